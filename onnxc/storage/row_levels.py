"""How a graph holds a weight whose rows have few levels, each row its own: numbers and codes.

    weight = levels[row, unpack(codes)],      levels = t Bᵀ

in standard operators that ONNX Runtime computes when it loads the file. Codes are unpacked as those
of a codebook are (`onnxc.storage.codebooks`); Einsum makes levels of the numbers t of each row by
the pattern B that all have in common (`onnxc.numerics.levels`), and GatherElements looks them up.
Where B is the identity the numbers are the levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.graph import nbytes
from onnxc.numerics.levels import Discrete
from onnxc.numerics.packing import bits_for, layout
from onnxc.storage.codebooks import INT32, OVERHEAD, WIDEST, Books, least_opset

Array = NDArray[Any]

EINSUM_OPSET = 12
CHAIN = 240  # bytes of the nodes behind the codes, about


def needed_opset(bits: int) -> int:
    """The first opset whose operators make a weight of codes of so many bits."""
    return max(EINSUM_OPSET, least_opset(bits))


def row_bytes(pattern: Array, rows: int, d: int, itemsize: int) -> int:
    """Bytes that rows of d weights take in this form, nodes included."""
    bits = bits_for(len(pattern))
    chain = OVERHEAD[bits < WIDEST and not layout(bits).is_simple] + CHAIN
    numbers = rows * int(pattern.shape[1])
    return -(-rows * d * bits // 8) + numbers * itemsize + chain


@dataclass
class RowLevels(Books):
    """Writes weights of few levels for each row into one graph."""

    def put(self, tensor: gs.Constant, found: Discrete, is_turned: bool) -> int:
        """Let the nodes that read a weight read what numbers and codes make; bytes stored.

        is_turned: the rows of the matrix lie across the axes of the weight.
        """
        self.number += 1
        bits, axis = bits_for(len(found.pattern)), 1 if is_turned else 2
        codes = found.codes.swapaxes(1, 2) if is_turned else found.codes
        unpacked, kept = self._stored(codes, bits)
        nodes = [*unpacked, self._cast(unpacked[-1].outputs[0] if unpacked else kept, INT32)]
        if unpacked:
            nodes += self._reshape(codes.shape, nodes[-1].outputs[0], codes.size, bits)
        made, levels, numbers = self._levels(tensor, found, is_turned)
        inputs = [levels, nodes[-1].outputs[0]]
        nodes += [*made, self._node("GatherElements", inputs, axis=axis)]
        shape = self._numbers(tensor.shape)
        nodes.append(self._node("Reshape", [nodes[-1].outputs[0], shape]))
        self._replace(tensor, nodes)
        return nbytes(kept) + nbytes(numbers)

    def _levels(
        self, tensor: gs.Constant, found: Discrete, is_turned: bool
    ) -> tuple[list[gs.Node], gs.Tensor, gs.Constant]:
        """The nodes that make levels, those levels, and the numbers that are stored."""
        B, t = found.pattern, found.t
        is_identity = B.shape[0] == B.shape[1] and bool((np.eye(len(B)) == B).all())
        if is_identity or tensor.dtype != np.float32:
            table = found.levels.swapaxes(1, 2) if is_turned else found.levels
            kept = self._keep("levels", table.astype(tensor.dtype))
            return [], kept, kept
        shape = "x".join(map(str, B.shape))
        pattern = self._shared(f"pattern_{shape}", 0, B.astype(np.float32))
        kept = self._keep("numbers", t.astype(np.float32))
        equation = "grn,kn->gkr" if is_turned else "grn,kn->grk"
        node = self._node("Einsum", [kept, pattern], equation=equation)
        return [node], node.outputs[0], kept
