"""Cut channels out of a graph: constants are sliced, and nodes that name indices are told new ones.

RECUTS has a row for each operator with sizes or indices of its own. A rule gets the node with the
positions that stay, of its inputs' axes and of its outputs'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.groups import Channels, kept
from onnxc.channels.labels import Axes, Labels, Ties
from onnxc.channels.moves import sliced
from onnxc.channels.reshapes import entries
from onnxc.channels.visit import Visit
from onnxc.edit import constant, fresh, insert, nbytes, opset, store, values
from onnxc.ops import groups, is_constant

Array = NDArray[Any]


@dataclass
class Cut:
    """A node whose inputs or outputs lose channels.

    x, y: labels of the axes of inputs and outputs. dead: labels that go.
    """

    graph: gs.Graph
    node: gs.Node
    x: list[Axes]
    y: list[Axes]
    dead: frozenset[int]
    ahead: list[gs.Node]

    def stays(self, labels: Labels) -> Array:
        return kept(labels, self.dead)

    def renumbered(self, labels: Labels) -> Array:
        """New positions by old ones; of those that go, the next one that stays."""
        is_kept = ~np.isin(labels, list(self.dead))
        return np.cumsum(is_kept) - is_kept

    def replace(self, position: int, array: Any) -> None:
        """Give the node a new constant of integers."""
        while len(self.node.inputs) <= position:
            self.node.inputs.append(gs.Variable(""))
        stem = self.node.inputs[position].name or f"{self.node.name}_{position}"
        name = fresh(self.graph, f"{stem}_cut")
        self.node.inputs[position] = constant(name, np.asarray(array, np.int64))


def cut(graph: gs.Graph, channels: Channels, dead: Collection[int]) -> dict[str, tuple[int, int]]:
    """Take channels out of a graph, in place; every axis must keep one.

    Returns the bytes of the constants of each node that lost some, before and after.
    """
    gone = frozenset(dead)
    sizes: dict[str, tuple[int, int]] = {}
    nodes = {node.name: node for node in graph.nodes}
    ahead: dict[str, list[gs.Node]] = {}
    for name, node in nodes.items():
        x = channels.inputs(node)
        y = [channels.tensors.get(t.name, {}) for t in node.outputs]
        if node.domain or not _loses((*x, *y), gone):
            continue
        work = Cut(graph, node, x, y, gone, [])
        for position in range(len(x)):
            if (name, position) in channels.uses and _loses((x[position],), gone):
                _copy_less(work, position)
        RECUTS.get(node.op, _stays)(work)
        ahead |= {name: work.ahead} if work.ahead else {}
    _slice_constants(graph, nodes, channels, gone, sizes)
    _set_shapes(graph, channels, gone)
    if ahead:
        insert(graph, before=ahead)
    return sizes


def _loses(all_axes: tuple[Axes, ...], dead: frozenset[int]) -> bool:
    gone = list(dead)
    return any(np.isin(labels, gone).any() for axes in all_axes for labels in axes.values())


def _slice_constants(
    graph: gs.Graph,
    nodes: dict[str, gs.Node],
    channels: Channels,
    dead: frozenset[int],
    sizes: dict[str, tuple[int, int]],
) -> None:
    """Slice each constant along its slots; uses that are sliced alike keep sharing it."""
    plans: dict[tuple[str, int], dict[int, Array]] = {}
    for slot in channels.slots:
        stays = kept(slot.labels, dead)
        if len(stays) < len(slot.labels):
            plans.setdefault((slot.node, slot.position), {})[slot.axis] = stays
    made: dict[Any, gs.Constant] = {}
    for (name, position), plan in plans.items():
        node = nodes[name]
        old = node.inputs[position]
        key = (id(old), tuple((axis, stays.tobytes()) for axis, stays in sorted(plan.items())))
        if key not in made:
            array = values(old)
            for axis, stays in plan.items():
                array = np.take(array, stays, axis)
            made[key] = store(graph, fresh(graph, f"{old.name}_cut"), array)
        node.inputs[position] = made[key]
        before, after = sizes.get(name, (0, 0))
        sizes[name] = (before + nbytes(old), after + nbytes(made[key]))


def _set_shapes(graph: gs.Graph, channels: Channels, dead: frozenset[int]) -> None:
    for node in graph.nodes:
        for tensor in node.outputs:
            axes = channels.tensors.get(tensor.name, {})
            if tensor.shape is not None and _loses((axes,), dead):
                tensor.shape = _less(tensor.shape, axes, dead)


def _less(shape: Sequence[Any], axes: Axes, dead: frozenset[int]) -> list[Any]:
    """A shape after the cut."""
    return [len(kept(axes[i], dead)) if i in axes else d for i, d in enumerate(shape)]


def _stays(cut: Cut) -> None:
    """What the node says holds whatever the sizes are."""


def _copy_less(cut: Cut, position: int) -> None:
    """Give an input that holds copies a maker of its own, which makes fewer."""
    old = cut.node.inputs[position]
    maker = old.inputs[0]
    name = fresh(cut.graph, f"{old.name}_fewer")
    made = gs.Node(maker.op, name, dict(maker.attrs), list(maker.inputs))
    made.outputs = [gs.Variable(name, old.dtype, _less(old.shape, cut.x[position], cut.dead))]
    less = Cut(cut.graph, made, [{}] * len(made.inputs), [cut.x[position]], cut.dead, [])
    _sizes(less)
    cut.ahead.append(made)
    cut.node.inputs[position] = made.outputs[0]


def _convolution(cut: Cut) -> None:
    """Groups that go as a whole; where all of them stay, the slices of the weight say it all."""
    g, x, y = groups(cut.node), cut.x[0].get(1), cut.y[0][1]
    if g == 1 or x is None:
        return
    rows = np.isin(y.reshape(g, -1), list(cut.dead)).all(axis=1)
    rows &= np.isin(x.reshape(g, -1), list(cut.dead)).all(axis=1)
    cut.node.attrs["group"] = int(g - rows.sum())


def _recurrent(cut: Cut) -> None:
    labels = next((axes[max(axes)] for axes in cut.y if axes), None)
    if labels is not None:
        cut.node.attrs["hidden_size"] = len(cut.stays(labels))


def _group_norm(cut: Cut) -> None:
    rows = cut.x[0][1].reshape(int(cut.node.attrs["num_groups"]), -1)
    cut.node.attrs["num_groups"] = len(cut.stays(rows[:, 0]))


def _sizes(cut: Cut) -> None:
    """The last input: sizes of axes that have channels; 0, 1 and -1 follow the input."""
    position = len(cut.node.inputs) - 1
    tensor = cut.node.inputs[position]
    known = entries(tensor)
    assert known is not None
    wanted = list(known)
    behind = len(cut.node.outputs[0].shape) - len(wanted)
    for axis, labels in cut.y[0].items():
        if axis >= behind and wanted[axis - behind] == len(labels):
            wanted[axis - behind] = len(cut.stays(labels))
    if is_constant(tensor):
        cut.replace(position, wanted)
    elif wanted != known:
        cut.node.inputs[position] = _joined(cut, tensor, wanted)


def _joined(cut: Cut, tensor: gs.Tensor, wanted: Sequence[int | None]) -> gs.Tensor:
    """A Concat like the one that makes a tensor, with other constants in it."""
    maker, name = tensor.inputs[0], fresh(cut.graph, f"{tensor.name}_cut")
    parts, start = [], 0
    for part in maker.inputs:
        size = int(np.prod(part.shape))
        some, start = wanted[start : start + size], start + size
        if is_constant(part):
            part = constant(fresh(cut.graph, f"{part.name}_cut"), np.array(some, np.int64))
        parts.append(part)
    made = gs.Variable(name, tensor.dtype, tensor.shape)
    cut.ahead.append(gs.Node(maker.op, name, dict(maker.attrs), parts, [made]))
    return made


def _resize(cut: Cut) -> None:
    if len(cut.node.inputs) > 3 and cut.node.inputs[3].name:
        wanted = values(cut.node.inputs[3]).copy()
        chosen = list(cut.node.attrs.get("axes", range(len(wanted))))
        for axis, labels in cut.y[0].items():
            if axis in chosen:
                wanted[chosen.index(axis)] = len(cut.stays(labels))
        cut.replace(3, wanted)


def _split(cut: Cut) -> None:
    axis = int(cut.node.attrs.get("axis", 0)) % len(cut.node.inputs[0].shape)
    if axis not in cut.x[0]:
        return
    parts = [len(cut.stays(axes[axis])) for axes in cut.y]
    cut.node.attrs.pop("num_outputs", None)
    if opset(cut.graph) < 13:
        cut.node.attrs["split"] = parts
    else:
        cut.replace(1, parts)


def _slice(cut: Cut) -> None:
    """New bounds where what stays is evenly spaced; else it is gathered in front of the Slice."""
    cuts = sliced(Visit(cut.node, cut.x, Ties(), []))
    assert cuts is not None
    for axis, labels in cut.x[0].items():
        if axis in cuts:
            taken = np.arange(len(labels))[cuts[axis]]
            is_kept = ~np.isin(labels[taken], list(cut.dead))
            cuts[axis] = _bounds(cut, axis, cut.renumbered(labels)[taken[is_kept]])
    columns = list(cuts.items())
    ends = [np.iinfo(np.int64).min if s.stop is None else s.stop for _, s in columns]
    numbers = ([s.start for _, s in columns], ends, [a for a, _ in columns])
    for position, row in enumerate((*numbers, [s.step for _, s in columns]), start=1):
        cut.replace(position, row)


def _bounds(cut: Cut, axis: int, positions: Array) -> slice:
    steps = np.unique(np.diff(positions))
    if len(steps) == 1 and steps[0] > 0:
        return slice(int(positions[0]), int(positions[-1]) + 1, int(steps[0]))
    if len(positions) == 1:
        return slice(int(positions[0]), int(positions[0]) + 1, 1)
    x = cut.node.inputs[0]
    name = fresh(cut.graph, f"{x.name}_picked")
    picked = gs.Variable(name, x.dtype)
    which = constant(fresh(cut.graph, f"{name}_indices"), positions.astype(np.int64))
    cut.ahead.append(gs.Node("Gather", name, {"axis": axis}, [x, which], [picked]))
    cut.node.inputs[0] = picked
    return slice(0, len(positions), 1)


def _gather(cut: Cut) -> None:
    rank = len(cut.node.inputs[0].shape)
    axis = int(cut.node.attrs.get("axis", 0)) % rank
    labels = cut.x[0].get(axis)
    if labels is None:
        return
    indices = values(cut.node.inputs[1])
    stays = cut.stays(labels[indices])
    cut.replace(1, cut.renumbered(labels)[indices][stays])


def _pad(cut: Cut) -> None:
    """Fewer zeros: those before and after x that stay."""
    given = cut.node.attrs.get("pads")
    pads = np.array(values(cut.node.inputs[1]) if given is None else given, np.int64)
    rank = len(pads) // 2
    for axis, labels in cut.y[0].items():
        before, after = pads[axis], pads[axis + rank]
        pads[axis] = len(cut.stays(labels[:before]))
        pads[axis + rank] = len(cut.stays(labels[len(labels) - after :]))
    if given is None:
        cut.replace(1, pads)
    else:
        cut.node.attrs["pads"] = pads.tolist()


RECUTS: dict[str, Callable[[Cut], None]] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("Reshape", "Expand"), _sizes),
    "GroupNormalization": _group_norm,
    "Resize": _resize,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
}
