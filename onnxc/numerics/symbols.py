"""Bytes of tensors as streams of symbols, and back: planes, codebooks, packed bits, masks.

    planes    a w-byte element u gives w streams of bytes. Floats are rotated first, by one bit to
              the left: that puts the exponent in the top byte, and the sign below the mantissa.
    book      elements with at most 256 values v_0 < v_1 < … give indices i with v[i] = u
    fields    bytes give fields of b bits, the low bits or the high bits first
    mask      elements that are not zero give a bit 1, and follow without the zeros

Elements are unsigned, little-endian. What is split joins again to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

MOST = 256  # values of a codebook
CHUNK = 1 << 16  # elements that stay in the cache
PROBES = 4096  # elements looked at before all are
_HASHED = 16  # bits of a hash
_TRIES = 64  # factors, of which each is free of collisions with probability 0.6


def elements(data: Bytes, width: int) -> Array:
    """Bytes as unsigned elements of 1, 2, 4 or 8 bytes."""
    return data.view(np.dtype(f"<u{width}"))


def split_planes(data: Bytes, width: int, rotate: bool) -> list[Bytes]:
    """The bytes of all elements by their significance, the lowest first."""
    if rotate:
        u = elements(data, width)
        data = ((u << 1) | (u >> (8 * width - 1))).astype(u.dtype).view(np.uint8)
    grid = data.reshape(-1, width)
    return [np.ascontiguousarray(grid[:, i]) for i in range(width)]


def join_planes(planes: Sequence[Bytes], rotate: bool) -> Bytes:
    """The inverse of `split_planes`."""
    width = len(planes)
    grid = np.empty((len(planes[0]), width), np.uint8)
    for i, plane in enumerate(planes):
        grid[:, i] = plane
    flat = grid.reshape(-1)
    if not rotate:
        return flat
    u = elements(flat, width)
    return ((u >> 1) | (u << (8 * width - 1))).astype(u.dtype).view(np.uint8)


def find_book(u: Array) -> tuple[Array, Bytes] | None:
    """The sorted values of elements and their indices; None where they are more than 256."""
    book = np.unique(u[:: max(u.size // PROBES, 1)])
    if book.size > MOST:
        return None
    indices = np.empty(u.size, np.uint8)
    look = _lookup(book)
    for start in range(0, u.size, CHUNK):
        part = u[start : start + CHUNK]
        found = look(part)
        is_strange = book.take(found, mode="clip") != part
        if is_strange.any():
            strange = part[is_strange]
            grown = np.union1d(book, strange)
            if grown.size > MOST:
                return None
            moved = np.searchsorted(grown, book).astype(np.uint8)
            indices[:start] = moved[indices[:start]]
            book, look = grown, _lookup(grown)
            found = look(part)
        indices[start : start + CHUNK] = found
    return book, indices


def _lookup(book: Array) -> Callable[[Array], Bytes]:
    """Elements to indices: right for those in the book, whatever for others."""
    kind = book.dtype
    place = np.dtype(np.int64) if kind.itemsize == 8 else kind  # NumPy 1 takes no uint64
    shift = kind.type(max(8 * kind.itemsize - _HASHED, 0))
    factors = np.random.default_rng(0).integers(1, 2**63, _TRIES, np.uint64) | np.uint64(1)
    table = np.zeros(1 << _HASHED, np.uint8)
    for factor in factors.astype(kind):
        places = (book * factor) >> shift
        if np.unique(places).size == book.size:
            table[places] = np.arange(book.size, dtype=np.uint8)
            return lambda part: table.take(
                ((part * factor) >> shift).view(place), mode="clip"
            )  # in range
    return lambda part: np.minimum(np.searchsorted(book, part), book.size - 1).astype(np.uint8)


def fields(data: Bytes, bits: int, high_first: bool = False) -> Bytes:
    """All whole fields of so many bits, 1 to 7; what is left at the end is in no field."""
    if 8 % bits == 0:
        table = _split_table(bits, high_first)
        return table.take(data, mode="clip").view(np.uint8)
    groups = -(-data.size // bits)
    grid = np.zeros((groups, 8), np.uint8)
    grid[:, :bits] = np.pad(data, (0, groups * bits - data.size)).reshape(-1, bits)
    whole = grid.view(">u8" if high_first else "<u8").reshape(-1).astype(np.uint64)
    symbols = np.empty((groups, 8), np.uint8)
    for column, place in enumerate(_places(bits, high_first)):
        symbols[:, column] = (whole >> place) & np.uint64((1 << bits) - 1)
    return symbols.reshape(-1)[: data.size * 8 // bits]


def _places(bits: int, high_first: bool) -> Array:
    """How far up each of eight fields begins in a word of eight bytes, in the order of reading."""
    k = np.arange(8, dtype=np.uint64)
    return (
        np.uint64(64) - np.uint64(bits) * (k + np.uint64(1)) if high_first else np.uint64(bits) * k
    )


def join_fields(symbols: Bytes, bits: int, size: int, high_first: bool = False) -> Bytes:
    """So many bytes of fields; bits that no field gives are 0. Fields that fill bytes give all."""
    if 8 % bits == 0:
        grid = symbols.reshape(-1, 8 // bits)
        places = range(0, 8, bits)
        data = np.zeros(len(grid), np.uint8)
        for column, place in enumerate(reversed(places) if high_first else places):
            data |= grid[:, column] << np.uint8(place)
        return data
    groups = -(-symbols.size // 8)
    grid = np.pad(symbols, (0, 8 * groups - symbols.size)).reshape(-1, 8)
    whole = np.zeros(groups, np.uint64)
    for column, place in enumerate(_places(bits, high_first)):
        whole |= grid[:, column].astype(np.uint64) << place
    packed = whole.astype(">u8" if high_first else "<u8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(packed[:, :bits]).reshape(-1)[:size]


def _split_table(bits: int, high_first: bool) -> Bytes:
    """The fields of each byte, side by side in one element."""
    places = np.arange(0, 8, bits, dtype=np.uint8)[:: -1 if high_first else 1]
    split = (np.arange(256, dtype=np.uint8)[:, None] >> places) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(split).view(f"u{8 // bits}").reshape(-1)


def split_zeros(u: Array) -> tuple[Bytes, Array]:
    """A mask of one bit an element, the lowest bit first, and the elements that are not zero."""
    is_kept = u != 0
    return np.packbits(is_kept, bitorder="little"), u[is_kept]


def join_zeros(mask: Bytes, kept: Array, count: int) -> Array:
    """The inverse of `split_zeros` for so many elements; the mask has as many bits as `kept`."""
    u = np.zeros(count, kept.dtype)
    u[np.unpackbits(mask, count=count, bitorder="little").view(bool)] = kept
    return u
