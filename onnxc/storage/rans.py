"""rANS (Duda 2013) by constriction's `AnsCoder`: rows of symbols, each row under its own law.

Long rows of few symbols are coded several at a time: one step of the coder takes a byte of two,
four or eight of them, whose law is the product of theirs. That is faster and costs nothing.

The format: words of 32 bits, little-endian, a state of 64 bits, laws of 24 bits precision made by
`Categorical(weights, perfect=False)`. Rows and symbols come out in the order in which they went in.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.errors import ModelError, OptionError
from onnxc.numerics import symbols

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

PIECE = 1 << 18  # steps at once: what they take stays small
LONG = 4096  # symbols of a row from which on several are coded in one step


def libraries() -> tuple[ModuleType, ModuleType]:
    """constriction and zstandard. Raises OptionError that names the extra to install."""
    try:
        import constriction
        import zstandard
    except ImportError as error:
        raise OptionError(
            'packed models need constriction and zstandard: pip install "onnxc[pack]"'
        ) from error
    return constriction, zstandard


def encode(rows: Bytes, low: int, weights: Array) -> bytes:
    """Symbols (rows, n) from `low` on, with weights (rows, k) for k symbols."""
    coder = libraries()[0].stream.stack.AnsCoder()
    bits = _bits(low, weights.shape[1], rows.shape[1])
    for row, w in zip(rows[::-1], weights[::-1], strict=True):
        law = _law(w, low, bits)
        steps = row - np.uint8(low) if bits == 8 else symbols.join_fields(row, bits, 0)
        for start in reversed(range(0, steps.size, PIECE)):
            coder.encode_reverse(steps[start : start + PIECE].astype(np.int32), law)
    payload: bytes = coder.get_compressed().astype("<u4").tobytes()
    return payload


def decode(payload: memoryview, shape: tuple[int, int], low: int, weights: Array) -> Bytes:
    """The symbols again. Raises ModelError where the payload is not of them."""
    if len(payload) % 4:
        raise ModelError("a stream in it is damaged")
    try:
        coder = libraries()[0].stream.stack.AnsCoder(np.frombuffer(payload, "<u4").astype("u4"))
    except ValueError as error:
        raise ModelError("a stream in it is damaged") from error
    rows = np.empty(shape, np.uint8)
    bits = _bits(low, weights.shape[1], shape[1])
    for row, w in zip(rows, weights, strict=True):
        law, size = _law(w, low, bits), PIECE * 8 // bits
        for start in range(0, row.size, size):
            piece = row[start : start + size]
            steps = coder.decode(law, piece.size * bits // 8)
            piece[:] = steps + low if bits == 8 else symbols.fields(steps.astype(np.uint8), bits)
    if not coder.is_empty():
        raise ModelError("a stream in it is longer than its tensor")
    return rows


def _bits(low: int, size: int, length: int) -> int:
    """Bits that a symbol takes of the byte that is coded in one step."""
    for bits in (1, 2, 4):
        if length >= LONG and low + size <= 1 << bits and length % (8 // bits) == 0:
            return bits
    return 8


def _law(w: Array, low: int, bits: int) -> Any:
    """constriction's model of what one step codes; whole numbers below 2⁵³ are exact in it."""
    law: Array = w.astype(np.float64)
    if bits < 8:
        one = np.zeros(1 << bits)
        one[low : low + w.size] = law / law.sum()
        law = one
        while law.size < 256:
            law = np.kron(one, law)  # the first symbol is in the low bits
    return libraries()[0].stream.model.Categorical(law, perfect=False)
