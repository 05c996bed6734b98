"""Tensors whose channels may be scaled together: who makes them, and who reads them.

Channel c of all tensors of a group is divided by s_c, and what the network computes stays, where

    producers   are linear in constants, one number or row a channel, that are divided by s: the
                weight and bias of a layer, the gain and bias of a norm, a vector multiplied by
    readers     are heavy nodes, whose weight is multiplied by s
    between     lie operators with f(s x) = s f(x): Relu, Add, pooling; and products of which one
                factor is made for them alone and takes s in, as in gated layers

Channels lie along axis 1 for convolutions and along the last axis for products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Key
from onnxc.graph import captured, fresh, store, values
from onnxc.ops import (
    bounds,
    data_inputs,
    groups,
    is_absorbed,
    is_constant,
    is_depthwise,
    knowledge,
    weight_of,
)


@dataclass(frozen=True)
class Place:
    """A constant that has a number or a row for each channel, along an axis of it."""

    node: gs.Node
    position: int
    axis: int


@dataclass
class ChannelGroup:
    """Tensors whose channel c must be scaled together, who makes them, and who reads them.

    ties: nodes between. clips: those that cut off. obstacle: why the group cannot be scaled.
    """

    tensors: list[gs.Tensor] = field(default_factory=list)
    producers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    ties: list[gs.Node] = field(default_factory=list)
    clips: list[gs.Node] = field(default_factory=list)
    obstacle: str = ""

    @property
    def axis(self) -> int:
        """Of the channels."""
        found = (knowledge(node) for node in (*self.readers, *self.producers) if is_layer(node))
        row = next(found, None)
        return 1 if row is None else row.y_axis

    @property
    def first(self) -> gs.Node:
        """The node that the group is named by."""
        return next(n for n in self.producers if is_layer(n) or _has_gains(n))

    @property
    def is_convolved(self) -> bool:
        """Whether a convolution makes or reads it."""
        layers = (n for n in (*self.producers, *self.readers) if is_layer(n))
        return any(not knowledge(node).float_output for node in layers)

    @property
    def is_known(self) -> bool:
        """Whether a layer makes it, or a norm or product for a layer that reads it."""
        if any(map(is_layer, self.producers)):
            return True
        return any(map(is_layer, self.readers)) and any(map(_has_gains, self.producers))

    @property
    def keys(self) -> list[Key]:
        """Peaks of what is scaled; of what lies behind a Clip, or what products read, if any."""
        measured = [clip.outputs[0] for clip in self.clips]
        if not measured and not self.is_convolved:
            names = {node.inputs[0].name for node in self.readers}
            measured = [tensor for tensor in self.tensors if tensor.name in names]
        return [Key(t.name, "peak", self.axis) for t in measured or self.tensors]

    @property
    def bound(self) -> float | None:
        """The least value that a Clip of the group cuts off at; None without a Clip."""
        return min((bounds(clip)[1] for clip in self.clips), default=None)

    @property
    def divided(self) -> list[Place]:
        """Constants that take 1 / s in."""
        nodes = (*self.producers, *self.ties)
        return [place for node in nodes for place in _made_by(node, self.axis)]

    @property
    def multiplied(self) -> list[Place]:
        """Weights that take s in."""
        return [Place(node, 1, _in_axis(node)) for node in self.readers]


def channel_groups(graph: gs.Graph, allowed: frozenset[str]) -> list[ChannelGroup]:
    """The groups that layers make, or that norms make for layers, in graph order."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in graph.nodes:
        for tensor in _tied(node):
            parent[find(tensor.name)] = find(node.outputs[0].name)
    found: dict[str, ChannelGroup] = {}
    seen: set[str] = set()
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if is_constant(tensor) or not tensor.name or tensor.name in seen:
                continue
            seen.add(tensor.name)
            _enter(found.setdefault(find(tensor.name), ChannelGroup()), tensor)
    pinned = {name: f"a nested body reads {name}" for name in captured(graph)}
    for port in (*graph.inputs, *graph.outputs):
        pinned[port.name] = f"{port.name} is an input or output of the graph"
    known = [group for group in found.values() if group.is_known]
    for group in known:
        group.obstacle = next(_obstacles(group, pinned, allowed), "")
    return known


def scale(graph: gs.Graph, group: ChannelGroup, s: NDArray[np.float64], suffix: str) -> None:
    """Divide the channels of a group by s, (channels,), and let readers make up for it."""
    for places, by in ((group.divided, 1 / s), (group.multiplied, s)):
        for place in places:
            old = place.node.inputs[place.position]
            made = _scaled(values(old), by, place.axis)
            place.node.inputs[place.position] = store(
                graph, fresh(graph, f"{old.name}_{suffix}"), made
            )


def _scaled(array: NDArray[Any], by: NDArray[np.float64], axis: int) -> NDArray[Any]:
    shape = [-1 if i == axis % array.ndim else 1 for i in range(array.ndim)]
    return np.asarray((array * by.reshape(shape)).astype(array.dtype))


def _enter(group: ChannelGroup, tensor: gs.Tensor) -> None:
    """Add a tensor with its producer and readers."""
    group.tensors.append(tensor)
    for node in tensor.inputs:
        if not _tied(node):
            group.producers.append(node)
            continue
        group.ties.append(node)
        group.clips += [node] if knowledge(node).bounds else []
    for node in tensor.outputs:
        is_tied = any(tensor is t for t in _tied(node))
        if not is_tied and not any(node is r for r in group.readers):
            group.readers.append(node)


def _obstacles(
    group: ChannelGroup, pinned: dict[str, str], allowed: frozenset[str]
) -> Iterator[str]:
    """Why a group cannot be scaled."""
    axis = group.axis
    for tensor in group.tensors:
        if tensor.name in pinned:
            yield pinned[tensor.name]
        if tensor.dtype != np.float32 or tensor.shape is None or len(tensor.shape) < 2:
            yield f"{tensor.name} is not a float tensor with channels"
            return
        if not isinstance(tensor.shape[axis], int):
            yield f"the channels of {tensor.name} are not known"
        for node in tensor.inputs:
            yield from _cannot_make(node, tensor, axis, allowed)
        for node in tensor.outputs:
            if not any(tensor is t for t in _tied(node)):
                yield from _cannot_read(node, tensor, axis, allowed)


def _activations(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.inputs if t.name and not is_constant(t)]


def _tied(node: gs.Node) -> list[gs.Tensor]:
    """The inputs that hand the scale of each channel to the output of a node."""
    row, given = knowledge(node), _activations(node)
    if not given:
        return []
    if row.bounds:
        return given if is_absorbed(node) and not any(map(is_constant, node.inputs[:1])) else []
    if row.multiplies:
        return _factor(node, given)
    if not row.homogeneous:
        return []
    shapes = [None if t.shape is None else list(t.shape) for t in given]
    is_same = len(given) == 1 or all(s is not None and s == shapes[0] for s in shapes)
    constants = [t for t in data_inputs(node) if is_constant(t)]
    return given if is_same and (not constants or _is_level(node, given[0])) else []


def _factor(node: gs.Node, given: list[gs.Tensor]) -> list[gs.Tensor]:
    """The factor of a product that takes the scale in: made for it alone, by a layer."""
    numbers = [t for t in data_inputs(node) if is_constant(t)]
    if numbers:
        return given if int(np.prod(numbers[0].shape)) == 1 and _is_level(node, given[0]) else []
    alone = [t for t in given if len(t.outputs) == 1 and _is_level(node, t)]
    return [t for t in alone if any(map(_is_layer_or_biased, t.inputs))][:1]


def _is_level(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether an input of a node is not stretched to the shape of its output."""
    made = node.outputs[0].shape
    return tensor.shape is not None and made is not None and list(tensor.shape) == list(made)


def _is_layer_or_biased(node: gs.Node) -> bool:
    """A layer, or the addition of a bias behind one."""
    if not knowledge(node).adds or not any(map(is_constant, node.inputs)):
        return is_layer(node)
    return any(is_layer(maker) for t in _activations(node) for maker in t.inputs)


def is_layer(node: gs.Node) -> bool:
    """A constant weight whose rows or columns are the channels of outputs and inputs."""
    row, weight = knowledge(node), weight_of(node)
    if weight is None or row.role != "weighted" or row.out_axis is None:
        return False
    if row.float_output:
        return len(weight.shape) == 2 and not node.attrs.get("transA", 0)
    return len(weight.shape) > 2 and row.out_axis(node) == 0


def _in_axis(reader: gs.Node) -> int:
    row = knowledge(reader)
    assert row.in_axis is not None
    return 0 if is_depthwise(reader) else row.in_axis(reader)


def _has_gains(node: gs.Node) -> bool:
    """A norm, or a product with a vector."""
    return bool(knowledge(node).gains) or (knowledge(node).multiplies and not _tied(node))


def _made_by(node: gs.Node, axis: int) -> list[Place]:
    """The constants that a node's outputs are linear in; none where there are no such."""
    row, result = knowledge(node), node.outputs[0]
    if is_layer(node):
        assert row.out_axis is not None
        return [Place(node, 1, row.out_axis(node)), *(Place(node, p, -1) for p in _biases(node))]
    if row.gains:
        given = [p for p in row.gains if p < len(node.inputs) and node.inputs[p].name]
        return [Place(node, p, -1) for p in given] if _lies_along(node, row.y_axis, axis) else []
    if not row.multiplies and not row.adds:
        return []
    vectors = [p for p, t in enumerate(node.inputs) if is_constant(t) and np.prod(t.shape) > 1]
    rank = len(result.shape or ())
    places = [
        Place(node, p, _positive(axis, result) - rank + len(node.inputs[p].shape)) for p in vectors
    ]
    return [place for place in places if place.axis >= 0]


def _biases(layer: gs.Node) -> list[int]:
    """The position of the bias of a layer, if it has one."""
    position = knowledge(layer).bias
    if position is None or position >= len(layer.inputs):
        return []
    return [position] if layer.inputs[position].name else []


def _positive(axis: int, tensor: gs.Tensor) -> int:
    return axis % max(len(tensor.shape or ()), 1)


def _cannot_make(
    node: gs.Node, tensor: gs.Tensor, axis: int, allowed: frozenset[str]
) -> Iterator[str]:
    """Why a node does not take 1 / s in, or hand it on."""
    places = _made_by(node, axis)
    constants = [t for t in data_inputs(node) if is_constant(t)]
    if not _tied(node):
        if not places or (is_layer(node) and not _lies_along(node, knowledge(node).y_axis, axis)):
            yield f"{node.name} ({node.op}) makes a part of it"
    elif knowledge(node).adds and constants and not places:
        yield f"{node.name} ({node.op}) adds one number to all channels"
    if places and node.name not in allowed:
        yield f"{node.name} is excluded"
    for place in places:
        given = node.inputs[place.position]
        if not is_constant(given):
            yield f"the bias of {node.name} is computed"
        elif not given.shape or given.shape[place.axis] != tensor.shape[axis]:
            yield f"{given.name} of {node.name} has not one number a channel"


def _cannot_read(
    node: gs.Node, tensor: gs.Tensor, axis: int, allowed: frozenset[str]
) -> Iterator[str]:
    """Why a node does not take s in."""
    if not is_layer(node) or node.inputs[0] is not tensor or tensor in node.inputs[1:]:
        yield f"{node.name} ({node.op}) reads it"
        return
    x_axis = knowledge(node).x_axis
    assert x_axis is not None
    if _positive(x_axis(node), tensor) != _positive(axis, tensor):
        yield f"{node.name} ({node.op}) reads it along another axis"
    if node.name not in allowed:
        yield f"{node.name} is excluded"
    if groups(node) > 1 and not is_depthwise(node):
        yield f"{node.name} is a grouped convolution"
    if any(not is_constant(node.inputs[position]) for position in _biases(node)):
        yield f"the bias of {node.name} is computed"


def _lies_along(node: gs.Node, axis: int, other: int) -> bool:
    return _positive(axis, node.outputs[0]) == _positive(other, node.outputs[0])
