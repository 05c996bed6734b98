"""Refit the weights of a linear layer to what the activation behind it ought to give.

With rows x̂ of the layer's input, u = W x̂ + b + a in front of the activation, a what is added behind
the layer (the other summand of a residual block, 0 where there is none), t what u ought to be, and
r(u) = min(max(u, 0), h) a ReLU, clipped at h or not,

    Ŵ, b̂ = argmin E‖r(t) − r(u)‖²

This is Zhang 2016 ("Accelerating very deep convolutional networks for classification and
detection", §3.2). What is below zero needs no weights, so that those there are do more for the
rest. With g = r(t), auxiliary z and a penalty λ it alternates between

    z = argmin (g − r(z))² + λ (z − u)²     each number alone
    W, b = argmin E‖z − u‖² + ridge         linear, as in `onnxc.numerics.refit`

from the linear solution on, which the ridge pulls to, while λ grows from 0.01 to 1. The best z is
one of min(0, u), r((λ u + g) / (λ + 1)) and max(h, u); that comes to

    z = u + (g − u) / (λ + 1)   where −c g < u < h + c (h − g),   c = √(1 + 1/λ) − 1,   else u

so what is far beyond a kink is let alone, and what is near is called back. λ = ∞ stands for c = 0
with whole steps, z = g for 0 < u < h: then E‖z − u‖² is nowhere below the error itself and touches
it where u is now, so that each step lowers it. Zhang ends with λ = 1, whose last solution is no
minimum; steps with ∞ make a tenth more of the gain.

Each output keeps the step that was the best for it, and the linear solution where that is better
for rows of samples that neither of them was fitted to: samples are kept in two folds, and each fold
judges what the other one teaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.refit import Fit, Moments, Sums, solve

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Mask = NDArray[np.bool_]

PENALTIES = (*map(float, np.geomspace(0.01, 1, 10)), *(np.inf,) * 10)  # λ, step by step
RIDGES = (1e-2, 1e-1, 1.0)  # of which the one is taken that does the most for held-out rows
AT_ONCE = 2048  # rows


@dataclass(frozen=True)
class Rows:
    """Rows x̂, (groups, n, d); t and a, (groups, n, outputs), a None for zero; float32."""

    x: Singles
    t: Singles
    a: Singles | None = None

    @property
    def count(self) -> int:
        return int(self.x.shape[1])

    def cut(self, most: int = AT_ONCE) -> Iterator[Rows]:
        """A few rows at a time."""
        for begin in range(0, self.count, most):
            part = slice(begin, begin + most)
            yield Rows(
                self.x[:, part], self.t[:, part], None if self.a is None else self.a[:, part]
            )

    def goal(self, high: float) -> Singles:
        """g."""
        return through(self.t, high)

    def made(self, W: Floats, b: Floats) -> Singles:
        """u."""
        u = self.x @ W.astype(np.float32).transpose(0, 2, 1)
        u += b.astype(np.float32)[:, None, :]
        if self.a is not None:
            u += self.a
        return u


Parts = Sequence[Rows]


@dataclass(frozen=True)
class Bent:
    """Weights W (groups, outputs, d) and b (groups, outputs) that know of the activation.

    better: outputs for which they are better than the linear ones, the others have those. before,
    after: squared errors behind the activation, of rows that the weights were not fitted to, summed
    over all outputs with weights; of the linear solution, and of this one.
    """

    W: Floats
    b: Floats
    better: Mask
    before: float
    after: float


def through(u: Singles, high: float) -> Singles:
    """r(u). high: h, infinite for a plain ReLU."""
    return np.asarray(np.clip(u, 0, np.float32(high)))


def bend(
    sums: Sequence[Sums],
    rows: Sequence[Parts],
    W: Floats,
    b: Floats,
    fit: Fit,
    is_biased: bool = True,
    high: float = np.inf,
) -> Bent:
    """The weights of the module's docstring, from a linear fit on.

    sums, rows: of two folds of samples. W, b: as they were; zeros of W stay zero. fit: what `refit`
    made of the sums. With fewer rows than inputs, nothing is better.
    """
    kept, none = W != 0, np.zeros(b.shape, bool)
    if min(_count(fold) for fold in rows) < W.shape[2]:
        return Bent(fit.W, fit.b, none, 0.0, 0.0)
    used, held = kept.any(axis=2), rows[::-1]
    starts = [solve(fold.moments(is_biased), W, b, kept, fit.ridge, is_biased) for fold in sums]
    before, tried = _held_out(held, starts, high), {}
    for ridge in RIDGES:
        pairs = zip(rows, starts, strict=True)
        bent = [alternate(own, *start, kept, ridge, is_biased, high) for own, start in pairs]
        tried[ridge] = np.minimum(_held_out(held, bent, high), before)
    best = min(tried, key=lambda ridge: float(tried[ridge][used].sum()))
    better = used & (tried[best] < before)
    totals = float(before[used].sum()), float(tried[best][used].sum())
    if not better.any():
        return Bent(fit.W, fit.b, none, *totals)
    both = [*rows[0], *rows[1]]
    found, c = alternate(both, fit.W, fit.b, kept, best, is_biased, high)
    found, c = np.where(better[:, :, None], found, fit.W), np.where(better, c, fit.b)
    return Bent(found, c, better, *totals)


def _held_out(held: Sequence[Parts], made: Sequence[tuple[Floats, Floats]], high: float) -> Floats:
    """The error of each output, each of two solutions judged by the rows of the other fold."""
    total = sum(
        _count(parts) * error(parts, *one, high) for parts, one in zip(held, made, strict=True)
    )
    return np.asarray(total / sum(map(_count, held)))


def error(parts: Parts, W: Floats, b: Floats, high: float = np.inf) -> Floats:
    """E|r(t) − r(u)|² of each output, (groups, outputs)."""
    total = np.zeros(b.shape)
    for rows in _cut(parts):
        total += _squares(rows.goal(high) - through(rows.made(W, b), high))
    return total / max(_count(parts), 1)


def alternate(
    parts: Parts,
    W: Floats,
    b: Floats,
    kept: Mask,
    ridge: float,
    is_biased: bool = True,
    high: float = np.inf,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Floats, Floats]:
    """Weights and biases of the least error on these rows, of all steps from W and b on.

    kept: where W may change. ridge: how much it is held to what it is given as.
    """
    H, mean = _inputs(parts, is_biased)
    best, least = (W, b), np.full(b.shape, np.inf)
    none, step, shift = (np.zeros_like(W), np.zeros_like(b)), np.zeros_like(W), np.zeros_like(b)
    for penalty in penalties:
        T, t, errors = _sweep(parts, W + step, b + shift, penalty, high)
        best, least = _best(best, least, (W + step, b + shift), errors)
        T -= t[:, :, None] * mean[:, None, :] if is_biased else 0
        T, t = T + step @ H, t + _apply(step, mean) + shift  # of z less u at the start
        moments = Moments(H, T, np.zeros_like(t), mean, t)
        step, shift = solve(moments, *none, kept, ridge, is_biased)
    now = W + step, b + shift
    return _best(best, least, now, error(parts, *now, high))[0]


def _inputs(parts: Parts, is_biased: bool) -> tuple[Floats, Floats]:
    """H and mu of the rows, H about the mean where there is a bias to take it up."""
    total = Sums()
    for rows in _cut(parts):
        x = rows.x.astype(np.float64)
        total = total + Sums.of(x, np.zeros((*x.shape[:2], 0)))
    moments = total.moments(is_biased)
    return moments.H, moments.x


def _sweep(
    parts: Parts, W: Floats, b: Floats, penalty: float, high: float
) -> tuple[Floats, Floats, Floats]:
    """E[(z − u) x̂ᵀ], E[z − u] and the error of each output, for the best z."""
    T, t, errors = np.zeros_like(W), np.zeros_like(b), np.zeros_like(b)
    count = _count(parts)
    for rows in _cut(parts):
        u, g = rows.made(W, b), rows.goal(high)
        errors += _squares(g - through(u, high))
        less = pull(g, u, penalty, high)
        T += less.transpose(0, 2, 1) @ rows.x
        t += less.sum(axis=1)
    return T / count, t / count, errors / count


def pull(g: Singles, u: Singles, penalty: float, high: float = np.inf) -> Singles:
    """The best z less u, for goals g behind the activation and values u in front of it."""
    c = np.float32(np.sqrt(1 + 1 / penalty) - 1)
    step = g - u
    step *= u > -c * g if c else u > 0
    if np.isfinite(high):
        step *= u < high + c * (high - g)
    return step if np.isinf(penalty) else step * np.float32(1 / (1 + penalty))


def _best(
    best: tuple[Floats, Floats], least: Floats, now: tuple[Floats, Floats], errors: Floats
) -> tuple[tuple[Floats, Floats], Floats]:
    """Weights and biases of each output with its least error."""
    better = errors < least
    W, b = np.where(better[:, :, None], now[0], best[0]), np.where(better, now[1], best[1])
    return (W, b), np.minimum(errors, least)


def _count(parts: Parts) -> int:
    return sum(part.count for part in parts)


def _cut(parts: Parts) -> Iterator[Rows]:
    return (rows for part in parts for rows in part.cut())


def _squares(x: Singles) -> Floats:
    """Sums of squares over some rows."""
    return np.asarray(np.einsum("gno,gno->go", x, x), np.float64)


def _apply(W: Floats, x: Floats) -> Floats:
    return np.asarray(np.einsum("god,gd->go", W, x))
