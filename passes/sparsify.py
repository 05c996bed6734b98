"""Make weights zero where the outputs feel it least, and fit the others to the outputs.

For a layer with the second moments H and the mean mu of its input (`onnxc.moments`), the weight Ŵ
is the solution of `onnxc.numerics.sparse`, and the bias takes in what the mean output moved by:

    Ŵ = argmin E(Ŵ) with so many zeros,      b <- b + (W − Ŵ) mu

How many zeros a layer gets is decided for all of them together (`allocation` global): with E_l(s)
the error that a share s of zeros makes, relative to the power of the layer's output,

    min Σ_l E_l(s_l),     Σ_l n_l s_l = sparsity · Σ_l n_l,

so that thin layers, and mostly the first and the last, keep more. N:M patterns are counted along
the input channels, for each output and kernel offset: of M consecutive ones N stay, which is what
sparse tensor cores skip in weights laid out with the channels last.

Without moments, weights go by magnitude. Weights that several layers share get the sum of their H.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import captured, fresh, nbytes, store, values, walk
from onnxc.moments import from_matrix, matrix, mean_output, moments_key, why_no_moments
from onnxc.numerics import sparse
from onnxc.numerics.patches import Window
from onnxc.numerics.sparse import Pattern, Quadratic
from onnxc.ops import knowledge, weight_of

Array = NDArray[Any]

WIDEST = 2048  # columns of C that are solved for together
SLACK = 1e-6  # of a share of zeros


@dataclass
class Layer:
    """A weight and the nodes that multiply by it. obstacle: why it stays as it is."""

    weight: gs.Constant
    nodes: list[gs.Node] = field(default_factory=list)
    obstacle: str = ""

    @property
    def size(self) -> int:
        return prod(self.weight.shape)

    @property
    def zeros(self) -> int:
        return self.size - int(np.count_nonzero(values(self.weight)))

    @property
    def matrix(self) -> Array:
        """The weight as (groups, outputs, d), float64; of a recurrent one, all gates as outputs."""
        array = values(self.weight).astype(np.float64)
        if knowledge(self.nodes[0]).out_axis is None:
            return array.reshape(1, -1, array.shape[-1])
        return matrix(self.nodes[0], array)

    def shaped(self, found: Array) -> Array:
        """The weight that a matrix is of."""
        shape = tuple(self.weight.shape)
        is_plain = knowledge(self.nodes[0]).out_axis is None
        array = found.reshape(shape) if is_plain else from_matrix(self.nodes[0], found, shape)
        return array.astype(self.weight.dtype)

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


@register
@dataclass(frozen=True)
class Sparsify:
    """Make weights zero where the outputs feel it least.

    sparsity: share of the weights of all layers together that are zero.
    nm: N:M, such as 2:4, in place of a share: of M consecutive input channels N stay.
    criterion: what tells which weights matter. With obs the others are fitted to the outputs.
    allocation: whether layers share the zeros so that their errors add up to the least.
    """

    name: ClassVar[str] = "sparsify"
    lossless: ClassVar[bool] = False

    sparsity: float = 0.5
    nm: str = ""
    criterion: Literal["obs", "magnitude", "wanda", "obd"] = "obs"
    allocation: Literal["global", "uniform"] = "global"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise OptionError(f"sparsity is a share between 0 and 1, not {self.sparsity:g}")
        if self.nm and self.pattern is None:
            raise OptionError(f"nm is N:M with N below M, such as 2:4, not {self.nm!r}")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M, or None."""
        found = re.fullmatch(r"(\d+):(\d+)", self.nm)
        pair = (int(found[1]), int(found[2])) if found else (0, 0)
        return pair if 0 < pair[0] < pair[1] else None

    @property
    def summary(self) -> str:
        """What becomes zero, in a few words."""
        what = self.nm or f"{100 * self.sparsity:g} % zero"
        how = "" if self.nm else f", {self.allocation}"
        return f"{what} by {self.criterion}{how}"

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph))
        nodes = (n for layer in found if not self._obstacle(layer) for n in layer.nodes)
        return [key for node in nodes if (key := moments_key(node)) is not None]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return self._apply(graph, context)

    def _apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = layers(graph, context.only.names(graph))
        results: list[Change | Skip] = list(_outside(graph))
        obstacles = [(layer, self._obstacle(layer)) for layer in found]
        for layer, reason in obstacles:
            results += [Skip(n.name, f"not sparse: {reason}") for n in layer.nodes if reason]
        rest = [layer for layer, reason in obstacles if not reason]
        for layer, share in zip(rest, self._shares(rest, context), strict=True):
            results += self._rewrite(graph, layer, share, context)
        return results

    def _obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is, or cannot have the N:M pattern; empty if it can."""
        if layer.obstacle or self.pattern is None:
            return layer.obstacle
        channels, m = layer.channels, self.pattern[1]
        return f"its {channels} input channels are no multiple of {m}" if channels % m else ""

    def _shares(self, found: Sequence[Layer], context: Context) -> list[float]:
        """The share of zeros of each layer."""
        sizes = [layer.size for layer in found]
        if self.pattern is not None:
            return [1 - self.pattern[0] / self.pattern[1]] * len(found)
        if self.allocation == "uniform":
            return [self.sparsity] * len(found)
        if sum(layer.zeros for layer in found) >= (self.sparsity - SLACK) * sum(sizes):
            return [layer.zeros / layer.size for layer in found]
        curves = [self._curve(layer, context) for layer in found]
        return sparse.allocate(curves, sizes, self.sparsity)

    def _curve(self, layer: Layer, context: Context) -> Array:
        E = _error(layer, context)
        return sparse.curve(layer.matrix, E, self._criterion(E))

    def _criterion(self, E: Quadratic) -> sparse.Criterion:
        """Without moments there is only the magnitude."""
        return self.criterion if E.blocks else "magnitude"

    def _keeps(self, layer: Layer, share: float) -> Pattern:
        """Which scores of a layer stay."""
        if self.pattern is not None:
            return sparse.n_of_m(*self.pattern, layer.offsets)
        keep = layer.size - math.ceil(share * layer.size - SLACK)
        return sparse.largest_in_rows(keep) if self.criterion == "wanda" else sparse.largest(keep)

    def _rewrite(
        self, graph: gs.Graph, layer: Layer, share: float, context: Context
    ) -> Iterator[Change | Skip]:
        W, keeps = layer.matrix, self._keeps(layer, share)
        if not (W[~keeps(np.abs(W))]).any():
            none = "none of its weights is to be zero"
            reason = none if share < SLACK else "it is that sparse already"
            yield from (Skip(node.name, f"not sparse: {reason}") for node in layer.nodes)
            return
        E = _error(layer, context)
        found = sparse.sparse(W, E, self._criterion(E), keeps)
        zeros, lost = np.mean(found == 0), E.error(W - found) / E.error(W)
        what = f"made sparse, {100 * zeros:.1f} % zero, {100 * lost:.2g} % of its output lost"
        if not E.blocks:
            what += " if inputs are alike: nothing is known of them, so by magnitude"
        yield from _store(graph, layer, found, context, what)


def layers(graph: gs.Graph, allowed: frozenset[str]) -> list[Layer]:
    """Weights that nodes of the main graph multiply by, in order, with what is in the way."""
    found: dict[int, Layer] = {}
    for node in graph.nodes:
        weight = weight_of(node)
        if weight is not None and knowledge(node).window is not None:
            found.setdefault(id(weight), Layer(weight)).nodes.append(node)
    read = captured(graph)
    for layer in found.values():
        layer.obstacle = _obstacle(graph, layer, allowed, read)
    return list(found.values())


def _obstacle(graph: gs.Graph, layer: Layer, allowed: frozenset[str], read: set[str]) -> str:
    weight, (first, *others) = layer.weight, layer.nodes
    for node in layer.nodes:
        if node.name not in allowed:
            return f"{node.name} is excluded" if others else "excluded"
        reason = why_no_moments(node)
        if reason:
            return reason
    stranger = next((n for n in weight.outputs if not any(n is m for m in layer.nodes)), None)
    if stranger is not None:
        return f"{stranger.name} reads its weight too"
    if weight.name in read or any(weight is tensor for tensor in graph.outputs):
        return "its weight is read outside of the graph"
    if any(_way(node) != _way(first) for node in others):
        return f"{others[0].name} reads its weight in another way"
    return "" if np.isfinite(values(weight)).all() else "its weight is not finite"


def _way(node: gs.Node) -> tuple[Any, ...]:
    """How a node reads its weight as a matrix."""
    row = knowledge(node)
    assert row.window is not None
    axis = None if row.out_axis is None else row.out_axis(node)
    return axis, row.window(node).groups, bool(row.window(node).kernel)


def _outside(graph: gs.Graph) -> Iterator[Skip]:
    """Heavy nodes without a weight here, and those in nested bodies."""
    for body in walk(graph):
        for node in (n for n in body.nodes if knowledge(n).window is not None):
            if body is not graph:
                yield Skip(node.name, "not sparse: it is inside a nested body")
            elif weight_of(node) is None:
                yield Skip(node.name, f"not sparse: {why_no_moments(node)}")


def _moments(layer: Layer, context: Context) -> list[Any]:
    """The statistics of the inputs of a layer's nodes; none where one is missing."""
    keys = (moments_key(node) for node in layer.nodes)
    found = [None if key is None else context.stats.get(key) for key in keys]
    return found if all(f is not None and f.is_finite and f.count for f in found) else []


def _error(layer: Layer, context: Context) -> Quadratic:
    """E of a layer, the mean over its nodes."""
    found = _moments(layer, context)
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


def _store(
    graph: gs.Graph, layer: Layer, found: Array, context: Context, what: str
) -> Iterator[Change]:
    """Put a new weight in place, and let biases take in what the mean outputs moved by."""
    old, array = layer.weight, layer.shaped(found)
    made = store(graph, fresh(graph, f"{old.name}_sparse"), array)
    moved = values(old).astype(np.float64) - array.astype(np.float64)
    moments = _moments(layer, context) if layer.has_biases else []
    for node in layer.nodes:
        position = knowledge(node).weight
        assert position is not None
        node.inputs[position] = made
    for node, stats in zip(layer.nodes, moments, strict=False):
        shift_bias(graph, node, mean_output(node, moved, stats.mean), "sparse")
    first, *others = layer.nodes
    yield Change(first.name, what, nbytes(old), nbytes(made))
    yield from (Change(node.name, f"shares its weight with {first.name}") for node in others)
