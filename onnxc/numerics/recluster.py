"""Refit a weight of few levels to what its layer ought to give, and keep it on few levels.

As `onnxc.numerics.refit` has it, with rows x̂ and goals t, the best plain weight W* and its ridge λ
make the error of another weight

    E‖t − Ŵ x̂ − b̂‖² + λ Σ_i D_i ‖Ŵ_i − W_i‖² = const + tr (W* − Ŵ) (H + λD) (W* − Ŵ)ᵀ,

so that codes and levels are fitted to W* with C = H + λD (`onnxc.numerics.codebook`), from where
they are. W is the weight before it was put on levels. b̂ = E[t] − Ŵ E[x̂].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.codebook import Codebook, feed_forward, fit
from onnxc.numerics.refit import Fit, Sums, refit
from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]

MOST = 256  # levels of a codebook
LEAST = 8  # weights for each level: of fewer, distinct values are no codebook
PINNED = 0.1  # share of zeros from which on they stay zeros
STEPS = 127  # of a grid of integers on either side of 0
CLOSE = 1e-4  # of a step, to be on that grid
LEAST_RIDGE, TINY = 1e-4, 1e-6  # λ; of the mean of D, what an input counts at least


def codebook_of(weight: Floats) -> Codebook | None:
    """The codebook that a weight (groups, outputs, d) is on already; None for a plain weight."""
    levels, codes = np.unique(weight, return_inverse=True)
    if len(levels) > min(MOST, weight.size // LEAST):
        return None
    codes = codes.reshape(weight.shape)
    zero = np.flatnonzero(levels == 0)
    is_sparse = len(zero) > 0 and np.mean(codes == zero[0]) >= PINNED
    return Codebook(levels, codes, int(zero[0]) if is_sparse else None)


def snap(levels: Floats) -> Floats:
    """Levels on the nearest multiples of max |c| / 127."""
    peak = float(np.abs(levels).max(initial=0))
    scale = float(np.float32(peak / STEPS))
    return np.asarray(np.rint(levels / scale) * scale) if scale else levels


def snapper(levels: Floats) -> Callable[[Floats], Floats] | None:
    """`snap`, for levels that are on the grid already."""
    scale = max(float(np.abs(levels).max(initial=0)) / STEPS, 1e-300)
    is_on_grid = np.abs(levels / scale - np.rint(levels / scale)).max() < CLOSE
    return snap if is_on_grid else None


def refit_shared(
    folds: Sequence[Sums], W: Floats, b: Floats, book: Codebook, bias: Floats, is_biased: bool
) -> Fit:
    """The best Ŵ on as many levels. W, b: before they were shared; book, bias: as they are."""
    sums = folds[0] + folds[1]
    W = np.where(book.codes == book.pinned, 0, W) if book.pinned is not None else W
    target = refit(folds, W, b if is_biased else bias, is_biased)
    before = _error(folds, book.weight, bias)
    if not np.isfinite(target.ridge):
        return Fit(book.weight, bias, before, before, target.ridge)
    m = sums.moments(is_biased)
    E, peak = Quadratic((_ridged(m.H, target.ridge),)), np.abs(W).max()
    goal = np.clip(target.W, -peak, peak)  # beyond lies what next to nothing comes in for
    starts = (book, feed_forward(goal, E, book))
    start = min(starts, key=lambda tried: E.error(goal - tried.weight))
    found = fit(goal, E, start, snap=snapper(book.levels)).weight
    shift = m.t - np.einsum("god,gd->go", found, m.x) if is_biased else bias
    return Fit(found, shift, before, _error(folds, found, shift), target.ridge)


def _ridged(H: Floats, ridge: float) -> Floats:
    """H + λD, with D above 0 where nothing came in."""
    D = np.diagonal(H, axis1=1, axis2=2)
    least = TINY * max(float(D.mean()), np.finfo(float).tiny)
    added = np.maximum(max(ridge, LEAST_RIDGE) * D, least)
    return np.asarray(H + added[:, None] * np.eye(H.shape[1]))


def _error(folds: Sequence[Sums], W: Floats, b: Floats) -> float:
    return float(sum(fold.error(W, b).sum() for fold in folds))
