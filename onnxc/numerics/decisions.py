"""What a disturbance of its scores costs a classifier, told by few samples.

Counting lost decisions needs thousands of samples: with 500, a share has an error of 1.5 points.
But z, the scores of the original, and e = ẑ − z, the disturbance, say more than which one is the
largest. With σ² = Var_c e, the spread of a sample's disturbance over its classes, and ε ~ N(0, 1),

    w_c = P(c wins) = P(z_c + σ ε_c > z_b + σ ε_b for all b ≠ c)
        = ∫ φ(u) Π_{b≠c} Φ((z_c − z_b)/σ + u) du                  (Gauss-Hermite)

    disagreement  = 1 − w_a,                     a = arg max z
    top-1 drop    = p_a − Σ_c p_c w_c,           p = softmax(z / T)

p stands for the label that is not looked at: near a tie, both classes are about as likely to be
right, so little is lost, whoever wins. With T such that p is calibrated (Guo 2017, temperature
scaling), this is the expectation of the counted drop, at a hundredth of its variance. Where the
disturbance is gross, decisions change by more than chance and it says too little; then counting
them is enough (`counted_drop`, `changed`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Array = NDArray[Any]

RIVALS = 12  # classes with the highest scores that may win
NODES = 21  # of the quadrature
PRIOR = 3  # classes
ROWS = 4096  # samples at once
TEMPERATURES = np.geomspace(0.25, 4.0, 65)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def win_chances(z: Array, sigma: Array) -> tuple[NDArray[np.intp], Floats]:
    """The classes that may win, (N, K), best first, and the chance of each, (N, K).

    z: (N, C) scores. sigma: (N,) standard deviations of their disturbance.
    """
    N, C = z.shape
    K = min(RIVALS, C)
    top = np.argsort(-z, axis=1, kind="stable")[:, :K]
    best = np.take_along_axis(z, top, axis=1).astype(np.float64)
    u, weight = np.polynomial.hermite_e.hermegauss(NODES)
    weight = weight / weight.sum()
    w = np.empty((N, K))
    for start in range(0, N, ROWS):
        rows = slice(start, start + ROWS)
        s = np.maximum(sigma[rows], 1e-12)[:, None]
        for c in range(K):
            ahead = (best[rows, c : c + 1] - np.delete(best[rows], c, axis=1)) / s
            won = _below(ahead[:, None, :] + u[None, :, None])
            w[rows, c] = won.prod(axis=2) @ weight
    return top, w


def spreads(z: Array, out: Array) -> Floats:
    """σ of each sample: (N,), of scores (N, C) that became `out`.

    Few classes tell it badly, so σ² is drawn to its mean over samples, which counts as PRIOR more.
    """
    own, C = (out.astype(np.float64) - z).var(axis=1, ddof=1), z.shape[1]
    return np.asarray(np.sqrt(((C - 1) * own + PRIOR * own.mean()) / (C - 1 + PRIOR)))


def disagreement(z: Array, out: Array) -> Floats:
    """Chance that each sample gets another class: (N,)."""
    _, w = win_chances(z, spreads(z, out))
    return np.asarray(1 - w[:, 0])


def expected_drop(z: Array, out: Array, T: float = 1.0) -> Floats:
    """What each sample takes from top-1, in expectation: (N,), shares."""
    top, w = win_chances(z, spreads(z, out))
    p = np.take_along_axis(softmax(z, T), top, axis=1)
    return np.asarray(p[:, 0] - (p * w).sum(axis=1))


def counted_drop(z: Array, out: Array, T: float = 1.0) -> Floats:
    """The same by the class that did win: (N,). It has more variance, and no model of the error."""
    p, rows = softmax(z, T), np.arange(len(z))
    return np.asarray(p[rows, z.argmax(axis=1)] - p[rows, out.argmax(axis=1)])


def changed(z: Array, out: Array) -> Floats:
    """Whether each sample got another class: (N,), 0 or 1."""
    return np.asarray(z.argmax(axis=1) != out.argmax(axis=1), np.float64)


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
