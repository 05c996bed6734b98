"""Affine (uniform) quantization: x ≈ s (q − z), q = clip(round(x / s) + z, q_min, q_max).

Jacob 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
inference". Rounding is to nearest even, as the ONNX operators do. A symmetric quantizer has z = 0
for signed integers and the middle of the range for unsigned ones, or 0 where no value is negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TINY = float(np.finfo(np.float32).tiny)
BIAS_LIMIT = 2.0**30  # of 2**31: the other half is left to the sum of products


@dataclass(frozen=True)
class Grid:
    """Integers a quantizer may use. bits: width; signed; narrow: no −2^(b−1), so symmetric."""

    bits: int = 8
    signed: bool = True
    narrow: bool = False
    reduced: bool = False  # one bit less, for kernels that saturate

    @property
    def low(self) -> int:
        if not self.signed:
            return 0
        return int(-(2 ** (self.width - 1)) + self.narrow)

    @property
    def high(self) -> int:
        return int(2 ** (self.width - 1) - 1 if self.signed else 2**self.width - 1)

    @property
    def width(self) -> int:
        return self.bits - int(self.reduced)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'int' if self.signed else 'uint'}{max(8, self.bits)}")


def parameters(
    low: float, high: float, grid: Grid, *, symmetric: bool = False
) -> tuple[np.float32, Any]:
    """Scale and zero point of a range. Zero is always exact: the range is widened to hold it.

    The scale is a positive, normal float32; a range of nothing but zero gets 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale, zero = _symmetric(low, high, grid)
    else:
        scale, zero = (high - low) / (grid.high - grid.low), None
    scale = float(np.float32(scale)) if scale > TINY else 1.0
    if zero is None:
        zero = round(grid.low - low / scale)
    return np.float32(scale), grid.dtype.type(np.clip(zero, grid.low, grid.high))


def _symmetric(low: float, high: float, grid: Grid) -> tuple[float, int]:
    """Scale and zero point where zero lies in the middle, or at the low end of what is unsigned."""
    if grid.signed:
        return max(-low, high) / grid.high, 0
    if low == 0.0:
        return high / grid.high, 0
    return 2 * max(-low, high) / grid.high, (grid.high + 1) // 2


def weight_scales(weight: Array, axis: int | None, grid: Grid) -> Array:
    """Symmetric scales s = max|w| / q_max: one per channel along `axis`, or one for all (None).

    A channel of zeros gets scale 1, a denormal one the least normal scale: neither divides by zero.
    """
    axes = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    peak = np.abs(np.asarray(weight, np.float32)).max(axes) if weight.size else np.float32(0)
    return np.asarray(np.where(peak > 0, np.maximum(peak / grid.high, TINY), 1.0), np.float32)


def along(vector: Array, axis: int | None, rank: int) -> Array:
    """A vector of channels shaped to broadcast along `axis` of an array of `rank` axes."""
    if axis is None:
        return vector
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def quantize(x: Array, scale: Array, zero: Any, grid: Grid, axis: int | None = None) -> Array:
    """Integers of x."""
    s = along(np.asarray(scale), axis, x.ndim)
    q = np.rint(np.asarray(x, np.float32) / s) + np.float32(zero)
    return np.asarray(np.clip(q, grid.low, grid.high), grid.dtype)


def dequantize(q: Array, scale: Array, zero: Any = 0, axis: int | None = None) -> Array:
    """Values of integers, float32."""
    s = along(np.asarray(scale), axis, q.ndim)
    return np.asarray((q.astype(np.float32) - np.float32(zero)) * s, np.float32)


def bias_guard(bias: Array, s_x: float, s_w: Array) -> Array:
    """Weight scales raised until |b| / (s_x s_w) fits an int32 with room for the sum of products.

    b is rounded at scale s_x s_w, so a tiny s_w of a nearly dead channel would overflow. That scale
    stays a normal float32, too.
    """
    needed = np.maximum(np.abs(bias) / BIAS_LIMIT, TINY) / float(s_x)
    return np.asarray(np.maximum(s_w, needed), np.float32)
