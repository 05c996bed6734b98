"""A table that puts the codes of an activation on few of them.

An activation on the grid s (c − z), c in low … high, is put on levels of that grid,

    c <- T[c],      T takes 2^b values at most, and T[z] = z

so that zero stays exact. The levels are those of LQ-Nets (`onnxc.numerics.activation_levels`),
Σ_i v_i e_i with e in {0, 1}^b above a least one, fitted to how often each code occurs, and rounded.
Where z is none of them, the nearest one makes room for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.activation_levels import basis
from onnxc.numerics.kmeans import Points, nearest

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Grid = tuple[int, float]  # levels below zero, and how far they are apart

ENDS = np.linspace(1.0, 0.1, 19)  # shares of each side of a range that grids reach to


def counted(x: Floats, n: Floats, scale: float, zero: int, low: int, high: int) -> Floats:
    """How often each code from low to high occurs, of numbers x that occur n times."""
    c = np.clip(np.rint(x / scale) + zero, low, high).astype(np.intp) - low
    return np.bincount(c, n, high - low + 1).astype(np.float64)


def few(counts: Floats, zero: int, low: int, bits: int) -> Codes:
    """The levels as sorted codes; counts: how often each code from low on occurs.

    From the uniform grid over a part of the range that loses least, which stays where it is best.
    """
    used = np.flatnonzero(counts)
    if not len(used):
        return np.array([zero], np.int64)
    high = low + len(counts) - 1

    def error(levels: Floats) -> float:
        return lost(counts, table(_rounded(levels, zero, low, high), low, high), low)

    below, above = max(zero - low - int(used[0]), 0), max(low + int(used[-1]) - zero, 0)
    grids = list(_grids(below, above, bits))
    least, step = min(grids, key=lambda grid: error(_levels(zero, grid, bits)))
    start = zero - least * step
    points = Points((used + low - start).astype(np.float64), counts[used], counts[used])
    e = np.array(list(product((0.0, 1.0), repeat=bits)))
    both = _levels(zero, (least, step), bits), start + e @ basis(points, bits, step)
    return _rounded(min(both, key=error), zero, low, high)


def _grids(below: int, above: int, bits: int) -> Iterator[Grid]:
    """Uniform grids over parts of a range."""
    for a in ENDS if below else (0.0,):
        for b in ENDS if above else (0.0,):
            step = (a * below + b * above) / (2**bits - 1)
            if step > 0:
                yield round(a * below / step), step
    yield 0, 1.0


def _levels(zero: int, grid: Grid, bits: int) -> Floats:
    least, step = grid
    return zero + (np.arange(2**bits) - least) * step


def _rounded(levels: Floats, zero: int, low: int, high: int) -> Codes:
    """Levels as codes, with zero among them."""
    kept = np.unique(np.clip(np.rint(levels), low, high).astype(np.int64))
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
