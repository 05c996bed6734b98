"""Round the weights of heavy nodes to the grid that an integer kernel will hold them on.

    w <- s · round(w / s),   s = max|w| / q_max   for each output channel

The weights stay float here; the pass that writes integers finds the same scale again, because the
largest weight of a channel lies on the grid. In between, `CorrectBias` sees what rounding alone did.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constant, fresh, nbytes, values
from onnxc.numerics.affine import dequantize, quantize, weight_scales
from onnxc.integer import weight_axis, weight_grid, weighted_nodes
from onnxc.ops import knowledge, weight_of


@register
@dataclass(frozen=True)
class RoundWeights:
    """Round weights to 8-bit grids without changing their type.

    power_of_two: scales are powers of two, for fixed point.
    """

    name: ClassVar[str] = "round-weights"
    lossless: ClassVar[bool] = False

    bits: int = 8
    power_of_two: bool = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        grid = weight_grid(context.target, self.bits)
        rounded: dict[tuple[int, int | None], gs.Constant] = {}
        results: list[Change | Skip] = []
        for node in weighted_nodes(graph, context):
            weight, axis = weight_of(node), weight_axis(node, context.target)
            assert weight is not None
            if (id(weight), axis) not in rounded:
                array = values(weight)
                scale = weight_scales(array, axis, grid, pow2=self.power_of_two)
                q = quantize(array, scale, 0, grid, axis)
                on_grid = dequantize(q, scale, 0, axis).astype(array.dtype)
                name = fresh(graph, f"{weight.name}_rounded")
                rounded[id(weight), axis] = constant(name, on_grid)
            new = rounded[id(weight), axis]
            node.inputs[knowledge(node).weight] = new
            results.append(Change(node.name, "weights rounded", nbytes(weight), nbytes(new)))
        return results
