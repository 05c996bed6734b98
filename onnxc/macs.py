"""Multiply-accumulates (MACs) of a node, from shapes.

    Conv            |Y| · |W| / M                 M: output channels, axis 0 of W
    ConvTranspose   |X| · |W| / C                 C: input channels, axis 0 of W
    Gemm, MatMul    |Y| · K                       K: the length that is summed over
    LSTM, GRU, RNN  steps · batch · (|W| + |R|)

|·| is the number of elements. A node whose shapes are unknown counts as unknown, never as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

Names = frozenset[str]


def macs(node: gs.Node, free: Names = frozenset()) -> int | None:
    """Multiply-accumulates of a node; 0 for an op without any, None where shapes are unknown.

    free: names of dimensions that count as 1.
    """
    rule = MACS.get(node.op)
    if rule is None:
        return 0
    try:
        return rule(node, free)
    except _UnknownShapeError:
        return None


class _UnknownShapeError(Exception):
    """A shape that a MAC rule needs is not known."""


def _dims(tensors: Sequence[gs.Tensor], index: int, free: Names) -> list[int]:
    shape = tensors[index].shape if index < len(tensors) else None
    if shape is None:
        raise _UnknownShapeError
    dims = [1 if d in free else d for d in shape]
    if not all(isinstance(d, int | np.integer) and d >= 0 for d in dims):
        raise _UnknownShapeError
    return [int(d) for d in dims]


Rule = Callable[[gs.Node, Names], int]


def _conv(weight: int) -> Rule:
    return lambda node, free: (
        prod(_dims(node.outputs, 0, free)) * prod(_dims(node.inputs, weight, free)[1:])
    )


def _conv_transpose(node: gs.Node, free: Names) -> int:
    return prod(_dims(node.inputs, 0, free)) * prod(_dims(node.inputs, 1, free)[1:])


def _product(node: gs.Node, free: Names) -> int:
    """Gemm and MatMul: A is input 0, and its last axis is summed over unless it is transposed."""
    axis = -2 if node.attrs.get("transA", 0) else -1
    return prod(_dims(node.outputs, 0, free)) * _dims(node.inputs, 0, free)[axis]


def _recurrent(node: gs.Node, free: Names) -> int:
    x, w, r = (_dims(node.inputs, i, free) for i in range(3))
    return prod(x[:-1]) * (prod(w) + prod(r))


MACS: dict[str, Rule] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger"), _conv(1)),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("Gemm", "FusedGemm", "QGemm"), _product),
    **dict.fromkeys(("MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger"), _product),
    **dict.fromkeys(("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), _product),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
}
