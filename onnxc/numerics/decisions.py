"""What a disturbance of its scores costs a classifier, told by few samples.

Counting lost decisions needs thousands of samples: with 500, a share has an error of 1.5 points.
But z, the scores of the original, and ẑ, the disturbed ones, say more than which one is the
largest. With ε ~ N(0, 1) and σ, the size of a sample's disturbance,

    w_c = P(c wins) = P(z_c + σ ε_c > z_b + σ ε_b for all b ≠ c)
        = ∫ φ(u) Π_{b≠c} Φ((z_c − z_b)/σ + u) du                  (Gauss-Hermite)

    disagreement  = 1 − w_a,                     a = arg max z
    top-1 drop    = p_a − Σ_c p_c w_c,           p = softmax(z / T)

p stands for the label that is not looked at: near a tie, both classes are about as likely to be
right, so little is lost, whoever wins. With T such that p is calibrated (Guo 2017, temperature
scaling), this is the expectation of the counted drop, at a hundredth of its variance.

σ of a sample is the spread of ẑ − z over its classes, s, times γ, which all samples share: the best
two classes may be disturbed more than others, and margins m = z₁ − z₂ as a whole may shrink,

    m̂ = (1 + β) m + √2 s r,      γ = √(E r²) / (1 + β),

β by least squares with weights 1 / s².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Array = NDArray[Any]

RIVALS = 12  # classes with the highest scores that may win
NODES = 21  # of the quadrature
ROWS = 4096  # samples at once
PRIOR = 3  # classes that the mean of σ² over samples counts for, beside those of a sample
SAME = 8  # samples that γ = 1 counts for
LEAST = 0.05  # of 1 + β: margins that vanish
TEMPERATURES = np.geomspace(0.25, 4.0, 65)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def win_chances(z: Array, sigma: Array) -> Floats:
    """The chance of each class to win, (N, K), of scores (N, K) with disturbances of σ, (N,)."""
    N, K = z.shape
    u, weight = np.polynomial.hermite_e.hermegauss(NODES)
    weight = weight / weight.sum()
    w = np.empty((N, K))
    for start in range(0, N, ROWS):
        rows = slice(start, start + ROWS)
        s = np.maximum(sigma[rows], 1e-12)[:, None]
        for c in range(K):
            ahead = (z[rows, c : c + 1] - np.delete(z[rows], c, axis=1)) / s
            w[rows, c] = _below(ahead[:, None, :] + u[None, :, None]).prod(axis=2) @ weight
    return w


def _best(z: Array) -> NDArray[np.intp]:
    """The best classes of each sample, (N, K), best first."""
    return np.argsort(-z, axis=1, kind="stable")[:, : min(RIVALS, z.shape[1])]


@dataclass(frozen=True)
class Contest:
    """Samples with their best K classes. z, moved, p: (N, K), of the original, disturbed, shares.

    variance: (N,), of the disturbance over all classes, of which there are `classes`. lost: (N,), p
    of the class that was best less that of the class that is. changed: (N,), whether it is another.
    """

    z: Floats
    moved: Floats
    p: Floats
    variance: Floats
    lost: Floats
    changed: Floats
    classes: int

    @classmethod
    def of(cls, z: Array, out: Array, T: float = 1.0) -> Contest:
        """Of logits (N, C)."""
        rows, top = np.arange(len(z)), _best(z)
        before, p = top[:, 0], softmax(z, T)
        after = out.argmax(axis=1)
        best, moved, shares = (np.take_along_axis(x, top, axis=1) for x in (z, out, p))
        variance = (out.astype(np.float64) - z).var(axis=1, ddof=1)
        lost, changed = p[rows, before] - p[rows, after], (before != after).astype(np.float64)
        return cls(best, moved, shares, variance, lost, changed, z.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[Contest]) -> Contest:
        """All samples of several."""
        own = ("z", "moved", "p", "variance", "lost", "changed")
        arrays = {name: np.concatenate([getattr(x, name) for x in parts]) for name in own}
        return cls(**arrays, classes=parts[0].classes)

    @property
    def sigma(self) -> Floats:
        """σ of each sample, (N,)."""
        C, own = self.classes, self.variance
        s = np.sqrt(((C - 1) * own + PRIOR * own.mean()) / (C - 1 + PRIOR))
        return np.asarray(s * self._gamma(np.maximum(s, 1e-12)))

    def _gamma(self, s: Floats) -> float:
        m, d = (x[:, 0] - x[:, 1] for x in (self.z, self.moved - self.z))
        beta = float((m * d / s**2).sum() / max((m**2 / s**2).sum(), 1e-300))
        r = (d - beta * m) / (math.sqrt(2) * s)
        return math.sqrt((float(r @ r) + SAME) / (len(r) + SAME)) / max(1 + beta, LEAST)

    @property
    def disagreement(self) -> Floats:
        """Chance that each sample gets another class: (N,)."""
        return self.told(self.sigma, is_top1=False)

    @property
    def expected_drop(self) -> Floats:
        """What each sample takes from top-1, in expectation: (N,), shares."""
        return self.told(self.sigma, is_top1=True)

    def told(self, sigma: Floats, is_top1: bool) -> Floats:
        """The drop of top-1, or else the disagreement, for disturbances of σ: (N,)."""
        w = win_chances(self.z, sigma)
        return np.asarray(self.p[:, 0] - (self.p * w).sum(axis=1) if is_top1 else 1 - w[:, 0])

    def beside(self, known: Contest, is_top1: bool) -> tuple[Floats, Floats]:
        """Two terms whose means add up to the drop, told more exactly (difference estimator).

        known: more samples, of the original alone. With one σ̄ for all samples, f(z, σ̄) is known for
        many, and what f(z, σ) differs from it by varies little:

            E f(z, σ) = E_seen [f(z, σ) − f(z, σ̄)] + E_known f(z, σ̄)
        """
        typical = float(np.sqrt(np.mean(self.sigma**2)))
        mine, theirs = (x.told(np.full(len(x.z), typical), is_top1) for x in (self, known))
        return self.told(self.sigma, is_top1) - mine, theirs


def softmax(z: Array, T: float = 1.0) -> Floats:
    """(N, C) shares of scores; of rows that are shares already, those of their logarithms."""
    s = logits(z) / T
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def logits(z: Array) -> Floats:
    """(N, C) scores that add up like logits: probabilities become their logarithms."""
    s = z.astype(np.float64)
    if (s >= 0).all() and np.allclose(s.sum(axis=1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(s, 1e-9)))
    return s


def temperature(z: Array, labels: Array) -> float:
    """T that makes softmax(z / T) most likely for the labels, (N,)."""
    rows = np.arange(len(z))
    losses = [-np.log(softmax(z, T)[rows, labels] + 1e-12).mean() for T in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def _below(x: Floats) -> Floats:
    """Φ(x)."""
    return np.asarray(0.5 * (1 + _erf(x / math.sqrt(2))))
