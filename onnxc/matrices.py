"""The weights of a graph with the nodes that read them: as a matrix, with what is known of inputs.

A weight is seen as W (groups, outputs, d), which multiplies rows of its layer's input with second
moments H and mean mu (`onnxc.moments`); what a solver makes of it goes back with `put`, and biases
take in what the mean of the output moved by,

    b <- b + (W − Ŵ) mu.

Weights that several nodes share are one layer, whose error is the mean over the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip
from onnxc.graph import captured, constant, fresh, insert, nbytes, store, values, walk
from onnxc.moments import from_matrix, matrix, mean_output, moments_key, why_no_moments
from onnxc.numerics import sparse
from onnxc.numerics.patches import Window
from onnxc.numerics.sparse import Quadratic
from onnxc.ops import knowledge, weight_of

Array = NDArray[Any]

WIDEST = 2048  # columns of C that are solved for together
HIDDEN = {"LSTM": 2, "GRU": 2}  # where recurrent nodes have the weight of their own output


@dataclass
class Layer:
    """A weight and the nodes that multiply by it or look it up, at this position of their inputs.

    obstacle: why it stays as it is. unmeasured: why there are no moments of what it multiplies.
    """

    weight: gs.Constant
    position: int
    nodes: list[gs.Node] = field(default_factory=list)
    obstacle: str = ""
    unmeasured: str = ""

    @property
    def name(self) -> str:
        """Its first node, with the position of what is not the weight of its input."""
        first = self.nodes[0]
        is_main = knowledge(first).weight == self.position
        return str(first.name) if is_main else f"{first.name}:{self.position}"

    @property
    def size(self) -> int:
        return prod(self.weight.shape)

    @property
    def zeros(self) -> int:
        return self.size - int(np.count_nonzero(values(self.weight)))

    @property
    def is_linear(self) -> bool:
        """Whether the axes of its outputs and inputs are known."""
        return knowledge(self.nodes[0]).out_axis is not None and not self.unmeasured

    @property
    def is_turned(self) -> bool:
        """Whether the rows of the matrix lie across the axes of the weight."""
        axis = knowledge(self.nodes[0]).out_axis
        return self.is_linear and axis is not None and axis(self.nodes[0]) != 0

    @property
    def matrix(self) -> Array:
        """The weight as (groups, outputs, d), float64; of a recurrent one, all gates as outputs."""
        array = values(self.weight).astype(np.float64)
        return matrix(self.nodes[0], array) if self.is_linear else _rows(array)

    def shaped(self, found: Array) -> Array:
        """The weight that a matrix is of."""
        shape = tuple(self.weight.shape)
        array = from_matrix(self.nodes[0], found, shape) if self.is_linear else found.reshape(shape)
        return array.astype(self.weight.dtype)

    def gain(self, found: Array) -> Array | None:
        """Gains of outputs, (groups, outputs, 1), as what the weight is multiplied by.

        None where they differ along all axes, as in a grouped ConvTranspose.
        """
        shape = tuple(self.weight.shape)
        whole = np.broadcast_to(found, self.matrix.shape)
        full = from_matrix(self.nodes[0], whole, shape) if self.is_linear else whole.reshape(shape)
        for axis in range(full.ndim):
            head = full.take([0], axis)
            full = head if (full == head).all() else full
        return full if full.size < self.size else None

    @property
    def has_gains(self) -> bool:
        """Whether each output may have a gain of its own in front of the weight."""
        shape = (*self.matrix.shape[:2], 1)
        return self.gain(np.arange(1.0, 1 + prod(shape)).reshape(shape)) is not None

    @property
    def window(self) -> Window:
        """How the first node cuts its input into rows."""
        cut = knowledge(self.nodes[0]).window
        assert cut is not None
        return cut(self.nodes[0])

    @property
    def offsets(self) -> int:
        """Kernel offsets for each input channel in a row of the matrix."""
        return prod(self.window.kernel)

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        axis = knowledge(self.nodes[0]).in_axis
        if axis is None:
            return int(self.weight.shape[-1])
        channels = int(self.weight.shape[axis(self.nodes[0])])
        return channels if self.window.kernel else channels // self.window.groups

    @property
    def has_biases(self) -> bool:
        """Whether a bias of each node can take in what the mean of its output moves by."""
        scaled = (n.attrs.get(key, 1.0) != 1.0 for n in self.nodes for key in ("alpha", "beta"))
        return all(map(has_place, self.nodes)) and not any(scaled)

    @property
    def is_overlapping(self) -> bool:
        """Whether several rows of the matrix make one output channel, as in ConvTranspose."""
        return len(self.weight.shape) > 2 and not self.window.kernel

    @property
    def keys(self) -> list[Key]:
        """Of the moments of the inputs of its nodes; none where one of them has none."""
        found = [] if self.unmeasured else [moments_key(node) for node in self.nodes]
        keys = [key for key in found if key is not None]
        return keys if len(keys) == len(self.nodes) else []


def layers(graph: gs.Graph, allowed: frozenset[str], everything: bool = False) -> list[Layer]:
    """Weights that nodes of the main graph multiply by, in order, with what is in the way.

    everything: also tables that are looked up and what recurrent nodes multiply their own output
    by, which have no moments.
    """
    found: dict[int, Layer] = {}
    for node in graph.nodes:
        for position in _positions(node, everything):
            weight = node.inputs[position]
            found.setdefault(id(weight), Layer(weight, position)).nodes.append(node)
    read = captured(graph)
    for layer in found.values():
        layer.obstacle = _obstacle(graph, layer, allowed, read)
        layer.unmeasured = _unmeasured(layer)
    return list(found.values())


def moments(layer: Layer, context: Context) -> list[Any]:
    """The statistics of the inputs of a layer's nodes; none where one is missing."""
    found = [context.stats.get(key) for key in layer.keys]
    return found if all(f is not None and f.is_finite and f.count for f in found) else []


def error(layer: Layer, context: Context) -> Quadratic:
    """E of a layer, the mean over its nodes."""
    found = moments(layer, context)
    if not found:
        return Quadratic()
    is_centred = layer.has_biases and not layer.is_overlapping
    parts = [
        sparse.quadratic(f.blocks(WIDEST), f.mean if is_centred else None, f.count).blocks
        for f in found
    ]
    if len({tuple(b.shape for b in blocks) for blocks in parts}) > 1:
        return Quadratic(parts[0])
    return Quadratic(tuple(sum(same) / len(parts) for same in zip(*parts, strict=True)))


def put(
    graph: gs.Graph, layer: Layer, found: Array, context: Context, suffix: str, what: str
) -> Iterator[Change]:
    """Put a new weight in place, and let biases take in what the mean outputs moved by."""
    lost = layer.matrix - found
    yield from place(graph, layer, found, suffix, what)
    shift_biases(graph, layer, lost, context, suffix)


def shift_biases(graph: gs.Graph, layer: Layer, lost: Array, context: Context, suffix: str) -> None:
    """Let the biases of a layer take in what its mean outputs lost. lost: W − Ŵ, as a matrix."""
    if not (layer.keys and layer.has_biases):
        return
    moved = from_matrix(layer.nodes[0], lost, tuple(layer.weight.shape))
    for node, stats in zip(layer.nodes, moments(layer, context), strict=False):
        shift_bias(graph, node, mean_output(node, moved, stats.mean), suffix)


def place(
    graph: gs.Graph, layer: Layer, found: Array, suffix: str, what: str, gain: Array | None = None
) -> Iterator[Change]:
    """Let the nodes of a layer read a new weight; one times a gain, if there is one.

    gain: of the shape of the weight, or 1 along axes.
    """
    old = layer.weight
    made = store(graph, fresh(graph, f"{old.name}_{suffix}"), layer.shaped(found))
    sizes, read = (nbytes(old), nbytes(made)), made
    first, *others = layer.nodes
    if gain is not None:
        factor = constant(fresh(graph, f"{old.name}_gain"), gain.astype(old.dtype))
        read = gs.Variable(fresh(graph, f"{old.name}_scaled"), old.dtype, old.shape)
        mul = gs.Node("Mul", read.name, {}, [made, factor], [read])
        insert(graph, before={first.name: [mul]})
    for node in layer.nodes:
        node.inputs[layer.position] = read
    yield Change(first.name, what, *sizes)
    yield from (Change(node.name, f"shares its weight with {first.name}") for node in others)


def _rows(array: Array) -> Array:
    return array.reshape(1, -1, array.shape[-1])


def _positions(node: gs.Node, everything: bool) -> Iterator[int]:
    """Where a node has constant float weights."""
    row = knowledge(node)
    if weight_of(node) is None or row.weight is None:
        return
    if row.window is not None or (everything and row.role == "lookup"):
        yield row.weight
    hidden = HIDDEN.get(node.op, 0) if everything else 0
    if hidden and isinstance(node.inputs[hidden], gs.Constant):
        yield hidden


def _obstacle(graph: gs.Graph, layer: Layer, allowed: frozenset[str], read: set[str]) -> str:
    weight, (first, *others) = layer.weight, layer.nodes
    for node in layer.nodes:
        if node.name not in allowed:
            return f"{node.name} is excluded" if others else "excluded"
    stranger = next((n for n in weight.outputs if not any(n is m for m in layer.nodes)), None)
    if stranger is not None:
        return f"{stranger.name} reads its weight too"
    if weight.name in read or any(weight is tensor for tensor in graph.outputs):
        return "its weight is read outside of the graph"
    if any(_way(node, layer) != _way(first, layer) for node in others):
        return f"{others[0].name} reads its weight in another way"
    return "" if np.isfinite(values(weight)).all() else "its weight is not finite"


def _way(node: gs.Node, layer: Layer) -> tuple[Any, ...]:
    """How a node reads its weight as a matrix."""
    row = knowledge(node)
    is_at = node.inputs[layer.position] is layer.weight
    if row.window is None:
        return node.op, is_at
    axis = None if row.out_axis is None else row.out_axis(node)
    return axis, row.window(node).groups, bool(row.window(node).kernel), is_at


def _unmeasured(layer: Layer) -> str:
    """Why there are no moments of what a weight multiplies; empty if there are."""
    row = knowledge(layer.nodes[0])
    if row.weight != layer.position:
        return "its input is the state of the node"
    return next(filter(None, map(why_no_moments, layer.nodes)), "")


def outside(graph: gs.Graph, done: str) -> Iterator[Skip]:
    """Heavy nodes without a weight here, and those in nested bodies. done: what is not to them."""
    for body in walk(graph):
        for node in (n for n in body.nodes if knowledge(n).window is not None):
            if body is not graph:
                yield Skip(node.name, f"not {done}: it is inside a nested body")
            elif weight_of(node) is None:
                yield Skip(node.name, f"not {done}: {why_no_moments(node)}")


@dataclass(frozen=True)
class LeaveOut:
    """A step of a sequential pass that only says what the others do not look at."""

    skips: tuple[Skip, ...]
    name: ClassVar[str] = "leave-out"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return list(self.skips)
