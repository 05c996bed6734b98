"""Take out channels that nothing reads: those whose every reader's weights are zero.

    Σ_i W[:, i] x_i  over i with W[:, i] ≠ 0         is        W x

so what makes such a channel, carries it along and reads it can go, exactly. The channels are left
behind by `prune` and by training with a group penalty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.channels.groups import Channels, Group, find_channels, survivors
from onnxc.channels.recut import cut
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import values


@register
@dataclass(frozen=True)
class Shrink:
    """Take out channels whose every reader's weights are zero."""

    name: ClassVar[str] = "shrink"
    lossless: ClassVar[bool] = True
    rescales: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        channels = find_channels(graph, context.only.excluded(graph))
        groups = channels.groups()
        dead = _dead(graph, channels, groups)
        if not dead:
            return [Skip(_first(group), _why(group)) for group in groups]
        lost = _lost(channels, dead)
        sizes = cut(graph, channels, dead)
        return [
            *(Change(name, f"{lost[name]} of its slices cut", *sizes[name]) for name in sizes),
            *(Skip(_first(group), _why(group)) for group in groups if group.obstacle),
        ]


def dead_channels(graph: gs.Graph, groups: Iterable[Group]) -> set[int]:
    """Channels of groups that can be cut whose every reader has zero weights for them."""
    nodes = {node.name: node for node in graph.nodes}
    alive: dict[tuple[str, int, int], set[int]] = {}
    dead: set[int] = set()
    for group in groups:
        if group.obstacle:
            continue
        read: set[int] = set()
        for slot in (s for s in group.slots if s.role == "reads"):
            place = (slot.node, slot.position, slot.axis)
            if place not in alive:
                weight = values(nodes[slot.node].inputs[slot.position])
                rows = np.moveaxis(weight, slot.axis, 0).reshape(len(slot.labels), -1)
                alive[place] = set(slot.labels[rows.any(axis=1)].tolist())
            read |= alive[place]
        dead |= set(group.channels.tolist()) - read
    return dead


def _dead(graph: gs.Graph, channels: Channels, groups: list[Group]) -> set[int]:
    """The dead channels, but for one where an axis would become empty."""
    dead = dead_channels(graph, groups)
    while saved := set(survivors(channels, dead)):
        dead -= saved
    return dead


def _lost(channels: Channels, dead: set[int]) -> Counter[str]:
    """Slices that each node loses."""
    lost: Counter[str] = Counter()
    for slot in channels.slots:
        lost[slot.node] += int(np.isin(slot.labels, list(dead)).sum())
    return lost


def _first(group: Group) -> str:
    return (group.nodes("makes") or group.nodes("reads", "carries"))[0]


def _why(group: Group) -> str:
    count = len(group.channels)
    if group.obstacle:
        return f"{count} channels must stay: {group.obstacle}"
    return f"all {count} channels are read"
