"""Which nodes of a graph can compute in integers on a target, on which grids, and why not others.

What the quantizing passes share: they must agree on nodes, axes and grids to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Context, Skip
from onnxc.graph import fresh, store, values
from onnxc.numerics import fixed
from onnxc.numerics.affine import Array, Grid, dequantize, quantize, weight_scales
from onnxc.numerics.lattice import lattice_scales
from onnxc.ops import (
    channels_of,
    groups,
    has_bias,
    is_constant,
    is_odd_bias,
    knowledge,
    weight_of,
)
from onnxc.targets import Target

OPSET = 10  # of QuantizeLinear and DequantizeLinear
AXIS_OPSET = 13  # from which on they take a scale for each channel


def weight_grid(target: Target, bits: int = 8) -> Grid:
    """Integers of a weight: symmetric without the lowest, 7 bits where kernels saturate."""
    return Grid(bits, signed=True, narrow=True, reduced=target.reduce_range and bits == 8)


def activation_grid(target: Target, bits: int = 8) -> Grid:
    """Integers of an activation."""
    return Grid(bits, signed=target.activations == "int8")


def weight_axis(node: gs.Node, context: Context) -> int | None:
    """Axis of the weight along which each channel has its own scale; None for one scale.

    A grouped ConvTranspose keeps its output channels on two axes, so it gets one scale.
    """
    row = knowledge(node)
    if not context.target.per_channel or context.opset < AXIS_OPSET or row.out_axis is None:
        return None
    return None if row.out_axis(node) != 0 and groups(node) > 1 else row.out_axis(node)


def scales(weight: Array, axis: int | None, grid: Grid, pow2: bool) -> Array:
    """Symmetric scales of a weight, powers of two or not; those it was rounded at, if it was."""
    if pow2:
        return fixed.weight_scales(weight, axis, grid)
    known = lattice_scales(weight, axis, grid.high)
    return weight_scales(weight, axis, grid) if known is None else known


def weighted_nodes(
    graph: gs.Graph, context: Context, ops: tuple[str, ...] = ()
) -> Iterator[gs.Node]:
    """Nodes with constant weights that this target computes in integers, in graph order.

    ops: only nodes of these operators; empty for all.
    """
    allowed = context.only.names(graph)
    nodes = (n for n in graph.nodes if n.name in allowed and (not ops or n.op in ops))
    return (n for n in nodes if context.opset >= OPSET and not refusal(n, context.target))


def round_weights(
    graph: gs.Graph,
    context: Context,
    ops: tuple[str, ...] = (),
    bits: int = 8,
    pow2: bool = False,
) -> None:
    """Move the weights of those nodes to the grids that integer kernels hold them on, in float.

    w <- s · round(w / s),   s = max|w| / q_max   for each output channel
    """
    made: dict[tuple[int, int | None], gs.Constant] = {}
    for node in weighted_nodes(graph, context, ops):
        weight, axis = weight_of(node), weight_axis(node, context)
        assert weight is not None
        if (id(weight), axis) not in made:
            on_grid = rounded(node, values(weight), context, bits, pow2)
            made[id(weight), axis] = store(graph, fresh(graph, f"{weight.name}_rounded"), on_grid)
        node.inputs[knowledge(node).weight] = made[id(weight), axis]


def rounded(node: gs.Node, weight: Array, context: Context, bits: int, pow2: bool) -> Array:
    """The weight of one of those nodes on its grid, in its own type."""
    grid, axis = weight_grid(context.target, bits), weight_axis(node, context)
    scale = scales(weight, axis, grid, pow2)
    on_grid = dequantize(quantize(weight, scale, 0, grid, axis), scale, 0, axis)
    return on_grid.astype(weight.dtype)


def refused_nodes(graph: gs.Graph, context: Context, ops: tuple[str, ...] = ()) -> Iterator[Skip]:
    """Heavy nodes that stay float, with the reason."""
    allowed = context.only.names(graph)
    for node in graph.nodes:
        if knowledge(node).role not in ("weighted", "recurrent"):
            continue
        reason = "excluded" if node.name not in allowed else refusal(node, context.target)
        if not reason and ops and node.op not in ops:
            reason = f"{node.op} is not asked for"
        if not reason and context.opset < OPSET:
            reason = f"Q/DQ need opset {OPSET}, and the model has {context.opset}"
        if reason:
            yield Skip(node.name, reason)


def refusal(node: gs.Node, target: Target) -> str:
    """Why a node cannot compute in integers between Q/DQ pairs on a target; empty if it can."""
    row = knowledge(node)
    if row.role != "weighted" or node.op not in target.static:
        return f"{node.op} has no integer kernel between Q/DQ on target {target.name}"
    weight = weight_of(node)
    if weight is None:
        return "its weight is not a constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype.name}"
    if node.inputs[0].dtype not in (None, np.float32):
        return "its input is not float32"
    if is_constant(node.inputs[0]):
        return "its input is a constant"
    if len(weight.shape) != 2 and row.float_output:
        return f"its weight has {len(weight.shape)} axes; kernels take 2"
    return _attribute_refusal(node)


def _attribute_refusal(node: gs.Node) -> str:
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "alpha or beta is not 1"
    if node.attrs.get("transA", 0):
        return "its input is transposed"
    if not has_bias(node):
        return ""
    bias = node.inputs[knowledge(node).bias]
    if not isinstance(bias, gs.Constant):
        return "its bias is computed"
    is_fit = values(bias).size == channels_of(node) and not is_odd_bias(node)
    return "" if is_fit else "its bias has another shape than the channels"
