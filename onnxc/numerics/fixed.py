"""Fixed point: x ≈ 2^−n q. The scale is a power of two, so that a shift takes its place.

    Qm.n     signed,   1 + m + n = b bits    −2^m ≤ x < 2^m
    UQm.n    unsigned,     m + n = b bits       0 ≤ x < 2^m

Of the two powers of two around a real scale the lesser one clips more and the greater one rounds
more; the one with the lesser squared error is taken:

    n = argmin Σ (x − 2^−n clip(round(2^n x)))²        n ∈ {⌊−log2 s⌋, ⌈−log2 s⌉}

A layer then needs integers and shifts only. With the bias b at the scale of the products,

    a = Σ q_x q_w + q_b                          scale 2^−(n_x + n_w)
    q_y = clip(round(2^−k a)),   k = n_x + n_w − n_y

`rescale` rounds ties to even, as QuantizeLinear does, or up, as processors do that add half a unit
and shift; the two differ by one unit, in ties only. An 8-bit layer of up to 2^10 products keeps a
below 2^24, where float32 is exact: ONNX Runtime computes the same integers. With 16 bits a needs
more than 32 bits, and float32 rounds it, so that q_y may differ by one unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics import affine
from onnxc.numerics.affine import TINY, Grid, dequantize, quantize

Array = NDArray[Any]
Integers = NDArray[np.int64]
Rounding = Literal["even", "up"]

EXACT = 2**53  # below which float64 holds every integer


def power_of_two(scale: Array | float) -> Array:
    """The least power of two that is not below each positive scale; float64."""
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    return np.asarray(np.ldexp(1.0, exponent - (mantissa == 0.5)))


def neighbours(scale: Array | float) -> tuple[Array, Array]:
    """The powers of two around each scale, below and above; twice itself for a power of two."""
    above = power_of_two(scale)
    below = np.where(above > scale, above / 2, above)
    return np.maximum(below, TINY), above


def nearest(scale: Array | float) -> Array:
    """The nearer one of the powers of two around each scale, of two as near the greater; float64.

    An error that is a parabola in the scale, with its least at the given one, is the lesser there.
    """
    below, above = neighbours(scale)
    return np.asarray(np.where(scale - below < above - scale, below, above))


def closest(scale: Array, error: Callable[[Array], Array]) -> Array:
    """Of the powers of two around each scale the one with the lesser error; ties go to the greater.

    error: squared errors of scales, of the same shape.
    """
    below, above = neighbours(scale)
    return np.asarray(np.where(error(below) < error(above), below, above), np.float32)


def weight_scales(weight: Array, axis: int | None, grid: Grid) -> Array:
    """Powers of two of least squared error, float32: one a channel along `axis`, or one for all.

    A weight that was rounded to fewer bits keeps its few integers, times one power of two for all.
    """
    rank = weight.ndim
    others = None if axis is None else tuple(i for i in range(rank) if i != axis % rank)

    def error(scale: Array) -> Array:
        q = quantize(weight, scale, 0, grid, axis)
        drift = dequantize(q, scale, 0, axis).astype(np.float64) - weight
        return np.asarray(np.square(drift).sum(others))

    found = closest(affine.weight_scales(weight, axis, grid), error)
    return found if error(found).any() else _in_common(weight, axis, grid, found)


def _in_common(weight: Array, axis: int | None, grid: Grid, scale: Array) -> Array:
    """Scales of the fewest different integers, of a weight that has integers at these scales."""
    q = quantize(weight, scale, 0, grid, axis).astype(np.int64)
    rows = q.reshape(1, -1) if axis is None else np.moveaxis(q, axis, 0).reshape(len(scale), -1)
    spare = np.bitwise_or.reduce(rows, axis=1)  # its last bit is the last one of all
    spare = np.where(spare == 0, 1, spare & -spare)
    largest = max(int((np.abs(rows).max(axis=1) // spare).max(initial=0)), 1)
    common = 1 << (max(grid.high // largest, 1).bit_length() - 1)
    kept = np.where(rows.any(axis=1), spare / common, 1.0)
    return np.asarray(scale * kept.reshape(scale.shape), np.float32)


def is_on_grid(weight: Array, axis: int | None, grid: Grid) -> bool:
    """Whether a weight is integers of a grid times powers of two already."""
    scale = weight_scales(weight, axis, grid)
    q = quantize(weight, scale, 0, grid, axis)
    return bool((dequantize(q, scale, 0, axis) == weight).all())


def fraction_bits(scale: Array | float) -> NDArray[np.int32]:
    """n of each scale 2^−n. Raises ValueError for a scale that is no power of two."""
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    if np.any(mantissa != 0.5):
        raise ValueError("a scale of fixed point must be a power of two")
    return np.asarray(1 - exponent, np.int32)


def name(scale: Array | float, bits: int, signed: bool) -> str:
    """The format of a scale, such as Q2.5 or UQ3.5, or the first and last of several scales.

    m or n is negative where the digit next to the point is none of the b bits.
    """
    n = np.unique(fraction_bits(scale))
    names = [f"Q{bits - 1 - i}.{i}" if signed else f"UQ{bits - i}.{i}" for i in (n[0], n[-1])]
    return " to ".join(dict.fromkeys(names))


def rescale(a: Integers, k: Array | int, rounding: Rounding = "even") -> Integers:
    """round(2^−k a) by shifts. k: one, or an array that broadcasts; to the left where negative."""
    k = np.asarray(k, np.int64)
    right, left = np.maximum(k, 0), np.maximum(-k, 0)
    floor = a >> right
    beyond = (a - (floor << right)) * 2 - (np.int64(1) << right)  # how far beyond one half, twice
    is_up = (beyond > 0) | ((beyond == 0) & ((floor & 1 == 1) | (rounding == "up")))
    return np.asarray((floor + is_up) << left, np.int64)


def clip(q: Integers, grid: Grid) -> Array:
    """Saturate to the integers of a grid."""
    return np.clip(q, grid.low, grid.high).astype(grid.dtype)


def matmul(x: Array, w: Array, bias: Array | int = 0) -> Integers:
    """Σ q_x q_w + q_b, (M, N) from (M, K), (K, N) and (N,)."""
    return _product(x.astype(np.int64), w.astype(np.int64)) + np.asarray(bias, np.int64)


def _product(x: Integers, w: Integers) -> Integers:
    """x w, by float64 where that is exact, for NumPy is slow with integers."""
    peaks = int(np.abs(x).max(initial=0)) * int(np.abs(w).max(initial=0))
    if peaks * x.shape[-1] >= EXACT:
        return np.asarray(x @ w)
    return (x.astype(np.float64) @ w.astype(np.float64)).astype(np.int64)


def convolve(
    x: Array,
    w: Array,
    bias: Array | int = 0,
    *,
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
    groups: int = 1,
) -> Integers:
    """Σ q_x q_w + q_b of a convolution with any number of spatial axes, without a zero point.

    x: (N, C, *size); w: (M, C / groups, *kernel); bias: (M,); pads: begins, then ends. Returns
    (N, M, *size).
    """
    rank = x.ndim - 2
    ends = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(x.astype(np.int64), ends)
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilations, w.shape[2:], strict=True))
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    windows = windows[(slice(None), slice(None), *steps)]
    count, channels, size = x.shape[0], w.shape[1], windows.shape[2 : 2 + rank]
    columns = windows.reshape(count, groups, channels, *size, *w.shape[2:])
    columns = np.moveaxis(columns, 2, 2 + rank).reshape(count, groups, int(np.prod(size)), -1)
    rows = w.astype(np.int64).reshape(groups, w.shape[0] // groups, -1)
    sums = _product(columns, rows.swapaxes(1, 2)).swapaxes(2, 3).reshape(count, w.shape[0], *size)
    return np.asarray(sums + np.reshape(bias, (-1, *[1] * rank)).astype(np.int64))
