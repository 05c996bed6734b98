"""Levels for numbers on a line: weighted k-means, exact or by Lloyd's steps.

For numbers x with weights w, levels c_1 < … < c_K are sought that make

    D = Σ w (x − c(x))²,      c(x) the level nearest to x,

small. Of sorted numbers each level has an interval, so that prefix sums of w, w x and w x² give the
cost of any interval at once. **Exact**: with D_k(j) the least cost of the first j numbers on k
levels,

    D_k(j) = min_i D_{k−1}(i) + cost(i, j),

and the best i grows with j, so that halving the range costs n log n a level (Wu 1991; Grønlund
2017). **Lloyd** (1982): levels move to the means of their intervals until they rest, from a start
that is linear, by density or random (Han 2016, "Deep Compression", §3.1; Arthur 2007, k-means++).
Weighted by the diagonal of the Hessian it is Choi 2017 ("Towards the limit of network
quantization", §3).

Many numbers are first put into bins, each with the mean and the weight of what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Init = Literal["linear", "density", "kmeans++"]

BINS = 4096
STEPS = 100  # of Lloyd
SETTLED = 1e-7  # of the range of the numbers: a move of levels that ends them


@dataclass(frozen=True)
class Points:
    """Sorted distinct numbers x with weights w, and n, how many numbers each one stands for."""

    x: Floats
    w: Floats
    n: Floats

    @classmethod
    def of(cls, numbers: Floats, weights: Floats | None = None, bins: int = BINS) -> Points:
        """Of numbers of any shape; more than `bins` distinct ones are put into as many bins."""
        x = np.asarray(numbers, np.float64).reshape(-1)
        w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).reshape(-1)
        w = w if w.any() else np.ones(len(x))
        distinct, place = np.unique(x, return_inverse=True)
        if len(distinct) <= bins:
            return cls(distinct, *(_binned(place, v, len(distinct)) for v in (w, 1.0 + 0 * x)))
        low, high = distinct[0], distinct[-1]
        place = np.minimum((x - low) * (bins / (high - low)), bins - 1).astype(np.intp)
        n, total, plain, heavy = (_binned(place, v, bins) for v in (1.0 + 0 * x, w, x, w * x))
        full = n > 0
        means = np.where(total > 0, heavy, plain)[full] / np.where(total > 0, total, n)[full]
        return cls(means, total[full], n[full])

    def sums(self) -> tuple[Floats, Floats, Floats]:
        """Prefix sums of w, w x and w x², each starting with 0."""
        parts = (self.w, self.w * self.x, self.w * self.x**2)
        first, second, third = (np.concatenate([[0.0], np.cumsum(part)]) for part in parts)
        return first, second, third

    def error(self, levels: Floats) -> float:
        """D, with each number on its nearest level."""
        return float(self.w @ (self.x - levels[nearest(self.x, levels)]) ** 2)


def _binned(place: Indices, v: Floats, count: int) -> Floats:
    """Sums of v in each bin."""
    return np.asarray(np.bincount(place, v, count), np.float64)


def nearest(x: Floats, levels: Floats) -> Indices:
    """The index of the nearest of sorted levels; between two, the upper one."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x, side="right")


def exact(points: Points, count: int) -> Floats:
    """The levels of least D, `count` of them or as many as there are points, sorted."""
    size = len(points.x)
    if size <= count:
        return points.x.copy()
    middle = np.average(points.x, weights=points.w if points.w.any() else None)
    S = Points(points.x - middle, points.w, points.n).sums()
    least = _costs(S, np.zeros(size + 1, np.intp), np.arange(size + 1))
    cuts = np.zeros((count, size + 1), np.intp)
    for level in range(1, count):
        least, cuts[level] = _one_more(least, S)
    ends = [size]
    for level in range(count - 1, 0, -1):
        ends.append(int(cuts[level, ends[-1]]))
    return _means(points, np.unique(np.array([0, *ends])))


def _costs(S: tuple[Floats, Floats, Floats], i: Indices, j: Indices) -> Floats:
    """Cost of the intervals [i, j) on one level each."""
    w, wx, wxx = (s[j] - s[i] for s in S)
    spread = np.divide(wx * wx, w, out=np.zeros_like(w), where=w > 0)
    return np.asarray(np.maximum(wxx - spread, 0))


def _one_more(least: Floats, S: tuple[Floats, Floats, Floats]) -> tuple[Floats, Indices]:
    """D_k(j) and its best i from D_{k−1}, for all j; ranges are halved together."""
    size = len(least) - 1
    found, best = np.zeros(size + 1), np.zeros(size + 1, np.intp)
    ends = np.array([-1, size + 1])  # solved, or outside
    bounds = np.array([0, size])  # the best i of these
    while len(ends) < size + 3:
        middle = (ends[1:] + ends[:-1]) // 2
        is_new = middle > ends[:-1]
        j, low, high = middle[is_new], bounds[:-1][is_new], bounds[1:][is_new]
        found[j], best[j] = _least(least, S, j, low, np.minimum(high, j))
        places = np.flatnonzero(is_new) + 1
        ends, bounds = np.insert(ends, places, j), np.insert(bounds, places, best[j])
    return found, best


def _least(
    least: Floats, S: tuple[Floats, Floats, Floats], j: Indices, low: Indices, high: Indices
) -> tuple[Floats, Indices]:
    """The least D_{k−1}(i) + cost(i, j) over low ≤ i ≤ high, and the first such i."""
    lengths = high - low + 1
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    i = np.arange(lengths.sum()) + np.repeat(low - starts, lengths)
    costs = least[i] + _costs(S, i, np.repeat(j, lengths))
    lowest = np.minimum.reduceat(costs, starts)
    hits = np.flatnonzero(costs == np.repeat(lowest, lengths))
    return lowest, i[hits[np.searchsorted(hits, starts)]]


def _means(points: Points, ends: Indices) -> Floats:
    """The mean of each interval between ends."""
    w, wx, _ = (np.diff(s[ends]) for s in points.sums())
    plain = np.add.reduceat(points.n * points.x, ends[:-1]) / np.add.reduceat(points.n, ends[:-1])
    return np.asarray(np.divide(wx, w, out=plain, where=w > 0))


def lloyd(points: Points, levels: Floats, pinned: int | None = None) -> Floats:
    """Levels after Lloyd's steps from a start, sorted. pinned: the index of one that stays."""
    S = points.sums()
    levels, kept = np.sort(levels), None if pinned is None else levels[pinned]
    width = max(float(points.x[-1] - points.x[0]), 1e-300)
    for _ in range(STEPS):
        cuts = np.searchsorted(points.x, (levels[1:] + levels[:-1]) / 2)
        w, wx, _ = (np.diff(s[np.concatenate([[0], cuts, [len(points.x)]])]) for s in S)
        moved = np.divide(wx, w, out=levels.copy(), where=w > 0)
        if kept is not None:
            moved[levels == kept] = kept
        step, levels = float(np.abs(moved - levels).max()), np.sort(moved)
        if step < SETTLED * width:
            break
    return levels


def _linear(points: Points, count: int, rng: np.random.Generator) -> Floats:
    """Evenly spread over the range: it keeps the few large numbers (Han 2016)."""
    return np.linspace(points.x[0], points.x[-1], count)


def _density(points: Points, count: int, rng: np.random.Generator) -> Floats:
    """Quantiles: as many numbers for each level."""
    shares = (np.cumsum(points.n) - points.n / 2) / points.n.sum()
    return np.asarray(np.interp((np.arange(count) + 0.5) / count, shares, points.x))


def _plus_plus(points: Points, count: int, rng: np.random.Generator) -> Floats:
    """One after the other at random, with w (x − c(x))² as the odds."""
    distance, chosen = np.ones(len(points.x)), list[float]()
    for _ in range(count):
        odds = points.w * distance
        odds = odds if odds.any() else points.n
        chosen.append(float(points.x[rng.choice(len(odds), p=odds / odds.sum())]))
        gap = (points.x - chosen[-1]) ** 2
        distance = gap if len(chosen) == 1 else np.minimum(distance, gap)
    return np.sort(chosen)


INITS: dict[str, Callable[[Points, int, np.random.Generator], Floats]] = {
    "linear": _linear,
    "density": _density,
    "kmeans++": _plus_plus,
}


def start(points: Points, count: int, init: Init, seed: int = 0) -> Floats:
    """`count` sorted levels to start from."""
    return INITS[init](points, count, np.random.default_rng(seed))
