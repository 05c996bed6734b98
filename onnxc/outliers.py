"""Channels that may be split into several: who reads them, and how they are copied.

A **candidate** is either a group of channels whose makers, carriers and readers are all widened, or
one tensor whose channels a Gather copies in front of the layers that read it. In both cases each
index of a reader's input is one of `count` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.groups import Channels, Group, find_channels
from onnxc.channels.labels import Labels
from onnxc.channels.widened import Order, has_twins, why_not_widened, widen
from onnxc.core import Context, Key
from onnxc.graph import constant, fresh, insert, values
from onnxc.integer import refusal
from onnxc.moments import moments_key
from onnxc.ops import groups, is_constant, knowledge
from onnxc.scalable import ChannelGroup, channel_groups

Array = NDArray[Any]


@dataclass(frozen=True)
class Candidate:
    """Channels that may be split.

    first: the node that they are named by. readers: layers that read them. numbers: for each
    reader, by name, the channel of each index of its input. copy: gives channels k copies, k
    (count,). scaled: how they are divided, where they may be, and the channel of each index there.
    """

    first: str
    count: int = 0
    readers: Sequence[gs.Node] = ()
    numbers: Mapping[str, Array] = field(default_factory=dict)
    copy: Callable[[Array], None] | None = None
    scaled: tuple[ChannelGroup, Array] | None = None
    obstacle: str = ""

    @property
    def statistics(self) -> list[Key]:
        """Of what the readers read."""
        return [key for node in self.readers for key in _keys(node)]

    def ends(self, context: Context) -> tuple[Array, Array]:
        """Least and largest value of each channel, as most samples have them, (count,) each."""
        low, high = np.zeros(self.count), np.zeros(self.count)
        for node in self.readers:
            _, found, typical = (context.stats[key] for key in _keys(node))
            peak, number = typical.peak, self.numbers[node.name]
            np.minimum.at(low, number, np.maximum(found.low, -peak))
            np.maximum.at(high, number, np.minimum(found.high, peak))
        return low, high


def candidates(graph: gs.Graph, context: Context, gather: bool = False) -> list[Candidate]:
    """Of a graph whose shapes were inferred, in its order; those in the way with their obstacle.

    gather: also tensors that a Gather would have to copy.
    """
    view = _View(graph, context)
    found = [view.of_group(group) for group in view.channels.groups()]
    if not gather:
        return found
    done = {node.name for x in found if not x.obstacle for node in x.readers}
    heavy = (node for node in graph.nodes if knowledge(node).window is not None)
    tensors = {node.inputs[0].name: node.inputs[0] for node in heavy}
    copied = [x for tensor in tensors.values() for x in view.of_tensor(tensor, done)]
    names = {node.name for x in copied for node in x.readers}
    return [x for x in found if names.isdisjoint(node.name for node in x.readers)] + copied


def _keys(node: gs.Node) -> Iterator[Key]:
    """Statistics of what a layer reads: moments, range and peak."""
    row, moments = knowledge(node), moments_key(node)
    assert row.x_axis is not None and moments is not None
    yield moments
    for what in ("range", "peak"):
        yield Key(node.inputs[0].name, what, row.x_axis(node))


@dataclass(frozen=True)
class _View:
    """A graph, with what candidates are made of."""

    graph: gs.Graph
    context: Context

    @cached_property
    def channels(self) -> Channels:
        return find_channels(self.graph, self.context.only.excluded(self.graph))

    @cached_property
    def allowed(self) -> frozenset[str]:
        return self.context.only.names(self.graph)

    @cached_property
    def scalable(self) -> list[ChannelGroup]:
        """What may be divided exactly: a Clip would cut off at another value."""
        found = channel_groups(self.graph, self.allowed)
        return [group for group in found if not group.obstacle and not group.clips]

    @cached_property
    def nodes(self) -> dict[str, gs.Node]:
        return {node.name: node for node in self.graph.nodes}

    def of_group(self, group: Group) -> Candidate:
        """A group that is widened."""
        first = (group.nodes("makes") or group.nodes("reads"))[0]
        readers = [self.nodes[name] for name in group.nodes("reads")]
        obstacle = next(filter(None, self._obstacles(group)), "")
        if obstacle:
            return Candidate(first, readers=readers, obstacle=obstacle)
        place = {root: number for number, root in enumerate(group.channels.tolist())}
        reading = (slot for slot in group.slots if slot.role == "reads")
        numbers = {slot.node: _numbers(slot.labels, place) for slot in reading}

        def copy(k: Array) -> None:
            counts = dict(zip(group.channels.tolist(), k.tolist(), strict=True))
            widen(self.graph, self.channels, counts)

        return Candidate(first, len(place), readers, numbers, copy, self._divided(readers, place))

    def _obstacles(self, group: Group) -> Iterator[str]:
        """Why a group is not widened; some are empty."""
        yield why_not_widened(self.graph, self.channels, group)
        names = group.nodes("makes", "carries")
        yield from (f"{name} is excluded" for name in names if name not in self.allowed)
        yield "" if group.nodes("makes") else "no weight makes them"
        yield "" if group.nodes("reads") else "no weight reads them"
        known = set(group.channels.tolist())
        for slot in (s for s in group.slots if s.role == "reads"):
            yield self._misfit(self.nodes[slot.node])
            if slot.position != 1 or not set(slot.labels.tolist()) <= known:
                yield f"{slot.node} reads others besides"
        yield "some are copies of others already" if has_twins(self.graph, group) else ""

    def _misfit(self, node: gs.Node) -> str:
        """Why a layer cannot read channels that are split; empty if it can."""
        if node.name not in self.allowed:
            return f"{node.name} is excluded"
        reason = refusal(node, self.context.target)
        if not reason and (groups(node) > 1 or moments_key(node) is None):
            reason = "it sums over groups of them"
        return f"{node.name} reads them, and {reason}" if reason else ""

    def _divided(
        self, readers: Sequence[gs.Node], place: Mapping[int, int]
    ) -> tuple[ChannelGroup, Array] | None:
        """How the channels of a group are divided, if they may be."""
        found = self._scaled(readers)
        if found is None:
            return None
        tensor = found.tensors[0]
        labels = self.channels.tensors.get(tensor.name, {}).get(found.axis % len(tensor.shape))
        if labels is None or not set(labels.tolist()) <= place.keys():
            return None
        return found, _numbers(labels, place)

    def _scaled(self, readers: Sequence[gs.Node]) -> ChannelGroup | None:
        """Tensors that may be scaled and that just these layers read."""
        names = {node.name for node in readers}
        return next((g for g in self.scalable if {n.name for n in g.readers} == names), None)

    def of_tensor(self, tensor: gs.Tensor, done: set[str]) -> Iterator[Candidate]:
        """A tensor with the layers that read it and are in no other candidate."""
        found = (n for n in tensor.outputs if n.inputs[0] is tensor and n.name in self.nodes)
        readers = [n for n in found if n.name not in done and not self._misfit(n)]
        axes = {_axis(node) for node in readers}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None or not isinstance(tensor.shape[axis], int):
            return
        first, count = readers[0].name, int(tensor.shape[axis])
        if _is_copied(tensor):
            yield Candidate(first, readers=readers, obstacle="some are copies of others already")
            return
        numbers = {node.name: np.arange(count) for node in readers}
        scaled = self._scaled(readers)

        def copy(k: Array) -> None:
            _gather(self.graph, tensor, readers, axis, Order.of(k).position)

        pair = None if scaled is None else (scaled, np.arange(count))
        yield Candidate(first, count, readers, numbers, copy, pair)


def _numbers(labels: Labels, place: Mapping[int, int]) -> Array:
    return np.array([place[root] for root in labels.tolist()], np.intp)


def _axis(node: gs.Node) -> int | None:
    """The axis of its input that a layer sums over; None where the rank is not known."""
    row, shape = knowledge(node), node.inputs[0].shape
    return None if shape is None or row.x_axis is None else row.x_axis(node) % len(shape)


def _is_copied(tensor: gs.Tensor) -> bool:
    """Whether a Gather picks some index of a tensor more than once."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "Gather" or not is_constant(maker.inputs[1]):
        return False
    picked = values(maker.inputs[1])
    return len(np.unique(picked)) < picked.size


def _gather(
    graph: gs.Graph, tensor: gs.Tensor, readers: Sequence[gs.Node], axis: int, picked: Array
) -> None:
    """Let layers read the picked channels of a tensor."""
    name = fresh(graph, f"{tensor.name}_split")
    shape = [len(picked) if i == axis else size for i, size in enumerate(tensor.shape)]
    wide = gs.Variable(name, tensor.dtype, shape)
    which = constant(fresh(graph, f"{name}_indices"), picked.astype(np.int64))
    node = gs.Node(
        "Gather", fresh(graph, f"{name}/Gather"), {"axis": axis}, [tensor, which], [wide]
    )
    for reader in readers:
        reader.inputs[0] = wide
    insert(graph, before={readers[0].name: [node]})
