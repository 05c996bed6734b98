"""Coders of a stream of bytes: as they are, zstandard, Huffman, or rANS under told models.

A coded stream is a head, which says how, and a payload. rANS (`onnxc.storage.rans`) comes within
0.1 % of the entropy of its models (`onnxc.numerics.entropy`), one for all symbols or one for each
channel. The smallest wins. zstandard at its highest level is slow, so a stream that is not small is
judged first: what its lowest level makes of all of it, times what the highest one gains on a part.
It runs in full where that is below the others.

Heads are written in numbers of 7 bits a byte, the low ones first, as protobuf does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.errors import ModelError
from onnxc.numerics import entropy
from onnxc.storage import rans as ans
from onnxc.storage.rans import libraries

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

RAW, ZSTD, HUFFMAN, RANS = range(4)
NAMES = ("stored", "zstd", "Huffman", "rANS")  # of coders, in the order of their numbers
LEVEL = 19  # of zstandard
SMALL = 1 << 14  # bytes up to which every coder runs
PART, MOST = 512, 1 << 16  # of a larger stream one part in so many is tried; bytes of it at most
PIECE = 1 << 18  # bytes that are counted at once
EXPANSION = 1 << 16  # bytes that a byte may stand for, at most; zstandard reaches 1 << 15
ROW = 256  # symbols of a channel that may have a model of its own
TABLES = 1 << 16  # entries of the histograms of channels, at most
GAIN = 255 / 256  # of the size that a coder must stay below to be worth its time


@dataclass(frozen=True)
class Coded:
    """A coded stream: what tells how to read it, and its bytes."""

    head: bytes
    payload: bytes

    @property
    def size(self) -> int:
        return len(self.head) + len(self.payload)


@dataclass(frozen=True)
class Model:
    """A model of `size` symbols from `low` on, by knots (channels, m); bits: what all costs."""

    low: int
    size: int
    step: int
    knots: Bytes
    bits: float

    @property
    def head(self) -> bytes:
        told = numbers(len(self.knots), self.low, self.size - 1, self.step)
        return told + self.knots.tobytes()

    def weights(self) -> Array:
        return entropy.weights(self.knots, self.step, self.size)


class Head:
    """Reads numbers and bytes from the front of a head. Raises ModelError past its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        value = shift = 0
        while shift < 63:
            (digit,) = self.bytes(1)
            value |= (digit & 127) << shift
            if digit < 128:
                return value
            shift += 7
        raise ModelError("a number in it is too large")

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ModelError("a description in it is too short")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> str:
        try:
            return self.bytes(self.number()).decode()
        except UnicodeDecodeError as error:
            raise ModelError("a name in it is no text") from error


def numbers(*values: int) -> bytes:
    """The bytes of whole numbers in a head."""
    digits = bytearray()
    for value in values:
        while value > 127:
            digits.append(value & 127 | 128)
            value >>= 7
        digits.append(value)
    return bytes(digits)


def encode(data: Bytes, channels: int = 1, thorough: bool = False) -> Coded:
    """A stream that is a part of a form, by the coder that makes it smallest.

    channels: rows of equal length that may have models of their own. thorough: every coder runs.
    """
    model = model_of(histograms(data, channels), 8 * GAIN * data.size)
    best = stored(data) if model is None else rans(data, model)
    compress = libraries()[1].compress
    if thorough or len(compress(data, 1)) < best.size:
        return general(data, best.size, True) or best
    return best


def decode(head: Head, payload: memoryview, size: int) -> tuple[Bytes, int]:
    """So many bytes of a stream, and how many of the payload they took. Raises ModelError."""
    coder, length = head.number(), head.number()
    if coder >= len(NAMES) or length > len(payload):
        raise ModelError("a stream in it is of an unknown kind, or too short")
    part = payload[:length]
    if coder == RANS:
        return _from_rans(head, part, size), length
    data = np.frombuffer(_DECODERS[coder](part, size), np.uint8)
    if data.size != size:
        raise ModelError("a stream in it has another length than declared")
    return data, length


def stored(data: Bytes) -> Coded:
    """A stream as it is."""
    return Coded(numbers(RAW, data.size), data.tobytes())


def histograms(data: Bytes, channels: int = 1) -> NDArray[np.int64]:
    """How often each byte is in each of so many equal rows; one row where they are too short."""
    rows = channels if channels > 1 and data.size >= ROW * channels else 1
    rows = rows if data.size % rows == 0 and 256 * rows <= TABLES else 1
    pieces = data.reshape(rows, -1)
    counts = np.zeros((rows, 256), np.int64)
    for row, piece in zip(counts, pieces, strict=True):
        for start in range(0, piece.size, PIECE):
            row += np.bincount(piece[start : start + PIECE], minlength=256)
    return counts


def model_of(counts: Array, limit: float) -> Model | None:
    """The cheapest model of a histogram (channels, k): one for all, or one for each channel.

    None where it costs as many bits as the limit.
    """
    pooled = counts.sum(axis=0, keepdims=True)
    if min(map(entropy.expected, (counts, pooled))) >= limit:
        return None
    used = np.flatnonzero(pooled[0])
    low, high = (int(used[0]), int(used[-1])) if used.size else (0, 0)
    inside = counts[:, low : high + 1].astype(np.float64)
    found = entropy.fit(inside.sum(axis=0, keepdims=True))
    if len(inside) > 1 and entropy.expected(inside) < found.bits:
        found = min(found, entropy.fit(inside), key=lambda fit: fit.bits)
    model = Model(low, high - low + 1, found.step, found.knots, found.bits)
    return model if found.bits < limit else None


def rans(data: Bytes, model: Model) -> Coded:
    """A stream of symbols that are all in the model."""
    rows, payload = data.reshape(len(model.knots), -1), b""
    if model.size > 1:
        payload = ans.encode(rows, model.low, model.weights())
    return Coded(numbers(RANS, len(payload)) + model.head, payload)


def _from_rans(head: Head, payload: memoryview, size: int) -> Bytes:
    channels, low, last, step = (head.number() for _ in range(4))
    is_sound = step in entropy.STEPS and low + last < 256
    if not is_sound or not channels or size % channels:
        raise ModelError("a model in it is damaged")
    shape = channels, entropy.knot_count(last + 1, step)
    knots = np.frombuffer(head.bytes(shape[0] * shape[1]), np.uint8).reshape(shape)
    if not last:
        return np.full(size, low, np.uint8)
    weights = entropy.weights(knots, step, last + 1)
    return ans.decode(payload, (channels, size // channels), low, weights).reshape(-1)


def general(data: Bytes, least: float, thorough: bool = False) -> Coded | None:
    """The smaller of zstandard and Huffman, if it is below `least` bytes; None if neither is."""
    is_all = thorough or data.size <= SMALL
    part = data[data.size // 2 :][: min(max(data.size // PART, SMALL // 4), MOST)]
    found = [zstd(data)] if is_all or _expected_zstd(data, part) < least else []
    if is_all or huffman(part).size * data.size < GAIN * least * part.size:
        found.append(huffman(data))
    best = min(found, key=lambda coded: coded.size, default=None)
    return best if best is not None and best.size < least else None


def _expected_zstd(data: Bytes, part: Bytes) -> float:
    """About how many bytes the highest level leaves of a stream."""
    compress = libraries()[1].compress
    low, high = (len(compress(part, level)) for level in (1, LEVEL))
    return float(len(compress(data, 1)) * high / low)


def zstd(data: Bytes) -> Coded:
    """A stream by zstandard, whatever comes of it."""
    payload = libraries()[1].compress(data, LEVEL)
    return Coded(numbers(ZSTD, len(payload)), payload)


def huffman(data: Bytes) -> Coded:
    """A stream by deflate that looks for no repeats: blocks, each with a code of its own."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    payload = deflate.compress(data.data) + deflate.flush()
    return Coded(numbers(HUFFMAN, len(payload)), payload)


def _as_is(payload: memoryview, size: int) -> memoryview:
    return payload


def from_zstd(payload: memoryview, size: int) -> bytes:
    zstandard = libraries()[1]
    try:
        if zstandard.frame_content_size(payload) != size:
            raise ModelError("a stream in it has another length than declared")
        reader = zstandard.ZstdDecompressor()
        data: bytes = reader.decompress(payload, size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ModelError("a stream in it is damaged") from error
    return data


def _from_huffman(payload: memoryview, size: int) -> bytes:
    inflate = zlib.decompressobj(-15)
    try:
        data = inflate.decompress(payload, size + 1)
    except zlib.error as error:
        raise ModelError("a stream in it is damaged") from error
    if not inflate.eof or inflate.unused_data:
        raise ModelError("a stream in it is damaged")
    return data


_DECODERS: dict[int, Callable[[memoryview, int], bytes | memoryview]] = {
    RAW: _as_is,
    ZSTD: from_zstd,
    HUFFMAN: _from_huffman,
}
