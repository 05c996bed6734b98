"""Statistics of one tensor that stream over batches and merge: commutative monoids.

    observe(a + b) == observe(a).merge(observe(b))

holds exactly for ranges, counts and histograms in any order of data and merges, and to rounding for
the float64 sums of means. So one process, many processes and many machines give the same numbers,
and nothing depends on the batch size.

Histogram. With exponent k, a value x falls into bin

    j(x) = trunc(x / 2**k),   -2048 < j < 2048,

where k is the smallest exponent whose 2,048 bins on each side of zero hold the data. Division by a
power of two is exact, so coarsening by s steps is the exact shift j -> trunc(j / 2**s): whichever
data comes first, the same bins result. Each side has its own bins, so that a one-sided tensor
(after ReLU) is no coarser than a two-sided one. Bin 0 reaches to both sides of zero and is twice as
wide: its centre is zero, the one value that every quantization grid represents.

An update takes `samples`, the number of samples that the array holds in its leading axis; a
histogram bins at most `positions` values of each sample, spread evenly
(`onnxc.numerics.sampling`). Minimum and maximum see every value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from calib.moments import MomentsObserver
from onnxc.core import Key
from onnxc.errors import OptionError
from onnxc.numerics.sampling import start, stride

Array = NDArray[Any]

SIDE = 2048  # bins on each side of zero
BINS = 2 * SIDE - 1
FINEST = -126  # 2**126 is the largest scale that float32 holds
POSITIONS = 8192  # values binned of one sample of one tensor
PIECE = 1 << 18  # values that stay in the cache


class Streaming(Protocol):
    """What every row of OBSERVERS offers: `core.Observer` with a sample count and health checks."""

    def update(self, x: Array, samples: int | None = None) -> None: ...
    def merge(self, other: Self) -> Self: ...

    @property
    def is_finite(self) -> bool: ...

    @property
    def has_nan(self) -> bool: ...


@dataclass
class RangeObserver:
    """Minimum, maximum and number of values; with `axis`, one minimum and maximum a channel.

    low, high: float64 of shape () or (channels,); +inf and -inf before the first value.
    """

    axis: int | None = None
    low: Array = field(default_factory=lambda: np.array(np.inf))
    high: Array = field(default_factory=lambda: np.array(-np.inf))
    count: int = 0

    def update(self, x: Array, samples: int | None = None) -> None:
        """See every value of `x`; any shape, a zero-size array changes nothing."""
        if x.size == 0:
            return
        rows = _channels(_real(x), self.axis)
        axes = tuple(i for i in range(rows.ndim) if i != 1) if self.axis is not None else None
        self.low = np.minimum(self.low, rows.min(axis=axes), dtype=np.float64)
        self.high = np.maximum(self.high, rows.max(axis=axes), dtype=np.float64)
        self.count += x.size

    def merge(self, other: Self) -> Self:
        """The observer of both data. Raises OptionError when the axes differ."""
        _same(self.axis, other.axis, "axis")
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return type(self)(self.axis, low, high, self.count + other.count)

    @property
    def is_finite(self) -> bool:
        return self.count == 0 or bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    @property
    def has_nan(self) -> bool:
        return bool(np.isnan(self.low).any())


@dataclass
class HistogramObserver:
    """Exact minimum and maximum of all values, and a histogram of the sampled ones.

    low, high: float; count: values seen; counts: int64 (4095,), of which counts[2047 + j] belongs
    to bin j of width 2**exponent. An array that holds NaN or infinity is not binned.
    """

    axis: int | None = None
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    exponent: int = FINEST
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    positions: int = POSITIONS

    def __post_init__(self) -> None:
        if self.axis is not None:
            raise OptionError("a histogram covers a whole tensor; use a range for one channel axis")

    def update(self, x: Array, samples: int | None = None) -> None:
        """See every value of `x` and bin at most `positions` of each sample.

        samples: how many samples `x` holds, batch-major; None: as many as its first axis.
        """
        if x.size == 0:
            return
        x = _real(x)
        low, high = extremes(x)
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))
        self.count += x.size
        if not (math.isfinite(low) and math.isfinite(high)):
            return
        self._coarsen(exponent_of(max(abs(low), abs(high))))
        sampled = every_nth(x, self.positions, samples)
        scaled = sampled * np.asarray(math.ldexp(1.0, -self.exponent), sampled.dtype)
        bins = scaled.astype(np.intp)
        if low < 0:
            self.counts += np.bincount(bins + (SIDE - 1), minlength=BINS)
        else:
            self.counts[SIDE - 1 :] += np.bincount(bins, minlength=SIDE)

    def merge(self, other: Self) -> Self:
        """The observer of both data. Raises OptionError when they sample differently."""
        _same(self.positions, other.positions, "number of positions")
        exponent = max(self.exponent, other.exponent)
        counts = coarsened(self.counts, exponent - self.exponent)
        counts = counts + coarsened(other.counts, exponent - other.exponent)
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        count = self.count + other.count
        return type(self)(None, float(low), float(high), count, exponent, counts, self.positions)

    def _coarsen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent

    @property
    def width(self) -> float:
        """Width of a bin; bin 0 is twice as wide."""
        return math.ldexp(1.0, self.exponent)

    @property
    def binned(self) -> int:
        """How many of the `count` values are in the bins."""
        return int(self.counts.sum())

    @property
    def is_finite(self) -> bool:
        return self.count == 0 or (math.isfinite(self.low) and math.isfinite(self.high))

    @property
    def has_nan(self) -> bool:
        return math.isnan(self.low)


@dataclass
class MeanObserver:
    """Sum and number of values, over the whole tensor or for each channel of `axis`.

    total: float64 of shape () or (channels,); count: values behind each element of it.
    """

    axis: int | None = None
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    count: int = 0

    def update(self, x: Array, samples: int | None = None) -> None:
        """Add every value of `x`."""
        if x.size == 0:
            return
        rows = _channels(_real(x), self.axis)
        axes = tuple(i for i in range(rows.ndim) if i != 1) if self.axis is not None else None
        added = np.asarray(rows.sum(axis=axes, dtype=np.float64))
        self.total = self.total + added
        self.count += x.size // added.size

    def merge(self, other: Self) -> Self:
        """The observer of both data. Raises OptionError when the axes differ."""
        _same(self.axis, other.axis, "axis")
        return type(self)(self.axis, self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> NDArray[np.float64]:
        return np.asarray(self.total / max(self.count, 1))

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.total).all())

    @property
    def has_nan(self) -> bool:
        return bool(np.isnan(self.total).any())


@dataclass
class PeakObserver(MeanObserver):
    """Mean over samples of each channel's largest magnitude: a range that one outlier cannot set.

    total: float64 (channels,), the sum of the samples' peaks; count: samples.
    """

    def update(self, x: Array, samples: int | None = None) -> None:
        """Add the peaks of every sample; samples: how many `x` holds, None: its first axis."""
        if x.size == 0:
            return
        parts = samples if samples is not None else (x.shape[0] if x.ndim else 1)
        parts = parts if parts and x.ndim and x.shape[0] % parts == 0 else 1
        x = _real(x)
        rows = x.reshape(parts, 1, -1) if self.axis is None else _channels(x, self.axis)
        peaks = np.maximum(rows.max(axis=-1), -rows.min(axis=-1))  # over contiguous memory
        peaks = peaks.reshape(parts, -1, peaks.shape[-1]).max(axis=1)
        total = peaks.sum(axis=0, dtype=np.float64)
        self.total = self.total + (total[0] if self.axis is None else total)
        self.count += parts

    @property
    def peak(self) -> NDArray[np.float64]:
        return self.mean


@dataclass
class ZerosObserver(MeanObserver):
    """Share of the values that are zero, over the whole tensor or for each channel of `axis`."""

    def update(self, x: Array, samples: int | None = None) -> None:
        """Count every value of `x`; NaN stays NaN."""
        super().update(np.where(np.isfinite(x), (x == 0).astype(np.float32), x))

    @property
    def zeros(self) -> NDArray[np.float64]:
        return self.mean


OBSERVERS: dict[str, Callable[..., Streaming]] = {
    "range": RangeObserver,
    "histogram": HistogramObserver,
    "mean": MeanObserver,
    "peak": PeakObserver,
    "zeros": ZerosObserver,
    "moments": MomentsObserver,
}


def observer_of(key: Key) -> Streaming:
    """An observer that has seen nothing yet, for a key whose `what` is in OBSERVERS."""
    options = (key.axis,) if key.window is None else (key.axis, key.window)
    return OBSERVERS[key.what](*options)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two observers hold exactly the same statistic."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return type(a) is type(b) and all(np.array_equal(x, y) for x, y in pairs)


def exponent_of(largest: float) -> int:
    """The smallest k with trunc(largest / 2**k) < 2048."""
    if largest == 0:
        return FINEST
    return max(math.frexp(largest)[1] - SIDE.bit_length() + 1, FINEST)


def coarsened(counts: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """The histogram with bins 2**steps times as wide: bin j goes to trunc(j / 2**steps)."""
    if steps == 0:
        return counts
    wide = np.zeros_like(counts)
    j = np.arange(BINS) - (SIDE - 1)
    np.add.at(wide, np.sign(j) * (np.abs(j) >> min(steps, 63)) + (SIDE - 1), counts)
    return wide


def extremes(x: Array) -> tuple[float, float]:
    """Minimum and maximum, piece by piece: each comes from memory once and from the cache once."""
    flat = x.reshape(-1)
    pieces = [flat[i : i + PIECE] for i in range(0, flat.size, PIECE)]
    pairs = [(piece.min(), piece.max()) for piece in pieces]
    return float(np.min([low for low, _ in pairs])), float(np.max([high for _, high in pairs]))


def every_nth(x: Array, positions: int, samples: int | None = None) -> Array:
    """At most `positions` values of each sample, flat."""
    parts = samples if samples is not None else (x.shape[0] if x.ndim else 1)
    rows = x.reshape(parts if parts and x.size % parts == 0 else 1, -1)
    step = stride(rows.shape[1], positions)
    if step == 1:
        return rows.reshape(-1)
    taken = [row[start(row, min(step, row.size)) :: step] for row in rows]
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


def _channels(x: Array, axis: int | None) -> Array:
    """View as (outer, channels, inner), so that reductions run over contiguous memory."""
    if axis is None:
        return x
    axis %= x.ndim
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    return x.reshape(outer, x.shape[axis], inner)


def _real(x: Array) -> Array:
    """float32 or float64 as they are; anything else in the one that holds it exactly."""
    if x.dtype in (np.float32, np.float64):
        return x
    return x.astype(np.float32 if x.dtype.itemsize <= 2 else np.float64)


def _same(mine: object, theirs: object, what: str) -> None:
    if mine != theirs:
        raise OptionError(f"statistics with different {what} cannot be merged: {mine}, {theirs}")
