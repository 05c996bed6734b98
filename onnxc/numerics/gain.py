"""A gain for each output, so that outputs of different strength share one codebook.

    ŵ_oj = g_o c[a_oj]

(gain and shape: Sabin and Gray 1984, "Product code vector quantizers"). A codebook of W alone is as
coarse for a weak output as for a strong one. With W/g in place of W, at

    g_o = min(max_j |w_oj|, 3 √(mean_j w_oj²)),

all outputs lose about the same share. The best g_o for given codes is that of least squares,

    g_o = (ĉ C wᵀ) / (ĉ C ĉᵀ),     ĉ = c[a_o],

and gains and codebooks are fitted in turn. A gain has 32 bits, which at the same bytes could be
spent on codes, where a bit is worth 6 dB; so gains are worth it where

    10 log₁₀ (error without / error with) > 20 log₁₀ 2 · bits of all gains / number of weights
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.codebook import Codebook, plain
from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]

PEAK = 3  # g, of the root of the mean square
ROUNDS = 3  # of gains and codebooks in turn
LEAST, MOST = 0.5, 2.0  # change of a gain in a round
DECIBELS = 20 * math.log10(2)  # of a bit
BITS = 32  # of a gain


def gains(W: Floats) -> Floats:
    """g at first, (groups, outputs, 1); 1 where all weights are 0."""
    peak = np.abs(W).max(axis=2, keepdims=True)
    found = np.minimum(peak, PEAK * np.sqrt(np.mean(W * W, axis=2, keepdims=True)))
    return np.where(found > 0, found, 1.0)


def fit(
    W: Floats, E: Quadratic, solve: Callable[[Floats, Codebook | None], Codebook]
) -> tuple[Codebook, Floats]:
    """The codebook of W/g and g. solve: fits a codebook to a weight, from a start if there is one.

    E is that of W; W/g is fitted in the same metric, so that each output counts with its share.
    """
    g = gains(W)
    book = solve(W / g, None)
    for _ in range(ROUNDS):
        g = g * _better(W / g, E, book.weight)
        book = solve(W / g, book)
    return book, g


def _better(W: Floats, E: Quadratic, made: Floats) -> Floats:
    """What gains have to be multiplied by."""
    image = E.times(made)
    across, along = (np.sum(image * x, axis=2, keepdims=True) for x in (W, made))
    found = np.divide(across, along, out=np.ones_like(across), where=along > 0)
    return np.asarray(np.clip(found, LEAST, MOST))


def is_worth_it(W: Floats, diagonal: Floats, levels: Callable[[Floats], Floats]) -> bool:
    """Whether gains do more than longer codes would. levels: finds them for weights.

    diagonal: what weights count with, (groups, d).
    """
    g = gains(W)
    without = _error(W, diagonal, levels(W))
    with_them = float(np.sum(_error(W / g, diagonal, levels(W / g)) * g[..., 0] ** 2))
    if with_them <= 0:
        return False
    gained = 10 * math.log10(max(without.sum() / with_them, 1))
    return gained > DECIBELS * BITS * g.size / W.size


def _error(W: Floats, diagonal: Floats, levels: Floats) -> Floats:
    """Σ_j C_jj (w_oj − ŵ_oj)², (groups, outputs)."""
    lost = W - plain(W, levels).weight
    return np.asarray(np.sum(diagonal[:, None] * lost * lost, axis=2))
