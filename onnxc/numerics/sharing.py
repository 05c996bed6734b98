"""METHODS: how the levels that weights share are found from the weights, before outputs count.

    kmeans    Lloyd's steps, all weights alike                        Han 2016, Gong 2015
    hessian   the same, weighted by the diagonal of the Hessian       Choi 2017, §3
    dp        the exact optimum of that                               Wu 1991, ZipML 2017
    ecsq      entropy-constrained: a level also costs what its code is long    Choi 2017, §4
    gmm       soft sharing by a mixture of Gaussians, then hard       Ullrich 2017

Of **ecsq**, with p_a the share of weights on level a and F their number,

    min Σ w (x − c_a)² + λ Σ −log₂ p_a,      λ = price · 2 ln 2 · D / F

D being what the levels of `hessian` cost: at high resolution a bit divides D by four, so that at a
price of 1 a bit of code costs what it would save there. Levels that nobody takes vanish.

Of **gmm**, the likelihood of Σ_a π_a N(x; c_a, σ_a²) is climbed by EM; then each weight goes to the
component that most likely made it. σ_a is bounded, and the bound shrinks from step to step: of free
widths few components would take all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.kmeans import Init, Points, exact, lloyd, start

Floats = NDArray[np.float64]
Method = Literal["kmeans", "hessian", "ecsq", "gmm", "dp"]

STEPS = 60  # of ecsq and of EM
NARROWEST = 0.02  # σ of a component, of the distance between levels on a linear grid
RARE = 1e-9


@dataclass(frozen=True)
class Wish:
    """Levels to be found: how many, from which start, and what a bit of code costs.

    unit: λ itself, in place of the price.
    """

    count: int
    init: Init = "linear"
    price: float = 1.0
    seed: int = 0
    unit: float | None = None


def _kmeans(points: Points, wish: Wish) -> Floats:
    return lloyd(points, start(points, wish.count, wish.init, wish.seed))


def _dp(points: Points, wish: Wish) -> Floats:
    return exact(points, wish.count)


def _ecsq(points: Points, wish: Wish) -> Floats:
    levels = _kmeans(points, wish)
    unit = bit_price(points, levels, wish.price) if wish.unit is None else wish.unit
    shares = np.full(len(levels), 1 / len(levels))
    total = points.n.sum()
    for _ in range(STEPS):
        lengths = -np.log2(np.maximum(shares, RARE))
        gap = (points.x[:, None] - levels) ** 2
        code = np.argmin(points.w[:, None] * gap + unit * points.n[:, None] * lengths, axis=1)
        n, w, wx = (
            np.bincount(code, v, len(levels)) for v in (points.n, points.w, points.w * points.x)
        )
        alive = n > 0
        moved = np.divide(wx, w, out=levels.copy(), where=w > 0)[alive]
        is_settled = len(moved) == len(levels) and np.allclose(moved, levels, rtol=1e-7, atol=0)
        levels, shares = moved, n[alive] / total
        if is_settled:
            break
    return np.sort(levels)


def bit_price(points: Points, levels: Floats, price: float) -> float:
    """λ of the module's docstring."""
    return price * 2 * math.log(2) * points.error(levels) / float(points.n.sum())


def _gmm(points: Points, wish: Wish) -> Floats:
    x, share = points.x[:, None], points.w / points.w.sum()
    levels = start(points, wish.count, wish.init, wish.seed)
    gap = max(float(points.x[-1] - points.x[0]) / wish.count, 1e-300)
    variance, pi = np.full(len(levels), gap**2 / 4), np.full(len(levels), 1 / len(levels))
    for step in range(STEPS):
        widest = gap * NARROWEST ** (step / STEPS)
        r = _responsibility(x, levels, variance, pi) * share[:, None]
        mass = r.sum(axis=0)
        alive = mass > RARE
        r, pi = r[:, alive], mass[alive]
        levels = (r * x).sum(axis=0) / pi
        spread = (r * (x - levels) ** 2).sum(axis=0) / pi
        variance = np.clip(spread, (NARROWEST * gap) ** 2, widest**2)
    chosen = np.argmax(_responsibility(x, levels, variance, pi), axis=1)
    return np.unique(levels[np.unique(chosen)])


def _responsibility(x: Floats, levels: Floats, variance: Floats, pi: Floats) -> Floats:
    """Share of each component in each point."""
    logs = np.log(pi) - 0.5 * (np.log(variance) + (x - levels) ** 2 / variance)
    odds = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Row:
    """find: sorted levels of points. is_weighted: by the diagonal of the Hessian.

    has_price: whether code length counts, also in what follows.
    """

    find: Callable[[Points, Wish], Floats]
    is_weighted: bool = True
    has_price: bool = False


METHODS: dict[str, Row] = {
    "kmeans": Row(_kmeans, is_weighted=False),
    "hessian": Row(_kmeans),
    "ecsq": Row(_ecsq, has_price=True),
    "gmm": Row(_gmm),
    "dp": Row(_dp),
}


def share(
    numbers: Floats, weights: Floats | None, method: str, wish: Wish, has_zero: bool = False
) -> Floats:
    """Sorted levels for numbers, at most wish.count; has_zero: one of them is 0."""
    row = METHODS[method]
    wanted = replace(wish, count=wish.count - has_zero)
    kept = numbers.reshape(-1) != 0 if has_zero else np.ones(numbers.size, bool)
    w = None if weights is None or not row.is_weighted else weights.reshape(-1)[kept]
    if not kept.any():
        return np.zeros(1)
    points = Points.of(numbers.reshape(-1)[kept], w)
    found = row.find(points, wanted)
    return np.unique(np.append(found, 0.0)) if has_zero else np.unique(found)
