"""CRITERIA: what may tell which channels of a group go first. One row a criterion.

A row says which statistics it wants of the graph and puts channels in order, with the mathematics
of `onnxc.numerics.criteria` and `onnxc.numerics.saliency`. Batch norms are folded into the weights
before; the |γ| of one is then the standard deviation of what the weights make. Where there are no
data, H is the identity.
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
from onnxc.channels.groups import Group
from onnxc.channels.readers import Reader, readers
from onnxc.core import Key
from onnxc.edit import values
from onnxc.moments import BLOCK, is_wide, matrix, moments_key
from onnxc.numerics import criteria
from onnxc.numerics.covariance import centred, pieces
from onnxc.numerics.saliency import Consumer, grouped, remove
from onnxc.numerics.sparse import Quadratic, quadratic
from onnxc.ops import knowledge

Array = NDArray[Any]
Name = Literal["obs", "l1", "l2", "fpgm", "bn", "apoz", "activation", "thinet", "lasso", "random"]


@dataclass(frozen=True)
class Ranking:
    """Channels of a group in the order in which they go, by number, and what that costs.

    damage: (steps + 1,), the squared error of the readers' outputs after 0, 1, … channels, relative
    to their variance and summed over the readers, with the other weights updated.
    """

    order: Array
    damage: Array


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
    def alive(self) -> Array:
        """Numbers of the channels that some reader has weights for."""
        alive = np.zeros(len(self.group.channels), bool)
        for reader in self.readers:
            used = (reader.matrix() != 0).any(axis=1).reshape(-1)
            alive |= [bool(used[c].any()) for c in reader.columns(self.group.channels)]
        return np.flatnonzero(alive)

    @cached_property
    def consumers(self) -> list[Consumer]:
        """What reads the living channels, for each group of a convolution and block of moments."""
        return [consumer for reader in self.readers for consumer in self._consumers(reader)]

    def _consumers(self, reader: Reader) -> Iterable[Consumer]:
        W = reader.matrix()
        H, mu = self._moments(reader, *W.shape[::2])
        columns = reader.columns(self.group.channels[self.alive])
        return map(_without_zeros, grouped(W, H, mu, columns))

    def _moments(self, reader: Reader, g: int, d: int) -> tuple[list[Array], Array | None]:
        """H (g, d, d) of a reader's rows in blocks, and their mean where a bias takes it up."""
        mu, E = error(reader, self.stats)
        if not E.blocks:
            step = BLOCK if is_wide(g, d) else d
            widths = [min(step, d - start) for start in range(0, d, max(step, 1))]
            return [np.broadcast_to(np.eye(w), (g, w, w)) for w in widths], None
        if mu is None:
            return list(E.blocks), None
        return [C + m[:, :, None] * m[:, None, :] for m, C in pieces(mu, E.blocks)], mu

    def rows(self) -> list[Array]:
        """Weights that make each living channel, (channels, entries), for each maker."""
        parts = []
        for node, axis, labels in self.makers:
            weight = values(node.inputs[knowledge(node).weight])
            parts.append(self.by_channel(np.moveaxis(weight, axis, 0), labels))
        return parts

    def by_channel(self, rows: Array, labels: Array) -> Array:
        """Rows of an axis put together by living channel, (channels, entries)."""
        flat = rows.reshape(len(labels), -1)
        picked = [flat[labels == c].reshape(-1) for c in self.group.channels[self.alive]]
        widest = max(map(len, picked), default=0)
        return np.array([np.pad(row, (0, widest - len(row))) for row in picked])

    def inputs(self, what: str) -> Iterable[tuple[Key, Array]]:
        """Keys of a statistic of the tensors that readers read, and the labels of its channels."""
        for reader in self.readers:
            row = knowledge(reader.node)
            if reader.key is not None and row.x_axis is not None:
                axis = row.x_axis(reader.node)
                yield Key(reader.node.inputs[row.data[0]].name, what, axis), reader.slot.labels

    def shares(self) -> list[Array]:
        """Shares of zeros of the living channels, as each reader reads them."""
        known = [
            (self.stats[k].zeros, labels) for k, labels in self.inputs("zeros") if k in self.stats
        ]
        fitting = [(z, labels) for z, labels in known if len(z) == len(labels)]
        return [self.by_channel(z[:, None], labels).mean(axis=1) for z, labels in fitting]

    def powers(self) -> list[Array]:
        """Root mean squares of the living channels, as each reader reads them."""
        found = []
        for reader in self.readers:
            if reader.key is not None and reader.key in self.stats:
                diagonal = self.stats[reader.key].diagonal.reshape(-1)
                columns = reader.columns(self.group.channels[self.alive])
                found.append(np.sqrt([diagonal[c].mean() for c in columns]))
        return found

    def deviations(self) -> list[Array]:
        """Standard deviations of what makes the living channels, for each maker."""
        found = []
        for node, _, labels in self.makers:
            key, weight = moments_key(node), values(node.inputs[knowledge(node).weight])
            if key is not None and key in self.stats and len(weight) == len(labels):
                stats, W = self.stats[key], matrix(node, weight.astype(np.float64))
                H = stats.blocks(W.shape[2])
                E = Quadratic(tuple(centred(h, m) for m, h in pieces(stats.mean, H)))
                variance = np.maximum(np.sum(E.times(W) * W, axis=2), 0).reshape(-1, 1)
                found.append(np.sqrt(self.by_channel(variance, labels).mean(axis=1)))
        return found


def error(reader: Reader, stats: Mapping[Key, Any]) -> tuple[Array | None, Quadratic]:
    """mu (g, d) where a bias takes it up, and E of a reader about it; no blocks without data."""
    found = None if reader.key is None else stats.get(reader.key)
    if found is None or not found.count:
        return None, Quadratic()
    mu = found.mean if has_place(reader.node) else None
    return mu, quadratic(found.blocks(found.total.shape[1]), mu, found.count)


def _without_zeros(consumer: Consumer) -> Consumer:
    """A consumer without the columns that are zero, which must stay so."""
    used = np.asarray(consumer.W.any(axis=0))
    if used.all():
        return consumer
    number = np.cumsum(used) - 1
    columns = [number[c[used[c]]] for c in map(np.asarray, consumer.columns)]
    mu = None if consumer.mu is None else consumer.mu[used]
    H = consumer.H[np.ix_(used, used)]
    return Consumer(consumer.W[:, used], H, mu, columns, consumer.energy)


@dataclass(frozen=True)
class Criterion:
    """One criterion. score: of each living channel, low ones go first; None for OBS.

    wants: its statistics besides the moments of the readers' rows.
    """

    score: Callable[[View], Array] | None
    wants: Callable[[View], Iterable[Key]] = lambda view: ()


def _by_rows(score: Callable[[Sequence[Array]], Array]) -> Criterion:
    return Criterion(lambda view: score(view.rows()) if view.makers else _alike(view))


def _alike(view: View) -> Array:
    return np.zeros(len(view.alive))


def _known(score: Callable[[Sequence[Array]], Array], found: list[Array], view: View) -> Array:
    return score(found) if found else _alike(view)


def _reader_moments(view: View) -> Iterable[Key]:
    return [reader.key for reader in view.readers if reader.key is not None]


def _maker_moments(view: View) -> Iterable[Key]:
    keys = (moments_key(node) for node, _, _ in view.makers)
    return [key for key in keys if key is not None]


def _random(view: View) -> Array:
    return criteria.random(len(view.alive), view.seed + int(view.group.channels[0]))


CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(None),
    "l1": _by_rows(criteria.l1),
    "l2": _by_rows(criteria.l2),
    "fpgm": _by_rows(criteria.fpgm),
    "bn": Criterion(lambda v: _known(criteria.bn, v.deviations(), v), _maker_moments),
    "apoz": Criterion(
        lambda v: _known(criteria.apoz, v.shares(), v), lambda v: [k for k, _ in v.inputs("zeros")]
    ),
    "activation": Criterion(lambda v: _known(criteria.activation, v.powers(), v)),
    "thinet": Criterion(lambda v: criteria.thinet(v.consumers)),
    "lasso": Criterion(lambda v: criteria.lasso(v.consumers)),
    "random": Criterion(_random),
}


def rank(view: View, name: Name, count: int) -> Ranking:
    """The first `count` channels to go by a criterion; fewer where fewer live."""
    if count <= 0 or not len(view.alive):
        return Ranking(np.zeros(0, np.intp), np.zeros(1))
    score = CRITERIA[name].score
    order = None if score is None else np.argsort(score(view), kind="stable")
    found = remove(view.consumers, min(count, len(view.alive)), order)
    return Ranking(view.alive[found.order], found.damage)


def wanted(view: View, name: Name) -> Iterable[Key]:
    """Statistics that a criterion, and the update after it, want: H of all readers, and its own."""
    return [*_reader_moments(view), *CRITERIA[name].wants(view)]
