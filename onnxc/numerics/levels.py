"""Weights on few levels that each output has for itself, in a pattern.

The K levels c of an output are linear in n numbers t of it, by the pattern B (K, n) of a scheme:

    c = B t,      ŵ_j = c[a_j]

    B             t          levels
    (−1, 0, 1)    a          −a, 0, a
    2 columns     a, b       −a, 0, b
    all signs     a_1 … a_M  ± a_1 ± … ± a_M: M binary bases
    0, ± 2^k      α          α 0, ± α 2^k
    I             c          any

so that one fit does for all of them (`onnxc.numerics.coded`): codes take the nearest level, and the
best numbers for given codes are linear least squares,

    (Bᵀ Aᵀ C A B) t = Bᵀ Aᵀ C W,      A the zeros and ones that spread levels over the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.columns import Choose, Codes, Floats

Array = NDArray[Any]


@dataclass(frozen=True)
class Discrete:
    """pattern: B, (K, n). t: (groups, outputs, n). codes: rows of B, (groups, outputs, d)."""

    pattern: Floats
    t: Floats
    codes: Codes

    @property
    def levels(self) -> Floats:
        """c of each output, (groups, outputs, K)."""
        return levels_of(self.pattern, self.t)

    @property
    def weight(self) -> Floats:
        """Ŵ."""
        return np.take_along_axis(self.levels, self.codes, axis=2)


def levels_of(pattern: Floats, t: Floats) -> Floats:
    """c = B t."""
    return np.asarray(t @ pattern.T)


@dataclass(frozen=True)
class Ladder:
    """Levels of each output sorted, (groups, outputs, K), for looking up the nearest ones.

    order: rows of B. cuts: half way between two levels, filled up with ∞ to 2^m − 1.
    """

    c: Floats
    order: Codes
    cuts: Floats

    @classmethod
    def of(cls, levels: Floats) -> Ladder:
        order = np.argsort(levels, axis=2, kind="stable")
        c = np.take_along_axis(levels, order, axis=2)
        K = c.shape[2]
        missing = (1 << (K - 1).bit_length()) - K
        cuts = np.pad(
            (c[..., 1:] + c[..., :-1]) / 2, [(0, 0)] * 2 + [(0, missing)], constant_values=np.inf
        )
        return cls(c, order, cuts)

    def nearest(self, X: Floats) -> tuple[Codes, Floats]:
        """Codes of X (groups, outputs, any) and their levels, by halving; of two, the upper one."""
        rows = np.arange(self.c[..., 0].size).reshape(*self.c.shape[:2], 1)
        width, K = self.cuts.shape[2], self.c.shape[2]
        place, step = np.zeros(X.shape, np.intp), (width + 1) // 2
        while step:
            place += step * (self.cuts.take(rows * width + place + (step - 1)) <= X)
            step //= 2
        at = rows * K + place
        return self.order.take(at), self.c.take(at)


@dataclass(frozen=True)
class Levels:
    """The family of `onnxc.numerics.coded` of a pattern. kept: what stays 0, if B has a 0."""

    pattern: Floats
    is_free: bool = True
    kept: Array | None = None

    def choose(self, t: Floats) -> Choose:
        ladder = Ladder.of(levels_of(self.pattern, t))

        def chosen(j: int, goal: Floats, power: Floats) -> tuple[Codes, Floats]:
            codes, values = ladder.nearest(goal[..., None])
            if self._zero is not None and self.kept is not None:
                codes[self.kept[..., j]], values[self.kept[..., j]] = self._zero, 0
            return codes[..., 0], values[..., 0]

        return chosen

    def nearest(self, X: Floats, t: Floats) -> tuple[Codes, Floats]:
        """Codes of all columns, each by itself, and their values."""
        codes, values = Ladder.of(levels_of(self.pattern, t)).nearest(X)
        if self._zero is not None and self.kept is not None:
            codes[self.kept], values[self.kept] = self._zero, 0
        return codes, values

    @property
    def _zero(self) -> int | None:
        """The code of a level that is 0 whatever the numbers are."""
        found = np.flatnonzero(~self.pattern.any(axis=1))
        return int(found[0]) if len(found) else None

    def spread(self, t: Floats, codes: Codes) -> Floats:
        return np.take_along_axis(levels_of(self.pattern, t), codes, axis=2)

    def gather(self, codes: Codes, G: Floats) -> Floats:
        return self._sums(codes, G) @ self.pattern

    def power(self, codes: Codes, c: Floats) -> Floats:
        return self._sums(codes, np.broadcast_to(c, codes.shape)) @ self.pattern**2

    def snap(self, t: Floats) -> Floats:
        """As files keep them."""
        return t.astype(np.float32).astype(np.float64)

    def _sums(self, codes: Codes, G: Floats) -> Floats:
        """Σ of G over the columns of each level, (groups, outputs, K)."""
        groups, outputs, K = *codes.shape[:2], len(self.pattern)
        rows = np.arange(groups * outputs).reshape(groups, outputs, 1) * K
        found = np.bincount((rows + codes).reshape(-1), G.reshape(-1), groups * outputs * K)
        return np.asarray(found.reshape(groups, outputs, K), np.float64)


def one_scale(steps: Floats) -> Floats:
    """B of levels that are multiples of one number."""
    return np.asarray(steps, np.float64)[:, None]


def powers(bits: int) -> Floats:
    """0 and ± 2^k, k = 0, …: all that codes of so many bits tell apart, of which −0 is none."""
    sizes = 2.0 ** np.arange(2 ** (bits - 1) - 1)
    return one_scale(np.concatenate([-sizes[::-1], [0], sizes]))


def signs(bases: int) -> Floats:
    """B of all sums of so many binary bases."""
    return np.array(list(product((-1.0, 1.0), repeat=bases)))


TERNARY = one_scale(np.array([-1.0, 0.0, 1.0]))
ASYMMETRIC = np.array([[-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])  # of a and b
