"""Find the scales of a weight that lies on few integers already.

    w = s q,    |q| ≤ q_max,      for each channel the largest s that there is

A weight that was rounded once must not be rounded again to other integers. With p = max |w| of a
channel, s = p / k for a whole k ≤ q_max; the least k that makes whole numbers of all weights is
taken, and of the float32 around p / k the one that gives each w exactly. The integers of all
channels are then multiplied by one power of two as far as q_max goes, which changes no value:
a bias at scale s_x s is the finer for it.

Blocks of values that have a scale of their own are many, and are looked at together, k after k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.affine import TINY

Array = NDArray[Any]

CLOSE = 2.0**-22  # of q, how far w / s may be from it: w and p are rounded to float32
FIRST = 16  # weights of a channel that tell most channels that lie on no integers
CHUNK = 1 << 14  # products of weights and multiples that are looked at in one step
FEW = 16  # blocks that tell most weights that lie on no integers
STEPS = (0, 1, -1, 2, -2)  # float32 numbers around p / k


def lattice_scales(weight: Array, axis: int | None, most: int) -> Array | None:
    """Scales, float32, (channels,) along `axis`, or () for None; of integers up to `most`.

    None where the weights of some channel are no such integers times any scale.
    """
    array = np.asarray(weight, np.float32)
    if not array.size:
        return None
    rows = array.reshape(1, -1)
    if axis is not None:
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    found, largest = np.ones(len(rows), np.float32), 1
    for index, row in enumerate(rows):
        peak = np.abs(row).max()
        if not peak:
            continue
        k = _least_multiple(row, float(peak), most)
        if not k:
            return None
        found[index], largest = _exact(row, float(peak), k), max(largest, k)
    found /= np.float32(1 << ((most // largest).bit_length() - 1))
    if found.min() < TINY:
        return None
    return found if axis is not None else found[0].reshape(())


def block_scales(rows: Array, low: int, high: int) -> Array | None:
    """Scales, float32, (n,), of rows (n, d) with integers from low to high, −low ≥ high.

    Negative where the longer side of the integers lies above 0. None where some row is no such
    integers times any scale.
    """
    if len(rows) > FEW and block_scales(rows[:FEW], low, high) is None:
        return None
    rows = np.asarray(rows, np.float32)
    top, bottom = rows.max(axis=1, initial=0), rows.min(axis=1, initial=0)
    peaks = np.maximum(top, -bottom)
    unit = np.where(peaks > 0, peaks, 1).astype(np.float64)
    k = _multiples(rows / unit[:, None], -low)
    is_longer = k > high
    if k.min(initial=1) == 0 or (is_longer & (top == -bottom)).any():
        return None
    found = _exact_rows(rows, unit / k)
    if found.min(initial=1) < TINY:
        return None
    return np.where(is_longer & (top > -bottom), -found, found)


def _multiples(x: Array, most: int) -> Array:
    """The least k of each row for which k x are integers, (n,); 0 where there is none."""
    found, left = np.zeros(len(x), np.int64), np.arange(len(x))
    step = max(1, CHUNK // max(1, x.size))
    for first in range(1, most + 1, step):
        k = np.arange(first, min(first + step, most + 1))
        is_whole = np.all(_is_whole(k[:, None] * x[left][:, None]), axis=2)
        is_found = np.any(is_whole, axis=1)
        found[left[is_found]] = k[np.argmax(is_whole[is_found], axis=1)]
        left = left[~is_found]
    return found


def _exact_rows(rows: Array, scales: Array) -> Array:
    """For each row the float32 nearest to its scale that gives each weight; else the nearest."""
    nearest, q = scales.astype(np.float32), np.rint(rows / scales[:, None]).astype(np.float32)
    found, is_left = nearest, np.ones(len(rows), bool)
    for step in STEPS:
        tried = nearest + np.float32(step) * np.spacing(nearest)
        is_exact = is_left & (q * tried[:, None] == rows).all(axis=1)
        found, is_left = np.where(is_exact, tried, found), is_left & ~is_exact
    return found


def _least_multiple(row: Array, peak: float, most: int) -> int:
    """The least k for which p / k is a scale of a channel; 0 if there is none."""
    k = np.arange(1, most + 1)
    likely = k[_is_whole(row[:FIRST].astype(np.float64) / peak * k[:, None]).all(axis=1)]
    return next((int(n) for n in likely if _is_whole(row.astype(np.float64) / peak * n).all()), 0)


def _is_whole(x: Array) -> Array:
    return np.asarray(np.abs(x - np.rint(x)) <= CLOSE * np.abs(x))


def _exact(row: Array, peak: float, k: int) -> np.float32:
    """The float32 nearest to p / k that gives each weight exactly; the nearest if none does."""
    nearest = np.float32(peak / k)
    q = np.rint(row.astype(np.float64) / peak * k).astype(np.float32)
    for step in STEPS:
        tried = nearest + np.float32(step) * np.spacing(nearest)
        if (q * tried == row).all():
            return np.float32(tried)
    return nearest
