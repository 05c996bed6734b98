"""How a graph holds a weight of few shared vectors: books of integers, codes, and scales.

    weight = σ Σ_m c_m[unpack(codes_m)]

in standard operators that ONNX Runtime computes when it loads the file. Codes are unpacked as those
of single values are (`onnxc.storage.codebooks`); Gather then takes rows of a book:

    Gather, Cast (and Add, of several books), Reshape, Mul by σ

Where the rows of the matrix (groups, outputs, d) lie across the axes of the weight, Transpose puts
them right. Integers times a scale of half precision are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.graph import nbytes
from onnxc.numerics.packing import layout
from onnxc.numerics.subvectors import Vectors
from onnxc.numerics.vector_fit import Form
from onnxc.storage.codebooks import NIBBLE, NIBBLE_OPSET, OVERHEAD, WIDEST, Books

Array = NDArray[Any]

FLOAT = 1  # ONNX number of float32
NODE = 60  # bytes of a node in a file, about


def overhead(form: Form, is_turned: bool, opset: int) -> int:
    """Bytes of the nodes that make a weight of codes."""
    is_whole = form.bits == WIDEST or (form.bits == NIBBLE and opset >= NIBBLE_OPSET)
    codes = 2 * NODE if is_whole else OVERHEAD[not layout(form.bits).is_simple]
    if form.is_plain:
        return codes
    return form.books * (codes + 2 * NODE) + (2 + form.is_scaled + 2 * is_turned) * NODE


@dataclass
class Codewords(Books):
    """Writes weights on codewords into one graph."""

    def put(self, tensor: gs.Constant, found: Vectors, bits: int, is_turned: bool) -> int:
        """Let the nodes that read a weight read what books and codes make; bytes stored.

        is_turned: the rows of the matrix lie across the axes of the weight.
        """
        self.number += 1
        nodes, stored = self._summed(found, bits)
        view = _view(tensor, found, is_turned)
        if self.is_whole(bits):
            nodes.append(self._node("Reshape", [nodes[-1].outputs[0], self._numbers(view)]))
        else:
            count = found.codes[0].size
            nodes += self._reshape(view, nodes[-1].outputs[0], count, bits)
        scale = self._keep("scales", _scales(found.scale, view))
        nodes += self._multiplied(nodes[-1].outputs[0], scale)
        nodes += self._turned(nodes[-1].outputs[0], tensor) if is_turned else []
        if tensor.dtype != np.float32:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            nodes.append(self._cast(nodes[-1].outputs[0], kind))
        self._replace(tensor, nodes)
        return sum(map(nbytes, (*stored, scale)))

    def _summed(self, found: Vectors, bits: int) -> tuple[list[gs.Node], list[gs.Constant]]:
        """The nodes that make rows without their scales, and what is stored of them."""
        nodes: list[gs.Node] = []
        stored: list[gs.Constant] = []
        for book, codes in zip(found.books, found.codes, strict=True):
            kept = self._keep("book", book.astype(np.int8))
            picked, packed = self._picked(kept, codes, bits)
            cast = self._cast(picked[-1].outputs[0], FLOAT)
            before = [nodes[-1].outputs[0]] if nodes else []
            nodes += [*picked, cast]
            nodes += [self._node("Add", [*before, cast.outputs[0]])] if before else []
            stored += [kept, packed]
        return nodes, stored

    def _multiplied(self, x: gs.Tensor, scale: gs.Constant) -> list[gs.Node]:
        casts = [self._cast(scale, FLOAT)] if scale.dtype != np.float32 else []
        factor = casts[0].outputs[0] if casts else scale
        return [*casts, self._node("Mul", [x, factor])]

    def _turned(self, x: gs.Tensor, tensor: gs.Constant) -> list[gs.Node]:
        """Rows along the axes of the weight."""
        if len(tensor.shape) == 2:
            return [self._node("Transpose", [x], perm=[1, 0])]
        turned = self._node("Transpose", [x], perm=[0, 2, 1])
        shape = self._numbers(tensor.shape)
        return [turned, self._node("Reshape", [turned.outputs[0], shape])]


def _view(tensor: gs.Constant, found: Vectors, is_turned: bool) -> tuple[int, ...]:
    """The shape that rows are put together in: the weight's own, or that of the matrix."""
    if not is_turned:
        return tuple(map(int, tensor.shape))
    groups, outputs = found.scale.shape
    d = found.codes.shape[3] * found.length
    return (outputs, d) if len(tensor.shape) == 2 else (groups, outputs, d)


def _scales(scale: Array, view: tuple[int, ...]) -> Array:
    """Scales that broadcast over rows; one where all are the same; in half precision if exact."""
    half = scale.astype(np.float16)
    exact = half if (half.astype(np.float64) == scale).all() else scale.astype(np.float32)
    if (scale == scale.flat[0]).all():
        return np.array(scale.flat[0], np.float32)
    sizes = list(accumulate(view, mul))
    axes = sizes.index(scale.size) + 1  # which count the rows
    return exact.reshape(view[:axes] + (1,) * (len(view) - axes))
