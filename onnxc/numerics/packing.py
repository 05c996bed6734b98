"""Codes of 1 to 8 bits, packed without gaps.

Code j takes the bits [b j, b j + b) of a stream, the first bit of a byte being its highest. With
b ≤ 7 a code lies in one byte or in two that follow each other, at the offset o = b j mod 8:

    code = ((byte << o) | (next >> (8 − o))) >> (8 − b)        in bytes

so that 8 / b codes of one byte, or 8 codes of b bytes, are unpacked by the same shifts everywhere.
Where o is 0, `next` is shifted by 7 in place of 8: its one bit goes with the last shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.integer]


@dataclass(frozen=True)
class Layout:
    """Of codes of b bits. size: bytes of a group; count: codes of it; first, second: of each code,
    the bytes that it lies in; left, right: what these are shifted by; down: what is shifted last.
    """

    size: int
    count: int
    first: NDArray[np.int32]
    second: NDArray[np.int32]
    left: Bytes
    right: Bytes
    down: int

    @property
    def is_simple(self) -> bool:
        """Whether each group is one byte."""
        return self.size == 1


def layout(bits: int) -> Layout:
    """Where codes of 1 to 7 bits lie."""
    count = 8 // bits if 8 % bits == 0 else 8
    size = bits * count // 8
    begin = bits * np.arange(count)
    first, offset = begin // 8, begin % 8
    second = np.minimum(first + 1, size - 1)
    left, right = offset.astype(np.uint8), np.minimum(8 - offset, 7).astype(np.uint8)
    return Layout(
        size, count, first.astype(np.int32), second.astype(np.int32), left, right, 8 - bits
    )


def pack(codes: Codes, bits: int) -> Bytes:
    """Codes of any shape below 2^bits as bytes (groups, size), filled up with zeros."""
    place = layout(bits)
    flat = codes.reshape(-1).astype(np.uint8)
    filled = np.pad(flat, (0, -len(flat) % place.count))
    stream = np.unpackbits(filled[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(stream.reshape(-1)).reshape(-1, place.size)


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of what `pack` made, by the shifts of the module's docstring."""
    place = layout(bits)
    found = packed[:, place.first] << place.left
    if not place.is_simple:
        found |= packed[:, place.second] >> place.right
    return np.asarray((found >> np.uint8(place.down)).reshape(-1)[:count], np.uint8)


def bits_for(count: int) -> int:
    """The least bits that tell so many values apart."""
    return max(1, (count - 1).bit_length())
