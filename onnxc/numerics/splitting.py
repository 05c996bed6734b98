"""Channels that are split, so that a few large numbers do not set the step of all others.

A channel j of x in y = W x becomes k_j channels, each with x_j / s_j and a part of s_j W_oj, which
leaves y as it is. Splitting weights (s = 1) divides what is largest of W by k, splitting inputs
(s = k) what is largest of x:

    Δ_o = max_j |W_oj| s_j / κ_j / q,        Δ = (max_j high_j / s_j − min_j low_j / s_j) / n

with weights on −q … q and n steps of x. With h_j = E[x_j²], summed over the columns of W that read
channel j, and m_j their mean, rounding then loses

    E(s, k) = Σ_o Δ_o² / 12 · Σ_j h_j / s_j²  +  Σ_oj W_oj² s_j² min(Δ² / 12, m_j / s_j²),

of which channels are split one after the other, each time that one, of its weights or its inputs,
that makes it fall most (Zhao 2019, "Improving neural network quantization without retraining using
outlier channel splitting"; Park 2018, "Value-aware quantization", keeps such numbers in more bits).

**Parts.** Equal parts would lose k times what one weight loses. Instead

    w_i = w / k + Δ (2 i + 1 − k) / (2 k),    i = 0 … k − 1,     Σ_i round(w_i / Δ) = round(w / Δ)

by the identity of Hermite, of which Zhao's w / 2 ± Δ / 4 is the case k = 2. The offsets reach a
little further than w / k, so κ = k − (k − 1) / (2 q).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.affine import TINY

Array = NDArray[Any]
Floats = NDArray[np.float64]

ROOM = 1e-12  # of an error, that is no gain


@dataclass(frozen=True)
class Reader:
    """A weight as the model of errors sees it.

    peaks: max |W_oj|, (scales, channels). outputs: how many share each scale. u: Σ_o W_oj², h: Σ
    E[x_j²], m: mean E[x_j²], over the columns of each channel, (channels,).
    """

    peaks: Floats
    outputs: int
    u: Floats
    h: Floats
    m: Floats

    @classmethod
    def of(cls, W: Array, h: Floats, channel: Array, count: int, one_scale: bool = False) -> Reader:
        """W (outputs, columns); h (columns,); channel: of each column, one of `count`."""
        sizes, peaks = np.abs(W, dtype=np.float64), np.zeros((count, len(W)))
        np.maximum.at(peaks, channel, sizes.T)
        u = _sums(channel, np.square(sizes).sum(axis=0), count)
        total = _sums(channel, h, count)
        m = total / np.maximum(_sums(channel, np.ones(len(h)), count), 1)
        if one_scale:
            return cls(peaks.max(axis=1)[None], len(W), u, total, m)
        return cls(peaks.T, 1, u, total, m)


def _sums(channel: Array, x: Array, count: int) -> Floats:
    return np.bincount(channel, x, count).astype(np.float64)


@dataclass(frozen=True)
class Problem:
    """Channels with all that reads them. low, high: of the inputs, (channels,). n, q: steps.

    has_inputs: whether inputs may be divided.
    """

    low: Floats
    high: Floats
    readers: Sequence[Reader]
    n: int = 255
    q: int = 127
    has_inputs: bool = True

    def error(self, s: Floats, k: Floats) -> float:
        """E(s, k)."""
        sizes = (reader.peaks * (s / spread(k, self.q)) for reader in self.readers)
        return self.total(s, [x.max(axis=1, initial=0) for x in sizes])

    def total(self, s: Floats, largest: Sequence[Floats]) -> float:
        """E of the largest numbers of each scale, (scales,) for each reader."""
        step = self._reach(s) / self.n
        total = 0.0
        for reader, top in zip(self.readers, largest, strict=True):
            squares = reader.outputs * float(np.square(top / self.q).sum())
            total += squares / 12 * float(reader.h @ s**-2)
            total += float((reader.u * s**2) @ np.minimum(step**2 / 12, reader.m / s**2))
        return total

    def _reach(self, s: Floats) -> float:
        return float((self.high / s).max(initial=0) - (self.low / s).min(initial=0))


@dataclass(frozen=True)
class Split:
    """s and k of each channel, (channels,), and E before and after."""

    s: Floats
    k: NDArray[np.intp]
    before: float
    after: float


def spread(k: Floats, q: int) -> Floats:
    """κ."""
    return k - (k - 1) / (2 * q)


def split(problem: Problem, most: int) -> Split:
    """Up to `most` copies of channels; as few as leave the least error on the way there.

    Of two ways: inputs alone, as one of two that reach equally far gains nothing yet, and both.
    """
    s, k = (np.ones(len(problem.low)) for _ in range(2))
    before = least = problem.error(s, k)
    for has_weights in (True, False):
        for found, *pair in _way(problem, most, has_weights):
            if found < least * (1 - ROOM):
                least, (s, k) = found, pair
    return Split(s, k.astype(np.intp), before, least)


def _way(problem: Problem, most: int, has_weights: bool) -> Iterator[tuple[float, Floats, Floats]]:
    """E, s and k with one copy more at a time, each the best of those that may come next."""
    s, k = (np.ones(len(problem.low)) for _ in range(2))
    sizes = [reader.peaks.copy() for reader in problem.readers]
    for _ in range(most):
        tops = [_Top.of(x) for x in sizes]
        tried = []
        for j, more in _next(problem, s, k, tops, has_weights):
            s_new, k_new = _plus(s, j, more), _plus(k, j, 1)
            factor = s_new[j] / spread(k_new, problem.q)[j]
            columns = [reader.peaks[:, j] * factor for reader in problem.readers]
            largest = [top.without(j, x) for top, x in zip(tops, columns, strict=True)]
            tried.append((problem.total(s_new, largest), j, s_new, k_new, columns))
        if not tried:
            return
        found, j, s, k, columns = min(tried, key=lambda item: item[0])
        for x, column in zip(sizes, columns, strict=True):
            x[:, j] = column
        yield found, s, k


@dataclass(frozen=True)
class _Top:
    """Of each scale: its largest number, the channel that it is of, and the next largest."""

    first: Floats
    channel: Array
    second: Floats

    @classmethod
    def of(cls, sizes: Floats) -> _Top:
        channel, rows = sizes.argmax(axis=1), np.arange(len(sizes))
        first = sizes[rows, channel]
        sizes[rows, channel] = 0
        second = sizes.max(axis=1)
        sizes[rows, channel] = first
        return cls(first, channel, second)

    def without(self, j: int, column: Floats) -> Floats:
        """The largest numbers, with others in channel j."""
        return np.maximum(np.where(self.channel == j, self.second, self.first), column)


def _next(
    problem: Problem, s: Floats, k: Floats, tops: Sequence[_Top], has_weights: bool
) -> Iterator[tuple[int, int]]:
    """What one more copy may be of: the channel whose weights gain most, or that ends the range.

    With what its s then has more.
    """
    gains, ratio = np.zeros(len(s)), spread(k, problem.q) / spread(k + 1, problem.q)
    for reader, top in zip(problem.readers, tops, strict=True):
        left = np.maximum(top.second, top.first * ratio[top.channel])
        power = reader.outputs * float(reader.h @ s**-2)
        gains += power * np.bincount(top.channel, top.first**2 - left**2, len(s))
    if has_weights and gains.max(initial=0) > 0:
        yield int(np.argmax(gains)), 0
    ends = {int(np.argmax(problem.high / s)), int(np.argmin(problem.low / s))}
    for j in sorted(ends) if problem.has_inputs else ():
        yield j, 1


def _plus(x: Floats, j: int, more: int) -> Floats:
    made = x.copy()
    made[j] += more
    return made


def steps(peaks: Floats, k: Array, q: int) -> Floats:
    """Δ_o of weights with these peaks, (scales, channels), once they are split; (scales,)."""
    reach = (peaks / spread(np.asarray(k, np.float64), q)).max(axis=1, initial=0)
    return np.asarray(np.maximum(reach / q, TINY))


def part(w: Array, k: Array, i: Array, step: Array) -> Floats:
    """w_i; all broadcast. Zeros stay zeros."""
    found = w / k + step * (2 * i + 1 - k) / (2 * k)
    return np.asarray(np.where(w == 0, 0.0, found))


def copies(share: float, channels: int) -> int:
    """How many a share of the channels is, at least one."""
    return math.ceil(share * channels)
