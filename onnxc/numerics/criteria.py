"""Scores that tell which classes of channels matter least; the least score goes first.

    criterion    score of class c                                       reads
    l1, l2       ‖w_c‖₁, ‖w_c‖₂ (Li 2017)                               rows of producers
    fpgm         Σ_j ‖w_c − w_j‖₂: least where the others can stand     rows of producers
                 in for it, near the geometric median (He 2019)
    bn           |γ_c| (Liu 2017)                                       scales of a normalization
    apoz         1 − share of zeros (Hu 2016)                           zeros of the activation
    activation   root of E[a_c²] (Molchanov 2017 takes E|a_c|)          power of the activation
    thinet       greedy: the least ‖Σ_S W_c x_c‖² so far (Luo 2017)     W, H of consumers
    lasso        the least λ that sends β_c to zero (He 2017)           W, H of consumers
    random       a seeded permutation                                   nothing
    obs          see `onnxc.numerics.saliency`                          W, H, mu of consumers

w_c are the weights and bias that make the channel. ThiNet and LASSO look at sampled positions of
the consumers' outputs; here at their moments, of which any number of positions leaves one matrix

    K_cj = E[(W_c x_c)ᵀ (W_j x_j)] = tr(W_c H_cj W_jᵀ),

so that the error of dropping a set S is Σ_{c, j in S} K_cj, and that of a scale β_c for each class
(β − 1)ᵀ K (β − 1). With a mean, moments are about it: the bias takes it up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.saliency import Consumer, Floats

Array = NDArray[np.floating]

PATH = 60  # λ tried, from 1e-4 of the one that sends all to zero
SWEEPS = 30  # of coordinate descent for each λ, at most
STILL = 1e-4  # change of the scales in a sweep below which they have settled
TINY = 1e-30


def l1(rows: Sequence[Array]) -> Floats:
    """‖w_c‖₁ for weights (classes, n) of each producer, each relative to its mean, and added."""
    return _together([np.abs(w).sum(axis=1, dtype=np.float64) for w in rows])


def l2(rows: Sequence[Array]) -> Floats:
    """‖w_c‖₂ for weights (classes, n) of each producer, each relative to its mean, and added."""
    return _together([np.sqrt(np.square(w, dtype=np.float64).sum(axis=1)) for w in rows])


def fpgm(rows: Sequence[Array]) -> Floats:
    """Sum of the distances to the rows of all other classes, of each producer (classes, n)."""
    return _together([_distances(np.asarray(w, np.float64)).sum(axis=1) for w in rows])


def bn(scales: Sequence[Array]) -> Floats:
    """|γ_c| for the scales (classes,) of each normalization."""
    return _together([np.abs(gamma).astype(np.float64) for gamma in scales])


def apoz(zeros: Sequence[Array]) -> Floats:
    """1 − share of zeros, for the shares (classes,) of each activation."""
    return np.asarray(np.mean([1 - np.asarray(share, np.float64) for share in zeros], axis=0))


def activation(means: Sequence[Array]) -> Floats:
    """Root mean squares (classes,) of each activation, each relative to their mean, and added."""
    return _together([np.abs(mean).astype(np.float64) for mean in means])


def random(classes: int, seed: int) -> Floats:
    """A permutation of 0, …, classes − 1."""
    return np.random.default_rng(seed).permutation(classes).astype(np.float64)


def thinet(consumers: Sequence[Consumer]) -> Floats:
    """Place of each class in the order in which the output's error grows least, (classes,)."""
    K = products(consumers)
    alone, crossed = K.diagonal().copy(), np.zeros(len(K))
    places = np.full(len(K), np.inf)
    for step in range(len(K)):
        free = np.isinf(places)
        chosen = int(np.argmin(np.where(free, alone + 2 * crossed, np.inf)))
        places[chosen] = step
        crossed += K[chosen]
    return places


def lasso(consumers: Sequence[Consumer]) -> Floats:
    """The largest λ at which the scale β_c of a class is not zero yet, (classes,).

        min_β ½ (β − 1)ᵀ K (β − 1) + λ Σ_c |β_c|

    by coordinate descent, λ growing, each from the solution before. Classes that leave at the same
    λ are told apart by what they gave at the one before.
    """
    K = products(consumers)
    pull, curvature = K.sum(axis=1), np.maximum(K.diagonal(), TINY)
    beta, scores = np.ones(len(K)), np.zeros(len(K))
    rest = pull - K @ beta
    top = max(float(np.abs(pull).max(initial=0.0)), TINY)
    given = np.zeros(len(K))
    for strength in np.geomspace(1e-4 * top, top, PATH):
        for _ in range(SWEEPS):
            if _sweep(beta, rest, K, curvature, strength) < STILL:
                break
        left = beta != 0
        given[left] = np.abs(beta[left]) * np.sqrt(curvature[left])
        scores[left] = strength
    return np.asarray(scores * (1 + 0.01 * given / max(given.max(initial=0.0), TINY)))


def _sweep(beta: Floats, rest: Floats, K: Floats, curvature: Floats, strength: float) -> float:
    """A round of coordinate descent; rest = K (1 − β) goes with it. Returns the largest change."""
    moved = 0.0
    for c, before in enumerate(beta):
        toward = rest[c] + curvature[c] * before
        size = max(abs(toward) - strength, 0.0) / curvature[c]
        step = math.copysign(size, toward) - before
        if step:
            beta[c] += step
            rest -= step * K[c]
            moved = max(moved, abs(step))
    return moved


def products(consumers: Sequence[Consumer]) -> Floats:
    """K of the module's docstring, (classes, classes), each consumer relative to its variance."""
    return np.asarray(sum(_products(consumer) for consumer in consumers))


def _products(consumer: Consumer) -> Floats:
    classes, d = len(consumer.columns), len(consumer.H)
    of_column = np.zeros((classes, d))
    for c, columns in enumerate(consumer.columns):
        of_column[c, columns] = 1
    pairs = (consumer.W.T @ consumer.W) * consumer.covariance
    energy = consumer.variance if consumer.energy is None else consumer.energy
    return np.asarray(of_column @ pairs @ of_column.T / max(energy, TINY))


def _distances(w: Floats) -> Floats:
    squares = (w * w).sum(axis=1)
    apart = squares[:, None] + squares[None, :] - 2 * w @ w.T
    np.fill_diagonal(apart, 0)
    return np.asarray(np.sqrt(np.maximum(apart, 0)))


def _together(scores: Sequence[Floats]) -> Floats:
    return np.asarray(sum(score / max(float(score.mean()), TINY) for score in scores))
