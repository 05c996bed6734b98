"""Channels of a tensor scaled so that layers which read it lose least in integers.

With channel j of x divided by s_j, and the columns of each weight W that reads it multiplied by
s_j, nothing changes but what rounding does. x then has one step for all channels and W one for each
row,

    Δ = 2 max_j p_j / s_j / n,      Δ_o = 2 max_j |W_oj| s_j / m,

p_j being the peak of channel j, n and m how many steps x and W have. A value that is rounded loses
Δ² / 12, or itself where it is smaller:

    E(s) = Σ_oj W_oj² s_j² min(Δ² / 12, h_j / s_j²)  +  Σ_o Δ_o² / 12 · Σ_j h_j / s_j²,

h_j = E[x_j²], summed over the layers. Xiao 2022, "SmoothQuant", takes

    s_j = p_j^α / w_j^(1−α),     w_j = max_o |W_oj|

of which α is the one of least E; where none is much better than s = 1, that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Reader = tuple[Array, Floats]  # W (outputs, channels) and h (channels,)

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WORTH = 0.8  # of E(1), that E has to be below
LIMIT = 1024.0  # largest ratio of a factor to the mean of all


def smoothing(peak: Floats, readers: Sequence[Reader], n: int = 255, m: int = 254) -> Floats:
    """s of the best α, (channels,), of geometric mean 1; ones where little is gained.

    A channel that is always zero, or that nothing is made of, keeps a factor of 1.
    """
    wide = np.max([np.abs(W).max(axis=0, initial=0) for W, _ in readers], axis=0)
    best, least = np.ones(len(peak)), WORTH * error(np.ones(len(peak)), peak, readers, n, m)
    for alpha in ALPHAS:
        s = factors(peak, wide, alpha)
        found = error(s, peak, readers, n, m)
        if found < least:
            best, least = s, found
    return best


def factors(peak: Floats, wide: Floats, alpha: float) -> Floats:
    """s of one α, of geometric mean 1."""
    is_used = (peak > 0) & (wide > 0)
    if not is_used.any():
        return np.ones(len(peak))
    logs = alpha * np.log(peak[is_used]) - (1 - alpha) * np.log(wide[is_used])
    s = np.ones(len(peak))
    s[is_used] = np.clip(np.exp(logs - logs.mean()), 1 / LIMIT, LIMIT)
    return s


def error(s: Floats, peak: Floats, readers: Sequence[Reader], n: int, m: int) -> float:
    """E(s)."""
    step = 2 * float((peak / s).max(initial=0)) / n
    total = 0.0
    for W, h in readers:
        scaled, power = np.asarray(W, np.float64) * s, h / s**2
        rows = 2 * np.abs(scaled).max(axis=1, initial=0) / m
        total += float(np.square(scaled).sum(axis=0) @ np.minimum(step**2 / 12, power))
        total += float(np.square(rows).sum() / 12 * power.sum())
    return total
