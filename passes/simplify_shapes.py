"""Give Reshape and Expand constant shapes where only free dimensions keep them from it.

Exporters compute the shape of every Reshape at run time, Concat(Shape(x)[0], Shape(x)[1], 8, 64),
because the batch or the length is free. Once shapes are inferred with symbols, most are plain:

    Reshape     (B, T, 512) → (B, T, 8, 64)       [0, 0, 8, 64]      0 copies a dimension of x
                (B, 2, 4, T) → (B, 8, T)          [0, 8, -1]         at most one is left to be -1
    Expand      (B, 4, 1, T) → (B, 4, 2, T)       [1, 1, 2, 1]       1 keeps a dimension of x

The chains of Shape, Gather, Unsqueeze and Concat that nothing else reads go. In a small model they
cost as much as the products, and a constant shape lets ONNX Runtime fuse what is around it. ONNX
inference follows the values of such chains from opset 14 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constant, fresh, tidy

Dims = Sequence[int | str | None]

STANDARD = (None, "", "ai.onnx")


@register
@dataclass(frozen=True)
class SimplifyShapes:
    """Give Reshape and Expand constant shapes where only free dimensions keep them from it."""

    name: ClassVar[str] = "simplify-shapes"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        results: list[Change | Skip] = []
        for node in graph.nodes:
            if node.op not in RULES or node.domain not in STANDARD or len(node.inputs) < 2:
                continue
            if isinstance(node.inputs[1], gs.Constant):
                continue
            sizes = _sizes(node)
            if node.name not in allowed:
                results.append(Skip(node.name, "excluded"))
            elif sizes is None:
                results.append(Skip(node.name, "its shape is not known well enough"))
            else:
                name = fresh(graph, f"{node.inputs[1].name}_fixed")
                node.inputs[1] = constant(name, np.array(sizes, np.int64))
                results.append(Change(node.name, f"{node.op} to {sizes}", 0, 8 * len(sizes)))
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results


def _sizes(node: gs.Node) -> list[int] | None:
    """A constant shape operand that does the same, or None."""
    x, y = node.inputs[0].shape, node.outputs[0].shape
    if x is None or y is None or node.attrs.get("allowzero", 0) or 0 in (*x, *y):
        return None
    return RULES[node.op](list(x), list(y))


def _reshaped(x: Dims, y: Dims) -> list[int] | None:
    """Sizes, 0 where x has the same dimension in the same place, and at most one -1."""
    sizes = [
        size if isinstance(size, int) else 0 if size is not None and x[i : i + 1] == [size] else -1
        for i, size in enumerate(y)
    ]
    return sizes if sizes.count(-1) <= 1 else None


def _expanded(x: Dims, y: Dims) -> list[int] | None:
    """Sizes, 1 where x has the same dimension in the same place from behind."""
    padded = [1] * (len(y) - len(x)) + list(x)
    sizes = [1 if a == b and a is not None else b for a, b in zip(padded, y, strict=True)]
    return (
        [s for s in sizes if isinstance(s, int)] if all(isinstance(s, int) for s in sizes) else None
    )


RULES = {"Reshape": _reshaped, "Expand": _expanded}
