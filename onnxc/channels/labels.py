"""Labels of channels: which indices of which axes must be cut together.

Every index of an axis carries a label, a number. Axes that move through a graph hand their labels
on, operators that add two tensors tie the labels of both, and an operator that cannot do without a
channel blocks its label. What is tied is one **class**: it is cut as a whole, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]  # (n,): one label for each index of an axis
Axes = dict[int, Labels]  # of the axes of a tensor that carry channels


@dataclass
class Ties:
    """A forest of labels (union-find); a root stands for its class.

    blocked: why a class cannot be cut, by any label of it. copies: labels of equal values.
    """

    parent: list[int] = field(default_factory=list)
    blocked: dict[int, str] = field(default_factory=dict)
    copies: set[int] = field(default_factory=set)

    def fresh(self, count: int, reason: str = "") -> Labels:
        """So many new labels; blocked ones where there is a reason."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        if reason:
            self.blocked.update(dict.fromkeys(range(start, start + count), reason))
        return np.arange(start, start + count)

    def tie(self, a: Labels, b: Labels) -> None:
        """Make one class of a_i and b_i, for each i; shapes broadcast."""
        pairs = (array.reshape(-1).tolist() for array in np.broadcast_arrays(a, b))
        for one, other in zip(*pairs, strict=True):
            self.copies.discard(one)  # what stood for any stands for one now
            self.copies.discard(other)
            first, second = self._root(one), self._root(other)
            self.parent[max(first, second)] = min(first, second)

    def block(self, labels: Labels, reason: str) -> None:
        """Say why some labels cannot be cut; the first reason stays."""
        for label in np.unique(labels):
            self.blocked.setdefault(int(label), reason)

    def roots(self) -> Labels:
        """The root of each label."""
        return np.array([self._root(label) for label in range(len(self.parent))], np.int64)

    def reasons(self, roots: Labels) -> dict[int, str]:
        """Why classes cannot be cut, by root."""
        found: dict[int, str] = {}
        for label, reason in self.blocked.items():
            found.setdefault(int(roots[label]), reason)
        return found

    def _root(self, label: int) -> int:
        parent = self.parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label


def spread(labels: Labels, axis: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Labels of one axis as an array of a whole shape."""
    sizes = [-1 if i == axis else 1 for i in range(len(shape))]
    return np.broadcast_to(labels.reshape(sizes), shape)
