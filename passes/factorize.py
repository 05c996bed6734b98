"""Replace a heavy node by two or more thinner ones of low rank, chosen on its input.

    y = W x + b    ->    y = B (A x) + b̂,      b̂ = b + (W − Ŵ) mu,   Ŵ = B A

with Ŵ of one of the structures of `onnxc.numerics.lowrank`, so that E‖(W − Ŵ)(x − mu)‖² is small,
H and mu being the moments of the rows x. A node without a place for a bias has H about zero. What
stands behind the node, an activation among it, stays as it is.

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

from onnxc import factors
from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import nbytes
from onnxc.moments import moments_key, why_no_moments
from onnxc.numerics import lowrank
from onnxc.numerics.lowrank import STRUCTURES, Factors
from onnxc.ops import knowledge, weight_of

Array = NDArray[Any]
Ints = tuple[int, ...]
Method = Literal["auto", "svd", "channel", "spatial", "tucker", "cp", "depthwise", "grouped"]

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
    def strides(self) -> Ints:
        return factors.strides(self.nodes[0])

    def methods(self, method: str) -> list[str]:
        """The structures that are for it, of one or of all."""
        wanted = STRUCTURES if method == "auto" else (method,)
        return [name for name in wanted if not lowrank.why_not(name, self.shape)]


@dataclass(frozen=True)
class Choice:
    """A structure with its ranks: METHOD:RANK[,RANK]."""

    method: str
    ranks: Ints

    def __str__(self) -> str:
        return f"{self.method}:{','.join(map(str, self.ranks))}"

    @classmethod
    def read(cls, text: str) -> Choice:
        """Raises OptionError for text that is not one."""
        method, _, numbers = text.partition(":")
        parts = numbers.split(",")
        if method not in STRUCTURES or not all(part.isdecimal() for part in parts):
            raise OptionError(f"ranks are METHOD:RANK[,RANK], such as channel:16, not {text!r}")
        return cls(method, tuple(map(int, parts)))


@register
@dataclass(frozen=True)
class Factorize:
    """Replace heavy nodes by several thin ones of low rank.

    method: the structure; auto takes the one of the least error at the outputs of each layer.
    macs: share of each layer's multiply-accumulates that its factors may take.
    ranks: of which node in place of a share, as NODE=METHOD:RANK[,RANK]; separated by semicolons.
    """

    name: ClassVar[str] = "factorize"
    lossless: ClassVar[bool] = False

    method: Method = "auto"
    macs: float = 0.75
    ranks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.macs < 1:
            raise OptionError(f"macs is a share between 0 and 1, not {self.macs:g}")
        self.choices  # noqa: B018 - raises where an entry cannot be read

    @property
    def choices(self) -> dict[str, Choice]:
        """Structures by node. Raises OptionError for an entry that cannot be read."""
        pairs = [entry.rpartition("=") for entry in self.ranks]
        return {name: Choice.read(text) for name, _, text in pairs}

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for layer in self._chosen(layers(graph, context)):
            yield from keys(layer)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = layers(graph, context)
        results: list[Change | Skip] = [
            Skip(node.name, layer.obstacle)
            for layer in found
            if layer.obstacle
            for node in layer.nodes
        ]
        for layer in self._chosen(found):
            results += self._rewrite(graph, layer, context)
        return results

    def _chosen(self, found: Sequence[Layer]) -> list[Layer]:
        """The layers to factorize. Raises OptionError for a name of `ranks` that is none."""
        free = [layer for layer in found if not layer.obstacle]
        odd = next((name for name in self.choices if name not in {x.name for x in free}), None)
        if odd is not None:
            why = next((x.obstacle for x in found if x.name == odd), "there is no such layer")
            raise OptionError(f"{odd!r} cannot be factorized: {why}")
        return [x for x in free if x.name in self.choices] if self.ranks else free

    def _rewrite(self, graph: gs.Graph, layer: Layer, context: Context) -> Iterator[Change | Skip]:
        tried = self._tried(layer, context)
        if not tried:
            yield from (Skip(node.name, self._why_none(layer)) for node in layer.nodes)
            return
        moments = Moments.of(layer, context)
        W = factors.tensor(layer.nodes[0])
        made = {c: lowrank.factorize(c.method, W, moments.H, c.ranks) for c in tried}
        best = min(made, key=lambda choice: made[choice].error)
        yield from _put(graph, layer, best, made[best], W, moments)

    def _tried(self, layer: Layer, context: Context) -> list[Choice]:
        if layer.name in self.choices:
            choice = self.choices[layer.name]
            if choice.ranks not in lowrank.ranks(choice.method, layer.shape):
                why = lowrank.why_not(choice.method, layer.shape) or "there is no such rank"
                raise OptionError(f"{layer.name!r} cannot have {choice}: {why}")
            return [choice]
        fixed = (layer.shape, self.macs, layer.strides, context.target.channels)
        picked = ((name, lowrank.pick(name, *fixed)) for name in layer.methods(self.method))
        return [Choice(name, ranks) for name, ranks in picked if ranks]

    def _why_none(self, layer: Layer) -> str:
        names = STRUCTURES if self.method == "auto" else (self.method,)
        reasons = {lowrank.why_not(name, layer.shape) for name in names}
        if len(reasons) == 1 and (why := reasons.pop()):
            return why
        return f"no rank takes {self.macs:.0%} of its MACs or less"


@dataclass(frozen=True)
class Moments:
    """H of the rows of a layer's input, None without data, and mu of each node's by its name."""

    H: Array | None
    means: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Layer, context: Context) -> Moments:
        """Means of several nodes have the same weight each; about the mean where there is a bias."""
        found = {node.name: context.stats.get(moments_key(node)) for node in layer.nodes}
        if None in found.values():
            return cls(None)
        means = {n.name: found[n.name].mean for n in layer.nodes if takes_mean(n)}
        each = [_centred(s.second, means.get(name)) for name, s in found.items()]
        return cls(np.mean(each, axis=0), means)


def _centred(H: Array, mean: Array | None) -> Array:
    return H if mean is None else H - mean[:, :, None] * mean[:, None, :]


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
    x, y = node.inputs[0], node.outputs[0]
    if len(x.inputs) == 1 and len(x.outputs) == 1 and _is_bare(x.inputs[0]):
        return f"it is a factor already, behind {x.inputs[0].name}"
    if _is_bare(node) and len(y.outputs) == 1 and weight_of(y.outputs[0]) is not None:
        return f"it is a factor already, in front of {y.outputs[0].name}"
    return ""


def _is_bare(node: gs.Node) -> bool:
    """A heavy linear node without a bias."""
    row = knowledge(node)
    position = row.bias if row.bias is not None else len(node.inputs)
    has_bias = position < len(node.inputs) and bool(node.inputs[position].name)
    return row.role == "weighted" and weight_of(node) is not None and not has_bias


def _put(
    graph: gs.Graph, layer: Layer, choice: Choice, made: Factors, W: Array, moments: Moments
) -> Iterator[Change]:
    first = layer.nodes[0]
    old = weight_of(first)
    assert old is not None
    cost = lowrank.macs(choice.method, layer.shape, choice.ranks, layer.strides)
    data = "" if moments.H is not None else ", without data"
    rank = " and ".join(map(str, choice.ranks))
    what = f"{choice.method} of rank {rank}, {cost:.0%} of its MACs, error {made.error:.2%}{data}"
    constants = factors.weights(graph, first, made.stages)
    sizes = nbytes(old), sum(map(nbytes, constants))
    for number, node in enumerate(layer.nodes):
        if node.name in moments.means:
            lost = (W - made.made).reshape(*W.shape[:2], -1)
            shift = np.einsum("god,gd->go", lost, moments.means[node.name]).reshape(-1)
            shift_bias(graph, node, shift, "factor")
        factors.put(graph, node, made.stages, constants)
        yield Change(node.name, what, *(sizes if not number else (0, 0)))
