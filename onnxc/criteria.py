"""CRITERIA: what may tell which channels of a group go first. One row a criterion.

A row says which statistics it wants of the graph and puts channels in order, with the mathematics
of `onnxc.numerics.saliency`. Where data are missing, H is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import has_place
from onnxc.channels import Group
from onnxc.core import Key
from onnxc.edit import values
from onnxc.moments import matrix, moments_key
from onnxc.numerics import saliency
from onnxc.numerics.saliency import Reading, Removal
from onnxc.ops import knowledge
from onnxc.readers import Reader, readers

Array = NDArray[Any]
Name = Literal["obs", "l1", "l2", "fpgm", "bn", "apoz", "activation", "thinet", "lasso", "random"]


@dataclass(frozen=True)
class View:
    """A group of channels in its graph, with what is known of it."""

    group: Group
    nodes: Mapping[str, gs.Node]
    stats: Mapping[Key, Any]
    seed: int = 0

    @cached_property
    def readers(self) -> Sequence[Reader]:
        return readers(self.group, self.nodes)

    @cached_property
    def makers(self) -> list[tuple[gs.Node, int, Array]]:
        """Weights that make the channels: node, axis, and the labels of the axis."""
        return [
            (self.nodes[s.node], s.axis, s.labels)
            for s in self.group.slots
            if s.role == "makes" and s.position == knowledge(self.nodes[s.node]).weight
        ]

    @cached_property
    def gone(self) -> list[int]:
        """Channels, by number, whose every reader's weights are zero."""
        alive = np.zeros(len(self.group.channels), bool)
        for reader in self.readers:
            W = reader.matrix()
            used = (W != 0).any(axis=1).reshape(-1)
            alive |= [bool(used[c].any()) for c in reader.columns(self.group.channels)]
        return [int(c) for c in np.flatnonzero(~alive)]

    @cached_property
    def readings(self) -> list[Reading]:
        """What the readers multiply, one entry for each group of a convolution."""
        return [reading for reader in self.readers for reading in self._readings(reader)]

    def _readings(self, reader: Reader) -> Iterable[Reading]:
        W = reader.matrix()
        H = self.second(reader, W)
        power = float(np.einsum("gmd,gde,gme->", W, H, W, optimize=True))
        width = W.shape[2]
        columns = reader.columns(self.group.channels)
        for number in range(len(W)):
            here = [c[(c >= number * width) & (c < (number + 1) * width)] for c in columns]
            inside = [c - number * width for c in here]
            yield Reading(W[number], H[number], inside, 1 / power if power > 0 else 0.0)

    def second(self, reader: Reader, W: Array) -> Array:
        """H (g, d, d) of a reader's rows, about the mean where a bias takes it up."""
        found = None if reader.key is None else self.stats.get(reader.key)
        if found is None:
            return np.broadcast_to(np.eye(W.shape[2]), (len(W), W.shape[2], W.shape[2]))
        H = found.second
        if not has_place(reader.node):
            return np.asarray(H)
        return np.asarray(H - found.mean[:, :, None] * found.mean[:, None, :])

    def rows(self) -> Array:
        """Weights that make each channel, (channels, entries)."""
        parts = []
        for node, axis, labels in self.makers:
            weight = values(node.inputs[knowledge(node).weight]).astype(np.float64)
            moved = np.moveaxis(weight, axis, 0).reshape(len(labels), -1)
            parts.append(self._by_channel(moved, labels))
        n = len(self.group.channels)
        return np.concatenate(parts, axis=1) if parts else np.zeros((n, 1))

    def _by_channel(self, rows: Array, labels: Array) -> Array:
        """Rows of an axis put together by channel; a channel may stand for several."""
        picked = [rows[labels == channel].reshape(-1) for channel in self.group.channels]
        widest = max(map(len, picked))
        return np.array([np.pad(row, (0, widest - len(row))) for row in picked])

    def inputs(self, what: str) -> Iterable[tuple[Key, Array]]:
        """Keys of a statistic of the tensors that readers read, and the labels of its channels."""
        for reader in self.readers:
            row = knowledge(reader.node)
            if reader.key is not None and row.x_axis is not None:
                axis = row.x_axis(reader.node)
                yield Key(reader.node.inputs[row.data[0]].name, what, axis), reader.slot.labels

    def means(self, what: str, field: str) -> Array:
        """A statistic of the channels, its mean over the readers; 0 where it is not known."""
        found = [np.zeros(len(self.group.channels))]
        for key, labels in self.inputs(what):
            if key in self.stats and len(labels) == len(getattr(self.stats[key], field)):
                rows = getattr(self.stats[key], field)[:, None]
                found.append(self._by_channel(rows, labels).mean(axis=1))
        return np.asarray(np.mean(found[1:] or found, axis=0))


@dataclass(frozen=True)
class Criterion:
    """One criterion. order: `count` channels, the first to go first. wants: its statistics."""

    order: Callable[[View, int], Removal]
    wants: Callable[[View], Iterable[Key]] = lambda view: ()


def _by(score: Callable[[View], Array]) -> Callable[[View, int], Removal]:
    """Low scores first; errors are those of the readers without an update."""

    def order(view: View, count: int) -> Removal:
        scores = score(view)
        left = [c for c in np.argsort(scores, kind="stable") if c not in set(view.gone)]
        picked = np.array(left[:count], np.intp)
        return Removal(picked, saliency.errors(view.readings, view.gone, picked))

    return order


def _deviation(view: View) -> Array:
    """Standard deviation of what makes each channel."""
    parts = []
    for node, _, labels in view.makers:
        key = moments_key(node)
        weight = values(node.inputs[knowledge(node).weight]).astype(np.float64)
        if key is not None and key in view.stats and len(weight) == len(labels):
            found, W = view.stats[key], matrix(node, weight)
            H = found.second - found.mean[:, :, None] * found.mean[:, None, :]
            spread = np.sqrt(np.maximum(np.einsum("gmd,gde,gme->gm", W, H, W, optimize=True), 0))
            parts.append(view._by_channel(spread.reshape(-1, 1), labels).mean(axis=1))
    return np.asarray(sum(parts)) if parts else saliency.norms(view.rows(), 2)


def _power(view: View) -> Array:
    """Root mean square of the values that readers read."""
    total = np.zeros(len(view.group.channels))
    for reader in view.readers:
        if reader.key is not None and reader.key in view.stats:
            diagonal = view.stats[reader.key].diagonal.reshape(-1)
            total += [diagonal[c].mean() for c in reader.columns(view.group.channels)]
    return np.sqrt(total)


def _reader_moments(view: View) -> Iterable[Key]:
    return [reader.key for reader in view.readers if reader.key is not None]


def _maker_moments(view: View) -> Iterable[Key]:
    keys = (moments_key(node) for node, _, _ in view.makers)
    return [key for key in keys if key is not None]


def _random(view: View) -> Array:
    first = [int(c) for c in view.group.channels[:1]]
    return np.random.default_rng([view.seed, *first]).random(len(view.group.channels))


CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(lambda v, n: saliency.obs(v.readings, v.gone, n)),
    "l1": Criterion(_by(lambda v: saliency.norms(v.rows(), 1))),
    "l2": Criterion(_by(lambda v: saliency.norms(v.rows(), 2))),
    "fpgm": Criterion(_by(lambda v: saliency.distances(v.rows()))),
    "bn": Criterion(_by(_deviation), _maker_moments),
    "apoz": Criterion(
        _by(lambda v: 1 - v.means("zeros", "zeros")), lambda v: [k for k, _ in v.inputs("zeros")]
    ),
    "activation": Criterion(_by(_power)),
    "thinet": Criterion(lambda v, n: saliency.thinet(v.readings, v.gone, n)),
    "lasso": Criterion(_by(lambda v: saliency.lasso(v.readings))),
    "random": Criterion(_by(_random)),
}


def wanted(view: View, name: Name) -> Iterable[Key]:
    """Statistics that a criterion, and the update after it, want: H of all readers, and its own."""
    return [*_reader_moments(view), *CRITERIA[name].wants(view)]
