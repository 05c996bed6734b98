"""What a layer of a rewritten graph gets and what it ought to give, row by row.

    x̂   rows of the layer's input in the graph as it is (`onnxc.numerics.patches`)
    t    at the same positions, what it ought to give: a tensor of the original graph, less one of
         the graph as it is where a sum follows (see `onnxc.core.Goal`)

`GoalObserver` sums over rows, `RowsObserver` keeps some of them. Samples go to two folds in turn,
so that what is learned from one can be judged by the other: rows of one sample look alike, those of
two samples do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.nonlinear import Rows
from onnxc.numerics.patches import Window, first, length, rows
from onnxc.numerics.refit import Sums

Array = NDArray[Any]

TAKEN = 256  # rows of a sample
AT_ONCE = 16 << 20  # bytes of rows, in float64, that are multiplied at once
KEPT = 64 << 20  # bytes of rows that are kept of a layer


@dataclass(frozen=True)
class Cut:
    """How rows are cut out of tensors. goal_axis: of the channels of all but the layer's input."""

    axis: int = 1
    window: Window = Window()
    goal_axis: int = 1

    def length(self, x: Array) -> int:
        return length(x.shape, self.axis, self.window)

    def parts(
        self, tensors: tuple[Array, ...], samples: int | None, wanted: int
    ) -> Iterator[tuple[int, tuple[Array, ...]]]:
        """Rows, (groups, n, channels), of the input and of what goes with it, a few samples each.

        First, how many samples they are of, which lie one behind the other. wanted: of a sample.
        """
        size = 8 * self.window.groups * wanted * self.length(tensors[0])
        for some, count in _some(tensors, samples, max(AT_ONCE // size, 1)):
            yield self._taken(some, count, wanted)

    def _taken(
        self, tensors: tuple[Array, ...], samples: int | None, wanted: int
    ) -> tuple[int, tuple[Array, ...]]:
        x, *others = tensors
        starts = first(x, self.axis, self.window, wanted, samples)
        taken, _ = rows(x, self.axis, self.window, wanted, samples, starts)
        plain = Window(groups=self.window.groups)
        also = (rows(t, self.goal_axis, plain, wanted, len(starts), starts)[0] for t in others)
        is_mixed = len(starts) < (samples or 1)  # no axis in front tells the samples apart
        return taken.shape[1] if is_mixed else len(starts), (taken, *also)


def _some(
    tensors: tuple[Array, ...], samples: int | None, most: int
) -> Iterator[tuple[tuple[Array, ...], int | None]]:
    """All tensors, a few samples at a time where the first axis counts them."""
    if samples is None or any(len(t) != samples for t in tensors):
        yield tensors, samples
        return
    for begin in range(0, samples, most):
        part = tuple(t[begin : begin + most] for t in tensors)
        yield part, len(part[0])


def _of_samples(taken: Array, count: int, chosen: slice, dtype: Any) -> Array:
    """Rows (groups, n, d) of some of the samples, which lie one behind the other."""
    groups, n, d = taken.shape
    parts = taken.reshape(groups, count, n // count, d)[:, chosen]
    return parts.reshape(groups, -1, d).astype(dtype)


@dataclass
class GoalObserver:
    """Sums over rows of the input x̂ of a layer and of its goal t, in two folds. samples: so far."""

    cut: Cut = Cut()
    folds: list[Sums] = field(default_factory=lambda: [Sums(), Sums()])
    samples: int = 0

    def update(self, x: Array, t: Array, samples: int | None = None) -> None:
        """Add the rows of a batch that holds so many samples."""
        for count, taken in self.cut.parts((x, t), samples, TAKEN):
            for fold in range(2):
                chosen = slice((self.samples + fold) % 2, None, 2)
                pair = (_of_samples(rows_, count, chosen, np.float64) for rows_ in taken)
                self.folds[fold] = self.folds[fold] + Sums.of(*pair)
            self.samples += count

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(np.isfinite(s.x).all() and np.isfinite(s.tt).all()) for s in self.folds)


@dataclass
class RowsObserver:
    """Some rows of x̂, of the goal's tensor and of what it is less, in two folds. samples: so far.

    expected: samples that there will be, which share KEPT bytes.
    """

    cut: Cut = Cut()
    expected: int = 1
    folds: list[list[Rows]] = field(default_factory=lambda: [[], []])
    samples: int = 0

    def update(
        self, x: Array, t: Array, samples: int | None = None, a: Array | None = None
    ) -> None:
        """Keep some rows of a batch that holds so many samples."""
        tensors = (x, t) if a is None else (x, t, a)
        for count, taken in self.cut.parts(tensors, samples, self._wanted(*tensors)):
            for fold in range(2):
                chosen = slice((self.samples + fold) % 2, None, 2)
                parts = (_of_samples(rows_, count, chosen, np.float32) for rows_ in taken)
                self.folds[fold].append(Rows(*parts))
            self.samples += count

    def _wanted(self, x: Array, *others: Array) -> int:
        """Rows of a sample."""
        d, axis = self.cut.length(x), self.cut.goal_axis
        row = 4 * (d * self.cut.window.groups + sum(int(t.shape[axis]) for t in others))
        return max(min(TAKEN, KEPT // (row * max(self.expected, 1))), 1)

    @property
    def is_finite(self) -> bool:
        """Whether all rows are."""
        parts = [part for fold in self.folds for part in fold]
        arrays = [a for part in parts for a in (part.x, part.t, part.a) if a is not None]
        return all(bool(np.isfinite(a).all()) for a in arrays)
