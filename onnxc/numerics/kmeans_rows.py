"""Exact levels for each of many rows of numbers at once: weighted k-means on lines.

What `onnxc.numerics.kmeans` does for one line of many numbers, for many lines of few, by the plain
recursion: with D_k(j) the least cost of the first j numbers of a row on k levels,

    D_k(j) = min_i D_{k−1}(i) + cost(i, j),      i ≤ j

whose table of costs is small enough for PARTS numbers. More numbers than that are put into as many
bins of one width, each with the mean and the weight of what is in it (ZipML 2017, §3.2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

PARTS = 128  # numbers or bins of a row
CHUNK = 1 << 20  # costs that are compared at once


def exact_rows(x: Floats, w: Floats, count: int) -> Floats:
    """The `count` levels of each row of least Σ w (x − c)², sorted. x, w: (rows, numbers)."""
    order = np.argsort(x, axis=1, kind="stable")
    x, w = (np.take_along_axis(part, order, axis=1) for part in (x, w))
    if x.shape[1] > PARTS:
        x, w = _binned(x, w)
    step = max(1, CHUNK // (x.shape[1] + 1) ** 2)
    parts = [slice(begin, begin + step) for begin in range(0, len(x), step)]
    return np.concatenate([_levels(x[part], w[part], count) for part in parts])


def _binned(x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Means and weights of the bins of sorted rows; an empty bin has its middle and no weight."""
    rows, low = len(x), x[:, :1]
    width = np.maximum(x[:, -1:] - low, np.finfo(np.float64).tiny) / PARTS
    place = np.minimum(((x - low) / width).astype(np.intp), PARTS - 1)
    flat = (place + PARTS * np.arange(rows)[:, None]).reshape(-1)
    total, first = (
        np.bincount(flat, part.reshape(-1), rows * PARTS).reshape(rows, PARTS)
        for part in (w, w * (x - low))
    )
    middle = (np.arange(PARTS) + 0.5) * width
    return low + np.divide(first, total, out=middle, where=total > 0), np.asarray(total, np.float64)


def _levels(x: Floats, w: Floats, count: int) -> Floats:
    """The levels of a few sorted rows."""
    middle = x.mean(axis=1, keepdims=True)
    sums = [np.pad(np.cumsum(w * (x - middle) ** k, axis=1), ((0, 0), (1, 0))) for k in range(3)]
    ends = _ends(_costs(sums), count)
    mass, moment = (np.diff(np.take_along_axis(s, ends, axis=1), axis=1) for s in sums[:2])
    first = np.take_along_axis(x, np.minimum(ends[:, :-1], x.shape[1] - 1), axis=1) - middle
    return np.sort(middle + np.divide(moment, mass, out=first, where=mass > 0), axis=1)


def _costs(sums: list[Floats]) -> Floats:
    """Of the numbers from i up to j on one level, (rows, i, j); ∞ for j before i."""
    n, first, second = (s[:, None, :] - s[:, :, None] for s in sums)
    spread = np.divide(first * first, n, out=np.zeros_like(n), where=n > 0)
    before = np.tri(n.shape[1], k=-1, dtype=bool)
    return np.where(before, np.inf, np.maximum(second - spread, 0))


def _ends(costs: Floats, count: int) -> Indices:
    """Where the intervals of the levels begin, and the end of the last one, (rows, count + 1)."""
    least, cuts = costs[:, 0], []
    for _ in range(1, count):
        total = least[:, :, None] + costs
        cuts.append(np.argmin(total, axis=1))
        least = np.take_along_axis(total, cuts[-1][:, None], axis=1)[:, 0]
    ends = [np.full((len(costs), 1), costs.shape[1] - 1)]
    for cut in reversed(cuts):
        ends.append(np.take_along_axis(cut, ends[-1], axis=1))
    ends.append(np.zeros_like(ends[0]))
    return np.concatenate(ends[::-1], axis=1)
