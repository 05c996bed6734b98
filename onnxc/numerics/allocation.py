"""How many classes of channels each group loses, under one budget for the model.

Counts k_g of the classes that go are sought with

    min Σ_g D_g(k_g)    subject to    cost(k) ≤ budget · cost(0),

D_g being the damage done by the first k_g classes of g, and cost any function of all counts, in
multiply-accumulates or milliseconds: a layer's work goes with its input channels times its output
channels, so that what a group saves depends on what its neighbours have lost.

Damage adds up over groups where it is an error of the model's outputs that is measured for one
group at a time, at a few counts (`through`); the relative errors of the layers alone know nothing
of what comes behind them.

Greedily first, each time the jump of the least damage for what it saves as things stand, over all
jumps of a group and not only the next one: a damage curve need not be convex, and the path runs
along its hull. Then by exchange: as long as a pair of groups does less damage with other counts
near by, within the budget, the best such pair takes them. Yang 2019 ("ECC") and He 2018 ("AMC")
train for what is solved here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Cost = Callable[[Indices], Floats]  # counts that go, (n, groups), to costs, (n,)

CLOSE = 1e-9  # relative: budgets are met, and exchanges count, to rounding
NEAR = 2  # allowed counts, up and down, that an exchange looks at
EXCHANGES = 200  # at most


@dataclass(frozen=True)
class Curve:
    """The damage of a group: D_g(k) for k = 0, …, and what limits k.

    damage: (steps + 1,), D(0) = 0; classes that may not go have no step. classes: n, of which at
    least `least` (a share) stay, and one. multiple: of how many channels the rest must be, each
    class being `width` of them; all of them may always stay.
    """

    damage: Floats
    classes: int
    least: float = 0.1
    multiple: int = 1
    width: int = 1

    @property
    def counts(self) -> Indices:
        """The k that are allowed, in growing order, from 0."""
        most = min(
            len(self.damage) - 1, self.classes - max(1, math.ceil(self.least * self.classes))
        )
        k = np.arange(max(most, 0) + 1)
        left = (self.classes - k) * self.width
        return np.asarray(k[(k == 0) | (left % self.multiple == 0)])


def through(damage: Floats, counts: Sequence[int], errors: Sequence[float]) -> Floats:
    """The curve through errors measured at some counts, shaped like `damage` between them.

        D(k) = r(k) · damage(k),   r(k) = error / damage where measured, linear between

    and never falling. damage: (steps + 1,), such as that of `onnxc.numerics.saliency`. counts:
    above 0, growing.
    """
    at = np.asarray(counts, np.intp)
    known = at[damage[at] > 0]
    if not len(known):
        return np.array(damage, np.float64)
    found = np.asarray(errors, np.float64)[damage[at] > 0]
    ratio = np.interp(np.arange(len(damage)), known, found / damage[known])
    return np.asarray(np.maximum.accumulate(ratio * damage))


def uniform(curves: Sequence[Curve], ratio: float) -> list[int]:
    """The allowed count of each group that is nearest to ratio · n; of two, the smaller one."""
    return [int(c.counts[np.argmin(np.abs(c.counts - ratio * c.classes))]) for c in curves]


def uniform_under(curves: Sequence[Curve], cost: Cost, budget: float) -> list[int]:
    """The counts of the smallest ratio, in hundredths, that meets the budget, or the largest."""
    tried = [uniform(curves, ratio / 100) for ratio in range(100)]
    meets = cost(np.array(tried)) <= _limit(curves, cost, budget)
    return tried[int(np.argmax(meets))] if meets.any() else tried[-1]


def allocate(curves: Sequence[Curve], cost: Cost, budget: float) -> list[int]:
    """k_g of each group. budget: a share of cost(0); counts are the largest if it cannot be met."""
    limit = _limit(curves, cost, budget)
    counts = np.zeros(len(curves), np.intp)
    while (now := float(cost(counts[None])[0])) > limit:
        jump = _best_jump(curves, cost, counts, now, limit)
        if jump is None:
            return counts.tolist()
        counts = jump
    for _ in range(EXCHANGES):
        better = _exchange(curves, cost, counts, limit)
        if better is None:
            break
        counts = better
    return counts.tolist()


def _limit(curves: Sequence[Curve], cost: Cost, budget: float) -> float:
    return budget * float(cost(np.zeros((1, len(curves)), np.intp))[0]) * (1 + CLOSE)


def _best_jump(
    curves: Sequence[Curve], cost: Cost, counts: Indices, now: float, limit: float
) -> Indices | None:
    """Counts after the jump of the least damage for what it saves, as far as it is needed."""
    options = _options(counts, [((g,), [(k,)]) for g, c in enumerate(curves) for k in c.counts])
    options = options[(options > counts).any(axis=1)]
    if not len(options):
        return None
    saved = np.minimum(now - cost(options), now - limit)
    added = _damage(curves, options) - _damage(curves, counts[None])
    price = np.where(saved > 0, added / np.maximum(saved, np.finfo(np.float64).tiny), np.inf)
    best = int(np.argmin(price))
    return options[best] if np.isfinite(price[best]) else None


def _exchange(curves: Sequence[Curve], cost: Cost, counts: Indices, limit: float) -> Indices | None:
    """Counts after the exchange between two groups that helps most; None where none helps."""
    near = [_near(curve, int(k)) for curve, k in zip(curves, counts, strict=True)]
    pairs = itertools.combinations(range(len(curves)), 2) if len(curves) > 1 else [(0, 0)]
    moves = [((a, b), list(itertools.product(near[a], near[b]))) for a, b in pairs]
    options = _options(counts, moves)
    damage, before = _damage(curves, options), float(_damage(curves, counts[None])[0])
    options = options[damage < before * (1 - CLOSE)]
    options = options[cost(options) <= limit] if len(options) else options
    return options[np.argmin(_damage(curves, options))] if len(options) else None


def _near(curve: Curve, k: int) -> list[int]:
    """Allowed counts around k."""
    at = int(np.searchsorted(curve.counts, k))
    return [int(i) for i in curve.counts[max(at - NEAR, 0) : at + NEAR + 1]]


def _options(
    counts: Indices, moves: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]]
) -> Indices:
    """The counts with those of some groups replaced, (n, groups)."""
    groups = [where for where, values in moves for _ in values]
    values = [value for _, some in moves for value in some]
    options = np.tile(counts, (len(values), 1))
    if values:
        options[np.arange(len(values))[:, None], np.array(groups)] = np.array(values)
    return options


def _damage(curves: Sequence[Curve], options: Indices) -> Floats:
    parts = (curve.damage[options[:, g]] for g, curve in enumerate(curves))
    return np.asarray(sum(parts))
