"""Channels that go together, in any graph: found by handing labels through it.

A class of labels that the graph can do without is a **channel**; channels that the same slices
make, carry and read are a **group**, such as the stream of a residual stage or the heads of an
attention layer. Indices are exact through Concat, Slice, Pad and Reshape. Inputs and outputs of the
graph never change, and an operator that is not understood keeps what reaches it. Fang 2023,
"DepGraph: Towards any structural pruning", who counts where this follows indices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.channels.flows import FLOWS
from onnxc.channels.labels import Axes, Labels, Ties
from onnxc.channels.visit import Slot, Split, Visit, opaque
from onnxc.edit import bodies, captured
from onnxc.ops import knowledge


@dataclass(frozen=True)
class Group:
    """Channels with the same slots. channels: their roots. obstacle: why they must stay, or ""."""

    channels: Labels
    slots: tuple[Slot, ...]
    obstacle: str = ""

    def nodes(self, *roles: str) -> list[str]:
        """Names of the nodes with a slot in these roles, in order."""
        return list(dict.fromkeys(s.node for s in self.slots if s.role in roles))


@dataclass(frozen=True)
class Channels:
    """Labels of all tensors of a graph, as roots: equal numbers are cut together.

    tensors: axes with channels by tensor name. uses: those of one input, by node and position,
    where a tensor holds copies: each use can be cut in its own way. slots: slices of constants.
    """

    tensors: Mapping[str, Axes]
    uses: Mapping[tuple[str, int], Axes]
    slots: tuple[Slot, ...]
    reasons: Mapping[int, str] = field(repr=False)

    def inputs(self, node: gs.Node) -> list[Axes]:
        """Axes with channels of each input of a node."""
        known = self.tensors
        return [
            self.uses.get((node.name, i), known.get(t.name, {})) for i, t in enumerate(node.inputs)
        ]

    @cached_property
    def _by_node(self) -> dict[str, list[Slot]]:
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            found.setdefault(slot.node, []).append(slot)
        return found

    def slots_of(self, node: str) -> list[Slot]:
        """The slots of a node's constants."""
        return self._by_node.get(node, [])

    def axes(self) -> Iterator[Labels]:
        """Labels of every axis that has channels, of tensors and constants."""
        for axes in (*self.tensors.values(), *self.uses.values()):
            yield from axes.values()
        yield from (slot.labels for slot in self.slots)

    def groups(self) -> list[Group]:
        """All groups that a slot makes or reads, those that must stay with the obstacle."""
        places: dict[int, list[int]] = {}
        for number, slot in enumerate(self.slots):
            for root in np.unique(slot.labels):
                places.setdefault(int(root), []).append(number)
        found: dict[tuple[tuple[int, ...], str], list[int]] = {}
        for root, numbers in places.items():
            reason = self.reasons.get(root, "")
            found.setdefault((tuple(numbers), reason), []).append(root)
        ordered = sorted(found.items(), key=lambda item: item[0][0])
        made = [self._group(numbers, roots, why) for (numbers, why), roots in ordered]
        return [group for group in made if group.nodes("makes", "reads")]

    def _group(self, numbers: tuple[int, ...], roots: list[int], why: str) -> Group:
        slots = tuple(self.slots[number] for number in numbers)
        return Group(np.array(sorted(roots), np.int64), slots, why)


def find_channels(graph: gs.Graph, excluded: Collection[str] = ()) -> Channels:
    """Follow every channel of a graph; shapes must have been inferred.

    excluded: names of nodes whose constants must stay as they are.
    """
    splits: dict[str, Split] = {}
    first = _Trace(graph, excluded, splits)
    found = first.channels()
    wrong = [name for name, axes in first.split.items() if _is_stuck(found, axes)]
    if not wrong:
        return found
    splits.update(dict.fromkeys(wrong, "inner"))
    second = _Trace(graph, excluded, splits)
    other = second.channels()
    return other if _free(other) > _free(found) else found


def _is_stuck(found: Channels, names: Collection[str]) -> bool:
    """Whether none, or one, of the channels of tensors can be cut."""
    labels = [a for name in names for a in found.tensors.get(name, {}).values()]
    roots = {int(root) for some in labels for root in some} - found.reasons.keys()
    return bool(labels) and len(roots) < 2


def _free(found: Channels) -> int:
    return sum(len(group.channels) for group in found.groups() if not group.obstacle)


class _Trace:
    """One way through a graph, node after node."""

    def __init__(
        self, graph: gs.Graph, excluded: Collection[str], splits: Mapping[str, Split]
    ) -> None:
        self.ties = Ties()
        self.slots: list[Slot] = []
        self.tensors: dict[str, Axes] = {}
        self.uses: dict[tuple[str, int], Axes] = {}
        self.copied: dict[str, dict[int, int]] = {}
        self.split: dict[str, list[str]] = {}  # nodes that can be cut in two ways, their outputs
        for node in graph.nodes:
            fixed = f"{node.name} is excluded" if node.name in excluded else ""
            self._visit(node, splits.get(node.name, "outer"), fixed)
        for name in captured(graph):
            self._pin(name, f"a nested body reads {name}")
        for port in graph.outputs:
            self._pin(port.name, f"{port.name} is an output of the model")
        self._share(graph)

    def _visit(self, node: gs.Node, split: Split, fixed: str) -> None:
        x = [self._input(node, position) for position in range(len(node.inputs))]
        visit = Visit(node, x, self.ties, self.slots, split, fixed)
        rule = FLOWS.get(node.op) if not node.domain and not bodies(node) else None
        try:
            made = (rule or opaque)(visit)
        except LookupError:  # a shape that is not known
            made = opaque(visit)
        for tensor, axes in zip(node.outputs, made, strict=False):
            if tensor.name:
                self.tensors[tensor.name] = axes
        if visit.has_choice:
            self.split[node.name] = [t.name for t in node.outputs]
        if visit.copied:
            self.copied[node.outputs[0].name] = visit.copied

    def _input(self, node: gs.Node, position: int) -> Axes:
        """Labels of an input; an axis of copies has its own for each use."""
        name = node.inputs[position].name
        axes = dict(self.tensors.get(name, {})) if name else {}
        for axis, size in self.copied.get(name, {}).items():
            axes[axis] = self.ties.fresh(size)
            self.ties.copies.update(axes[axis].tolist())
        if name in self.copied:
            self.uses[node.name, position] = axes
        return axes

    def _pin(self, name: str, reason: str) -> None:
        for labels in self.tensors.get(name, {}).values():
            self.ties.block(labels, reason)

    def _share(self, graph: gs.Graph) -> None:
        """A weight that several nodes read stays one weight."""
        weights = {
            (node.name, row.weight): id(node.inputs[row.weight])
            for node in graph.nodes
            if (row := knowledge(node)).weight is not None and row.weight < len(node.inputs)
        }
        firsts: dict[tuple[int, int], Labels] = {}
        for slot in self.slots:
            key = weights.get((slot.node, slot.position))
            if key is not None:
                self.ties.tie(firsts.setdefault((key, slot.axis), slot.labels), slot.labels)

    def channels(self) -> Channels:
        roots = self.ties.roots()
        tensors = {name: _to_roots(axes, roots) for name, axes in self.tensors.items() if axes}
        uses = {use: _to_roots(axes, roots) for use, axes in self.uses.items()}
        slots = tuple(Slot(s.node, s.position, s.axis, s.role, roots[s.labels]) for s in self.slots)
        return Channels(tensors, uses, slots, self.ties.reasons(roots))


def _to_roots(axes: Axes, roots: Labels) -> Axes:
    return {axis: roots[labels] for axis, labels in axes.items()}


def kept(labels: Labels, dead: Collection[int]) -> np.ndarray:
    """Positions of an axis that stay."""
    return np.flatnonzero(~np.isin(labels, list(dead)))


def survivors(channels: Channels, dead: set[int]) -> Iterator[int]:
    """Channels that must stay after all, so that no axis becomes empty."""
    for labels in channels.axes():
        if len(labels) and set(labels.tolist()) <= dead:
            yield int(labels[0])
