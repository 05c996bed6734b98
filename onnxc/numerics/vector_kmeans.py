"""Codewords for vectors: weighted k-means.

For vectors x_n with a weight for each coordinate, w_n, codewords c_1 … c_K are sought that make

    D = Σ_n min_k Σ_i w_ni (x_ni − c_ki)²

small: Lloyd's steps (1982) from a start that draws one vector after the other with what D still is
as the odds (Arthur 2007, k-means++). Codewords that nothing takes begin again where D is largest.
Of many vectors some are looked at, drawn at random.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS, SETTLED = 16, 3e-3  # of Lloyd; a gain in D that ends them
MOST, FEWEST = 32, 4096  # vectors that are looked at: for each codeword, and at least


def kmeans(x: Floats, w: Floats, count: int, seed: int = 0) -> Floats:
    """Codewords (count, s) of vectors x (n, s) with weights w (n, s); fewer where x has fewer."""
    rng = np.random.default_rng(seed)
    most = max(MOST * count, FEWEST)
    if len(x) > most:
        chosen = rng.choice(len(x), most, replace=False)
        x, w = x[chosen], w[chosen]
    distinct = np.unique(x, axis=0)
    if len(distinct) <= count:
        return distinct
    return _lloyd(x, w, _plus_plus(x, w, count, rng))


def _plus_plus(x: Floats, w: Floats, count: int, rng: np.random.Generator) -> Floats:
    odds, chosen = np.sum(w * x * x, axis=1) + np.finfo(float).tiny, list[int]()
    for step in range(count):
        total = odds.sum()
        p = odds / total if total > 0 else np.full(len(x), 1 / len(x))
        chosen.append(int(rng.choice(len(x), p=p)))
        gap = np.sum(w * (x - x[chosen[-1]]) ** 2, axis=1)
        odds = gap if not step else np.minimum(odds, gap)
    return x[chosen]


def _lloyd(x: Floats, w: Floats, c: Floats) -> Floats:
    wx, own = w * x, np.sum(w * x * x, axis=1)
    last = np.inf
    for _ in range(STEPS):
        costs = w @ (c * c).T - 2 * (wx @ c.T)
        a = np.argmin(costs, axis=1)
        gap = np.maximum(np.take_along_axis(costs, a[:, None], 1)[:, 0] + own, 0)
        above, below = (_summed(a, v, len(c)) for v in (wx, w))
        c = np.divide(above, below, out=c.copy(), where=below > 0)
        unused = np.flatnonzero(np.bincount(a, minlength=len(c)) == 0)
        c[unused] = x[np.argsort(-gap, kind="stable")[: len(unused)]]
        total = float(gap.sum())
        if not len(unused) and total > (1 - SETTLED) * last:
            break
        last = total
    return c


def _summed(a: NDArray[np.intp], rows: Floats, count: int) -> Floats:
    return np.stack([np.bincount(a, column, count) for column in rows.T], axis=1)
