"""Refit the weights of a linear layer to what it ought to give.

With rows x̂ of the layer's input as it is now and t of what it ought to give for them,

    Ŵ, b̂ = argmin E‖t − Ŵ x̂ − b̂‖² + λ Σ_i D_i ‖Ŵ_i − W_i‖²,      D = diag(H),

where entries of W that are zero stay zero. λ pulls towards the weights as they are, so that few
rows do little. D is bounded below by a share of its mean: of an input that hardly ever comes in
nothing is learnt that would be much when it does. With moments about the means (about zero for a
layer that takes no bias)

    H = E[x̂ x̂ᵀ],   T = E[t x̂ᵀ],   R = T − W H,
    (H + λD)_SS Δ_S = R_S,   Ŵ = W + Δ,   b̂ = E[t] − Ŵ E[x̂]

for each row of W with its support S. This is the least squares of He 2017 ("Channel pruning for
accelerating very deep neural networks", §3.1) and the asymmetric reconstruction of Zhang 2016
("Accelerating very deep convolutional networks", §3.3), with a ridge and any support.

λ is chosen by cross-validation: the samples are kept in two **folds**, what one of them teaches is
judged by the other, and a refit that does not help there is none. λ falls until the error rises:
along λ it has one valley.

Rows that share the support of their group are solved for directly, others by conjugate gradients,
all at once and each projected on its own support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

RIDGES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ
STEPS = 100  # of conjugate gradients
CLOSE = 1e-3  # ‖residual‖ / ‖R‖ at which they end
PAST = 1.01  # times the least error so far: λ beyond the best one
FAINT = 1e-2  # of the mean of D: the least that an input counts with in the ridge


@dataclass
class Sums:
    """Sums over rows, float64: of x̂ and t, of their products, and of t².

    x: (groups, d). t, tt: (groups, outputs). xx: (groups, d, d). tx: (groups, outputs, d).
    """

    count: int = 0
    x: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    t: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    xx: Floats = field(default_factory=lambda: np.zeros((0, 0, 0)))
    tx: Floats = field(default_factory=lambda: np.zeros((0, 0, 0)))
    tt: Floats = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, x: Floats, t: Floats) -> Sums:
        """The sums of rows x, (groups, n, d), and t, (groups, n, outputs)."""
        across, along = x.transpose(0, 2, 1), t.transpose(0, 2, 1)
        sums = (x.sum(axis=1), t.sum(axis=1), across @ x, along @ x, (t * t).sum(axis=1))
        return cls(x.shape[1], *sums)

    def __add__(self, other: Sums) -> Sums:
        if not self.count or not other.count:
            return other if not self.count else self
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("x", "t", "xx", "tx", "tt"))
        return Sums(self.count + other.count, *(a + b for a, b in pairs))

    def moments(self, is_centred: bool) -> Moments:
        """Means of the products, about the means where there is a bias to take them up."""
        n = max(self.count, 1)
        x, t = self.x / n, self.t / n
        H, T, tt = self.xx / n, self.tx / n, self.tt / n
        if is_centred:
            H, T = H - x[:, :, None] * x[:, None, :], T - t[:, :, None] * x[:, None, :]
            tt = tt - t * t
        return Moments(H, T, tt, x, t)

    def error(self, W: Floats, b: Floats) -> Floats:
        """E|t − W x̂ − b|² of each output, (groups, outputs)."""
        m = self.moments(False)
        made = _apply(W, m.x)
        squares = _dot(W @ m.H, W) + 2 * b * made + b * b
        return np.asarray(np.maximum(m.tt - 2 * _dot(W, m.T) - 2 * b * m.t + squares, 0))

    def variance(self) -> Floats:
        """E|t − E[t]|² of each output, (groups, outputs)."""
        return np.asarray(np.maximum(self.moments(True).tt, 0))


@dataclass(frozen=True)
class Moments:
    """H, (groups, d, d); T, (groups, outputs, d); E[t²], E[x̂] and E[t]."""

    H: Floats
    T: Floats
    tt: Floats
    x: Floats
    t: Floats


@dataclass(frozen=True)
class Fit:
    """A refit layer: W (groups, outputs, d), b (groups, outputs), and how well it does.

    before, after: squared errors summed over all outputs, of rows that the weights were not fitted
    to. ridge: λ.
    """

    W: Floats
    b: Floats
    before: float
    after: float
    ridge: float


def refit(
    folds: Sequence[Sums],
    W: Floats,
    b: Floats,
    is_biased: bool = True,
    ridges: Sequence[float] = RIDGES,
) -> Fit:
    """The best weights of the module's docstring for the sums of two folds.

    W: (groups, outputs, d), b: (groups, outputs) as they are, and as they stay where a fold is
    empty. is_biased: b may change.
    """
    first, second = folds
    if not first.count or not second.count:
        return Fit(W, b, 0.0, 0.0, np.inf)
    kept = W != 0
    before = float(first.error(W, b).sum() + second.error(W, b).sum())
    halves, tried = [fold.moments(is_biased) for fold in folds], dict[float, float]()
    for ridge in sorted(ridges, reverse=True):  # the smaller, the more steps it takes
        one, other = (solve(half, W, b, kept, ridge, is_biased) for half in halves)
        tried[ridge] = float(second.error(*one).sum() + first.error(*other).sum())
        if tried[ridge] > PAST * min(tried.values()):
            break
    best = min(sorted(tried), key=lambda ridge: tried[ridge])
    fitted = solve((first + second).moments(is_biased), W, b, kept, best, is_biased)
    return Fit(*fitted, before, tried[best], best)


def solve(
    m: Moments, W: Floats, b: Floats, kept: Mask, ridge: float, is_biased: bool = True
) -> tuple[Floats, Floats]:
    """Ŵ and b̂ for one λ. m: about the means if is_biased. kept: where W may change, like W."""
    R = m.T - W @ m.H - (0 if is_biased else b[:, :, None] * m.x[:, None, :])
    D = np.diagonal(m.H, axis1=1, axis2=2)
    scale = 1 / np.sqrt(np.maximum(D, max(FAINT * float(D.mean()), np.finfo(float).tiny)))
    H = (
        m.H * scale[:, :, None] * scale[:, None, :]
    )  # of diagonal 1 or less, so that the ridge is λI
    R = np.where(kept, R * scale[:, None, :], 0)
    step, odd = np.zeros_like(R), _is_odd(kept)
    if not odd.all():
        step[:, ~odd] = _direct(H, R[:, ~odd], kept[:, ~odd], ridge)
    if odd.any():
        step[:, odd] = _iterated(H, R[:, odd], kept[:, odd], ridge)
    fitted = W + step * scale[:, None, :]
    return fitted, m.t - _apply(fitted, m.x) if is_biased else b


def _is_odd(kept: Mask) -> Mask:
    """Outputs that in some group keep less than the others do, but not nothing."""
    union = kept.any(axis=1, keepdims=True) & kept.any(axis=2, keepdims=True)
    return np.asarray((kept != union).any(axis=(0, 2)))


def _direct(H: Floats, R: Floats, kept: Mask, ridge: float) -> Floats:
    """Δ in scaled units, one system of equations for each group; what is not kept is cut out."""
    union: Mask = np.asarray(kept.any(axis=1))
    system = np.where(union[:, :, None] & union[:, None, :], H, 0)
    index = np.arange(H.shape[1])
    system[:, index, index] = np.where(union, system[:, index, index] + ridge, 1)
    found = np.linalg.solve(system, R.transpose(0, 2, 1)).transpose(0, 2, 1)
    return np.asarray(np.where(kept, found, 0))


def _iterated(H: Floats, R: Floats, kept: Mask, ridge: float) -> Floats:
    """Δ in scaled units by conjugate gradients, whose every step lowers the error."""
    step, residual = np.zeros_like(R), R
    direction = residual
    power = _dot(residual, residual)
    end = CLOSE**2 * power
    for _ in range(STEPS):
        image = np.where(kept, direction @ H + ridge * direction, 0)
        length = _ratio(power, _dot(direction, image))[:, :, None]
        step, residual = step + length * direction, residual - length * image
        now = _dot(residual, residual)
        if (now <= end).all():
            break
        direction = residual + _ratio(now, power)[:, :, None] * direction
        power = now
    return np.asarray(step)


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("god,god->go", a, b))


def _apply(W: Floats, x: Floats) -> Floats:
    return np.asarray(np.einsum("god,gd->go", W, x))
