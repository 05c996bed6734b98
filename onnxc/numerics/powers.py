"""Weights that are 0 or ± 2^k, quantized by and by, as INQ does (Zhou 2017).

All weights of a layer share a window of exponents. The larger ones are put on their nearest level
first, the others then make up for what that did to the outputs, and so on, until all are on levels:

    50, 75, 87.5, 100 % of the weights, the largest |w| first.

INQ trains the others on; here they are what OBS makes of them (Hassibi 1993), in closed form: the
least E with the levels so far held fixed (`onnxc.numerics.sparse`, refit).

Codes of b bits tell 2^(b−1) − 1 exponents apart, signs and zero. The window ends at or below

    log₂ (4/3 max |w|)

where the largest weight still rounds down to; where fewer bits than that range asks for are given,
a lower window may lose less, and the best one by E is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxc.numerics.coded import Coded
from onnxc.numerics.columns import Floats
from onnxc.numerics.levels import Levels
from onnxc.numerics.sparse import Quadratic, largest, refit

SHARES = (0.5, 0.75, 0.875, 1.0)  # of the weights that are on levels, step by step
LOWER = 4  # windows that are tried below the highest
ACCURACY = 1e-3  # of what OBS makes of the other weights


def windows(W: Floats, levels: Levels) -> Iterator[Floats]:
    """Least sizes 2^k of windows, as numbers t of all outputs, the highest window first."""
    peak = float(np.abs(W).max(initial=0))
    count = int(np.log2(levels.pattern.max())) if peak else 0
    top = int(np.floor(np.log2(4 / 3 * peak))) if peak else 0
    for down in range(LOWER + 1):
        yield np.full((*W.shape[:2], 1), 2.0 ** (top - count - down))


def window(W: Floats, E: Quadratic, levels: Levels) -> Floats:
    """The numbers of the best window, each weight on its nearest level."""
    return min(windows(W, levels), key=lambda t: E.error(W - levels.nearest(W, t)[1]))


def incremental(W: Floats, E: Quadratic, levels: Levels, t: Floats) -> Coded:
    """Codes by the steps above, for levels that stay."""
    X, fixed = W, np.zeros(W.shape, bool)
    for share in SHARES:
        size = np.where(fixed, np.inf, np.abs(X))
        fixed = largest(round(share * W.size))(size)
        codes, values = levels.nearest(X, t)
        X = np.where(fixed, values, X)
        if E.blocks and share < 1:
            held = np.where(fixed, X, 0)
            X = held + refit(W - held, E, ~fixed, X, ACCURACY)
    return Coded(t, codes, values)
