"""What a processor with integers and shifts alone makes of a fixed-point network, to the bit.

A tensor is held as a **number**: integers a with fraction bits n, and a divisor d where a pool has
summed d values,

    x = 2^−n a / d

so that nothing is ever rounded between two quantizers:

    convolution, product    a = Σ q_x q_w + q_b            n = n_x + n_w, of each output channel
    sum                     a = 2^(n − n_x) a_x + 2^(n − n_y) a_y      n = max(n_x, n_y)
    Relu, Clip              a limited to the bounds at n
    pools                   the largest a, or their sum over d

and a quantizer of n_y fraction bits shifts, rounds ties to even as QuantizeLinear does, and
saturates:

    q = clip(round(2^(n_y − n) a / d))

(Gupta 2015, "Deep learning with limited numerical precision"; `onnxc.numerics.fixed`.) Sums are
held in 64 bits; `width` says how many they need. Those of 8-bit layers fit 32 bits, and partial
sums may wrap around on the way, as two's complement forgives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid, along

Array = NDArray[Any]
Integers = NDArray[np.int64]
Ints = tuple[int, ...]

LEAST = -(2**62)  # what is padded around a pool of maxima
ONE = np.asarray(1, np.int64)
MANTISSA = 53  # bits of a float64


@dataclass(frozen=True)
class Number:
    """x = 2^−n a / d. n and d broadcast against a."""

    a: Integers
    n: Integers
    d: Integers

    @classmethod
    def of(cls, q: Array, scale: Array, axis: int | None = None) -> Number:
        """Integers with their scales, powers of two. Raises ValueError for others."""
        n = fixed.fraction_bits(scale).astype(np.int64)
        n = along(n.reshape(-1), axis, q.ndim) if n.size > 1 else n.reshape(())
        return cls(q.astype(np.int64), n, ONE)

    @classmethod
    def exactly(cls, x: Array) -> Number:
        """Real numbers of few digits, such as bounds. Raises ValueError for one of too many."""
        mantissa, exponent = np.frexp(np.asarray(x, np.float64))
        n = int(np.max(MANTISSA - exponent, initial=0, where=mantissa != 0))
        while n > 0 and not np.any(np.ldexp(x, n - 1) % 1):
            n -= 1
        a = np.ldexp(np.asarray(x, np.float64), n)
        if np.any(np.abs(a) > 2.0**MANTISSA):
            raise ValueError("a number has more digits than 64 bits hold")
        return cls(a.astype(np.int64), np.asarray(n, np.int64), ONE)

    @property
    def value(self) -> NDArray[np.float64]:
        """Exact as long as a has up to 53 bits and d is a power of two."""
        return np.asarray(np.ldexp(self.a.astype(np.float64), -self.n) / self.d)

    @property
    def width(self) -> int:
        """Bits that the integers need, sign included."""
        return int(np.abs(self.a).max(initial=0)).bit_length() + 1

    def moved(self, move: Callable[[Array], Array]) -> Number:
        """The same numbers in other places."""
        parts = (x if x.size == 1 else np.broadcast_to(x, self.a.shape) for x in (self.n, self.d))
        n, d = (x.reshape(()) if x.size == 1 else move(x) for x in parts)
        return Number(move(self.a), n, d)

    def whole(self) -> Number:
        """Itself, if it may be multiplied. Raises ValueError where n differs, or d is not 1."""
        if self.n.size > 1 or np.any(self.d != 1):
            raise ValueError("its input is not behind a quantizer")
        return Number(self.a, self.n.reshape(()), ONE)


def quantize(x: Number, scale: Array, grid: Grid) -> Array:
    """Shifted, rounded to even, saturated. scale: one power of two."""
    k = x.n - int(fixed.fraction_bits(scale).reshape(()))
    if np.all(x.d == 1):
        return fixed.clip(fixed.rescale(x.a, k), grid)
    above, below = x.a << np.maximum(-k, 0), x.d << np.maximum(k, 0)
    floor = above // below
    beyond = 2 * (above - floor * below) - below
    return fixed.clip(floor + ((beyond > 0) | ((beyond == 0) & (floor & 1 == 1))), grid)


def aligned(parts: Sequence[Number]) -> list[Number]:
    """The same numbers at the largest n of all, d being 1 for all."""
    if any(np.any(part.d != 1) for part in parts):
        raise ValueError("the mean of a pool is not quantized before it is added")
    n = np.asarray(max(int(part.n.max()) for part in parts), np.int64)
    return [Number(part.a << (n - part.n), n, part.d) for part in parts]


def add(x: Number, y: Number) -> Number:
    """x + y, which broadcast."""
    x, y = aligned((x, y))
    return Number(x.a + y.a, x.n, x.d)


def concatenate(parts: Sequence[Number], axis: int) -> Number:
    """Numbers side by side."""
    same = aligned(parts)
    return Number(np.concatenate([part.a for part in same], axis), same[0].n, same[0].d)


def relu(x: Number) -> Number:
    """max(x, 0)."""
    return Number(np.maximum(x.a, 0), x.n, x.d)


def clip(x: Number, low: float, high: float) -> Number:
    """x within bounds, infinite ones for none. Raises ValueError for bounds of many digits."""
    for bound, limit in ((low, np.maximum), (high, np.minimum)):
        if math.isfinite(bound):
            x, y = aligned((x, Number.exactly(np.asarray(bound))))
            x = Number(limit(x.a, y.a), x.n, x.d)
    return x


def convolve(x: Number, w: Number, b: Number | None, **geometry: Any) -> Number:
    """A convolution; geometry: as in `onnxc.numerics.fixed.convolve`."""
    x, behind = x.whole(), x.a.ndim - 2
    sums = fixed.convolve(x.a, w.a, 0, **geometry)
    n = w.n.reshape(-1, *[1] * behind) if w.n.ndim else w.n
    return _biased(Number(sums, x.n + n, ONE), b, behind)


def multiply(x: Number, w: Number, b: Number | None) -> Number:
    """The product x w, of (…, K) and (K, N), and a bias (N,)."""
    x, n = x.whole(), w.n.reshape(-1) if w.n.ndim else w.n
    return _biased(Number(fixed.matmul(x.a, w.a), x.n + n, ONE), b, 0)


def _biased(sums: Number, b: Number | None, behind: int) -> Number:
    """Sums of products with a bias at their scale. behind: axes after that of the channels."""
    if b is None:
        return sums
    shape = (-1, *[1] * behind)
    n = np.broadcast_to(b.n.reshape(-1), b.a.size).reshape(shape)
    if np.any(n != sums.n):
        raise ValueError("a bias is not at the scale of its products")
    return Number(sums.a + b.a.reshape(shape), sums.n, sums.d)


@dataclass(frozen=True)
class Pool:
    """How a pool cuts its input. kernel and so on: one number an axis; pads: begins, then ends.

    is_ceiled: whether a last window may reach beyond the end. counts_pads: whether a mean counts
    what is padded.
    """

    kernel: Ints
    strides: Ints
    pads: Ints
    dilations: Ints
    is_ceiled: bool = False
    counts_pads: bool = False

    def windows(self, a: Integers, fill: int, extra: int) -> Integers:
        """(N, C, *size, *kernel). fill: what is padded; extra: what lies beyond that."""
        rank = len(self.kernel)
        ends = [(0, 0), (0, 0), *zip(self.pads[:rank], self.pads[rank:], strict=True)]
        padded = np.pad(a, ends, constant_values=fill)
        reach = tuple(d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        more = [(0, 0), (0, 0)]
        for axis, (span, step) in enumerate(zip(reach, self.strides, strict=True)):
            left = (padded.shape[2 + axis] - span) % step
            begins = padded.shape[2 + axis] - left - span + step  # of the window beyond the end
            is_inside = begins < a.shape[2 + axis] + self.pads[axis]
            more.append((0, step - left if self.is_ceiled and left and is_inside else 0))
        padded = np.pad(padded, more, constant_values=extra)
        axes = tuple(range(2, 2 + rank))
        found = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
        steps = [slice(None, None, step) for step in (*self.strides, *self.dilations)]
        return np.asarray(found[(slice(None), slice(None), *steps)])


def max_pool(x: Number, pool: Pool) -> Number:
    """The largest number of each window. x: of one n and d."""
    axes = tuple(range(-len(pool.kernel), 0))
    return Number(pool.windows(x.a, LEAST, LEAST).max(axis=axes), x.n, x.d)


def mean_pool(x: Number, pool: Pool) -> Number:
    """The mean of each window: its sum, and how many values it counts. x: of one n and d."""
    axes = tuple(range(-len(pool.kernel), 0))
    ones = pool.windows(np.ones_like(x.a), int(pool.counts_pads), 0)
    sums = pool.windows(x.a, 0, 0).sum(axis=axes)
    return Number(sums, x.n, x.d * ones.sum(axis=axes))


def mean(x: Number) -> Number:
    """The mean over all axes behind the channels. x: of one n and d."""
    axes = tuple(range(2, x.a.ndim))
    count = math.prod(x.a.shape[2:])
    return Number(x.a.sum(axis=axes, keepdims=True), x.n, np.asarray(x.d * count, np.int64))
