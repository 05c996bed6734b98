"""Give channels of a group copies: more slices of what makes, carries and reads them.

Copies come behind all that an axis has, in the order of what they are copies of, first copies
before second ones. So every axis of a group is widened alike, a flattened one too; where an
operator numbers or regroups its channels in another way, the group stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.groups import Channels, Group
from onnxc.channels.labels import Axes, Labels
from onnxc.channels.recut import RECUTS
from onnxc.edit import fresh, store, values
from onnxc.ops import groups, is_constant, is_depthwise, knowledge

Array = NDArray[Any]
Copies = Mapping[int, int]  # how many a channel is, by root; 1 for one that is not in it

REGROUP = frozenset(("Concat", "Tile", "DepthToSpace", "SpaceToDepth", "Shape", "ConstantOfShape"))


@dataclass(frozen=True)
class Order:
    """Of a widened axis: position: what each index is a copy of. turn: the how-manieth one, from 0.

    count: how many copies there are of the same.
    """

    position: Array
    turn: Array
    count: Array

    @classmethod
    def of(cls, counts: Array) -> Order:
        """Of an axis whose index i is to be there counts[i] times."""
        rounds = [np.flatnonzero(counts > turn) for turn in range(int(counts.max(initial=1)))]
        position = np.concatenate(rounds)
        turn = np.repeat(np.arange(len(rounds)), [len(some) for some in rounds])
        return cls(position, turn, counts[position])


def why_not_widened(graph: gs.Graph, channels: Channels, group: Group) -> str:
    """Why the channels of a group cannot be copied; empty if they can."""
    if group.obstacle:
        return group.obstacle
    wanted = set(group.channels.tolist())
    for node in graph.nodes:
        ports = (*channels.inputs(node), *(channels.tensors.get(t.name, {}) for t in node.outputs))
        if not any(_touches(axes, wanted) for axes in ports):
            continue
        is_grouped = groups(node) > 1 and not is_depthwise(node)
        if node.op in REGROUP or (node.op in RECUTS and node.op != "Conv") or is_grouped:
            return f"{node.name} ({node.op}) has an order of its own for them"
        if node.op == "Flatten" and int(node.attrs.get("axis", 1)) != 1:
            return f"{node.name} (Flatten) mixes them with samples"
    return ""


def widen(graph: gs.Graph, channels: Channels, copies: Copies) -> None:
    """Copy channels of groups that can be widened, in place; weights that read them, too."""
    nodes = {node.name: node for node in graph.nodes}
    for slot in channels.slots:
        order = order_of(slot.labels, copies)
        if len(order.position) > len(slot.labels):
            node = nodes[slot.node]
            old = node.inputs[slot.position]
            array = np.take(values(old), order.position, slot.axis)
            node.inputs[slot.position] = store(graph, fresh(graph, f"{old.name}_wide"), array)
    for node in graph.nodes:
        x = channels.inputs(node)[0] if is_depthwise(node) else {}
        for axis, wide in _sizes(x, copies).items():
            node.attrs["group"] = wide if axis == 1 else groups(node)
        for tensor in (t for t in node.outputs if t.shape is not None):
            sizes = _sizes(channels.tensors.get(tensor.name, {}), copies)
            tensor.shape = [sizes.get(axis, size) for axis, size in enumerate(tensor.shape)]


def _sizes(axes: Axes, copies: Copies) -> dict[int, int]:
    """How many indices those of some axes have then that have copies."""
    found = {a: sum(copies.get(root, 1) for root in x.tolist()) for a, x in axes.items()}
    return {axis: size for axis, size in found.items() if size > len(axes[axis])}


def order_of(labels: Labels, copies: Copies) -> Order:
    """Of an axis with these labels."""
    return Order.of(np.array([copies.get(int(root), 1) for root in labels], np.intp))


def _touches(axes: Axes, roots: set[int]) -> bool:
    return any(np.isin(labels, list(roots)).any() for labels in axes.values())


def has_twins(graph: gs.Graph, group: Group) -> bool:
    """Whether some weight makes two channels of a group alike, other than by zeros."""
    nodes = {node.name: node for node in graph.nodes}
    return any(_repeats(rows) for rows in _makers(nodes, group))


def _makers(nodes: Mapping[str, gs.Node], group: Group) -> Iterator[Array]:
    for slot in group.slots:
        weight = nodes[slot.node].inputs[slot.position]
        is_main = slot.position == knowledge(nodes[slot.node]).weight
        if slot.role == "makes" and is_main and is_constant(weight):
            rows = np.moveaxis(values(weight), slot.axis, 0)
            yield rows.reshape(len(slot.labels), -1)


def _repeats(rows: Array) -> bool:
    alive = rows[rows.any(axis=1)]
    return len(np.unique(alive, axis=0)) < len(alive)
