"""How many classes of channels each group loses, under one budget for the model.

Group g of n_g classes keeps the share s_g = 1 − k_g / n_g after losing k_g. What the model costs,
in multiply-accumulates or milliseconds, is a sum of terms,

    cost(k) = Σ_t cost_t Π_{g in groups of t} s_g,

as a layer's work is proportional to its input and its output channels: what a group saves depends
on what its neighbours have lost. Counts are sought with

    min Σ_g D_g(k_g)    subject to    cost(k) ≤ budget · cost(0),

D_g being the damage done by the first k_g classes of g: greedily, each time the jump of the least
damage for what it saves now, over all jumps of a group and not only the next (so the damage may be
any curve: the greedy path runs along its convex hull); then by exchange: as long as a pair of
groups has counts that do less damage within the budget, the best such pair takes them. Yang 2019
("ECC") and He 2018 ("AMC") learn what is solved for here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

CLOSE = 1e-9  # relative: budgets are met, and exchanges count, to rounding
EXCHANGES = 200  # pairs of groups that take other counts, at most


@dataclass(frozen=True)
class Curve:
    """The damage of a group: D_g(k) for k = 0, …, and what limits k.

    damage: (steps + 1,), D(0) = 0; classes that may not go have no step. classes: n, of which at
    least `least` (a share) stay. multiple: of how many channels the rest must be, each class being
    `width` of them; all of them may always stay.
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


@dataclass(frozen=True)
class Term:
    """A part of the cost that is proportional to the kept share of each of some groups."""

    cost: float
    groups: tuple[int, ...]


def total(terms: Sequence[Term], curves: Sequence[Curve], counts: Sequence[int]) -> float:
    """cost(k)."""
    shares = [1 - k / curve.classes for k, curve in zip(counts, curves, strict=True)]
    return sum(term.cost * math.prod(shares[g] for g in term.groups) for term in terms)


def uniform(curves: Sequence[Curve], ratio: float) -> list[int]:
    """The allowed count of each group that is nearest to ratio · n; of two, the smaller one."""
    return [int(c.counts[np.argmin(np.abs(c.counts - ratio * c.classes))]) for c in curves]


def uniform_under(curves: Sequence[Curve], terms: Sequence[Term], budget: float) -> list[int]:
    """The counts of the smallest ratio, in hundredths, that meets the budget, or the largest."""
    limit = _limit(curves, terms, budget)
    for ratio in np.arange(0, 1, 0.01):
        found = uniform(curves, float(ratio))
        if total(terms, curves, found) <= limit:
            break
    return found


def allocate(curves: Sequence[Curve], terms: Sequence[Term], budget: float) -> list[int]:
    """k_g of each group. budget: a share of cost(0); counts are the largest if it cannot be met."""
    limit = _limit(curves, terms, budget)
    counts = [0] * len(curves)
    while total(terms, curves, counts) > limit:
        jump = _best_jump(curves, terms, counts, limit)
        if jump is None:
            return counts
        counts[jump[0]] = jump[1]
    for _ in range(EXCHANGES):
        if not _exchange(curves, terms, counts, limit):
            break
    return counts


def _limit(curves: Sequence[Curve], terms: Sequence[Term], budget: float) -> float:
    return budget * total(terms, curves, [0] * len(curves)) * (1 + CLOSE)


def _best_jump(
    curves: Sequence[Curve], terms: Sequence[Term], counts: list[int], limit: float
) -> tuple[int, int] | None:
    """The group and the count of the least damage for what it saves, as far as it is needed."""
    needed = total(terms, curves, counts) - limit
    best, least = None, np.inf
    for g, curve in enumerate(curves):
        options = curve.counts[curve.counts > counts[g]]
        saved = _rate(terms, curves, counts, g) * (options - counts[g])
        if not len(options) or saved[0] <= 0:
            continue
        price = (curve.damage[options] - curve.damage[counts[g]]) / np.minimum(saved, needed)
        at = int(np.argmin(price))
        if price[at] < least:
            best, least = (g, int(options[at])), float(price[at])
    return best


def _rate(terms: Sequence[Term], curves: Sequence[Curve], counts: list[int], g: int) -> float:
    """What one more class of g saves now."""
    kept = [1 - k / c.classes for k, c in zip(counts, curves, strict=True)]
    parts = (
        t.cost * math.prod(kept[h] for h in t.groups if h != g) for t in terms if g in t.groups
    )
    return sum(parts) / curves[g].classes


def _exchange(
    curves: Sequence[Curve], terms: Sequence[Term], counts: list[int], limit: float
) -> bool:
    """Give the pair of groups for which it helps most the counts that are best for both."""
    best, gain = None, CLOSE * _damage(curves, counts)
    pairs = itertools.combinations(range(len(curves)), 2) if len(curves) > 1 else [(0, 0)]
    for a, b in pairs:
        damage, cost = _plane(curves, terms, counts, a, b)
        damage = np.where(cost <= limit, damage, np.inf)
        at = np.unravel_index(int(np.argmin(damage)), damage.shape)
        now = curves[a].damage[counts[a]] + (curves[b].damage[counts[b]] if a != b else 0)
        if now - damage[at] > gain:
            best, gain = (a, b, at), float(now - damage[at])
    if best is None:
        return False
    a, b, (i, j) = best
    counts[b] = int(curves[b].counts[j])
    counts[a] = int(curves[a].counts[i])
    return True


def _damage(curves: Sequence[Curve], counts: list[int]) -> float:
    return float(sum(c.damage[k] for c, k in zip(curves, counts, strict=True)))


def _plane(
    curves: Sequence[Curve], terms: Sequence[Term], counts: list[int], a: int, b: int
) -> tuple[Floats, Floats]:
    """Damage of a and b, and cost of all, for each pair of their counts; one row if a is b."""
    kept = [1 - k / c.classes for k, c in zip(counts, curves, strict=True)]
    x = 1 - curves[a].counts[:, None] / curves[a].classes
    y = 1 - curves[b].counts[None, :] / curves[b].classes if a != b else np.ones((1, 1))
    parts = np.zeros((2, 2))
    for term in terms:
        inside = (int(a in term.groups), int(a != b and b in term.groups))
        parts[inside] += term.cost * math.prod(kept[g] for g in term.groups if g not in (a, b))
    cost = parts[0, 0] + parts[1, 0] * x + parts[0, 1] * y + parts[1, 1] * x * y
    damage = curves[a].damage[curves[a].counts][:, None]
    if a != b:
        damage = damage + curves[b].damage[curves[b].counts][None, :]
    return damage + 0 * cost, cost
