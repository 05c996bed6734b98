"""How channels flow through operators that move values: done to the labels as to the values."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.channels.labels import Axes, Labels, Ties
from onnxc.channels.visit import Dim, Visit, merged, opaque
from onnxc.edit import values
from onnxc.ops import is_constant


def concat(visit: Visit) -> list[Axes]:
    shapes = [visit.shape(i) for i in range(len(visit.node.inputs))]
    rank = len(shapes[0])
    joined = int(visit.node.attrs["axis"]) % rank
    made: Axes = {}
    for axis in range(rank):
        if axis != joined:
            found = merged(visit, shapes, axis - rank)
            made |= {} if found is None else {axis: found}
    if any(joined in axes for axes in visit.x):
        made[joined] = np.concatenate([_part(visit, i, joined) for i in range(len(visit.x))])
    return [made]


def _part(visit: Visit, position: int, axis: int) -> Labels:
    """Labels of an axis of an input; new ones where it has none."""
    if axis in visit.x[position]:
        return visit.x[position][axis]
    count = visit.shape(position)[axis]
    if not isinstance(count, int):
        raise LookupError(visit.node.inputs[position].name)
    if is_constant(visit.node.inputs[position]):
        return visit.slot("makes", position, axis, visit.ties.fresh(count))
    return visit.ties.fresh(count, f"{visit.node.inputs[position].name!r} cannot be cut")


def split(visit: Visit) -> list[Axes]:
    axis = int(visit.node.attrs.get("axis", 0)) % len(visit.shape(0))
    made = [dict(visit.x[0]) for _ in visit.node.outputs]
    if axis not in visit.x[0]:
        return made
    sizes = visit.setting("split", 1)
    if sizes is None and visit.has(1):
        return opaque(visit)
    labels = visit.x[0][axis]
    if sizes is None:
        width = -(-len(labels) // len(made))
        sizes = [width] * (len(made) - 1) + [len(labels) - width * (len(made) - 1)]
    for axes, part in zip(made, np.split(labels, np.cumsum(sizes)[:-1]), strict=True):
        axes[axis] = part
    return made


def sliced(visit: Visit) -> dict[int, slice] | None:
    """What a Slice takes of each axis; None where that is computed."""
    starts, ends = visit.setting("starts", 1), visit.setting("ends", 2)
    if starts is None or ends is None:
        return None
    axes, steps = visit.setting("axes", 3), visit.setting("steps", 4)
    if (axes is None and visit.has(3)) or (steps is None and visit.has(4)):
        return None
    rank = len(visit.shape(0))
    cuts = zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True)
    return {a % rank: _slice(start, end, step) for a, start, end, step in cuts}


def _slice(start: int, end: int, step: int) -> slice:
    """As ONNX means it: an end far below 0 is the front of the axis, whatever its length."""
    return slice(start, None if step < 0 and end < -(1 << 31) else end, step)


def slice_(visit: Visit) -> list[Axes]:
    cuts = sliced(visit)
    if cuts is None:
        return opaque(visit)
    return [{a: labels[cuts.get(a, slice(None))] for a, labels in visit.x[0].items()}]


def gather(visit: Visit) -> list[Axes]:
    """Rows of a table, or channels by their numbers."""
    shape, indices = visit.shape(0), visit.node.inputs[1]
    axis = int(visit.node.attrs.get("axis", 0)) % len(shape)
    rank = len(visit.shape(1))
    axes = dict(visit.x[0])
    if is_constant(visit.node.inputs[0]):
        for other in range(axis + 1, len(shape)):
            count = shape[other]
            assert isinstance(count, int)
            axes[other] = visit.slot("makes", 0, other, visit.ties.fresh(count))
    visit.block(visit.x[1].values())
    made = {a + (rank - 1 if a > axis else 0): some for a, some in axes.items() if a != axis}
    if axis not in axes:
        return [made]
    if not is_constant(indices) or rank != 1:
        visit.block([axes[axis]], "picks some of them")
        return [made]
    return [{**made, axis: axes[axis][values(indices)]}]


def pad(visit: Visit) -> list[Axes]:
    """Zeros, or another constant, around x: channels of their own."""
    pads, rank = visit.setting("pads", 1), len(visit.shape(0))
    if pads is None or visit.has(3):
        return opaque(visit)
    mode = visit.node.attrs.get("mode", "constant")
    made: Axes = {}
    for axis, labels in visit.x[0].items():
        before, after = pads[axis], pads[axis + rank]
        if min(before, after) < 0 or (mode != "constant" and (before or after)):
            visit.block([labels])
        else:
            around = (visit.ties.fresh(before), visit.ties.fresh(after))
            made[axis] = np.concatenate([around[0], labels, around[1]])
    return [made]


def transpose(visit: Visit) -> list[Axes]:
    rank = len(visit.shape(0))
    perm = [int(a) for a in visit.node.attrs.get("perm", range(rank)[::-1])]
    return [{perm.index(axis): labels for axis, labels in visit.x[0].items()}]


def squeeze(visit: Visit) -> list[Axes]:
    shape = visit.shape(0)
    given = visit.setting("axes", 1)
    if given is None and visit.has(1):
        return opaque(visit)
    gone = {a % len(shape) for a in given} if given else {i for i, d in enumerate(shape) if d == 1}
    kept = visit.only(0, set(range(len(shape))) - gone, "drops the axis")
    return [{axis - sum(a < axis for a in gone): labels for axis, labels in kept.items()}]


def unsqueeze(visit: Visit) -> list[Axes]:
    given = visit.setting("axes", 1)
    if given is None:
        return opaque(visit)
    rank = len(visit.shape(0)) + len(given)
    new = {a % rank for a in given}
    old = [axis for axis in range(rank) if axis not in new]
    return [{old[axis]: labels for axis, labels in visit.x[0].items()}]


def expand(visit: Visit) -> list[Axes]:
    """To a constant shape: 1 there keeps an axis as it is; one of size 1 is copied."""
    sizes, shape = visit.number(1), visit.shape(0)
    if sizes is None:
        return opaque(visit)
    rank = max(len(sizes), len(shape))
    wanted = [1] * (rank - len(sizes)) + sizes
    here: list[Dim] = [*[1] * (rank - len(shape)), *shape]
    made = {axis + rank - len(shape): labels for axis, labels in visit.x[0].items()}
    for axis, size in enumerate(wanted):
        if here[axis] == 1 and size > 1:
            if axis in made:
                visit.block([made.pop(axis)], "spreads it over an axis")
            visit.copied[axis] = size
    return [made]


def filled(visit: Visit) -> list[Axes]:
    """ConstantOfShape: one value everywhere."""
    sizes = visit.number(0)
    if sizes is None:
        return opaque(visit)
    visit.copied = {axis: size for axis, size in enumerate(sizes) if size > 1}
    return [{}]


def tile(visit: Visit) -> list[Axes]:
    repeats = visit.number(1)
    if repeats is None:
        return opaque(visit)
    return [{axis: np.tile(labels, repeats[axis]) for axis, labels in visit.x[0].items()}]


def resize(visit: Visit) -> list[Axes]:
    """Axes that stay as long as they were are handed on."""
    shape, out = visit.shape(0), visit.node.outputs[0].shape
    if out is None or visit.x[0].keys() & set(range(len(shape), 99)):
        return opaque(visit)
    kept = [a for a, size in enumerate(shape) if isinstance(size, int) and out[a] == size]
    return [visit.only(0, kept, "interpolates along them")]


def shape_of(visit: Visit) -> list[Axes]:
    """Sizes that are read: of axes with channels, no longer what they were."""
    axes = np.arange(len(visit.shape(0)))
    start, end = (visit.node.attrs.get(name) for name in ("start", "end"))
    picked = (_picked(user, axes[start:end]) for user in visit.node.outputs[0].outputs)
    read = {int(axis) for some in picked for axis in some}
    visit.only(0, set(axes.tolist()) - read, "reads how many there are")
    return [{}]


def _picked(user: gs.Node, axes: Labels) -> Labels:
    """The axes whose sizes a reader of a shape takes; all of them where that is computed."""
    if user.op == "Gather" and is_constant(user.inputs[1]):
        return np.ravel(axes[values(user.inputs[1])])
    cuts = sliced(Visit(user, [], Ties(), [])) if user.op == "Slice" else None
    return axes if cuts is None else axes[cuts.get(0, slice(None))]
