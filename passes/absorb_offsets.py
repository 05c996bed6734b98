"""Take the offset of each channel out of a tensor before its channels share a range.

Where nothing but sums lies between the layers that make a tensor and those that read it, each
channel may be moved, and readers put back what is missing:

    b_p[c] <- b_p[c] − δ_c                      in the producer p
    b_r    <- b_r + Σ_i W_r[:, :, i] δ          in every reader r, i over the kernel

The network's function stays as it was. With low and high the least and largest value of a channel,

    δ_c = (low_c + high_c) / 2

centres it, so that the widest channel alone sets the range, not the one that lies farthest off.
This is bias absorption (Nagel 2019, "Data-free quantization", §4.1.3) between layers without an
activation in between, where it is exact; channel shifting of transformers (Wei 2023, "Outlier
suppression+") is the same. Sums carry the sum of what their summands were moved by.

Readers with padding are in the way: the zeros at the border do not move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, values
from onnxc.moments import mean_output, why_no_moments
from onnxc.ops import data_inputs, is_constant, knowledge, weight_of

Floats = NDArray[np.float64]

WORTH = 0.02  # of a tensor's range: what it has to become narrower by


@register
@dataclass(frozen=True)
class AbsorbOffsets:
    """Centre the channels of tensors between layers without an activation in between."""

    name: ClassVar[str] = "absorb-offsets"
    lossless: ClassVar[bool] = False
    rescales: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return [_key(node) for node in Movable.of(graph, context).makers()]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        movable, moved = Movable.of(graph, context), dict[str, Floats]()
        results: list[Change | Skip] = []
        makers = {id(node) for node in movable.makers()}
        for node in list(graph.nodes):
            if id(node) in makers:
                results += _centre(graph, node, context, moved)
            elif node.outputs and movable.through(node.outputs[0]) and not _is_layer(node):
                _carry(node, moved)
            elif _is_layer(node) and node.inputs[0].name in moved:
                _put_back(graph, node, moved[node.inputs[0].name])
        return results


@dataclass
class Movable:
    """Which tensors of a graph may be moved: all that read them put it back, or hand it on."""

    graph: gs.Graph
    allowed: frozenset[str]
    pinned: frozenset[str]
    known: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: gs.Graph, context: Context) -> Movable:
        pinned = {t.name for t in graph.outputs} | captured(graph)
        found = cls(graph, context.only.names(graph), frozenset(pinned))
        for node in reversed(graph.nodes):  # readers are known before what they read
            for tensor in node.outputs:
                found.through(tensor)
        return found

    def makers(self) -> list[gs.Node]:
        """Layers whose outputs may be moved."""
        return [node for node in self.graph.nodes if self._makes(node)]

    def _makes(self, node: gs.Node) -> bool:
        is_free = _is_layer(node) and node.name in self.allowed and has_place(node)
        return is_free and self.through(node.outputs[0])

    def through(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor may be moved."""
        if tensor.name not in self.known:
            is_free = tensor.name not in self.pinned and bool(tensor.outputs)
            readers = tensor.outputs
            self.known[tensor.name] = is_free and all(self._hands_on(n, tensor) for n in readers)
        return self.known[tensor.name]

    def _hands_on(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        if _is_layer(node):
            is_read = node.inputs[0] is tensor and tensor not in node.inputs[1:]
            is_fit = is_read and _is_along_channels(node) and _is_unpadded(node)
            return is_fit and node.name in self.allowed and has_place(node)
        if not knowledge(node).adds or any(map(is_constant, node.inputs)):
            return False
        shapes = [t.shape for t in (*data_inputs(node), *node.outputs)]
        is_same = None not in shapes and all(list(s) == list(shapes[0]) for s in shapes)
        return is_same and self.through(node.outputs[0])


def _is_layer(node: gs.Node) -> bool:
    """A layer whose output channels lie on axis 1 or last, and whose weight is a constant."""
    row, factors = knowledge(node), (node.attrs.get(key, 1.0) for key in ("alpha", "beta"))
    is_heavy = row.role == "weighted" and row.window is not None
    return is_heavy and set(factors) == {1.0} and not why_no_moments(node)


def _is_along_channels(node: gs.Node) -> bool:
    """Whether a layer multiplies the axis that others lay their channels along."""
    row = knowledge(node)
    return row.x_axis is not None and row.x_axis(node) == row.y_axis


def _is_unpadded(node: gs.Node) -> bool:
    row = knowledge(node)
    assert row.window is not None
    window = row.window(node)
    is_plain = not any(window.pads) and window.auto_pad in ("NOTSET", "VALID")
    weight = weight_of(node)
    assert weight is not None
    return is_plain and (bool(window.kernel) or len(weight.shape) == 2)


def _key(node: gs.Node) -> Key:
    return Key(node.outputs[0].name, "range", knowledge(node).y_axis)


def _centre(
    graph: gs.Graph, node: gs.Node, context: Context, moved: dict[str, Floats]
) -> list[Change | Skip]:
    """Move the outputs of a layer, which may itself read what was moved."""
    given = moved.get(node.inputs[0].name)
    if given is not None:
        _put_back(graph, node, given)
    found = context.stats.get(_key(node))
    if found is None or not found.count:
        return [Skip(node.name, "channels not centred: nothing was measured on them")]
    low, high = found.low.astype(np.float64), found.high.astype(np.float64)
    before, after = high.max() - low.min(), (high - low).max()
    if not after < (1 - WORTH) * before:
        return [Skip(node.name, "channels not centred: they lie around one value")]
    offset = (low + high) / 2
    sizes = shift_bias(graph, node, -offset, "centred")
    if sizes is None:
        return [Skip(node.name, "channels not centred: its bias has another shape")]
    moved[node.outputs[0].name] = offset
    what = f"{len(offset)} channels centred, their range {before:.3g} is {after:.3g} now"
    return [Change(node.name, what, *sizes)]


def _carry(node: gs.Node, moved: dict[str, Floats]) -> None:
    """What a sum is moved by."""
    given = [moved[t.name] for t in data_inputs(node) if t.name in moved]
    if given:
        moved[node.outputs[0].name] = np.sum(given, axis=0)


def _put_back(graph: gs.Graph, node: gs.Node, offset: Floats) -> None:
    """Let the bias of a reader make up for what its input was moved by."""
    row, weight = knowledge(node), weight_of(node)
    assert row.window is not None and weight is not None
    groups, kernel = row.window(node).groups, int(np.prod(weight.shape[2:]))
    mean = np.repeat(offset.reshape(groups, -1), kernel, axis=1)
    shift_bias(graph, node, mean_output(node, values(weight).astype(np.float64), mean), "centred")
