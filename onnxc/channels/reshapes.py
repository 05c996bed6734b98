"""How channels flow through operators that regroup axes: Reshape, Flatten, DepthToSpace.

Axes of x and y are paired up in the shortest runs of equal size, and the labels of a run are
reshaped as its values are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.channels.labels import Axes, Labels, spread
from onnxc.channels.visit import Dim, Visit, opaque
from onnxc.edit import values
from onnxc.ops import is_constant


def depth_to_space(visit: Visit) -> list[Axes]:
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


def space_to_depth(visit: Visit) -> list[Axes]:
    made = visit.only(0, (0, 1))
    if 1 in made:
        made[1] = np.tile(made[1], int(visit.node.attrs["blocksize"]) ** 2)
    return [made]


def reshape(visit: Visit) -> list[Axes]:
    """To sizes that are constants where there are channels; elsewhere they may be computed."""
    sizes = entries(visit.node.inputs[1])
    if sizes is None or visit.node.attrs.get("allowzero", 0):
        return opaque(visit)
    (made,) = reshaped(visit)
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


def reshaped(visit: Visit) -> list[Axes]:
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
