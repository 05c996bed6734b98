"""Cross-layer equalization: bring the channels of a tensor to one scale before they share a range.

Channels whose values pass only through homogeneous operators (f(s x) = s f(x) for s > 0: Relu, Add,
pooling, …) between the layers that make them and the layers that read them can be scaled freely:

    W_p[c, :] <- W_p[c, :] / s_c,   b_p[c] <- b_p[c] / s_c     in every producer p
    W_r[:, c] <- W_r[:, c] · s_c                                in every reader r

leaves the network's function as it was. With r_c the mean over the samples of the channel's largest
magnitude,

    s_c = (r_c / m)^½,   m the geometric mean of r,

shares the spread between the activations' one scale and the readers' weights (Nagel 2019,
"Data-free quantization", whose weight ranges are replaced by what is measured on the activations).

A Clip(0, h) is homogeneous only for a channel that stays below h. There r is measured behind the
Clip, with a factor of HEADROOM for the samples that reach higher than most, and

    s_c = min(1, HEADROOM r_c / h)^½

so that channels are only scaled up, and one that reaches h stays as it is. The largest values of a
few samples may be clipped; it is the one change that is not exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, fresh, nbytes, store, values
from onnxc.ops import bounds, groups, is_absorbed, is_constant, is_depthwise, knowledge, weight_of

LIMIT = 64.0  # largest ratio of two channels' factors to their mean: a dead channel is no guide
HEADROOM = 1.5  # of a channel's mean peak below the bound of a Clip


@dataclass
class ChannelGroup:
    """Tensors whose channel c must be scaled together, who makes them, and who reads them."""

    tensors: list[gs.Tensor] = field(default_factory=list)
    producers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    clips: list[gs.Node] = field(default_factory=list)
    obstacle: str = ""  # why the group cannot be scaled

    @property
    def keys(self) -> list[Key]:
        """Peaks of all tensors; of those behind a Clip, where there is one."""
        measured = [clip.outputs[0] for clip in self.clips] or self.tensors
        return [Key(tensor.name, "peak", 1) for tensor in measured]

    @property
    def bound(self) -> float | None:
        """The least value that a Clip of the group cuts off at; None without a Clip."""
        return min((bounds(clip)[1] for clip in self.clips), default=None)


@register
@dataclass(frozen=True)
class Equalize:
    """Scale channels so that they share one quantization range better."""

    name: ClassVar[str] = "equalize"
    lossless: ClassVar[bool] = False
    rescales: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for group in self._groups(graph, context):
            if not group.obstacle:
                yield from group.keys

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return [
            result
            for group in self._groups(graph, context)
            for result in _scale(graph, group, context)
        ]

    def _groups(self, graph: gs.Graph, context: Context) -> list[ChannelGroup]:
        return channel_groups(graph, context.only.names(graph))


def channel_groups(graph: gs.Graph, allowed: frozenset[str]) -> list[ChannelGroup]:
    """The groups of 4-D (batch, channel, …) float tensors between convolutions, in graph order."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in graph.nodes:
        if _ties(node):
            for tensor in _activations(node):
                parent[find(tensor.name)] = find(node.outputs[0].name)
    found: dict[str, ChannelGroup] = {}
    seen: set[str] = set()
    pinned = {name: f"a nested body reads {name}" for name in captured(graph)}
    for port in (*graph.inputs, *graph.outputs):
        pinned[port.name] = f"{port.name} is an input or output of the graph"
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if is_constant(tensor) or not tensor.name or tensor.name in seen:
                continue
            seen.add(tensor.name)
            _enter(found.setdefault(find(tensor.name), ChannelGroup()), tensor, pinned, allowed)
    return [group for group in found.values() if any(map(_is_convolution, group.producers))]


def _enter(
    group: ChannelGroup, tensor: gs.Tensor, pinned: dict[str, str], allowed: frozenset[str]
) -> None:
    """Add a tensor with its producer and readers, or the obstacle that it is."""
    group.tensors.append(tensor)
    group.obstacle = group.obstacle or pinned.get(tensor.name, "")
    if tensor.dtype != np.float32 or tensor.shape is None or len(tensor.shape) < 3:
        group.obstacle = group.obstacle or f"{tensor.name} is not a float tensor with channels"
    elif not isinstance(tensor.shape[1], int):
        group.obstacle = group.obstacle or f"the channels of {tensor.name} are not known"
    for node in tensor.inputs:
        if _ties(node):
            group.clips += [node] if knowledge(node).bounds else []
        else:
            group.producers.append(node)
            group.obstacle = group.obstacle or _cannot_produce(node, allowed)
    for node in tensor.outputs:
        if not _ties(node) and not any(node is r for r in group.readers):
            group.readers.append(node)
            group.obstacle = group.obstacle or _cannot_read(node, tensor, allowed)


def _activations(node: gs.Node) -> Iterator[gs.Tensor]:
    return (t for t in node.inputs if t.name and not is_constant(t))


def _ties(node: gs.Node) -> bool:
    """Whether a node hands the scale of each channel from its inputs to its output."""
    row = knowledge(node)
    if row.bounds:
        return is_absorbed(node) and not any(map(is_constant, node.inputs[:1]))
    if not row.homogeneous:
        return False
    tensors = [t for t in node.inputs if t.name]
    shapes = [list(t.shape) if t.shape is not None else None for t in tensors]
    same = all(s is not None and s == shapes[0] for s in shapes)
    return not any(map(is_constant, tensors)) and (len(tensors) == 1 or same)


def _is_convolution(node: gs.Node) -> bool:
    """A constant weight (out, in, …) whose outputs are the channels at axis 1."""
    row, weight = knowledge(node), weight_of(node)
    if weight is None or row.role != "weighted" or row.y_axis != 1 or len(weight.shape) < 3:
        return False
    return row.out_axis is not None and row.out_axis(node) == 0


def _cannot_produce(node: gs.Node, allowed: frozenset[str]) -> str:
    if not _is_convolution(node):
        return f"{node.name} ({node.op}) makes a part of it"
    if node.name not in allowed:
        return f"{node.name} is excluded"
    return _shared(node)


def _cannot_read(node: gs.Node, tensor: gs.Tensor, allowed: frozenset[str]) -> str:
    if not _is_convolution(node) or node.inputs[0] is not tensor or tensor in node.inputs[1:]:
        return f"{node.name} ({node.op}) reads it"
    if node.name not in allowed:
        return f"{node.name} is excluded"
    if groups(node) > 1 and not is_depthwise(node):
        return f"{node.name} is a grouped convolution"
    return _shared(node)


def _shared(node: gs.Node) -> str:
    """Weights are replaced by new constants: only a bias that is no constant is in the way."""
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    is_free = not has_bias or is_constant(node.inputs[2])
    return "" if is_free else f"the bias of {node.name} is computed"


def _scale(graph: gs.Graph, group: ChannelGroup, context: Context) -> list[Change | Skip]:
    first = next(n for n in group.producers if _is_convolution(n))
    if group.obstacle:
        return [Skip(first.name, f"channels not equalized: {group.obstacle}")]
    peaks = [context.stats[key].peak for key in group.keys if key in context.stats]
    if not peaks or not group.readers:
        return [Skip(first.name, "channels not equalized: nothing was measured on them")]
    s = factors(np.max(peaks, axis=0), group.bound)
    if np.allclose(s, 1, atol=0.01):
        return [Skip(first.name, "channels not equalized: they already share one scale")]
    for node in group.producers:
        _multiply(graph, node, 1, 1 / s, axis=0)
        _multiply(graph, node, 2, 1 / s, axis=0)
    for node in group.readers:
        _multiply(graph, node, 1, s, axis=0 if is_depthwise(node) else 1)
    size = sum(nbytes(n.inputs[1]) for n in (*group.producers, *group.readers))
    what = f"{len(s)} channels equalized, factors {s.min():.2g} to {s.max():.2g}"
    return [Change(first.name, what, size, size)]


def factors(peak: NDArray[Any], bound: float | None = None) -> NDArray[np.float64]:
    """The s_c of the module's docstring for peaks (channels,); 1 for a channel that is always zero.

    bound: where a Clip cuts off, or None.
    """
    alive = peak > 0
    if not alive.any():
        return np.ones(len(peak))
    if bound is None:
        relative = peak / np.exp(np.log(peak[alive]).mean())
    else:
        relative = np.minimum(1, HEADROOM * peak / bound)
    s = np.sqrt(np.where(alive, relative, 1))
    return np.asarray(np.clip(s, 1 / LIMIT, LIMIT))


def _multiply(
    graph: gs.Graph, node: gs.Node, position: int, s: NDArray[np.float64], axis: int
) -> None:
    if position >= len(node.inputs) or not node.inputs[position].name:
        return
    old = node.inputs[position]
    array = values(old)
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    scaled = (array * s.reshape(shape)).astype(array.dtype)
    node.inputs[position] = store(graph, fresh(graph, f"{old.name}_equalized"), scaled)
