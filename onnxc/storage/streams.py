"""The bytes of a tensor in the form that codes best: which streams of symbols they become.

    bytes     as they are
    planes    one stream for each byte of an element; the exponents of floats are in one of them
    book      few values: a codebook and indices
    fields    bytes that hold packed indices of 1 to 6 bits: one symbol for each index
    zeros     a mask, and the elements that are not zero, in a form of their own

A form is a head and a payload, as in `onnxc.storage.coders`: the number of the form, what it needs
to know, then its streams. Forms that are in question are coded, and the smallest is kept.
zstandard's highest level on the bytes as they are is always in question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.errors import ModelError
from onnxc.numerics import symbols
from onnxc.storage import coders
from onnxc.storage.coders import Coded, Head, numbers

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

BYTES, PLANES, BOOK, FIELDS, ZEROS = range(5)
NAMES = ("bytes", "byte planes", "codebook", "bit fields", "zeros apart")
WIDTHS = (1, 2, 4, 8)  # bytes of elements
EVEN, ODD = (8, 4, 2, 1), (3, 5, 6)  # bits of fields that fill bytes, and that do not
MANY = 0.25  # share of zeros from which on they may be told apart
_TRIED = 15 << 8  # bytes on which odd fields are tried; whole periods of all of them
_WORTH = 0.97  # of the size that odd fields must stay below there
_DEEPEST = 2  # a form inside a form


@dataclass(frozen=True)
class Kind:
    """width: bytes of an element. channels: rows of equal length, 1 if there are none."""

    width: int = 1
    is_float: bool = False
    channels: int = 1


def encode(data: Bytes, kind: Kind = Kind(), thorough: bool = False) -> tuple[Coded, str]:
    """The bytes of a tensor, coded, and in words how."""
    is_whole = data.size % kind.width == 0
    kind = kind if is_whole else Kind()
    forms = _of_bytes if kind.width == 1 else _of_elements
    coded, label = forms(data, kind, thorough)
    if coded.size >= data.size:
        return _bytes(coders.stored(data))
    if data.size <= coders.EXPANSION * coded.size:
        return coded, label
    return _bytes(coders.zstd(data))  # a reader takes more for a trap


def decode(head: Head, payload: memoryview, size: int, depth: int = 1) -> tuple[Bytes, int]:
    """So many bytes of a tensor, and how many of the payload they took. Raises ModelError."""
    form = head.number()
    if form == BYTES:
        return coders.decode(head, payload, size)
    if form == FIELDS:
        return _from_fields(head, payload, size)
    width = head.number()
    if form >= len(NAMES) or width not in WIDTHS or size % width or depth > _DEEPEST:
        raise ModelError("a tensor in it is of an unknown form")
    if form == PLANES:
        return _from_planes(head, payload, size, width)
    if form == BOOK:
        return _from_book(head, payload, size, width)
    return _from_zeros(head, payload, size, width, depth)


def _smallest(forms: Iterable[tuple[Coded, str]]) -> tuple[Coded, str]:
    return min(forms, key=lambda form: form[0].size)


def _of_elements(data: Bytes, kind: Kind, thorough: bool) -> tuple[Coded, str]:
    """The best form of elements of several bytes."""
    u = symbols.elements(data, kind.width)
    is_all = thorough or data.size <= coders.SMALL
    has_zeros = np.count_nonzero(u) < (1 - MANY) * u.size
    book = symbols.find_book(u) if u.size else None
    forms = [] if book is None else [_book(*book, kind, thorough)]
    if has_zeros:
        forms.append(_zeros(u, kind, thorough))
    if is_all or not forms:
        forms.append(_planes(data, kind, thorough))
    if is_all or book is None:
        forms += _general(data, _smallest(forms)[0].size, thorough)
    return _smallest(forms)


def _of_bytes(data: Bytes, kind: Kind, thorough: bool) -> tuple[Coded, str]:
    """The best form of single bytes, which may hold packed indices."""
    counts = coders.histograms(data, kind.channels)
    forms = [_bytes(coders.stored(data))]
    limit, bits, model = 8 * coders.GAIN * data.size, 0, None
    for width in EVEN:
        found = coders.model_of(_counts_of_fields(counts, width), limit)
        if found is not None:
            limit, bits, model = found.bits, width, found
    if model is not None:
        stream = coders.rans(symbols.fields(data, bits) if bits < 8 else data, model)
        forms = [_fields(stream, bits) if bits < 8 else _bytes(stream)]
    forms += [_odd(data, *fields) for fields in _odd_fields(data, limit)]
    if counts[:, 0].sum() > MANY * data.size:
        forms.append(_zeros(data, kind, thorough))
    return _smallest([*forms, *_general(data, _smallest(forms)[0].size, thorough)])


def _general(data: Bytes, least: int, thorough: bool) -> list[tuple[Coded, str]]:
    found = coders.general(data, least, thorough)
    return [] if found is None else [_bytes(found)]


def _bytes(stream: Coded) -> tuple[Coded, str]:
    return _joined(BYTES, b"", [stream])


def _joined(form: int, told: bytes, streams: list[Coded]) -> tuple[Coded, str]:
    """Streams behind what a form needs to know; the name tells the coder of most that is coded."""
    head = numbers(form) + told + b"".join(stream.head for stream in streams)
    most = max(streams, key=lambda stream: (stream.head[0] != coders.RAW, len(stream.payload)))
    coder = coders.NAMES[most.head[0]]
    return Coded(head, b"".join(s.payload for s in streams)), f"{NAMES[form]}, {coder}"


def _planes(data: Bytes, kind: Kind, thorough: bool) -> tuple[Coded, str]:
    planes = symbols.split_planes(data, kind.width, kind.is_float)
    streams = [coders.encode(plane, kind.channels, thorough) for plane in planes]
    return _joined(PLANES, numbers(kind.width, kind.is_float), streams)


def _from_planes(head: Head, payload: memoryview, size: int, width: int) -> tuple[Bytes, int]:
    rotate, at, planes = bool(head.number()), 0, []
    for _ in range(width):
        plane, length = coders.decode(head, payload[at:], size // width)
        planes.append(plane)
        at += length
    return symbols.join_planes(planes, rotate), at


def _book(book: Array, indices: Bytes, kind: Kind, thorough: bool) -> tuple[Coded, str]:
    stream = coders.encode(indices, kind.channels, thorough)
    return _joined(BOOK, numbers(kind.width, book.size - 1) + book.tobytes(), [stream])


def _from_book(head: Head, payload: memoryview, size: int, width: int) -> tuple[Bytes, int]:
    count = head.number() + 1
    book = np.frombuffer(head.bytes(count * width), f"<u{width}")
    indices, length = coders.decode(head, payload, size // width)
    if count > symbols.MOST or (indices.size and int(indices.max()) >= count):
        raise ModelError("a codebook in it is too small for its indices")
    return book.take(indices, mode="clip").view(np.uint8), length


def _fields(stream: Coded, bits: int, high_first: bool = False, tail: int = 0) -> tuple[Coded, str]:
    return _joined(FIELDS, numbers(bits, high_first, tail), [stream])


def _odd_fields(data: Bytes, best: float) -> Iterator[tuple[int, bool]]:
    """Bits and order of fields that seem to be below `best` bits, judged by a part."""
    part = data[:_TRIED]
    limit = _WORTH * best * part.size / max(data.size, 1)
    for bits in ODD:
        for high_first in (False, True):
            counts = coders.histograms(symbols.fields(part, bits, high_first))
            if coders.model_of(counts[:, : 1 << bits], limit) is not None:
                yield bits, high_first


def _odd(data: Bytes, bits: int, high_first: bool) -> tuple[Coded, str]:
    found = symbols.fields(data, bits, high_first)
    return _fields(coders.encode(found), bits, high_first, int(data[-1]))


def _counts_of_fields(counts: Array, bits: int) -> Array:
    """Histograms of fields from those of the bytes that hold them."""
    if bits == 8:
        return counts
    inside = symbols.fields(np.arange(256, dtype=np.uint8), bits).reshape(256, -1)
    found = np.zeros((len(counts), 1 << bits), np.int64)
    for column in inside.T:
        for value in range(1 << bits):
            found[:, value] += counts[:, column == value].sum(axis=1)
    return found


def _from_fields(head: Head, payload: memoryview, size: int) -> tuple[Bytes, int]:
    bits, high_first, tail = head.number(), bool(head.number()), head.number()
    if not 0 < bits < 8 or tail > 255:
        raise ModelError("a tensor in it is of an unknown form")
    found, length = coders.decode(head, payload, 8 * size // bits)
    data = symbols.join_fields(found, bits, size, high_first)
    if size and 8 % bits:
        data[-1] = tail  # with the bits that are in no field
    return data, length


def _zeros(u: Array, kind: Kind, thorough: bool) -> tuple[Coded, str]:
    mask, kept = symbols.split_zeros(u)
    values, label = encode(kept.view(np.uint8), Kind(kind.width, kind.is_float), thorough)
    told = numbers(kind.width, kept.size)
    return _joined(ZEROS, told, [coders.encode(mask, 1, thorough), values])[
        0
    ], f"zeros apart, {label}"


def _from_zeros(
    head: Head, payload: memoryview, size: int, width: int, depth: int
) -> tuple[Bytes, int]:
    kept, count = head.number(), size // width
    if kept > count:
        raise ModelError("a mask in it does not fit its values")
    mask, at = coders.decode(head, payload, -(-count // 8))
    values, length = decode(head, payload[at:], kept * width, depth + 1)
    if np.count_nonzero(np.unpackbits(mask, count=count, bitorder="little")) != kept:
        raise ModelError("a mask in it does not fit its values")
    u = symbols.join_zeros(mask, symbols.elements(values, width), count)
    return u.view(np.uint8), at + length
