"""Histograms of symbols, told in few bytes: log-frequencies at knots, linear between them.

A model gives each of k symbols a whole weight w. It is told by bytes q at every s-th symbol:

    L_i = (1 − t) q_j + t q_{j+1},     i = (j + t) s,   0 ≤ t < 1
    w_i = 2^(30 − L_i / 8),            p_i = w_i / Σ w

A byte is a step of an eighth of an octave, which costs less than 0.0007 bits a symbol at s = 1.
Wider knots suit smooth histograms of few symbols. Which s is best is decided by the whole cost,

    Σ c_i log2(1 / p_i) + 8 · (number of knots) − 7 · (those of symbols that do not occur),

c being the counts; rows of the highest byte pack well. All of w is integer arithmetic, so that
every machine decodes with the same model. Rows of a table are channels: each has its own model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STEPS = (1, 2, 4, 8, 16, 32)  # distances of knots
UNSEEN = 255  # the byte at symbols that do not occur
FINE = 256  # parts of an octave in which log-frequencies are added up
_BYTE = FINE // 8  # of those parts a step of a byte
_POWERS = np.round(2.0 ** (30 - np.arange(FINE) / FINE)).astype(np.int64)


@dataclass(frozen=True)
class Fit:
    """Knots (channels, m) of a model with a distance of `step`, and what all costs, in bits."""

    step: int
    knots: Array
    bits: float


def knot_count(size: int, step: int) -> int:
    """How many knots tell a model of so many symbols."""
    return -(-(size - 1) // step) + 1


def weights(knots: Array, step: int, size: int) -> Array:
    """w, (channels, size), each at least 1; knots: bytes (channels, knot_count(size, step))."""
    at = np.arange(size)
    left, t = at // step, at % step
    right = np.minimum(left + 1, knots.shape[1] - 1)
    q = knots.astype(np.int64)
    L = (q[:, left] * (step - t) + q[:, right] * t) * (_BYTE // step)
    w: Array = np.maximum(_POWERS[L % FINE] >> (L // FINE), 1)
    return w


def cost(counts: Array, w: Array) -> float:
    """Bits of symbols with these counts under models with these weights, both (channels, k)."""
    total = counts.sum(axis=1, dtype=np.float64)
    return float((total * np.log2(w.sum(axis=1))).sum() - (counts * np.log2(w)).sum())


def entropy(counts: Array) -> float:
    """Bits of symbols under their own histogram, without its cost; counts: (channels, k)."""
    c = np.asarray(counts, np.float64)
    logs = np.log2(c, out=np.zeros_like(c), where=c > 0)
    total = c.sum(axis=1)
    return float((total * np.log2(np.maximum(total, 1))).sum() - (c * logs).sum())


def expected(counts: Array) -> float:
    """About the fewest bits that a model can cost, found without one.

    The entropy of few symbols is below that of their law, by half a nat for each that occurs
    (Miller 1955); a model costs two knots besides.
    """
    bias = (np.count_nonzero(counts) - len(counts)) / (2 * np.log(2))
    return entropy(counts) + float(bias) + 16 * len(counts)


def knots_of(counts: Array, step: int) -> Array:
    """Bytes of the model nearest to a histogram: its logarithm, averaged around each knot."""
    smooth = counts if step == 1 else counts @ _tents(counts.shape[1], step).T
    top = np.maximum(smooth.max(axis=1, keepdims=True), 1e-300)
    share = np.maximum(smooth / top, 2.0**-32)
    knots: Array = np.minimum(np.round(-8 * np.log2(share)), UNSEEN).astype(np.uint8)
    return knots


@cache
def _tents(size: int, step: int) -> NDArray[np.float64]:
    """The averages around knots as a matrix (knots, size): triangles, each of sum 1."""
    centres = step * np.arange(knot_count(size, step))
    heights = np.maximum(1 - np.abs(centres[:, None] - np.arange(size)) / step, 0)
    return np.asarray(heights / np.maximum(heights.sum(axis=1, keepdims=True), 1e-9))


def fit(counts: Array) -> Fit:
    """The cheapest model of a histogram (channels, k)."""
    return min((_fit(counts, step) for step in STEPS), key=lambda found: found.bits)


def _fit(counts: Array, step: int) -> Fit:
    knots = knots_of(counts, step)
    told = 8 * np.count_nonzero(knots != UNSEEN) + np.count_nonzero(knots == UNSEEN)
    return Fit(step, knots, cost(counts, weights(knots, step, counts.shape[1])) + told)
