"""Islands of integer nodes in a float graph, and which of them may cost more than they gain.

Every value that crosses between float and integers is quantized or dequantized, about as much work
as BREAK_EVEN multiply-accumulates save by running in integers. An island whose heavy nodes do fewer
of them for each value at its border is a suspect; the search then measures the model without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs

from onnxc.core import Context
from onnxc.cost import free_dimensions
from onnxc.macs import macs
from onnxc.ops import data_inputs, knowledge
from onnxc.placement import behind_activation, place

BREAK_EVEN = 50  # MACs for each value at the border: where a suspect begins, not where it is guilty


@dataclass(frozen=True)
class Island:
    """Heavy nodes that hand integers to each other, their MACs, and the values at the border."""

    nodes: tuple[str, ...]
    macs: int
    border: int

    @property
    def is_suspect(self) -> bool:
        return self.macs < BREAK_EVEN * self.border


def suspects(graph: gs.Graph, context: Context) -> tuple[str, ...]:
    """Heavy nodes of islands that may not be worth their Q/DQ; empty when that would be all."""
    found = list(islands(graph, context))
    doubtful = [island for island in found if island.is_suspect]
    return tuple(n for i in doubtful for n in i.nodes) if len(doubtful) < len(found) else ()


def islands(graph: gs.Graph, context: Context) -> Iterator[Island]:
    """The islands of a graph as `Quantize` would place them, in graph order."""
    placement, free = place(graph, context), free_dimensions(graph)
    parent = {id(node): id(node) for node in placement.integer}

    def find(key: int) -> int:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for node in placement.integer:
        for tensor in data_inputs(node):
            maker = _integer_maker(tensor, parent)
            if maker is not None:
                parent[find(id(node))] = find(maker)
    members: dict[int, list[gs.Node]] = {}
    for node in placement.integer:
        members.setdefault(find(id(node)), []).append(node)
    for nodes in members.values():
        heavy = [node for node in nodes if knowledge(node).role == "weighted"]
        border = _border(nodes, parent)
        yield Island(tuple(n.name for n in heavy), sum(macs(n, free) or 0 for n in heavy), border)


def _integer_maker(tensor: gs.Tensor, integer: dict[int, int]) -> int | None:
    """The integer node that makes a tensor, behind the activation that it absorbs; or None."""
    while tensor.inputs and knowledge(tensor.inputs[0]).role == "activation":
        tensor = tensor.inputs[0].inputs[0]
    maker = id(tensor.inputs[0]) if tensor.inputs else None
    return maker if maker in integer else None


def _border(nodes: list[gs.Node], integer: dict[int, int]) -> int:
    """Values of the tensors that enter the island as float or leave it to float readers."""
    crossing: dict[str, gs.Tensor] = {}
    for node in nodes:
        crossing |= {t.name: t for t in data_inputs(node) if _integer_maker(t, integer) is None}
        for output in node.outputs:
            held = behind_activation(output, set())
            if not held.outputs or any(id(reader) not in integer for reader in held.outputs):
                crossing[held.name] = held
    return sum(_size(tensor) for tensor in crossing.values())


def _size(tensor: gs.Tensor) -> int:
    shape = tensor.shape or ()
    return prod(d if isinstance(d, int) else 1 for d in shape)
