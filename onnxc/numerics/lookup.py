"""A table that puts the codes of an activation on few of them.

An activation on the grid s (c − z), c in low … high, is put on levels of that grid,

    c <- T[c],      T takes 2^b values at most, and T[z] = z

so that zero stays exact. The levels are those of LQ-Nets (`onnxc.numerics.activation_levels`),
Σ_i v_i e_i with e in {0, 1}^b above the least code that occurs, fitted to how often each code
does, and rounded. Where z is none of them, the nearest one makes room for it.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.activation_levels import basis
from onnxc.numerics.kmeans import Points, nearest

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


def counted(x: Floats, n: Floats, scale: float, zero: int, low: int, high: int) -> Floats:
    """How often each code from low to high occurs, of numbers x that occur n times."""
    c = np.clip(np.rint(x / scale) + zero, low, high).astype(np.intp) - low
    return np.bincount(c, n, high - low + 1).astype(np.float64)


def few(counts: Floats, zero: int, low: int, bits: int) -> Codes:
    """The levels as sorted codes; counts: how often each code from low on occurs."""
    used = np.flatnonzero(counts)
    if not len(used):
        return np.array([zero], np.int64)
    first = used[0]
    n = counts[used]
    v = basis(Points((used - first).astype(np.float64), n, n), bits)
    levels = np.array([float(np.dot(e, v)) for e in product((0.0, 1.0), repeat=bits)])
    kept = np.unique(np.clip(np.rint(levels) + first, 0, len(counts) - 1).astype(np.int64)) + low
    if zero not in kept:
        kept[np.argmin(np.abs(kept - zero))] = zero
    return np.unique(kept)


def table(kept: Codes, low: int, high: int) -> Codes:
    """T of the codes from low to high: the nearest of those that are kept."""
    codes = np.arange(low, high + 1, dtype=np.float64)
    return kept[nearest(codes, kept.astype(np.float64))]


def lost(counts: Floats, made: Codes, low: int) -> float:
    """Squared error that a table makes, in steps of the grid, relative to the variance of codes."""
    codes = np.arange(low, low + len(counts))
    total = max(float(counts.sum()), 1.0)
    spread = float(counts @ (codes - counts @ codes / total) ** 2)
    return float(counts @ (made - codes) ** 2) / spread if spread > 0 else 0.0


def wrapped(made: Codes, low: int, dtype: Any) -> NDArray[Any]:
    """A table to look up in by code, negative ones counted from its end."""
    return np.roll(made, low).astype(dtype)
