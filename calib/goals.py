"""What a layer of a rewritten graph gets and what it ought to give, summed over rows.

    x̂   rows of the layer's input in the graph as it is (`onnxc.numerics.patches`)
    t    at the same positions, what it ought to give: a tensor of the original graph, less one of
         the graph as it is where a sum follows (see `onnxc.core.Goal`)

Samples go to two folds in turn, so that what is learned from one can be judged by the other: rows
of one sample look alike, those of two samples do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.patches import Window, first, rows
from onnxc.numerics.refit import Sums

Array = NDArray[Any]

POSITIONS = 256  # rows of a sample


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
        starts = first(x, self.axis, self.window, POSITIONS, samples)
        count = len(starts)
        taken, _ = rows(x, self.axis, self.window, POSITIONS, samples, starts)
        part = Window(groups=self.window.groups)
        goals, _ = rows(t, self.goal_axis, part, POSITIONS, count, starts)
        for fold in range(2):
            chosen = slice((self.samples + fold) % 2, None, 2)
            one, other = (_of_samples(a, count, chosen) for a in (taken, goals))
            self.folds[fold] = self.folds[fold] + Sums.of(one, other)
        self.samples += count

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(np.isfinite(s.x).all() and np.isfinite(s.tt).all()) for s in self.folds)


def _of_samples(taken: Array, count: int, chosen: slice) -> NDArray[np.float64]:
    """Rows (groups, n, d) of some of the samples, which lie one behind the other."""
    groups, n, d = taken.shape
    parts = taken.reshape(groups, count, n // count, d)[:, chosen]
    return parts.reshape(groups, -1, d).astype(np.float64)
