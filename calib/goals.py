"""What a layer of a rewritten graph gets and what it ought to give, summed over rows.

    x̂   rows of the layer's input in the graph as it is (`onnxc.numerics.patches`)
    t    at the same positions, what it ought to give: a tensor of the original graph, less one of
         the graph as it is where a sum follows (see `onnxc.core.Goal`)

Samples go to two folds in turn, so that what is learned from one can be judged by the other: rows
of one sample look alike, those of two samples do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.patches import Window, first, length, rows
from onnxc.numerics.refit import Sums

Array = NDArray[Any]

FEWEST, MOST = 64, 256  # rows of a sample: clip(d, FEWEST, MOST)
AT_ONCE = 16 << 20  # bytes of rows, in float64, that are multiplied at once


def positions(d: int) -> int:
    """Rows of length d that are taken of a sample."""
    return min(max(d, FEWEST), MOST)


@dataclass
class GoalObserver:
    """Sums over rows of the input x̂ of a layer and of its goal t, in two folds.

    axis, window: of the rows of x̂. goal_axis: of the channels of t. samples: seen so far.
    """

    axis: int = 1
    window: Window = Window()
    goal_axis: int = 1
    folds: list[Sums] = field(default_factory=lambda: [Sums(), Sums()])
    samples: int = 0

    def update(self, x: Array, t: Array, samples: int | None = None) -> None:
        """Add the rows of a batch that holds so many samples."""
        d = length(x.shape, self.axis, self.window)
        size = 8 * self.window.groups * positions(d) * d
        for one, other, count in _parts(x, t, samples, max(AT_ONCE // size, 1)):
            self._add(one, other, count, positions(d))

    def _add(self, x: Array, t: Array, samples: int | None, wanted: int) -> None:
        starts = first(x, self.axis, self.window, wanted, samples)
        taken, _ = rows(x, self.axis, self.window, wanted, samples, starts)
        part = Window(groups=self.window.groups)
        goals, _ = rows(t, self.goal_axis, part, wanted, len(starts), starts)
        is_mixed = len(starts) < (samples or 1)  # no axis in front tells the samples apart
        count = taken.shape[1] if is_mixed else len(starts)
        for fold in range(2):
            chosen = slice((self.samples + fold) % 2, None, 2)
            pair = (_of_samples(rows_, count, chosen) for rows_ in (taken, goals))
            self.folds[fold] = self.folds[fold] + Sums.of(*pair)
        self.samples += count

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(np.isfinite(s.x).all() and np.isfinite(s.tt).all()) for s in self.folds)


def _parts(
    x: Array, t: Array, samples: int | None, most: int
) -> Iterator[tuple[Array, Array, int | None]]:
    """Both, a few samples at a time where the first axis counts them."""
    if samples is None or not len(x) == len(t) == samples:
        yield x, t, samples
        return
    for begin in range(0, samples, most):
        part = slice(begin, begin + most)
        yield x[part], t[part], len(x[part])


def _of_samples(taken: Array, count: int, chosen: slice) -> NDArray[np.float64]:
    """Rows (groups, n, d) of some of the samples, which lie one behind the other."""
    groups, n, d = taken.shape
    parts = taken.reshape(groups, count, n // count, d)[:, chosen]
    return parts.reshape(groups, -1, d).astype(np.float64)
