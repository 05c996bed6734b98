"""What a graph costs when each group of channels keeps so many of them.

A node's cost, in MACs or milliseconds, goes with the sizes of the axes that channels are cut from:

    c_n(k) = c_n Π_a ⌈A_a k⌉_m / ⌈A_a k₀⌉_m,

where k counts the channels that each group keeps, k₀ all that there are, A_a k is the size of axis
a, and ⌈·⌉_m rounds up to the multiple m that kernels work in (1 for MACs). A weight counts by its
own axes, what has no weight by those of its output; a recurrent node by both of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.groups import Channels, Group
from onnxc.channels.labels import Labels

Array = NDArray[Any]


@dataclass(frozen=True)
class Budget:
    """Costs of a graph as a function of the channels that its groups keep.

    shares: part of the cost that moves with some axes, (items,). axes: for each item the rows of
    `counts` that it is a product of. counts: A, (axes, groups + 1), whose last column is what no
    group can cut. all: k₀, (groups,). fixed: the cost that does not move. multiple: m.
    """

    shares: Array
    axes: tuple[tuple[int, ...], ...]
    counts: Array
    all: Array
    fixed: float
    multiple: int = 1

    @property
    def total(self) -> float:
        """The cost of the graph as it is."""
        return float(self.cost(self.all[None])[0])

    def cost(self, kept: Array) -> Array:
        """Costs (n,) when group i keeps kept[:, i] channels; kept: (n, groups)."""
        ratio = self._sizes(kept) / np.maximum(self._sizes(self.all[None]), 1)
        cost = np.full(len(kept), self.fixed)
        for share, rows in zip(self.shares, self.axes, strict=True):
            cost += share * np.prod(ratio[:, list(rows)], axis=1)
        return cost

    def _sizes(self, kept: Array) -> Array:
        """Sizes of the axes, (n, axes)."""
        sizes = kept @ self.counts[:, :-1].T + self.counts[:, -1]
        return np.asarray(np.ceil(np.round(sizes, 6) / self.multiple) * self.multiple)


def budget(
    graph: gs.Graph,
    channels: Channels,
    groups: Sequence[Group],
    costs: Mapping[str, float],
    multiple: int = 1,
) -> Budget:
    """The costs of nodes by name, and which axes they move with."""
    owner = {int(root): i for i, group in enumerate(groups) for root in group.channels}
    sizes = np.array([len(group.channels) for group in groups], float)
    rows: list[Array] = []
    items: list[tuple[float, tuple[int, ...]]] = []
    fixed = float(costs.get("", 0.0))
    for node in graph.nodes:
        cost = costs.get(node.name, 0.0)
        for share, axes in _items(node, channels):
            found = [_row(labels, owner, sizes) for labels in axes]
            moving = [row for row in found if row[:-1].any()]
            if not moving:
                fixed += cost * share
            elif cost:
                start = len(rows)
                rows += moving
                items.append((cost * share, tuple(range(start, len(rows)))))
    counts = np.array(rows) if rows else np.zeros((0, len(groups) + 1))
    shares = np.array([share for share, _ in items])
    return Budget(shares, tuple(axes for _, axes in items), counts, sizes, fixed, multiple)


def _items(node: gs.Node, channels: Channels) -> list[tuple[float, list[Labels]]]:
    """Parts of a node's cost with the axes that each goes with."""
    axes: dict[int, list[Labels]] = {}
    for slot in channels.slots_of(node.name):
        if len(node.inputs[slot.position].shape) >= 2:
            axes.setdefault(slot.position, []).append(slot.labels)
    if not axes:
        made = channels.tensors.get(node.outputs[0].name, {})
        return [(1.0, list(made.values()))]
    sizes = {position: float(np.prod(node.inputs[position].shape)) for position in axes}
    whole = sum(sizes.values())
    return [(sizes[position] / whole, some) for position, some in axes.items()]


def _row(labels: Labels, owner: Mapping[int, int], sizes: Array) -> Array:
    """How many indices of an axis a channel of each group stands for; last, those of no group."""
    row = np.zeros(len(sizes) + 1)
    for root in labels.tolist():
        row[owner.get(root, len(sizes))] += 1
    row[:-1] /= np.maximum(sizes, 1)
    return row
