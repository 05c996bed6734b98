"""Where the bytes of a model file are: in which layer, of which type, before and after.

A constant belongs to the first node that reads it and computes: nodes that follow from constants
alone, such as a DequantizeLinear or a Reshape of a weight, hand it on. What several nodes read
counts once. The rest is what no layer holds: the graph itself, names, scales of activations, small
constants. So the layers, the rest and what packing saves add up to the file:

    Σ bytes of layers + rest − saved = bytes of the file
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxc.cost import bytes_by_type
from onnxc.graph import Model, nbytes, size, walk

LEAST = 0.005  # of the bytes of the larger file: layers with less are in the rest


@dataclass(frozen=True)
class Layer:
    """Bytes of the constants of a layer; 0 where a model does not have it."""

    node: str
    op: str
    before: int
    after: int


@dataclass(frozen=True)
class Anatomy:
    """Two model files, byte by byte. Pairs are (before, after).

    layers: in the order of the graph. types: bytes of all constants by element type. rest: what is
    in no layer. saved: what packing saves.
    """

    layers: tuple[Layer, ...]
    types: dict[str, tuple[int, int]]
    rest: tuple[int, int]
    saved: tuple[int, int] = (0, 0)

    @property
    def files(self) -> tuple[int, int]:
        """Bytes of both files."""
        before, after = (self._file(side) for side in (0, 1))
        return before, after

    def _file(self, side: int) -> int:
        held = sum((layer.before, layer.after)[side] for layer in self.layers)
        return held + self.rest[side] - self.saved[side]


def anatomy(
    models: tuple[Model, Model], files: tuple[int, int], packed: tuple[bool, bool] = (False, False)
) -> Anatomy:
    """Compare two models layer by layer.

    files: bytes of the files that they are in. packed: whether these are packages.
    """
    first, second = (layer_bytes(model) for model in models)
    ops = {**_ops(models[1]), **_ops(models[0])}
    second = _renamed(second, first)
    least = LEAST * max(files)
    layers = tuple(
        Layer(name, ops.get(name, ""), first[name], second[name])
        for name in dict.fromkeys((*first, *second))
        if max(first[name], second[name]) >= least
    )
    trio = zip(files, models, packed, strict=True)
    plain = [max(file, size(model)) if is_packed else file for file, model, is_packed in trio]
    held = (sum(x.before for x in layers), sum(x.after for x in layers))
    kinds = [bytes_by_type(model.graph) for model in models]
    return Anatomy(
        layers,
        {name: (kinds[0].get(name, 0), kinds[1].get(name, 0)) for name in {**kinds[0], **kinds[1]}},
        (plain[0] - held[0], plain[1] - held[1]),
        (plain[0] - files[0], plain[1] - files[1]),
    )


def layer_bytes(model: Model) -> Counter[str]:
    """Bytes of the constants of each node that computes, nested bodies included, in order."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for graph in walk(model.graph):
        fixed = _fixed(graph)
        for node in (n for n in graph.nodes if id(n) not in fixed):
            held = sum(map(nbytes, _own(node, fixed, seen)))
            if held:
                found[node.name] += held
    return found


def _fixed(graph: gs.Graph) -> set[int]:
    """Nodes that follow from constants alone."""
    found: set[int] = set()
    for node in graph.nodes:
        makers = [t.inputs[0] if t.inputs else None for t in node.inputs]
        are_known = [
            isinstance(t, gs.Constant) or not t.name or (m is not None and id(m) in found)
            for t, m in zip(node.inputs, makers, strict=True)
        ]
        if node.inputs and all(are_known):
            found.add(id(node))
    return found


def _own(node: gs.Node, fixed: set[int], seen: set[int]) -> Iterator[gs.Constant]:
    """The constants that a node reads, through nodes that follow from constants; each once."""
    waiting = list(node.inputs)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        if isinstance(tensor, gs.Constant):
            seen.add(id(tensor))
            yield tensor
        elif tensor.inputs and id(tensor.inputs[0]) in fixed:
            seen.add(id(tensor))
            waiting.extend(tensor.inputs[0].inputs)


def _renamed(found: Mapping[str, int], known: Mapping[str, int]) -> Counter[str]:
    """Bytes under the names of another model: what a layer was split into goes to it.

    Parts are known by their names: that of the layer, with something behind it.
    """
    names = sorted(filter(None, known), key=len, reverse=True)
    total: Counter[str] = Counter()
    for name, count in found.items():
        whole = (n for n in names if name.startswith(f"{n}_"))
        total[name if name in known else next(whole, name)] += count
    return total


def _ops(model: Model) -> dict[str, str]:
    return {node.name: node.op for graph in walk(model.graph) for node in graph.nodes}
