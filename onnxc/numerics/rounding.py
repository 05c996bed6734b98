"""Weights on a grid of integers, rounded so that the outputs of their layer stay.

    ŵ = s (q − z),      q in [low, high] of the grid (`onnxc.numerics.affine`)

with one scale s for each output, or one for each block of columns of an output. METHODS, which look
at the outputs of the layer, and one that draws:

    nearest     each weight by itself
    gptq        columns feed forward what they miss,       Frantar 2022; Chee 2023
                or nearest for outputs that lose less so
    descent     from the better of both, codes by coordinate descent on the error of the outputs
                and scales for these codes, in turn        the objective of Nagel 2020, AdaRound
    admm        the same from the best of these and ADMM   Leng 2018; slow, for 3 bits and fewer
    stochastic  q = ⌊w / s + u⌋, u uniform in [0, 1), over the whole range: E[ŵ] = w
                                                           Gupta 2015

**Scales** start where the range r max |w|, of several ratios r, leaves the least of

    Σ_j C_jj (w_j − ŵ_j)².

For given codes the best ones are those of least squares; of one for each output,

    s = (q C wᵀ) / (q C qᵀ)

with q short for q − z; blocks of an output ask for each other (`onnxc.numerics.coded`). Zero points
are integers of the grid, and stay where the first range puts them. Scales that are powers of two
(`shifts`) are too far apart to be solved for: each output takes the best of three in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics import coded, fixed
from onnxc.numerics.admm import joined
from onnxc.numerics.affine import TINY, Grid
from onnxc.numerics.coded import Coded
from onnxc.numerics.columns import Choose, Codes, Floats
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]
Snap = Callable[[Floats], Floats]  # positive scales to those that are allowed
Method = Literal["nearest", "gptq", "descent", "admm", "stochastic"]

FACTORS = (1.0, 0.9, 1.1)  # of scales, from which each output takes its best start
OCTAVES = (1.0, 0.5, 2.0)  # the same of powers of two
CLOSE = 1e-6  # of a scale, what rounding it to float32 takes
RATIOS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3)


def float32(scales: Floats) -> Floats:
    """Scales as files keep them."""
    return scales.astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Wish:
    """What a weight shall be put on. grid: of 2 bits or more; unsigned ones have zero points.

    block: columns of one scale, 0 for all of an output. is_mirrored: scales may be negative, so
    that the longer side of a signed grid may lie above 0. keeps_zeros: weights that are 0 stay 0.
    snap: which scales are allowed. is_free: whether they may be solved for. factors: of scales to
    start from. seed: of what is random.
    """

    grid: Grid
    block: int = 0
    is_mirrored: bool = False
    keeps_zeros: bool = False
    snap: Snap = float32
    is_free: bool = True
    factors: tuple[float, ...] = FACTORS
    seed: int = 0


def shifts(grid: Grid, seed: int = 0) -> Wish:
    """A wish for scales that are powers of two."""
    return Wish(grid, snap=fixed.nearest, is_free=False, factors=OCTAVES, seed=seed)


@dataclass(frozen=True)
class Rounded:
    """codes: integers (groups, outputs, d). scales, zeros: (groups, outputs, blocks)."""

    codes: Array
    scales: Floats
    zeros: Array
    block: int

    @property
    def weight(self) -> Floats:
        """Ŵ."""
        count = self.codes.shape[2]
        scales, zeros = (_over(part, self.block, count) for part in (self.scales, self.zeros))
        return np.asarray(scales * (self.codes - zeros))


@dataclass(frozen=True)
class Integers:
    """The family of `onnxc.numerics.coded` whose numbers are scales. kept: weights that stay 0."""

    wish: Wish
    zeros: Floats
    block: int
    kept: Array | None = None

    @property
    def is_free(self) -> bool:
        return self.wish.is_free

    def nearest(self, X: Floats, t: Floats) -> tuple[Codes, Floats]:
        s, z = (_over(part, self.block, X.shape[2]) for part in (t, self.zeros))
        q = np.clip(np.rint(X / s) + z, self.wish.grid.low, self.wish.grid.high)
        q = q if self.kept is None else np.where(self.kept, z, q)
        return q.astype(np.intp), s * (q - z)

    def choose(self, t: Floats) -> Choose:
        low, high = self.wish.grid.low, self.wish.grid.high

        def chosen(j: int, goal: Floats, power: Floats) -> tuple[Array, Floats]:
            s, z = t[..., j // self.block], self.zeros[..., j // self.block]
            q = np.minimum(np.maximum(np.rint(goal / s) + z, low), high)
            if self.kept is not None:
                q = np.where(self.kept[..., j], z, q)
            return q, s * (q - z)

        return chosen

    def _integers(self, codes: Codes) -> Floats:
        return np.asarray(codes - _over(self.zeros, self.block, codes.shape[2]))

    def spread(self, t: Floats, codes: Codes) -> Floats:
        return np.asarray(_over(t, self.block, codes.shape[2]) * self._integers(codes))

    def gather(self, codes: Codes, G: Floats) -> Floats:
        return _blocks_of(G * self._integers(codes), self.block)

    def power(self, codes: Codes, c: Floats) -> Floats:
        return _blocks_of(c * self._integers(codes) ** 2, self.block)

    def snap(self, t: Floats) -> Floats:
        sizes = self.wish.snap(np.maximum(np.abs(t), TINY))
        return np.asarray(np.where(t < 0, -sizes, sizes))


def _over(t: Array, block: int, count: int) -> Array:
    """A number of each block for each of its columns."""
    return t if t.shape[2] == 1 else np.repeat(t, block, axis=2)[..., :count]


def _blocks_of(G: Floats, block: int) -> Floats:
    """Sums over the columns of each block."""
    return np.asarray(np.add.reduceat(G, np.arange(0, G.shape[2], block), axis=2))


def rounded(W: Floats, E: Quadratic, wish: Wish, method: Method = "descent") -> Rounded:
    """W (groups, outputs, d) on the integers of a grid."""
    block = min(wish.block, W.shape[2]) or W.shape[2]
    kept = (W == 0) if wish.keeps_zeros else None
    is_drawn = method == "stochastic"
    scales, zeros = ranges(W, E, wish, block, () if is_drawn else RATIOS)
    family = Integers(wish, zeros, block, kept)
    found = drawn(W, family, scales) if is_drawn else METHODS[method](W, E, family, scales)
    return Rounded(found.codes.astype(np.int32), found.t, zeros.astype(np.int32), block)


def ranges(
    W: Floats, E: Quadratic, wish: Wish, block: int, ratios: tuple[float, ...] = RATIOS
) -> tuple[Floats, Floats]:
    """Scales and zero points, (groups, outputs, blocks), of the best clipped ranges.

    ratios: to clip at; none for the whole range.
    """
    grid, starts = wish.grid, np.arange(0, W.shape[2], block)
    low = np.minimum(np.minimum.reduceat(W, starts, axis=2), 0)
    high = np.maximum(np.maximum.reduceat(W, starts, axis=2), 0)
    best, least = _range(low, high, grid), np.full(low.shape, np.inf)
    unit = np.where(high > low, high - low, 1)  # in which float32 cannot overflow
    w, c = (W / _over(unit, block, W.shape[2])).astype(np.float32), _powers(E)
    signs = (1, -1) if wish.is_mirrored and grid.signed else (1,)
    ratios = ratios if wish.is_free or not ratios else (2.0, *ratios)  # also the power above
    for ratio in (sign * r for r in ratios for sign in signs):
        tried = _range(ratio * low, ratio * high, grid)
        tried = tried if wish.is_free else (wish.snap(tried[0]), tried[1])
        parts = ((tried[0] / unit).astype(np.float32), tried[1].astype(np.float32))
        s, z = (_over(part, block, W.shape[2]) for part in parts)
        q = np.clip(np.rint(w / s) + z, grid.low, grid.high) - z
        found = _blocks_of(c * (w - s * q) ** 2, block)
        better = found < least
        best = (np.where(better, tried[0], best[0]), np.where(better, tried[1], best[1]))
        least = np.where(better, found, least)
    return best


def _powers(E: Quadratic) -> Array:
    """C_jj, relative to the largest one, (groups, 1, d)."""
    if not E.blocks:
        return np.ones((1, 1, 1), np.float32)
    power = E.diagonal[:, None]
    return np.asarray(power / max(float(power.max(initial=0)), TINY), np.float32)


def _range(low: Floats, high: Floats, grid: Grid) -> tuple[Floats, Floats]:
    """Scale and zero point of ranges; 1 where there is nothing but zero."""
    span = np.where(high > -low, high, -low) if grid.signed else high - low
    size = np.maximum(np.abs(span) / grid.high, TINY)
    scale = np.where(span == 0, 1.0, np.where(span < 0, -size, size))
    if grid.signed:
        return scale, np.zeros_like(scale)
    return scale, np.clip(np.rint(-low / scale), grid.low, grid.high)


def _nearest(W: Floats, E: Quadratic, family: Integers, scales: Floats) -> Coded:
    return next(coded.starts(W, Quadratic(), family, [scales]))


def _gptq(W: Floats, E: Quadratic, family: Integers, scales: Floats) -> Coded:
    best, _, _ = coded.best_of(W, E, coded.starts(W, E, family, [scales]))
    return best


def _starts(W: Floats, E: Quadratic, family: Integers, scales: Floats) -> Iterator[Coded]:
    return coded.starts(W, E, family, [factor * scales for factor in family.wish.factors])


def _descent(W: Floats, E: Quadratic, family: Integers, scales: Floats) -> Coded:
    return coded.fit(W, E, family, _starts(W, E, family, scales))


def drawn(W: Floats, family: Integers, scales: Floats) -> Coded:
    """Stochastic rounding."""
    low, high = family.wish.grid.low, family.wish.grid.high
    t = family.snap(scales)
    t = np.where(t < (1 - CLOSE) * scales, 2 * t, t)  # the whole range: what is clipped is biased
    s, z = (_over(part, family.block, W.shape[2]) for part in (t, family.zeros))
    u = np.random.default_rng(family.wish.seed).random(W.shape)
    q = np.clip(np.floor(W / s + u) + z, low, high)
    q = q if family.kept is None else np.where(family.kept, z, q)
    return Coded(t, q.astype(np.intp), s * (q - z))


def _admm(W: Floats, E: Quadratic, family: Integers, scales: Floats) -> Coded:
    return coded.fit(W, E, family, joined(W, E, family, _starts(W, E, family, scales)))


METHODS: dict[str, Callable[[Floats, Quadratic, Integers, Floats], Coded]] = {
    "nearest": _nearest,
    "gptq": _gptq,
    "descent": _descent,
    "admm": _admm,
}
