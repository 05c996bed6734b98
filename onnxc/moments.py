"""Which moments of its input the solvers for a heavy node need: the key, or why there is none.

Nodes that read one tensor in one way share a key, so that its moments are gathered once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Key
from onnxc.edit import values
from onnxc.ops import is_constant, knowledge, weight_of

Array = NDArray[Any]

WIDEST = 4608  # columns, √(groups) d, of which H is kept whole: a few copies of 8 bytes times d²
BLOCK = 1024  # columns of its blocks where there are more


def is_wide(groups: int, d: int) -> bool:
    """Whether H of so many groups of rows with d columns is too much to keep whole."""
    return groups * d * d > WIDEST**2


def moments_key(node: gs.Node, what: str = "moments") -> Key | None:
    """The key of the moments of a node's input; None where `why_no_moments` says why.

    what: "moments", or "goal" or "rows" for a key that is then given its goal.
    """
    row = knowledge(node)
    if row.x_axis is None or row.window is None or why_no_moments(node):
        return None
    return Key(node.inputs[row.data[0]].name, what, row.x_axis(node), window=row.window(node))


def why_no_moments(node: gs.Node) -> str:
    """Why the input of a node has no moments; empty if it has."""
    row = knowledge(node)
    if row.window is None:
        return f"{node.op} multiplies its input by no weight"
    weight = weight_of(node)
    if weight is None:
        return "its weight is not a constant of floats"
    if is_constant(node.inputs[row.data[0]]):
        return "its input is a constant"
    if row.role == "weighted" and row.float_output and len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} axes, so there is one matrix a sample"
    dtype = node.inputs[row.data[0]].dtype
    return "" if dtype in (None, np.float32, np.float16, np.float64) else f"its input is {dtype}"


def moments_keys(graph: gs.Graph) -> dict[str, Key]:
    """Keys of the heavy nodes of a graph, by node, in order; bodies of nodes are left out."""
    return dict(_pairs(graph))


def _pairs(graph: gs.Graph) -> Iterator[tuple[str, Key]]:
    for node in graph.nodes:
        key = moments_key(node)
        if key is not None:
            yield node.name, key


def matrix(node: gs.Node, weight: Array) -> Array:
    """The weight of a Conv, ConvTranspose, Gemm or MatMul as it multiplies the rows of its input.

    (groups, outputs, d); a transposed convolution has an output for each channel and kernel offset.
    """
    row = knowledge(node)
    assert row.window is not None and row.out_axis is not None
    groups = row.window(node).groups
    parts = weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
    return np.asarray(parts if row.out_axis(node) == 0 else parts.transpose(0, 2, 1))


def from_matrix(node: gs.Node, matrix: Array, shape: tuple[int, ...]) -> Array:
    """The weight of this shape that a matrix (groups, outputs, d) is of; undoes `matrix`."""
    row = knowledge(node)
    assert row.out_axis is not None
    parts = matrix if row.out_axis(node) == 0 else matrix.transpose(0, 2, 1)
    return np.ascontiguousarray(parts.reshape(shape))


def channel_powers(node: gs.Node, diagonal: Array) -> tuple[Array, Array]:
    """Of each channel of a heavy node's input: |W_j|² of its weights, and E[x_j²], (channels,).

    diagonal: E[x²] of the rows of its input, (groups, d), over the offsets of whose kernel the
    latter is the mean.
    """
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.window is not None
    offsets = math.prod(row.window(node).kernel)
    squares = np.square(matrix(node, values(weight)).astype(np.float64)).sum(axis=1)
    u = squares.reshape(len(squares), -1, offsets).sum(axis=2)
    m = diagonal.reshape(len(diagonal), -1, offsets).mean(axis=2)
    return u.reshape(-1), m.reshape(-1)


def mean_output(node: gs.Node, weight: Array, mean: Array) -> Array:
    """E[W x] for each output channel, where E[x] = mean, (groups, d).

    A transposed convolution adds at each position what one in ∏ strides of its kernel's offsets
    give, on average; what it crops at the border is not looked at.
    """
    row = knowledge(node)
    assert row.window is not None
    made = np.einsum("god,gd->go", matrix(node, weight), mean)
    if weight.ndim == 2 or row.window(node).kernel:
        return np.asarray(made.reshape(-1))
    offsets, strides = math.prod(weight.shape[2:]), node.attrs.get("strides", ())
    return np.asarray(made.reshape(-1, offsets).sum(axis=1) / math.prod(strides))
