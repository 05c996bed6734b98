"""Expand once what several nodes would broadcast slowly.

ONNX Runtime adds and multiplies in runs of consecutive values. Where an operand repeats along an
axis in the middle, as the rotary tables (1, T, 1, d) of attention against (B, T, H, d), a run is
only d long, and each costs about 12 ns. Measured in microseconds, T = 192, H = 8:

    d                       4     8    16    32    64
    Mul with broadcast     20    19    20    23    32
    Mul of equal shapes     6     6     7    10    18
    Expand                  8     8     8     8    11

So an operand with two readers or more, and runs of 2 to 64 values, is expanded once for all, with
the same values as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constant, fresh, insert

Dims = Sequence[int | str | None]
Reader = tuple[gs.Node, int]  # a node, and which of its inputs

ARITHMETIC = ("Add", "Sub", "Mul", "Div")
STANDARD = (None, "", "ai.onnx")
OPSET = 8  # of Expand


@register
@dataclass(frozen=True)
class ExpandBroadcasts:
    """Expand once what several nodes would broadcast slowly.

    readers: nodes that must read an operand to make it worth it.
    run: consecutive values, at most, below which a broadcast is slow.
    """

    readers: int = 2
    run: int = 64

    name: ClassVar[str] = "expand-broadcasts"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        results: list[Change | Skip] = []
        before: dict[str, list[gs.Node]] = {}
        for (_, sizes), readers in self._groups(graph).items():
            chosen = [reader for reader in readers if reader[0].name in allowed]
            results += [
                Skip(node.name, "excluded") for node, _ in readers if node.name not in allowed
            ]
            if context.opset < OPSET or len(chosen) < self.readers:
                why = f"fewer than {self.readers} nodes would share the expanded operand"
                results += [Skip(node.name, why) for node, _ in chosen]
                continue
            wide = _expand(graph, chosen, sizes)
            before.setdefault(chosen[0][0].name, []).append(wide)
            results += [Change(node.name, f"reads {wide.name}") for node, _ in chosen]
        insert(graph, before=before)
        return results

    def _groups(self, graph: gs.Graph) -> dict[tuple[str, tuple[int, ...]], list[Reader]]:
        """Readers of each operand that is broadcast slowly, by its name and how it is expanded."""
        groups: dict[tuple[str, tuple[int, ...]], list[Reader]] = {}
        for node in graph.nodes:
            if node.op not in ARITHMETIC or node.domain not in STANDARD:
                continue
            for index, operand in enumerate(node.inputs):
                sizes = self._sizes(operand.shape, node.inputs[1 - index].shape)
                if sizes is not None:
                    groups.setdefault((operand.name, sizes), []).append((node, index))
        return groups

    def _sizes(self, operand: Dims | None, other: Dims | None) -> tuple[int, ...] | None:
        """The shape that Expand gives an operand so that only leading axes repeat, or None."""
        if operand is None or other is None or len(operand) > len(other):
            return None
        dims = [1] * (len(other) - len(operand)) + list(operand)
        repeated = [i for i, (a, b) in enumerate(zip(dims, other, strict=True)) if a == 1 != b]
        inside = [i for i in repeated if any(d != 1 for d in dims[:i])]
        if not inside or not all(isinstance(other[i], int) for i in inside):
            return None
        tail = range(inside[-1] + 1, len(other))
        sizes = [next((d for d in (dims[i], other[i]) if isinstance(d, int)), 0) for i in tail]
        if not 2 <= prod(sizes) <= self.run:
            return None
        return tuple(int(other[i] or 1) if i in inside else 1 for i in range(len(other)))


def _expand(graph: gs.Graph, readers: Sequence[Reader], sizes: tuple[int, ...]) -> gs.Node:
    """An Expand that the readers read from now on."""
    node, index = readers[0]
    narrow = node.inputs[index]
    shape = constant(fresh(graph, f"{narrow.name}_sizes"), np.array(sizes, np.int64))
    wide = gs.Variable(fresh(graph, f"{narrow.name}_wide"), narrow.dtype)
    for node, index in readers:
        node.inputs[index] = wide
    return gs.Node("Expand", fresh(graph, f"{narrow.name}/Expand"), {}, [narrow, shape], [wide])
