"""Quantized weights with one scale for each block of values that are summed together.

A weight is viewed as (outer, K, inner), K being the length of the sum it takes part in, and cut
along K into blocks of `block` values; the last one is filled up with zeros. In each block

    w ≈ s q,   −2^(b−1) ≤ q < 2^(b−1)

With 8 bits s = max|w| / 127. With fewer bits the range is one level longer below zero than above:
s takes the sign that sends the largest |w| to −2^(b−1), and the range may clip: of several ranges
r max|w| the one is taken that leaves the least squared error once s is the best for its codes,

    s = ⟨w, q⟩ / ⟨q, q⟩,   ‖w − s q‖² = ‖w‖² − ⟨w, q⟩² / ⟨q, q⟩.

A weight whose blocks lie on such integers already keeps them (`onnxc.numerics.lattice`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.affine import TINY
from onnxc.numerics.lattice import block_scales

Array = NDArray[Any]

RATIOS = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
    0.75,
)  # of the largest |w|, where a clipped range may be better
CHUNK = 1 << 20  # values worked on at a time
STORED = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}


@dataclass(frozen=True)
class Blocks:
    """codes: int8, (outer, blocks, block, inner). scales: float32, (outer, blocks, 1, inner).

    length: K, the last block without its filling. bits: 4 or 8.
    """

    codes: Array
    scales: Array
    length: int
    bits: int

    @property
    def is_filled(self) -> bool:
        """Whether the last block was filled up."""
        return bool(self.codes.shape[1] * self.codes.shape[2] != self.length)

    def stored(self) -> Array:
        """The codes in the type that a file keeps them in: int8, or int4, which is packed."""
        return self.codes.astype(STORED[self.bits])

    def unfilled(self) -> Array:
        """The codes as stored, (outer, K, inner)."""
        outer, count, block, inner = self.codes.shape
        return self.stored().reshape(outer, count * block, inner)[:, : self.length]


def quantize_blocks(weight: Array, bits: int, block: int = 0, reduced: bool = False) -> Blocks:
    """Codes and scales of a weight (outer, K, inner); block 0 makes one block of K.

    reduced: 7 bits of 8, for kernels that saturate.
    """
    width = bits - int(reduced)
    choose = _widest if bits == 8 else _best
    found = _blocks(weight, bits, block, lambda w: choose(w, width))
    assert found is not None
    return found


def known_blocks(weight: Array, bits: int, block: int = 0) -> Blocks | None:
    """Codes and scales of a weight that lies on integers of so many bits; None if it does not."""
    return _blocks(weight, bits, block, lambda w: _known(w, bits))


def _blocks(
    weight: Array, bits: int, block: int, choose: Callable[[Array], Array | None]
) -> Blocks | None:
    """Blocks with the scales that are chosen for each; None as soon as there are none."""
    outer, length, inner = weight.shape
    size = min(block or length, length) or 1
    count = -(-length // size)
    codes = np.empty((outer, count, size, inner), np.int8)
    scales = np.empty((outer, count, 1, inner), np.float32)
    for part in _parts(outer, length, inner):
        w = np.asarray(weight[part[0], :, part[1]], np.float32)
        filled = np.pad(w, ((0, 0), (0, count * size - length), (0, 0)))
        w = filled.reshape(len(w), count, size, w.shape[2])
        s = choose(w)
        if s is None:
            return None
        scales[part[0], :, :, part[1]] = s
        codes[part[0], :, :, part[1]] = _codes(w, s, bits)
    return Blocks(codes, scales, length, bits)


def _parts(outer: int, length: int, inner: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of the outer or inner axis, whichever is longer, that bound the memory."""
    step = max(1, CHUNK * max(outer, inner) // max(1, outer * length * inner))
    for start in range(0, max(outer, inner), step):
        piece = slice(start, start + step)
        yield (piece, slice(None)) if outer >= inner else (slice(None), piece)


def dequantize_blocks(blocks: Blocks) -> Array:
    """Values, float32, (outer, K, inner)."""
    values = blocks.codes * blocks.scales
    outer, count, block, inner = values.shape
    return np.asarray(values.reshape(outer, count * block, inner)[:, : blocks.length])


def decibels(weight: Array, blocks: Blocks) -> float:
    """10 log10(Σ w² / Σ (w − s q)²) of a weight (outer, K, inner); at most 200."""
    signal = noise = 0.0
    for outer, inner in _parts(*weight.shape):
        part = replace(
            blocks, codes=blocks.codes[outer, ..., inner], scales=blocks.scales[outer, ..., inner]
        )
        w = np.asarray(weight[outer, :, inner], np.float32)
        signal += float(np.square(w, dtype=np.float64).sum())
        noise += float(np.square(w - dequantize_blocks(part), dtype=np.float64).sum())
    return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-20 * signal, 1e-300))


def pack_columns(blocks: Blocks) -> Array:
    """Codes as MatMulNBits reads them: uint8, (N, blocks, block · bits / 8), zero in the middle.

    The weight must be a matrix (K, N), so outer is 1, or (N, K), so inner is 1. The lower half of
    a byte holds the value that comes first.
    """
    codes = (
        blocks.codes[0].transpose(2, 0, 1) if blocks.codes.shape[0] == 1 else blocks.codes[..., 0]
    )
    shifted = (codes.astype(np.int16) + 2 ** (blocks.bits - 1)).astype(np.uint8)
    if blocks.bits == 8:
        return np.ascontiguousarray(shifted)
    return np.asarray(shifted[..., 0::2] | (shifted[..., 1::2] << 4), np.uint8)


def _widest(w: Array, bits: int) -> Array:
    """Scales that clip nothing, symmetric around zero."""
    peak = np.abs(w).max(2, keepdims=True)
    return _nonzero(peak / (2 ** (bits - 1) - 1), peak)


def _best(w: Array, bits: int) -> Array:
    """Scales of least squared error among the clipped ranges."""
    lowest = -_lowest(bits)
    high, low = w.max(2, keepdims=True), w.min(2, keepdims=True)
    extreme = np.where(high > -low, high, low)
    best, gain = _nonzero(-extreme / lowest, extreme), np.full(extreme.shape, -1.0, np.float32)
    for ratio in RATIOS:
        q = _codes(w, _nonzero(-ratio * extreme / lowest, extreme), bits).astype(np.float32)
        dot = np.einsum("okbi,okbi->oki", w, q)[:, :, None]
        norm = np.einsum("okbi,okbi->oki", q, q)[:, :, None]
        kept = dot * dot / np.maximum(norm, 1)
        is_better = (kept > gain) & (norm > 0)
        best = np.where(is_better, dot / np.maximum(norm, 1), best)
        gain = np.where(is_better, kept, gain)
    return _nonzero(best, best)


def _known(w: Array, bits: int) -> Array | None:
    """Scales of blocks that lie on the integers of their codes."""
    turned = w.swapaxes(2, 3)
    found = block_scales(turned.reshape(-1, w.shape[2]), _lowest(bits), 2 ** (bits - 1) - 1)
    return None if found is None else found.reshape(*turned.shape[:3], 1).swapaxes(2, 3)


def _nonzero(scale: Array, values: Array) -> Array:
    """Scales away from zero: 1 where all values are zero, never denormal."""
    least = np.where(np.abs(scale) < TINY, np.copysign(TINY, scale), scale)
    return np.asarray(np.where(values == 0, 1.0, least), np.float32)


def _codes(w: Array, scale: Array, bits: int) -> Array:
    return np.asarray(np.clip(np.rint(w / scale), _lowest(bits), 2 ** (bits - 1) - 1), np.int8)


def _lowest(bits: int) -> int:
    return -(2 ** (bits - 1)) if bits < 8 else -127
