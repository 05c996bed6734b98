"""How channels flow through operators with weights: what they sum over, and what they make."""

from __future__ import annotations

import numpy as np

from onnxc.channels.labels import Axes, Labels
from onnxc.channels.visit import Rule, Visit, merged, opaque
from onnxc.ops import groups, is_constant


def conv(visit: Visit) -> list[Axes]:
    """W (M, C, k…) in g groups: axis 1 reads the input, axis 0 makes the output."""
    M, C = visit.sizes(1)[:2]
    return _convolved(visit, M, C, reads=1, makes=0)


def conv_transpose(visit: Visit) -> list[Axes]:
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


def gemm(visit: Visit) -> list[Axes]:
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


def matmul(visit: Visit) -> list[Axes]:
    ranks = [len(visit.shape(i)) for i in (0, 1)]
    if min(ranks) < 2:
        return opaque(visit)
    made = _contracted(visit, (ranks[0] - 2, ranks[0] - 1), (ranks[1] - 1, ranks[1] - 2))
    rank = max(ranks)
    axes = {rank - 2: made.get(0), rank - 1: made.get(1)}
    shapes = [visit.shape(i) for i in (0, 1)]
    axes |= {rank + behind: merged(visit, shapes, behind) for behind in range(-rank, -2)}
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


def recurrent(gates: int) -> Rule:
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
