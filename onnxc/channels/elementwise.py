"""How channels flow through operators that work element by element, or along some axes."""

from __future__ import annotations

from onnxc.channels.labels import Axes
from onnxc.channels.visit import Rule, Visit, merged, opaque


def same(visit: Visit) -> list[Axes]:
    """Element by element; parameters are scalars."""
    for axes in visit.x[1:]:
        visit.block(axes.values())
    return [dict(visit.x[0]) for _ in visit.node.outputs]


def merge(visit: Visit) -> list[Axes]:
    """Element by element over inputs that broadcast."""
    shapes = [visit.shape(i) for i in range(len(visit.node.inputs))]
    rank = max(map(len, shapes))
    made: Axes = {}
    for axis in range(rank):
        found = merged(visit, shapes, axis - rank)
        if found is not None:
            made[axis] = found
    return [made]


def norm(visit: Visit) -> list[Axes]:
    """BatchNormalization, InstanceNormalization: parameters by channel, axis 1."""
    along = () if visit.node.op == "InstanceNormalization" else range(2, 9)
    made = visit.only(0, (0, 1, *along))
    if 1 in made:
        for position in range(1, len(visit.node.inputs)):
            visit.slot("carries", position, 0, made[1])
    return [made, *({} for _ in visit.node.outputs[1:])]


def group_norm(visit: Visit) -> list[Axes]:
    """GroupNormalization: a group goes as a whole."""
    made = visit.only(0, (0, 1))
    if 1 in made:
        rows = made[1].reshape(int(visit.node.attrs["num_groups"]), -1)
        visit.ties.tie(rows, rows[:, :1])
        for position in (1, 2):
            is_whole = visit.shape(position)[0] == len(made[1])
            visit.slot("carries", position, 0, made[1] if is_whole else rows[:, 0])
    return [made]


def spatial(visit: Visit) -> list[Axes]:
    """Pooling: axes behind the channels are worked along."""
    return [dict(visit.only(0, (0, 1))) for _ in visit.node.outputs]


def along(default: int, onward: bool = False) -> Rule:
    """Softmax and the like, along the attribute axis; onward: along all behind it, too."""

    def rule(visit: Visit) -> list[Axes]:
        rank = len(visit.shape(0))
        axis = int(visit.node.attrs.get("axis", default)) % rank
        kept = [i for i in range(rank) if i != axis and not (onward and i > axis)]
        for axes in visit.x[1:]:
            visit.block(axes.values())
        made = visit.only(0, kept)
        return [dict(made) if i == 0 else {} for i in range(len(visit.node.outputs))]

    return rule


def reduce(visit: Visit) -> list[Axes]:
    rank = len(visit.shape(0))
    given = visit.setting("axes", 1)
    if given is None and visit.has(1):
        return opaque(visit)
    is_noop = bool(visit.node.attrs.get("noop_with_empty_axes", 0))
    over = {a % rank for a in given} if given else set() if is_noop else set(range(rank))
    kept = visit.only(0, set(range(rank)) - over)
    if visit.node.attrs.get("keepdims", 1):
        return [kept]
    return [{axis - sum(a < axis for a in over): labels for axis, labels in kept.items()}]


def argument(visit: Visit) -> list[Axes]:
    """ArgMax, ArgMin: which index of an axis."""
    rank = len(visit.shape(0))
    over = int(visit.node.attrs.get("axis", 0)) % rank
    kept = visit.only(0, set(range(rank)) - {over})
    if visit.node.attrs.get("keepdims", 1):
        return [kept]
    return [{axis - (axis > over): labels for axis, labels in kept.items()}]
