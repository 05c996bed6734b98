"""FLOWS: how a channel cut travels through each operator. One row an operator.

A rule gets a node with the labels of its inputs' axes, and returns those of its outputs. On the way
it says which slices of which constants belong to a label, ties labels that go together, and blocks
those that the operator cannot do without. An operator without a row blocks all that reaches it.

    weighted    Y = W X        reads its input's labels, makes new ones
    same        y = f(x)       hands them on
    merge       y = f(a, b)    ties the labels of a and b, index by index, where neither broadcasts
    moved       a view of x    Slice, Concat, Transpose, Reshape, …: done to the labels themselves
    along       f over axes    blocks the axes that it works along, hands on the others

Reshape (C) → (A, B) and grouped convolutions can be cut in two ways: whole rows of A go (**outer**:
an attention head, a group), or the same place in each row (**inner**: channel shuffles).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.edit import values
from onnxc.labels import Axes, Labels, Ties, spread
from onnxc.ops import groups, is_constant

Role = Literal["makes", "reads", "carries"]
Split = Literal["outer", "inner"]
Dim = int | str | None


@dataclass(frozen=True)
class Slot:
    """An axis of a constant input whose slices belong to channels.

    role: the slices make the channels, read them (sum over them), or carry values of them along.
    labels: one for each index of the axis.
    """

    node: str
    position: int
    axis: int
    role: Role
    labels: Labels = field(repr=False, compare=False)


@dataclass
class Visit:
    """A node on the way: what a rule sees, and what it can say."""

    node: gs.Node
    x: list[Axes]
    ties: Ties
    slots: list[Slot]
    split: Split = "outer"
    fixed: str = ""  # why the constants of this node must stay
    has_choice: bool = False  # whether the other split would have been another way
    copied: dict[int, int] = field(default_factory=dict)  # axes of the output with equal values

    @property
    def where(self) -> str:
        return f"{self.node.name} ({self.node.op})"

    def shape(self, position: int) -> list[Dim]:
        """Shape of an input; raises LookupError where it is not known."""
        found = self.node.inputs[position].shape
        if found is None:
            raise LookupError(self.node.inputs[position].name)
        return [int(d) if isinstance(d, int | np.integer) else d for d in found]

    def sizes(self, position: int) -> list[int]:
        """The same, where all of it must be known."""
        found = self.shape(position)
        if not all(isinstance(d, int) for d in found):
            raise LookupError(self.node.inputs[position].name)
        return [d for d in found if isinstance(d, int)]

    def has(self, position: int) -> bool:
        return position < len(self.node.inputs) and bool(self.node.inputs[position].name)

    def slot(self, role: Role, position: int, axis: int, labels: Labels) -> Labels:
        """Say that an axis of a constant belongs to labels; one that is no constant blocks them."""
        if not self.has(position):
            return labels
        tensor = self.node.inputs[position]
        if not is_constant(tensor):
            self.ties.block(labels, f"{tensor.name} of {self.where} is computed")
        elif self.fixed:
            self.ties.block(labels, self.fixed)
        else:
            self.slots.append(Slot(self.node.name, position, axis, role, labels))
        return labels

    def block(self, labels: Iterable[Labels], why: str = "mixes the channels") -> None:
        for some in labels:
            self.ties.block(some, f"{self.where} {why}")

    def is_copy(self, labels: Labels) -> bool:
        """Whether labels are those of copies, which any others may stand for."""
        return len(labels) > 0 and int(labels[0]) in self.ties.copies

    def only(self, position: int, axes: Iterable[int], why: str = "works along them") -> Axes:
        """The labels of some axes of an input; those of the others are blocked."""
        kept = set(axes)
        self.block((some for axis, some in self.x[position].items() if axis not in kept), why)
        return {axis: some for axis, some in self.x[position].items() if axis in kept}

    def number(self, position: int) -> list[int] | None:
        """The values of a constant input of integers; None where they are computed."""
        if not self.has(position) or not is_constant(self.node.inputs[position]):
            return None
        return [int(v) for v in np.ravel(values(self.node.inputs[position]))]

    def setting(self, name: str, position: int) -> list[int] | None:
        """Integers that newer operator sets take as an input and older ones as an attribute."""
        given = self.node.attrs.get(name)
        return self.number(position) if given is None else [int(v) for v in np.ravel(given)]


Rule = Callable[[Visit], list[Axes]]


def opaque(visit: Visit) -> list[Axes]:
    """Nothing is known: all that reaches the node must stay."""
    for axes in visit.x:
        visit.block(axes.values(), "cannot be cut through")
    return [{} for _ in visit.node.outputs]


def _same(visit: Visit) -> list[Axes]:
    """Element by element; parameters are scalars."""
    for axes in visit.x[1:]:
        visit.block(axes.values())
    return [dict(visit.x[0]) for _ in visit.node.outputs]


def _merge(visit: Visit) -> list[Axes]:
    """Element by element over inputs that broadcast."""
    shapes = [visit.shape(i) for i in range(len(visit.node.inputs))]
    rank = max(map(len, shapes))
    made: Axes = {}
    for axis in range(rank):
        found = _merged(visit, shapes, axis - rank)
        if found is not None:
            made[axis] = found
    return [made]


def _merged(visit: Visit, shapes: Sequence[Sequence[Dim]], behind: int) -> Labels | None:
    """Labels of an axis, counted from the last one, of the output of a merge."""
    labelled, others = [], []
    for position, shape in enumerate(shapes):
        axis = len(shape) + behind
        if axis < 0:
            continue
        some = visit.x[position].get(axis)
        if some is not None:
            labelled.append(some)
        elif shape[axis] != 1:
            others.append((position, axis))
    if not labelled:
        return None
    count = max(map(len, labelled))
    full = [some for some in labelled if len(some) == count]
    visit.block((some for some in labelled if len(some) < count), "spreads it over all channels")
    for some in full[1:]:
        visit.ties.tie(full[0], some)
    for position, axis in others:
        if is_constant(visit.node.inputs[position]) and shapes[position][axis] == count:
            visit.slot("carries", position, axis, full[0])
        else:
            name = visit.node.inputs[position].name
            visit.block(full, f"needs {name!r} too, which cannot be cut")
    return full[0] if count > 1 or not others else None


def _conv(visit: Visit) -> list[Axes]:
    """W (M, C, k…) in g groups: axis 1 reads the input, axis 0 makes the output."""
    M, C = visit.sizes(1)[:2]
    return _convolved(visit, M, C, reads=1, makes=0)


def _conv_transpose(visit: Visit) -> list[Axes]:
    """W (g·C, M/g, k…): axis 0 reads the input, axis 1 makes the output."""
    g = groups(visit.node)
    rows, columns = visit.sizes(1)[:2]
    return _convolved(visit, g * columns, rows // g, reads=0, makes=1)


def _convolved(visit: Visit, M: int, C: int, reads: int, makes: int) -> list[Axes]:
    """A convolution of g·C channels to M, in g groups."""
    g = groups(visit.node)
    x = visit.only(0, (1,), "slides along them").get(1)
    visit.block(labels for axes in visit.x[1:] for labels in axes.values())
    visit.has_choice = g > 1 and C > 1
    if g == 1:
        if x is not None:
            visit.slot("reads", 1, reads, x)
        made = visit.ties.fresh(M)
        visit.slot("makes", 1, makes, made)
    elif x is None:
        made = visit.ties.fresh(M, f"{visit.where} has groups of channels that cannot be cut")
    elif C == 1 or visit.split == "outer":  # a group goes as a whole
        rows = x.reshape(g, C)
        visit.ties.tie(rows, rows[:, :1])
        made = np.repeat(rows[:, 0], M // g)
        visit.slot("carries", 1, 0, made if reads == 1 else x)
    else:  # the same place in each group
        rows = x.reshape(g, C)
        visit.ties.tie(rows, rows[:1])
        visit.slot("reads", 1, reads, rows[0] if reads == 1 else x)
        place = visit.ties.fresh(M // g)
        made = np.tile(place, g)
        visit.slot("makes", 1, makes, made if makes == 0 else place)
    visit.slot("makes", 2, 0, made)
    return [{1: made}]


def _gemm(visit: Visit) -> list[Axes]:
    """Y = A' B' + C, with A' and B' transposed where the node says so."""
    a, b = (int(bool(visit.node.attrs.get(name, 0))) for name in ("transA", "transB"))
    made = _contracted(visit, (a, 1 - a), (1 - b, b))
    if visit.has(2) and 1 in made:
        _added(visit, made[1])
    return [made]


def _added(visit: Visit, labels: Labels) -> None:
    """The C of a Gemm, (N), (1, N), (M, N), or one value for all."""
    shape = visit.shape(2)
    if shape and shape[-1] == len(labels) and len(labels) > 1:
        visit.slot("makes", 2, len(shape) - 1, labels)
    elif shape and shape[-1] != 1:
        visit.block([labels])


def _matmul(visit: Visit) -> list[Axes]:
    ranks = [len(visit.shape(i)) for i in (0, 1)]
    if min(ranks) < 2:
        return opaque(visit)
    made = _contracted(visit, (ranks[0] - 2, ranks[0] - 1), (ranks[1] - 1, ranks[1] - 2))
    rank = max(ranks)
    axes = {rank - 2: made.get(0), rank - 1: made.get(1)}
    shapes = [visit.shape(i) for i in (0, 1)]
    axes |= {rank + behind: _merged(visit, shapes, behind) for behind in range(-rank, -2)}
    return [{axis: labels for axis, labels in axes.items() if labels is not None}]


def _contracted(visit: Visit, a: tuple[int, int], b: tuple[int, int]) -> Axes:
    """Labels of rows (0) and columns (1) of a product.

    a, b: axes of each factor, the one that stays and the one that is summed over.
    """
    summed = [axes.get(axis) for axes, (_, axis) in zip(visit.x, (a, b), strict=False)]
    made: Axes = {}
    for side, (stays, inner) in enumerate((a, b)):
        other = summed[1 - side]
        if not is_constant(visit.node.inputs[side]):
            if stays in visit.x[side]:
                made[side] = visit.x[side][stays]
            continue
        if other is not None:
            visit.slot("reads", side, inner, other)
        count = visit.shape(side)[stays]
        assert isinstance(count, int)
        made[side] = visit.slot("makes", side, stays, visit.ties.fresh(count))
    if not any(map(is_constant, visit.node.inputs[:2])):
        why = "multiplies two activations along them"
        visit.block((some for some in summed if some is not None), why)
    return made


def _recurrent(gates: int) -> Rule:
    """LSTM, GRU, RNN of H hidden units: W (dirs, gates·H, in), R (dirs, gates·H, H)."""

    def rule(visit: Visit) -> list[Axes]:
        x = visit.only(0, (2,), "steps along them").get(2)
        if x is not None:
            visit.slot("reads", 1, 2, x)
        H = visit.sizes(2)[2]
        hidden = visit.ties.fresh(H)
        for position, times in ((1, gates), (2, gates), (3, 2 * gates), (7, gates - 1)):
            visit.slot("makes", position, 1, np.tile(hidden, times))
        visit.slot("reads", 2, 2, hidden)
        for position in range(4, min(7, len(visit.x))):  # lengths and first states
            _state(visit, position, hidden)
        return [{axis: hidden} for axis in (3, 2, 2)[: len(visit.node.outputs)]]

    return rule


def _state(visit: Visit, position: int, hidden: Labels) -> None:
    """The first state of a recurrent node (position 5 and 6): a constant, or tied to the others."""
    if position == 4:
        visit.block(visit.x[position].values())
    elif visit.has(position) and 2 in visit.x[position]:
        visit.ties.tie(hidden, visit.x[position][2])
    else:
        visit.slot("carries", position, 2, hidden)


def _norm(visit: Visit) -> list[Axes]:
    """BatchNormalization, InstanceNormalization: parameters by channel, axis 1."""
    along = () if visit.node.op == "InstanceNormalization" else range(2, 9)
    made = visit.only(0, (0, 1, *along))
    if 1 in made:
        for position in range(1, len(visit.node.inputs)):
            visit.slot("carries", position, 0, made[1])
    return [made, *({} for _ in visit.node.outputs[1:])]


def _group_norm(visit: Visit) -> list[Axes]:
    """GroupNormalization: a group goes as a whole."""
    made = visit.only(0, (0, 1))
    if 1 in made:
        rows = made[1].reshape(int(visit.node.attrs["num_groups"]), -1)
        visit.ties.tie(rows, rows[:, :1])
        for position in (1, 2):
            is_whole = visit.shape(position)[0] == len(made[1])
            visit.slot("carries", position, 0, made[1] if is_whole else rows[:, 0])
    return [made]


def _spatial(visit: Visit) -> list[Axes]:
    """Pooling: axes behind the channels are worked along."""
    return [dict(visit.only(0, (0, 1))) for _ in visit.node.outputs]


def _along(default: int, onward: bool = False) -> Rule:
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


def _reduce(visit: Visit) -> list[Axes]:
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


def _argument(visit: Visit) -> list[Axes]:
    """ArgMax, ArgMin: which index of an axis."""
    rank = len(visit.shape(0))
    over = int(visit.node.attrs.get("axis", 0)) % rank
    kept = visit.only(0, set(range(rank)) - {over})
    if visit.node.attrs.get("keepdims", 1):
        return [kept]
    return [{axis - (axis > over): labels for axis, labels in kept.items()}]


def _concat(visit: Visit) -> list[Axes]:
    shapes = [visit.shape(i) for i in range(len(visit.node.inputs))]
    rank = len(shapes[0])
    joined = int(visit.node.attrs["axis"]) % rank
    made: Axes = {}
    for axis in range(rank):
        if axis != joined:
            found = _merged(visit, shapes, axis - rank)
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


def _split(visit: Visit) -> list[Axes]:
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


def _sliced(visit: Visit) -> list[Axes]:
    cuts = sliced(visit)
    if cuts is None:
        return opaque(visit)
    return [{a: labels[cuts.get(a, slice(None))] for a, labels in visit.x[0].items()}]


def _gather(visit: Visit) -> list[Axes]:
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


def _pad(visit: Visit) -> list[Axes]:
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


def _transpose(visit: Visit) -> list[Axes]:
    rank = len(visit.shape(0))
    perm = [int(a) for a in visit.node.attrs.get("perm", range(rank)[::-1])]
    return [{perm.index(axis): labels for axis, labels in visit.x[0].items()}]


def _squeeze(visit: Visit) -> list[Axes]:
    shape = visit.shape(0)
    given = visit.setting("axes", 1)
    if given is None and visit.has(1):
        return opaque(visit)
    gone = {a % len(shape) for a in given} if given else {i for i, d in enumerate(shape) if d == 1}
    kept = visit.only(0, set(range(len(shape))) - gone, "drops the axis")
    return [{axis - sum(a < axis for a in gone): labels for axis, labels in kept.items()}]


def _unsqueeze(visit: Visit) -> list[Axes]:
    given = visit.setting("axes", 1)
    if given is None:
        return opaque(visit)
    rank = len(visit.shape(0)) + len(given)
    new = {a % rank for a in given}
    old = [axis for axis in range(rank) if axis not in new]
    return [{old[axis]: labels for axis, labels in visit.x[0].items()}]


def _expand(visit: Visit) -> list[Axes]:
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


def _filled(visit: Visit) -> list[Axes]:
    """ConstantOfShape: one value everywhere."""
    sizes = visit.number(0)
    if sizes is None:
        return opaque(visit)
    visit.copied = {axis: size for axis, size in enumerate(sizes) if size > 1}
    return [{}]


def _tile(visit: Visit) -> list[Axes]:
    repeats = visit.number(1)
    if repeats is None:
        return opaque(visit)
    return [{axis: np.tile(labels, repeats[axis]) for axis, labels in visit.x[0].items()}]


def _resize(visit: Visit) -> list[Axes]:
    """Axes that stay as long as they were are handed on."""
    shape, out = visit.shape(0), visit.node.outputs[0].shape
    if out is None or visit.x[0].keys() & set(range(len(shape), 99)):
        return opaque(visit)
    kept = [a for a, size in enumerate(shape) if isinstance(size, int) and out[a] == size]
    return [visit.only(0, kept, "interpolates along them")]


def _depth_to_space(visit: Visit) -> list[Axes]:
    """(b·b·C) → C: an output channel is made of b·b inputs."""
    made = visit.only(0, (0, 1))
    if 1 in made:
        b = int(visit.node.attrs["blocksize"])
        is_inner = visit.node.attrs.get("mode", "DCR") == "DCR"
        rows = made[1].reshape((b * b, -1) if is_inner else (-1, b * b))
        rows = rows if is_inner else rows.T
        visit.ties.tie(rows, rows[:1])
        made[1] = rows[0]
    return [made]


def _space_to_depth(visit: Visit) -> list[Axes]:
    made = visit.only(0, (0, 1))
    if 1 in made:
        made[1] = np.tile(made[1], int(visit.node.attrs["blocksize"]) ** 2)
    return [made]


def _shape(visit: Visit) -> list[Axes]:
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


def _reshape(visit: Visit) -> list[Axes]:
    """To sizes that are constants where there are channels; elsewhere they may be computed."""
    sizes = entries(visit.node.inputs[1])
    if sizes is None or visit.node.attrs.get("allowzero", 0):
        return opaque(visit)
    (made,) = _reshaped(visit)
    for axis in [a for a in made if sizes[a] is None]:
        visit.block([made.pop(axis)], "computes how many there are")
    return [made]


def entries(tensor: gs.Tensor) -> list[int | None] | None:
    """The integers of a 1-D tensor, None for those that are computed; None if it is not known."""
    if is_constant(tensor):
        return [int(v) for v in np.ravel(values(tensor))]
    if tensor.inputs and tensor.inputs[0].op == "Concat":
        parts = [entries(part) for part in tensor.inputs[0].inputs]
        return None if None in parts else [v for part in parts for v in part or ()]
    size = tensor.shape[0] if tensor.shape is not None and len(tensor.shape) == 1 else None
    return [None] * int(size) if isinstance(size, int | np.integer) else None


def _reshaped(visit: Visit) -> list[Axes]:
    """Axes in runs of equal size; the labels of a run are reshaped as its values are."""
    out = visit.node.outputs[0].shape
    made: Axes = {}
    left = dict(visit.x[0])
    for old, new, into in runs(visit.shape(0), [] if out is None else list(out)):
        inside = [axis for axis in range(*old) if axis in left and not visit.is_copy(left[axis])]
        if len(inside) == 1 and into:
            axis, labels = _recut(visit, left.pop(inside[0]), inside[0] - old[0], into)
            made |= {} if labels is None else {new[0] + axis: labels}
    kept = (labels for labels in left.values() if not visit.is_copy(labels))
    visit.block(kept, "moves them in a way that is not followed")
    return [made]


Range = tuple[int, int]
Into = tuple[tuple[int, ...], tuple[int, ...]]


def runs(x: Sequence[Dim], y: Sequence[Dim]) -> list[tuple[Range, Range, Into | None]]:
    """The shortest runs of axes of x and y of equal size: where each is, and their sizes.

    Sizes that are not known pair up with equal symbols from the front and from behind; None stands
    for the sizes of what is left between.
    """
    front, i = [], 0
    j = 0
    while i < len(x) and j < len(y):
        found = _run(x[i:], y[j:])
        if found is None:
            break
        a, b = found
        front.append(((i, i + a), (j, j + b), (_ints(x[i : i + a]), _ints(y[j : j + b]))))
        i, j = i + a, j + b
    back: list[tuple[Range, Range, Into | None]] = []
    m, n = len(x), len(y)
    while m > i and n > j:
        found = _run(x[i:m][::-1], y[j:n][::-1])
        if found is None:
            break
        a, b = found
        back.append(((m - a, m), (n - b, n), (_ints(x[m - a : m]), _ints(y[n - b : n]))))
        m, n = m - a, n - b
    middle = [((i, m), (j, n), None)] if m > i else []
    return [*front, *middle, *back[::-1]]


def _ints(dims: Sequence[Dim]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else 1 for d in dims)


def _run(x: Sequence[Dim], y: Sequence[Dim]) -> tuple[int, int] | None:
    """How many axes of x and y, from the front, have the same size together."""
    if x[0] == y[0] and x[0] is not None:
        return 1, 1
    a = b = 1
    while a <= len(x) and b <= len(y):
        mine, theirs = x[:a], y[:b]
        if not all(isinstance(d, int) for d in (*mine, *theirs)):
            return None
        if prod(_ints(mine)) == prod(_ints(theirs)):
            return a, b
        shorter = prod(_ints(mine)) < prod(_ints(theirs))
        a, b = (a + 1, b) if shorter else (a, b + 1)
    return None


def _recut(visit: Visit, labels: Labels, axis: int, into: Into) -> tuple[int, Labels | None]:
    """Where the labels of an axis are after a reshape of sizes: an axis, and its labels."""
    array = spread(labels, axis, into[0]).reshape(into[1])
    wide = [i for i, size in enumerate(into[1]) if size > 1] or [0]
    fits = [i for i in wide if _is_constant_but(array, i)]
    place = fits[0] if fits else wide[0] if visit.split == "outer" else wide[-1]
    rows = np.moveaxis(array, place, 0).reshape(into[1][place], -1)
    if not fits:
        visit.has_choice = True
        visit.ties.tie(rows, rows[:, :1])
    return place, np.ascontiguousarray(rows[:, 0])


def _is_constant_but(array: Any, axis: int) -> bool:
    """Whether an array changes along one axis only."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


_UNARY = (
    *("Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish"),
    *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Gelu", "Swish", "Erf", "Exp", "Log"),
    *("Sqrt", "Reciprocal", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos", "Not"),
    *("Clip", "Cast", "Identity", "Dropout", "IsNaN", "IsInf"),
)
_BINARY = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Max", "Min", "Sum", "Mean", "Where"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
)
_POOLS = (
    *("MaxPool", "AveragePool", "LpPool"),
    *("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
)
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")

FLOWS: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys(_BINARY, _merge),
    **dict.fromkeys(_POOLS, _spatial),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _argument),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _along(-1, onward=True)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _norm),
    "GroupNormalization": _group_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "Concat": _concat,
    "Split": _split,
    "Slice": _sliced,
    "Gather": _gather,
    "Pad": _pad,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "ConstantOfShape": _filled,
    "Tile": _tile,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Reshape": _reshape,
    "Flatten": _reshaped,
    "Shape": _shape,
}
