"""Layers that take the rows of a product for other samples than they come in, and back.

    x (…, c1 c2) → Reshape (-1, c2) → product → Reshape (-1, c1 r, o2) → Conv → Reshape (…, o1 o2)

The last layer is a product from the left, which a convolution of kernel 1 computes: all that knows
convolutions can work on it. The node becomes that convolution. Its bias, one for each of o1 o2, is
added behind; the tensor that it gave keeps its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.edit import constant, fresh
from onnxc.ops import knowledge, weight_of


def why_not(node: gs.Node) -> str:
    """Why the rows of a product cannot be taken apart; empty if they can."""
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        return "it multiplies its output or its bias by a factor"
    return "" if _leading(node) is not None else "more than one of its leading axes is not known"


def enter(graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """Let a product read its rows as they are, where it has them transposed."""
    if not node.attrs.pop("transA", 0):
        return []
    x = node.inputs[0]
    made = _node(graph, node, "Transpose", "rows", [x], {"perm": [1, 0]})
    node.inputs[0] = made.outputs[0]
    return [made]


def sample(
    graph: gs.Graph, node: gs.Node, x: gs.Tensor, sizes: Sequence[int], number: int
) -> gs.Node:
    """x as samples of these sizes, for the layer of a number."""
    return _reshape(graph, node, x, f"samples{number}", (-1, *sizes))


def leave(graph: gs.Graph, node: gs.Node, count: int) -> list[gs.Node]:
    """Make a product, the last of some layers, a convolution; what gives its output from it."""
    leading, weight, row = _leading(node), weight_of(node), knowledge(node)
    assert leading is not None and weight is not None and row.out_axis is not None
    channels, y = int(weight.shape[row.out_axis(node)]), node.outputs[0]
    bias = [t for t in node.inputs[2:] if t.name]
    part = gs.Variable(fresh(graph, f"{y.name}_factor{count}"), dtype=weight.dtype)
    made = [_reshape(graph, node, part, "joined", (*leading, channels))]
    if bias:
        made.append(_node(graph, node, "Add", "biased", [made[-1].outputs[0], *bias]))
    node.op, node.attrs = "Conv", {"kernel_shape": [1]}
    node.inputs, node.outputs = list(node.inputs[:2]), [part]
    made[-1].outputs = [y]
    return made


def rows(node: gs.Node) -> gs.Tensor:
    """What a node reads, before a product was taken for the samples of a convolution."""
    x = node.inputs[0]
    makers = [m for m in x.inputs if m.op == "Reshape" and not m.domain]
    return makers[0].inputs[0] if makers and taker(makers[0]) is node else x


def taker(reshape: gs.Node) -> gs.Node | None:
    """The convolution that multiplies a product from the left, behind a Reshape between them."""
    x, y = reshape.inputs[0], reshape.outputs[0]
    if reshape.op != "Reshape" or reshape.domain or len(x.inputs) != 1 or len(y.outputs) != 1:
        return None
    maker, reader = knowledge(x.inputs[0]), y.outputs[0]
    is_product = maker.window is not None and maker.float_output
    window = knowledge(reader).window
    if not is_product or window is None or weight_of(reader) is None:
        return None
    return reader if window(reader).kernel == (1,) else None


def _leading(node: gs.Node) -> list[int] | None:
    """The axes of the output before the last, -1 for one that is not known; None for several."""
    if knowledge(node).y_axis == 1:  # Gemm, which has two axes
        return [-1]
    x = node.inputs[0]
    if x.shape is None:
        return None
    found = [d if isinstance(d, int) and d > 0 else -1 for d in x.shape[:-1]]
    return found if found.count(-1) <= 1 else None


def _reshape(
    graph: gs.Graph, node: gs.Node, x: gs.Tensor, what: str, sizes: Sequence[int]
) -> gs.Node:
    shape = constant(fresh(graph, f"{node.name}_{what}_shape"), np.array(sizes, np.int64))
    return _node(graph, node, "Reshape", what, [x, shape])


def _node(
    graph: gs.Graph,
    node: gs.Node,
    op: str,
    what: str,
    inputs: Sequence[gs.Tensor],
    attrs: dict[str, Any] | None = None,
) -> gs.Node:
    """A node named after another one, and its output."""
    weight = weight_of(node)
    assert weight is not None
    y = gs.Variable(fresh(graph, f"{node.outputs[0].name}_{what}"), dtype=weight.dtype)
    return gs.Node(op, fresh(graph, f"{node.name}_{what}"), attrs or {}, list(inputs), [y])
