"""From statistics to the range (low, high) of a quantizer: one row of METHODS a criterion.

A uniform quantizer of `bits` bits has N = 2**bits levels, s = (high - low) / (N - 1) apart,

    q(x) = s * (clip(round(x / s) + z, 0, N - 1) - z),   z = round(-low / s).

It must represent zero exactly (padding, ReLU), so every range has low <= 0 <= high. A symmetric
range is (-a, a) with z in the middle.

minmax      [min, max]: no clipping (Vanhoucke 2011; Jacob 2018).
percentile  the values that leave (100 - p)/2 percent of the data on each side; symmetric: the p-th
            percentile of |x| (Wu 2020, "Integer quantization", section 4).
entropy     least KL(P || Q) = sum P log(P / Q), where P is the histogram inside the range with the
            outliers added to its end bins and Q the same histogram averaged over the non-empty bins
            of each level (Migacz 2017, "8-bit inference with TensorRT").
mse         least E[(x - q(x))^2], clipping and rounding together, evaluated on the bins
            (Sung 2015).
aciq        the same in closed form, x being a Gauss or a Laplace (Banner 2019).
hwgq        the same for half a Gauss on each side of zero (Cai 2017).
            Both: `onnxc.numerics.activation_levels`.
output      least E[ω(x) (x - q(x))^2], the error of the output y = W x of what reads x, whose
            errors in channels j do not know of each other: with u_j = |W_j|^2 and m_j = E[x_j^2]

                ω(x) = sum_j u_j P(j | x),   P(j | x) ~ exp(-|x| sqrt(2 / m_j)) / sqrt(m_j),

            each channel being a Laplace. So an end is cut off where only channels reach that count
            little (Choi 2018, PACT, and Jung 2019, QIL, learn such ends). As mse where no layer
            reads x itself, or moments are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.observers import SIDE, HistogramObserver, RangeObserver
from onnxc.errors import OptionError
from onnxc.numerics.activation_levels import aciq, hwgq
from onnxc.numerics.kmeans import Points

Floats = NDArray[np.float64]
CANDIDATES = 192  # ranges that a search compares on its coarse grids, and again on its fine ones
EMPTY = 1e-4  # counts that stand for an empty level, whose divergence would be infinite


@dataclass(frozen=True)
class Rule:
    """What the range is for. percentile: percent of the data to keep, for that method.

    importance: ω of each bin, for the error of an output; None: 1.
    """

    bits: int = 8
    symmetric: bool = False
    percentile: float = 99.99
    importance: Floats | None = None

    @property
    def levels(self) -> int:
        return int(2**self.bits)


def choose(
    observer: HistogramObserver | RangeObserver,
    method: str = "minmax",
    bits: int = 8,
    symmetric: bool = False,
    percentile: float = 99.99,
    importance: Floats | None = None,
) -> tuple[float, float]:
    """(low, high) with low <= 0 <= high; (0, 0) when no value, or nothing but zero, was seen.

    A RangeObserver knows `minmax` only, and one with an axis gives the range over all channels.
    Raises OptionError for an unknown method, or one that the observer cannot answer.
    """
    if method not in METHODS:
        raise OptionError(f"range method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise OptionError(f"percentile {percentile} is not in (0, 100]; 99.99 is usual")
    rule = Rule(bits, symmetric, percentile, importance)
    if method == "minmax":
        return minmax(observer, rule)
    if not isinstance(observer, HistogramObserver):
        raise OptionError(f"range method {method!r} needs a histogram; only 'minmax' takes a range")
    low, high = minmax(observer, rule)
    if low == high or observer.binned == 0:
        return low, high
    least, most = METHODS[method](observer, rule)
    return float(min(least, 0.0)), float(max(most, 0.0))


def minmax(observer: HistogramObserver | RangeObserver, rule: Rule) -> tuple[float, float]:
    """The smallest range that holds every value and zero."""
    if observer.count == 0:
        return 0.0, 0.0
    low, high = min(float(np.min(observer.low)), 0.0), max(float(np.max(observer.high)), 0.0)
    return (-max(-low, high), max(-low, high)) if rule.symmetric else (low, high)


def percentile(observer: HistogramObserver, rule: Rule) -> tuple[float, float]:
    """Quantiles of the histogram, linear within a bin."""
    limits = minmax(observer, rule)
    if rule.percentile == 100:
        return limits
    if rule.symmetric:
        end = min(_quantile(_magnitudes(observer), 0, observer.width, rule.percentile), limits[1])
        return -end, end
    tail = (100 - rule.percentile) / 2
    low = _quantile(observer.counts, 1 - SIDE, observer.width, tail)
    high = _quantile(observer.counts, 1 - SIDE, observer.width, 100 - tail)
    return max(low, limits[0]), min(high, limits[1])


def _quantile(counts: NDArray[np.int64], first: int, width: float, percent: float) -> float:
    edges = np.arange(first, first + len(counts) + 1, dtype=np.float64)
    if first < 0:
        edges[: 1 - first] -= 1  # bin j < 0 covers (j - 1, j], bin 0 (-1, 1), bin j > 0 [j, j + 1)
    below = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(below[-1] * percent / 100, below, edges) * width)


def entropy(observer: HistogramObserver, rule: Rule) -> tuple[float, float]:
    """The range that loses least information; the full one where bins are no finer than levels."""
    counts = _magnitudes(observer) if rule.symmetric else observer.counts
    levels = rule.levels // 2 if rule.symmetric else rule.levels
    zero = 0 if rule.symmetric else SIDE - 1
    low, high = minmax(observer, rule)
    below, above = int(-low / observer.width), int(high / observer.width) + 1

    def cost(lows: Floats, highs: Floats) -> Floats:
        first = zero - (0 if rule.symmetric else 1) * np.rint(lows * below).astype(np.intp)
        last = zero + np.maximum(np.rint(highs * above), 1).astype(np.intp)
        return divergence(counts, first, last, levels)

    shrink_low, shrink_high = _search(cost, low < 0, high > 0, rule.symmetric)
    return low * shrink_low, high * shrink_high


def divergence(
    counts: NDArray[np.int64], first: NDArray[np.intp], last: NDArray[np.intp], levels: int
) -> Floats:
    """KL(P || Q) in nats of windows [first, last) of a histogram, each cut into `levels` levels.

    counts: (bins,); first, last: (windows,); inf for a window with fewer bins than levels.
    """
    total = counts.sum()
    below = _prefix(counts)
    filled = _prefix(counts > 0)
    entropy_of = _prefix(_x_log_x(counts))
    cuts = first[:, None] + (np.arange(levels + 1) * (last - first)[:, None]) // levels
    inside = np.diff(below[cuts], axis=1).astype(np.float64)
    bins = np.diff(filled[cuts], axis=1)
    mass = inside.copy()
    p_log_p = entropy_of[last] - entropy_of[first]
    for end, level, outliers in ((first, 0, below[first]), (last - 1, -1, total - below[last])):
        mass[:, level] += outliers
        bins[:, level] += (counts[end] == 0) & (outliers > 0)
        p_log_p += _x_log_x(counts[end] + outliers) - _x_log_x(counts[end])
    log_q = np.log(np.maximum(inside, EMPTY) / np.maximum(bins, 1))
    kept = np.log(np.maximum(inside.sum(axis=1), EMPTY))
    kl = (p_log_p - (mass * log_q).sum(axis=1)) / total - np.log(total) + kept
    return np.where(last - first < levels, np.inf, kl)


def mse(observer: HistogramObserver, rule: Rule) -> tuple[float, float]:
    """The range of least expected squared error; both ends are searched."""
    return _least_error(observer, rule, None)


def _least_error(
    observer: HistogramObserver, rule: Rule, importance: Floats | None
) -> tuple[float, float]:
    low, high = minmax(observer, rule)

    def cost(lows: Floats, highs: Floats) -> Floats:
        scale = (highs * high - lows * low) / (rule.levels - 1)
        zero = np.rint(-lows * low / scale)
        return squared_error(observer, scale, zero, rule.levels, importance)

    shrink_low, shrink_high = _search(cost, low < 0, high > 0, rule.symmetric)
    return low * shrink_low, high * shrink_high


def output(observer: HistogramObserver, rule: Rule) -> tuple[float, float]:
    """The range of least expected error of what reads the tensor."""
    return _least_error(observer, rule, rule.importance)


def importance(observer: HistogramObserver, u: Floats, m: Floats) -> Floats | None:
    """ω of each bin, from u_j and m_j of the channels; None where no channel counts."""
    is_live = (m > 0) & np.isfinite(m) & np.isfinite(u)
    u, scale = u[is_live], np.sqrt(2 / m[is_live])
    if not u.any():
        return None
    logs = np.log(scale) - np.abs(centres(observer))[:, None] * scale
    shares = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(shares @ u / (shares.sum(axis=1) * u.mean()))


def _closed(
    form: Callable[[Points, int, bool], tuple[float, float]],
) -> Callable[[HistogramObserver, Rule], tuple[float, float]]:
    """A range in closed form, within the one of the data; that one where the form has none."""

    def method(observer: HistogramObserver, rule: Rule) -> tuple[float, float]:
        limits = minmax(observer, rule)
        filled = np.flatnonzero(observer.counts)
        counts = observer.counts[filled].astype(np.float64)
        points = Points(centres(observer)[filled], counts, counts)
        low, high = form(points, rule.bits, rule.symmetric)
        low, high = max(min(low, 0.0), limits[0]), min(max(high, 0.0), limits[1])
        return (low, high) if low < high else limits

    return method


def squared_error(
    observer: HistogramObserver,
    scale: Floats,
    zero: Floats,
    levels: int,
    importance: Floats | None = None,
) -> Floats:
    """E[(x - q(x))^2] of quantizers of a tensor: scale (n,), zero point in 0 .. levels - 1 (n,).

    importance: ω of each bin.
    """
    filled = np.flatnonzero(observer.counts)
    unit = observer.width  # in which float32 cannot overflow
    x = (centres(observer)[filled] / unit).astype(np.float32)
    shares = observer.counts[filled] / max(observer.binned, 1)
    weights = (shares if importance is None else shares * importance[filled]).astype(np.float32)
    s, z = (scale / unit).astype(np.float32)[:, None], zero.astype(np.float32)[:, None]
    error = x / s
    np.rint(error, out=error)
    np.clip(error, -z, levels - 1 - z, out=error)
    error *= s
    error -= x
    np.square(error, out=error)
    return np.asarray((error @ weights).astype(np.float64) * unit**2)


def centres(observer: HistogramObserver) -> Floats:
    """Middle of each of the 4,095 bins, within the seen minimum and maximum; zero for bin 0."""
    j = np.arange(1 - SIDE, SIDE)
    middle = (j + np.sign(j) / 2) * observer.width
    return np.asarray(np.clip(middle, observer.low, observer.high) * (j != 0))


def _search(
    cost: Callable[[Floats, Floats], Floats], has_low: bool, has_high: bool, is_joint: bool
) -> tuple[float, float]:
    """Fractions of the full (low, high) with least cost, by line searches: both ends, then each.

    A line is searched on a coarse grid, then on a fine one around its best point; the fewer lines,
    the finer. Ties go to the wider range.
    """
    both, low_only, high_only = np.array([[1, 1], [1, 0], [0, 1]], bool)
    is_line = is_joint or not (has_low and has_high)
    lines = [both] if is_line else [both, high_only, low_only, high_only, low_only]
    count = CANDIDATES // len(lines)
    coarse = np.arange(count, 0, -1) / count
    near = np.linspace(1, -1, count + 1) / count
    ends = np.ones(2)
    for line in lines:
        ends = _best(cost, ends, line, coarse)
        ends = _best(cost, ends, line, np.clip(ends[line][0] + near, near[0] / 32, 1))
    return float(ends[0]), float(ends[1])


def _best(
    cost: Callable[[Floats, Floats], Floats], ends: Floats, line: NDArray[np.bool_], steps: Floats
) -> Floats:
    """The best of `ends` and of the points that have the steps in place of the ends on the line."""
    points = np.vstack([ends, np.where(line, steps[:, None], ends)])
    return np.asarray(points[np.argmin(cost(points[:, 0], points[:, 1]))])


def _magnitudes(observer: HistogramObserver) -> NDArray[np.int64]:
    """Histogram of |x|: 2,048 bins."""
    folded = observer.counts[SIDE - 1 :].copy()
    folded[1:] += observer.counts[SIDE - 2 :: -1]
    return folded


def _prefix(values: NDArray[Any]) -> NDArray[Any]:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0], np.cumsum(values)])


def _x_log_x(counts: NDArray[np.int64]) -> Floats:
    return np.asarray(counts * np.log(np.maximum(counts, 1)))


METHODS: dict[str, Callable[[HistogramObserver, Rule], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
    "aciq": _closed(aciq),
    "hwgq": _closed(hwgq),
    "output": output,
}
