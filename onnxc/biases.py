"""The bias of a heavy node: whether it takes one, and how to move it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.edit import constant, fresh, nbytes, values
from onnxc.ops import is_constant, knowledge, weight_of


def has_place(node: gs.Node) -> bool:
    """Whether the operator takes a bias, and the bias is a constant or absent."""
    position = knowledge(node).bias
    if position is None:
        return False
    given = _given(node, position)
    return given is None or is_constant(given)


def bias_of(node: gs.Node) -> NDArray[np.float64]:
    """One number an output channel; zeros where a node has none. For nodes with a constant one."""
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.out_axis is not None
    count = int(weight.shape[row.out_axis(node)])
    given = None if row.bias is None else _given(node, row.bias)
    found = np.zeros(1) if given is None else values(given).astype(np.float64)
    return np.broadcast_to(found.reshape(-1), count)


def shift_bias(
    graph: gs.Graph, node: gs.Node, shift: NDArray[Any], suffix: str
) -> tuple[int, int] | None:
    """Add a shift, one number an output channel, to the bias of a node that has a place for it.

    Returns the bytes of the bias before and after; None where it has another shape than the
    channels, and stays.
    """
    position, weight = knowledge(node).bias, weight_of(node)
    assert position is not None and weight is not None
    old = _given(node, position)
    bias = np.zeros(len(shift), weight.dtype) if old is None else values(old)
    try:
        new = (bias + shift.reshape([1] * (bias.ndim - 1) + [-1])).astype(bias.dtype)
    except ValueError:
        return None
    stem = f"{node.name}_bias" if old is None else old.name
    made = constant(fresh(graph, f"{stem}_{suffix}"), new)
    if position < len(node.inputs):
        node.inputs[position] = made
    else:
        node.inputs.append(made)
    return (0 if old is None else nbytes(old)), new.nbytes


def _given(node: gs.Node, position: int) -> gs.Tensor | None:
    """The bias that a node has, or None."""
    tensor = node.inputs[position] if position < len(node.inputs) else None
    return tensor if tensor is not None and tensor.name else None
