"""Write weights and biases of integer nodes as integers in front of DequantizeLinear.

    ŵ = s_w q_w     one scale for each output channel, or one for all
    b̂ = s_x s_w q_b     int32, s_x being the scale of the node's input

A tiny s_w of a nearly dead channel is raised until q_b fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Context
from onnxc.graph import fresh, store, values
from onnxc.integer import scales, weight_axis, weight_grid
from onnxc.numerics import fixed
from onnxc.numerics.affine import bias_guard, quantize
from onnxc.ops import knowledge, weight_of

Array = NDArray[Any]

BIAS_LIMIT = 2.0**31 - 1


@dataclass
class Constants:
    """Writes those of one graph. nodes: made so far, for the caller to put ahead of all others."""

    graph: gs.Graph
    context: Context
    bits: int = 8
    power_of_two: bool = False
    per_tensor: bool = False
    nodes: list[gs.Node] = field(default_factory=list)
    weights: dict[tuple[int, int | None, bytes], gs.Tensor] = field(default_factory=dict)

    def write(self, node: gs.Node, s_x: np.float32) -> Array:
        """Replace weight and bias of a node; the scales of its weight, (channels,) or ()."""
        scale = self._weight(node, s_x)
        self._bias(node, s_x, scale)
        return scale

    def _weight(self, node: gs.Node, s_x: np.float32) -> Array:
        weight, position = weight_of(node), knowledge(node).weight
        assert weight is not None and position is not None
        grid = weight_grid(self.context.target, self.bits)
        axis = None if self.per_tensor else weight_axis(node, self.context)
        array = values(weight)
        scale = self._guarded(node, s_x, scales(array, axis, grid, self.power_of_two))
        key = (id(weight), axis, scale.tobytes())
        if key not in self.weights:
            q = quantize(array, scale, 0, grid, axis)
            self.weights[key] = self._dequantized(weight.name, q, scale, axis)
        node.inputs[position] = self.weights[key]
        return scale

    def _guarded(self, node: gs.Node, s_x: np.float32, scale: Array) -> Array:
        """Scales of a weight raised until the bias fits its int32."""
        bias = _bias_of(node)
        if bias is None or not bias.size:
            return scale
        raised = bias_guard(bias if scale.ndim else np.abs(bias).max(), float(s_x), scale)
        return fixed.power_of_two(raised).astype(np.float32) if self.power_of_two else raised

    def _bias(self, node: gs.Node, s_x: np.float32, scale: Array) -> None:
        bias, position = _bias_of(node), knowledge(node).bias
        if bias is None or position is None:
            return
        s_b = (np.float64(s_x) * scale.astype(np.float64)).astype(np.float32)
        q = np.rint(bias / s_b.astype(np.float64))
        q = np.clip(q, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32)
        axis = 0 if s_b.ndim else None
        node.inputs[position] = self._dequantized(node.inputs[position].name, q, s_b, axis)

    def _dequantized(self, name: str, q: Array, scale: Array, axis: int | None) -> gs.Tensor:
        """q -> DQ; its output."""
        parts = {"quantized": q, "scale": scale}
        if q.dtype != np.int32:
            parts["zero_point"] = np.zeros(scale.shape, q.dtype)
        inputs = [store(self.graph, fresh(self.graph, f"{name}_{k}"), v) for k, v in parts.items()]
        out = gs.Variable(fresh(self.graph, f"{name}_dequantized"), np.float32, q.shape)
        attrs = {} if axis is None else {"axis": axis}
        node_name = fresh(self.graph, f"{name}_DequantizeLinear")
        self.nodes.append(gs.Node("DequantizeLinear", node_name, attrs, inputs, [out]))
        return out


def _bias_of(node: gs.Node) -> Array | None:
    position = knowledge(node).bias
    if position is None or position >= len(node.inputs) or not node.inputs[position].name:
        return None
    return values(node.inputs[position]).reshape(-1)
