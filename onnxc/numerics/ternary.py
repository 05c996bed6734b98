"""Where weights on {−a, 0, +b} start from: the sizes a and b of each output.

Weights beyond a threshold Δ become −a or +b, the means of what they stand for.

    twn    Δ = 0.7 E|w|                                        Li 2016 (TWN)
    ttq    Δ = 0.05 max |w|, a and b by themselves             Zhu 2017 (TTQ)
    tga    the weights as a Gaussian N(μ, σ²), cut off at Δ    He 2019 (TGA)

Of **tga** the mean of what is beyond Δ is known in closed form, with φ and Φ of the Gaussian,

    b(Δ) = E[w | w > Δ] = μ + σ φ(x) / (1 − Φ(x)),      x = (Δ − μ) / σ

and a likewise for −w. He 2019 trains Δ; here it is where the expected squared error is least, that
is between the levels, Δ = b / 2, found by repeating both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erfc, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.columns import Floats

Mask = NDArray[np.bool_]

STEPS = 30  # of Δ and b in turn
TWN, TTQ = 0.7, 0.05

_erfc = np.vectorize(erfc, otypes=[np.float64])


def twn(W: Floats) -> Floats:
    """a and b, alike, (groups, outputs, 2)."""
    size = np.abs(W)
    a = _mean(size, size > TWN * size.mean(axis=2, keepdims=True))
    return np.stack([a, a], axis=2)


def ttq(W: Floats) -> Floats:
    """a and b, each the mean of its side."""
    least = TTQ * np.abs(W).max(axis=2, keepdims=True)
    return np.stack([_mean(side, side > least) for side in (-W, W)], axis=2)


def tga(W: Floats) -> Floats:
    """a and b of a Gaussian of the mean and the width of the weights."""
    mu, sigma = W.mean(axis=2), W.std(axis=2)
    return np.stack([_beyond(-mu, sigma), _beyond(mu, sigma)], axis=2)


def _mean(values: Floats, mask: Mask) -> Floats:
    """Mean of the values that a mask marks, along the last axis; 0 of none."""
    count = np.count_nonzero(mask, axis=2)
    return np.asarray(np.where(mask, values, 0).sum(axis=2) / np.maximum(count, 1))


def _beyond(mu: Floats, sigma: Floats) -> Floats:
    """b that is twice its own threshold; at least 0."""
    sigma = np.maximum(sigma, 1e-6 * np.abs(mu) + np.finfo(float).tiny)
    b = np.maximum(mu, 0) + sigma
    for _ in range(STEPS):
        x = np.clip((b / 2 - mu) / sigma, -8, 8)
        tail = 0.5 * _erfc(x / sqrt(2))
        b = np.maximum(mu + sigma * np.exp(-x * x / 2) / sqrt(2 * pi) / tail, 0)
    return np.asarray(b)


STARTS: dict[str, Callable[[Floats], Floats]] = {"twn": twn, "ttq": ttq, "tga": tga}
