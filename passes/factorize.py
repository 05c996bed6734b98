"""Replace a heavy node by two or more thinner ones of low rank, chosen on its input.

    y = W x + b    ->    y = B (A x) + b̂,      b̂ = b + (W − Ŵ) mu,   Ŵ = B A

with Ŵ of one of the structures of `onnxc.numerics.lowrank`, so that E‖(W − Ŵ)(x − mu)‖² is small,
H and mu being the moments of the rows x. A node without a place for a bias has H about zero. What
stands behind the node, an activation among it, stays as it is. Where n rows are few, H is shrunk:

    H <- (1 − s) H + s tr(H)/d I,      s = d / (d + 4 n)

Zhang 2016 ("Accelerating very deep convolutional networks") fits the factors to the original's
outputs on the inputs of the compressed network; that is what `reconstruct` does to the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc import factors
from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import nbytes
from onnxc.moments import moments_key, why_no_moments
from onnxc.numerics import lowrank
from onnxc.numerics.covariance import centred, shrunk
from onnxc.numerics.lowrank import Factors
from onnxc.numerics.lowrank_structures import STRUCTURES
from onnxc.ops import knowledge, weight_of

Array = NDArray[Any]
Ints = tuple[int, ...]
Method = Literal["auto", "svd", "channel", "spatial", "tucker", "cp", "depthwise", "grouped", "tt"]

WIDEST = 4608  # inputs of a layer: H takes a few copies of 8 bytes times its square


@dataclass(frozen=True)
class Layer:
    """Nodes that multiply by one weight, under the name of the first. obstacle: why it stays."""

    nodes: tuple[gs.Node, ...]
    obstacle: str = ""

    @property
    def name(self) -> str:
        return str(self.nodes[0].name)

    @property
    def shape(self) -> Ints:
        """(groups, o, c, *kernel)."""
        return factors.shape(self.nodes[0])

    @property
    def size(self) -> int:
        """Numbers in its weight."""
        weight = weight_of(self.nodes[0])
        return 0 if weight is None else int(np.prod(weight.shape))

    @property
    def strides(self) -> Ints:
        return factors.strides(self.nodes[0])

    def methods(self, method: str) -> list[str]:
        """The structures that are for it, of one or of all that are found in little time."""
        wanted = [method]
        if method == "auto":
            wanted = [name for name in STRUCTURES if lowrank.is_quick(name, self.shape)]
        return [name for name in wanted if not self.why_not(name)]

    def why_not(self, method: str) -> str:
        """Why a structure is not for it; empty where it is."""
        reason = lowrank.why_not(method, self.shape)
        if reason or not STRUCTURES[method].splits:
            return reason
        return next(filter(None, map(factors.why_whole, self.nodes)), "")


@dataclass(frozen=True)
class Choice:
    """A structure with its ranks: METHOD:RANK[xRANK]."""

    method: str
    ranks: Ints

    def __str__(self) -> str:
        return f"{self.method}:{'x'.join(map(str, self.ranks))}"

    @classmethod
    def read(cls, text: str) -> Choice:
        """Raises OptionError for text that is not one."""
        method, _, numbers = text.partition(":")
        parts = numbers.split("x")
        if method not in STRUCTURES or not all(part.isdecimal() for part in parts):
            raise OptionError(
                f"ranks are METHOD:RANK[xRANK], such as NODE=tucker:16x24, not {text!r}"
            )
        return cls(method, tuple(map(int, parts)))


@register
@dataclass(frozen=True)
class Factorize:
    """Replace heavy nodes by several thin ones of low rank.

    method: the structure; auto takes the one of the least error at the outputs of each layer.
    macs: share of each layer's multiply-accumulates that its factors may take; 0: none has factors
    but for those in `ranks`.
    ranks: of some layers in place of a share, as NODE=METHOD:RANK or NODE=METHOD:RANKxRANK.
    """

    name: ClassVar[str] = "factorize"
    lossless: ClassVar[bool] = False

    method: Method = "auto"
    macs: float = 0.75
    ranks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.macs < 1:
            raise OptionError(f"macs is a share from 0 to 1, not {self.macs:g}")
        self.choices  # noqa: B018 - raises where an entry cannot be read

    @property
    def choices(self) -> dict[str, Choice]:
        """Structures by node. Raises OptionError for an entry that cannot be read."""
        pairs = [entry.rpartition("=") for entry in self.ranks]
        return {name: Choice.read(text) for name, _, text in pairs}

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for layer in self._free(layers(graph, context)):
            if self.macs or layer.name in self.choices:
                yield from keys(layer)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = layers(graph, context)
        results: list[Change | Skip] = [
            Skip(node.name, layer.obstacle)
            for layer in found
            if layer.obstacle
            for node in layer.nodes
        ]
        with threadpool_limits(1, user_api="blas"):  # matrices are small: threads only wait
            for layer in self._free(found):
                results += self._rewrite(graph, layer, context)
        return results

    def _free(self, found: Sequence[Layer]) -> list[Layer]:
        """The layers that may be factorized. Raises OptionError where one of `ranks` may not."""
        free = [layer for layer in found if not layer.obstacle]
        odd = next((name for name in self.choices if name not in {x.name for x in free}), None)
        if odd is not None:
            why = next((x.obstacle for x in found if x.name == odd), "there is no such layer")
            raise OptionError(f"{odd!r} cannot be factorized: {why}")
        return free

    def _rewrite(self, graph: gs.Graph, layer: Layer, context: Context) -> Iterator[Change | Skip]:
        tried = self._tried(layer, context)
        if not tried:
            yield from (Skip(node.name, self._why_none(layer)) for node in layer.nodes)
            return
        fitter = Fitter.of(layer, context)
        made = {choice: fitter.fit(choice) for choice in tried}
        best = min(made, key=lambda choice: made[choice].error)
        yield from put(graph, layer, best, made[best], fitter)

    def _tried(self, layer: Layer, context: Context) -> list[Choice]:
        if layer.name in self.choices:
            choice = self.choices[layer.name]
            why = layer.why_not(choice.method)
            if why or not lowrank.has_ranks(choice.method, layer.shape, choice.ranks):
                why = why or "its shape has no such ranks"
                raise OptionError(f"{layer.name!r} cannot have {choice}: {why}")
            return [choice]
        if not self.macs:
            return []
        fixed = (layer.shape, self.macs, layer.strides, context.target.channels)
        picked = ((name, lowrank.pick(name, *fixed)) for name in layer.methods(self.method))
        return [Choice(name, ranks) for name, ranks in picked if ranks]

    def _why_none(self, layer: Layer) -> str:
        if not self.macs:
            return "stays whole: no ranks are given for it"
        names = STRUCTURES if self.method == "auto" else (self.method,)
        reasons = {layer.why_not(name) for name in names}
        if len(reasons) == 1 and (why := reasons.pop()):
            return why
        return f"no rank takes {self.macs:.0%} of its MACs or less"


@dataclass(frozen=True)
class Fitter:
    """What factors of a layer are fitted to: W (groups, o, c, *kernel) and the moments of its rows.

    H: (groups, d, d), None without data. means: mu of each node's input, by the node's name.
    """

    W: Array
    H: Array | None
    means: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Layer, context: Context) -> Fitter:
        """Several nodes count alike; H is about the mean where there is a bias to take it up."""
        W = factors.tensor(layer.nodes[0])
        pairs = ((node.name, moments_key(node)) for node in layer.nodes)
        found = {n: context.stats[k] for n, k in pairs if k is not None and k in context.stats}
        if len(found) < len(layer.nodes):
            return cls(W, None)
        means = {n.name: found[n.name].mean for n in layer.nodes if takes_mean(n)}
        each = [shrunk(centred(s.second, means.get(n)), s.count) for n, s in found.items()]
        return cls(W, np.mean(each, axis=0), means)

    def fit(self, choice: Choice) -> Factors:
        return lowrank.factorize(choice.method, self.W, self.H, choice.ranks)

    def error(self, made: Factors) -> float:
        """E‖(W − Ŵ) x‖² / E‖W x‖² with these moments."""
        return lowrank.relative_error(self.W, made.made, self.H)


def takes_mean(node: gs.Node) -> bool:
    """Whether a bias can take up what the mean of the output moves by."""
    return has_place(node) and all(node.attrs.get(k, 1.0) == 1.0 for k in ("alpha", "beta"))


def layers(graph: gs.Graph, context: Context) -> list[Layer]:
    """The heavy nodes that may be touched, those of one weight together, in order."""
    allowed = context.only.names(graph)
    found: dict[Any, list[gs.Node]] = {}
    alone: list[Layer] = []
    for node in graph.nodes:
        if node.name not in allowed or knowledge(node).window is None:
            continue
        if not factors.is_chainable(node):
            alone.append(Layer((node,), _why_not(node)))
            continue
        place = (id(weight_of(node)), factors.layout(node))
        found.setdefault(place, []).append(node)
    return [*alone, *(Layer(tuple(x), _obstacle(x)) for x in found.values())]


def keys(layer: Layer) -> Iterator[Key]:
    """Of the moments of a layer's inputs."""
    found = (moments_key(node) for node in layer.nodes)
    return (key for key in found if key is not None)


def _why_not(node: gs.Node) -> str:
    if weight_of(node) is None:
        return "its weight is not a constant of floats"
    return f"there is no chain of layers in place of {node.op}"


def _obstacle(nodes: Sequence[gs.Node]) -> str:
    weight = weight_of(nodes[0])
    assert weight is not None
    for node in nodes:
        reason = why_no_moments(node) or _is_factor(node)
        if reason:
            return reason
    other = next((u for u in weight.outputs if all(u is not n for n in nodes)), None)
    if other is not None:
        return f"its weight is shared with {other.name}"
    _, o, *rest = factors.shape(nodes[0])
    if min(o, int(np.prod(rest))) < 2:
        return "it makes one output of each group, which has no smaller rank"
    return "" if np.prod(rest) <= WIDEST else f"with {np.prod(rest)} inputs it is too wide"


def _is_factor(node: gs.Node) -> str:
    """Why a node is one of several that make up one linear layer; empty if it is not."""
    maker, reader = factors.before(node), factors.behind(node)
    if maker is not None and _is_bare(maker):
        return f"it is a factor already, behind {maker.name}"
    if reader is not None and _is_bare(node) and weight_of(reader) is not None:
        return f"it is a factor already, in front of {reader.name}"
    return ""


def _is_bare(node: gs.Node) -> bool:
    """A heavy linear node without a bias."""
    row = knowledge(node)
    position = row.bias if row.bias is not None else len(node.inputs)
    has_bias = position < len(node.inputs) and bool(node.inputs[position].name)
    return row.role == "weighted" and weight_of(node) is not None and not has_bias


def put_sketch(graph: gs.Graph, layer: Layer, choice: Choice) -> list[gs.Node]:
    """Put layers of the right shapes in place of one, to be timed; those in front of its nodes."""
    stages = lowrank.sketch(choice.method, layer.shape, choice.ranks)
    constants = factors.weights(graph, layer.nodes[0], stages)
    return [made for node in layer.nodes for made in factors.put(graph, node, stages, constants)]


def put(
    graph: gs.Graph, layer: Layer, choice: Choice, made: Factors, fitter: Fitter
) -> Iterator[Change]:
    """Put factors in place of a layer of a graph, with biases for what they lose on average."""
    first, W = layer.nodes[0], fitter.W
    old = weight_of(first)
    assert old is not None
    what = _told(layer, choice, made) + ("" if fitter.H is not None else ", without data")
    constants = factors.weights(graph, first, made.stages)
    sizes = nbytes(old), sum(map(nbytes, constants))
    lost = (W - made.made).reshape(*W.shape[:2], -1)
    for number, node in enumerate(layer.nodes):
        if node.name in fitter.means:
            shift = np.einsum("god,gd->go", lost, fitter.means[node.name]).reshape(-1)
            shift_bias(graph, node, shift, "factor")
        factors.put(graph, node, made.stages, constants)
        yield Change(node.name, what, *(sizes if not number else (0, 0)))


def _told(layer: Layer, choice: Choice, made: Factors) -> str:
    cost = lowrank.macs(choice.method, layer.shape, choice.ranks, layer.strides)
    rank = " and ".join(map(str, choice.ranks))
    return f"{choice.method} of rank {rank}, {cost:.0%} of its MACs, error {made.error:.2%}"
