"""A weight of codes and of few numbers for each output, both fitted to the outputs of its layer.

A **family** of such weights says what codes and numbers make: with the codes given, each output is
linear in its numbers t, be they scales or levels,

    Ŵ = A t,       (Aᵀ C A) t = Aᵀ C W         t (groups, outputs, n)

solved by conjugate gradients, all outputs at once. With t given, codes follow column by column
(`onnxc.numerics.columns`). Of several starts each output takes its best; then t and codes are
fitted in turn until that gains little. No output ends above its best start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxc.numerics.columns import (
    Array,
    Choose,
    Codes,
    Floats,
    forward,
    sweep,
    triangles,
    upright,
)
from onnxc.numerics.sparse import Quadratic

ROUNDS, SETTLED = 20, 1e-2  # of numbers and codes in turn; a gain in E that ends them
SOLVED = 1e-2  # ‖residual‖ of the numbers, of the first one
CLOSE = 1e-6  # a move of numbers that only rounds them


class Family(Protocol):
    """What codes and numbers make of each other. is_free: whether numbers may be solved for."""

    @property
    def is_free(self) -> bool: ...

    def nearest(self, X: Floats, t: Floats) -> tuple[Codes, Floats]:
        """Codes of all columns, each by itself, and their values."""
        ...

    def choose(self, t: Floats) -> Choose:
        """What tells the codes of a column."""
        ...

    def spread(self, t: Floats, codes: Codes) -> Floats:
        """A t, (groups, outputs, d)."""
        ...

    def gather(self, codes: Codes, G: Floats) -> Floats:
        """Aᵀ G, (groups, outputs, n)."""
        ...

    def power(self, codes: Codes, c: Floats) -> Floats:
        """About the diagonal of Aᵀ C A, from that of C, c (groups, 1, d)."""
        ...

    def snap(self, t: Floats) -> Floats:
        """Numbers where they are allowed."""
        ...


@dataclass(frozen=True)
class Coded:
    """t: (groups, outputs, n). codes: (groups, outputs, d). weight: Ŵ."""

    t: Floats
    codes: Codes
    weight: Floats


def starts(W: Floats, E: Quadratic, family: Family, numbers: Sequence[Floats]) -> Iterator[Coded]:
    """Weights of given numbers: columns on the nearest values, with the first, and fed forward."""
    parts = triangles(E)
    chosen = [(t, family.choose(t)) for t in map(family.snap, numbers)]
    for t, _ in chosen[:1]:
        yield Coded(t, *family.nearest(W, t))
    for t, choose in chosen if parts else ():
        yield Coded(t, *forward(W, parts, choose))


def fit(W: Floats, E: Quadratic, family: Family, found: Iterable[Coded]) -> Coded:
    """The weight of least E that the steps above find from the best of several starts."""
    now, R, least = best_of(W, E, found)
    best = now
    for _ in range(ROUNDS):
        now, R = _turn(W, E, family, now, R)
        value, before = _errors(W, now, R), least.sum()
        best, least = _where(value < least, now, best), np.minimum(value, least)
        if not least.sum() < (1 - SETTLED) * before:
            break
    return best


def best_of(W: Floats, E: Quadratic, found: Iterable[Coded]) -> tuple[Coded, Floats, Floats]:
    """For each output the weight of least error, its (W − Ŵ) C, and that error."""
    best, *others = found
    R = E.times(W - best.weight)
    least = _errors(W, best, R)
    for other in others:
        S = E.times(W - other.weight)
        value = _errors(W, other, S)
        is_better = value < least
        best, R = _where(is_better, other, best), np.where(is_better[..., None], S, R)
        least = np.minimum(value, least)
    return best, R, least


def _errors(W: Floats, now: Coded, R: Floats) -> Floats:
    """E of each output, (groups, outputs)."""
    return np.asarray(np.einsum("god,god->go", R, W - now.weight))


def _where(chosen: Array, a: Coded, b: Coded) -> Coded:
    """a for the outputs that are chosen, else b."""
    if chosen.all() or not chosen.any():
        return a if chosen.any() else b
    pairs = ((a.t, b.t), (a.codes, b.codes), (a.weight, b.weight))
    return Coded(*(np.where(chosen[..., None], x, y) for x, y in pairs))


def _turn(W: Floats, E: Quadratic, family: Family, now: Coded, R: Floats) -> tuple[Coded, Floats]:
    """Numbers, then codes; and the new (W − Ŵ) C."""
    now, R = solved(W, E, family, now, R) if family.is_free else (now, R)
    codes, weight, R = (upright(part) for part in (now.codes, now.weight, R))
    sweep(E, codes, weight, R, family.choose(now.t))
    return Coded(now.t, codes, weight), R


def solved(W: Floats, E: Quadratic, family: Family, now: Coded, R: Floats) -> tuple[Coded, Floats]:
    """The weight with the best numbers for its codes, and the new R = (W − Ŵ) C."""
    codes = now.codes
    power = family.power(codes, E.diagonal[:, None] if E.blocks else np.ones((1, 1, 1)))
    scale = np.divide(1, power, out=np.zeros_like(power), where=power > 0)
    x, residual = np.zeros_like(now.t), family.gather(codes, R)
    P = scale * residual
    size = first = np.sum(residual * P, axis=-1, keepdims=True)
    for _ in range(residual.shape[-1]):
        if (size <= SOLVED**2 * first).all():
            break
        image = E.times(family.spread(P, codes))
        Q = family.gather(codes, image)
        step = _ratio(size, np.sum(P * Q, axis=-1, keepdims=True))
        x, residual, R = x + step * P, residual - step * Q, R - step * image
        last, size = size, np.sum(scale * residual**2, axis=-1, keepdims=True)
        P = scale * residual + _ratio(size, last) * P
    t = family.snap(now.t + x)
    weight = family.spread(t, codes)
    is_moved = not np.allclose(t, now.t + x, rtol=CLOSE, atol=0)
    return Coded(t, codes, weight), E.times(W - weight) if is_moved else R


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.zeros_like(a), where=b > 0))
