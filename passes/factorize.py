"""Replace a heavy node by two or more thinner ones of low rank, chosen on its input.

    y = W x + b    ->    y = B (A x) + b̂,      Ŵ = B A

with Ŵ of one of the structures of `onnxc.numerics.lowrank_structures`. With data, layers are taken
one after the other: factors approach what the layer gives in the original, on what it gets from the
layers before it as they are by now (`onnxc.lowrank.fitter`). With statistics alone they approach W
x on the original's own x. What stands behind the node, an activation among it, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.biases import shift_bias
from onnxc.core import Change, Context, Key, Pass, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import nbytes
from onnxc.lowrank import factors
from onnxc.lowrank.fitter import Fitter, goal_key
from onnxc.lowrank.layers import Layer, find_layers
from onnxc.moments import moments_key
from onnxc.numerics import lowrank
from onnxc.numerics.lowrank import Factors
from onnxc.numerics.lowrank_ranks import Rule
from onnxc.numerics.lowrank_structures import STRUCTURES
from onnxc.ops import weight_of

Array = NDArray[Any]
Ints = tuple[int, ...]
Method = Literal["auto", "svd", "channel", "spatial", "tucker", "cp", "depthwise", "grouped", "tt"]


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

    method: the structure; auto takes the one of the least error at the outputs of each layer, or
    the one of the fewest MACs under a rule that bounds that error.
    macs: share of each layer's multiply-accumulates that its factors may take; 0: none has factors
    but for those in `ranks`.
    rank: a rule in place of a share: energy:SHARE, sqnr:DB or vbmf.
    ranks: of some layers in place of both, as NODE=METHOD:RANK or NODE=METHOD:RANKxRANK.
    whole: layers that stay, as NODE=REASON.
    """

    name: ClassVar[str] = "factorize"
    lossless: ClassVar[bool] = False

    method: Method = "auto"
    macs: float = 0.75
    rank: str = ""
    ranks: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.macs < 1:
            raise OptionError(f"macs is a share from 0 to 1, not {self.macs:g}")
        self.choices, self.rule  # noqa: B018 - raise where an entry cannot be read

    @property
    def choices(self) -> dict[str, Choice]:
        """Structures by node. Raises OptionError for an entry that cannot be read."""
        pairs = [entry.rpartition("=") for entry in self.ranks]
        return {name: Choice.read(text) for name, _, text in pairs}

    @property
    def rule(self) -> Rule | None:
        """Raises OptionError for one that cannot be read."""
        try:
            return Rule.read(self.rank) if self.rank else None
        except ValueError as error:
            raise OptionError(f"{error}, not {self.rank!r}") from error

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for layer in self._free(find_layers(graph, context)):
            if self.may_take(layer):
                keys = (moments_key(node) for node in layer.nodes)
                yield from (key for key in keys if key is not None)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        with threadpool_limits(1, user_api="blas"):  # matrices are small: threads only wait
            return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a layer, in the order of first nodes."""
        found = find_layers(graph, context)
        self._free(found)
        yield from (FactorizeLayer(self, layer) for layer in found)

    def _free(self, found: Sequence[Layer]) -> list[Layer]:
        """The layers that may be factorized. Raises OptionError where one of `ranks` may not."""
        free = [layer for layer in found if not layer.obstacle]
        odd = next((name for name in self.choices if name not in {x.name for x in free}), None)
        if odd is not None:
            why = next((x.obstacle for x in found if x.name == odd), "there is no such layer")
            raise OptionError(f"{odd!r} cannot be factorized: {why}")
        return free

    def may_take(self, layer: Layer) -> bool:
        """Whether there may be factors for a layer."""
        return bool(self.macs or self.rank or layer.name in self.choices)

    def tried(self, layer: Layer, context: Context, fitter: Fitter) -> list[Choice]:
        """The structures to compare for a layer, with their ranks."""
        if layer.name in self.choices:
            return [self._given(layer)]
        fixed = (layer.strides, context.target.channels)
        if self.rule is None:
            found = {
                n: lowrank.pick(n, layer.shape, self.macs, *fixed) for n in self.methods(layer)
            }
        else:
            some = (n for n in self.methods(layer) if not self.rule.why_not(n))
            found = {n: self.rule.ranks(n, fitter.W, fitter.H, *fixed) for n in some}
        return [Choice(name, ranks) for name, ranks in found.items() if ranks]

    def methods(self, layer: Layer) -> list[str]:
        """The structures that are for a layer, of one or of all that are found in little time."""
        wanted: Sequence[str] = [self.method]
        if self.method == "auto":
            wanted = [name for name in STRUCTURES if lowrank.is_quick(name, layer.shape)]
        return [name for name in wanted if not layer.why_not(name)]

    def _given(self, layer: Layer) -> Choice:
        choice = self.choices[layer.name]
        why = layer.why_not(choice.method)
        if why or not lowrank.has_ranks(choice.method, layer.shape, choice.ranks):
            why = why or "its shape has no such ranks"
            raise OptionError(f"{layer.name!r} cannot have {choice}: {why}")
        return choice

    def best(self, layer: Layer, made: dict[Choice, Factors]) -> Choice:
        """The one of the least error; of the fewest MACs under a rule that bounds the error."""
        if self.rule is None or not self.rule.bounds_error:
            return min(made, key=lambda choice: made[choice].error)
        fixed = (layer.shape, layer.strides)
        return min(made, key=lambda c: lowrank.macs(c.method, fixed[0], c.ranks, fixed[1]))

    def why_none(self, layer: Layer) -> str:
        """Why a layer has no factors."""
        if not self.may_take(layer):
            reasons = dict(entry.split("=", 1) for entry in self.whole)
            return reasons.get(layer.name, "stays whole: no ranks are given for it")
        names = STRUCTURES if self.method == "auto" else (self.method,)
        rule = self.rule
        found = {layer.why_not(n) or (rule.why_not(n) if rule else "") for n in names}
        if len(found) == 1 and (why := found.pop()):
            return why
        if rule is not None:
            return f"no rank that {self.rank} allows takes fewer MACs"
        return f"no rank takes {self.macs:.0%} of its MACs or less"


@dataclass(frozen=True)
class FactorizeLayer:
    """Factorize one layer, as a whole pass wants it."""

    whole: Factorize
    layer: Layer
    name: ClassVar[str] = "factorize-layer"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        if not self.layer.obstacle and self.whole.may_take(self.layer):
            yield goal_key(self.layer.nodes[0])

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        layer, whole = self.layer, self.whole
        if layer.obstacle:
            return [Skip(node.name, layer.obstacle) for node in layer.nodes]
        fitter = Fitter.of(layer, context) if whole.may_take(layer) else None
        tried = whole.tried(layer, context, fitter) if fitter else []
        if fitter is None or not tried:
            return [Skip(node.name, whole.why_none(layer)) for node in layer.nodes]
        made = {choice: fitter.fit(choice.method, choice.ranks) for choice in tried}
        best = whole.best(layer, made)
        return list(put(graph, layer, best, made[best], fitter))


def put_sketch(graph: gs.Graph, layer: Layer, choice: Choice) -> list[gs.Node]:
    """Put layers of the right shapes in place of one, to be timed; those in front of its nodes."""
    stages = lowrank.sketch(choice.method, layer.shape, choice.ranks)
    constants = factors.weights(graph, layer.nodes[0], stages)
    return [made for node in layer.nodes for made in factors.put(graph, node, stages, constants)]


def put(
    graph: gs.Graph, layer: Layer, choice: Choice, made: Factors, fitter: Fitter
) -> Iterator[Change]:
    """Put factors in place of a layer of a graph, with biases for what they lose on average."""
    first = layer.nodes[0]
    old = weight_of(first)
    assert old is not None
    what = _told(layer, choice, made) + ("" if fitter.H is not None else ", without data")
    constants = factors.weights(graph, first, made.stages)
    sizes = nbytes(old), sum(map(nbytes, constants))
    for number, node in enumerate(layer.nodes):
        shift = fitter.shift(node, made)
        if shift is not None:
            shift_bias(graph, node, shift, "factor")
        factors.put(graph, node, made.stages, constants)
        yield Change(node.name, what, *(sizes if not number else (0, 0)))


def _told(layer: Layer, choice: Choice, made: Factors) -> str:
    cost = lowrank.macs(choice.method, layer.shape, choice.ranks, layer.strides)
    rank = " and ".join(map(str, choice.ranks))
    return f"{choice.method} of rank {rank}, {cost:.0%} of its MACs, error {made.error:.2%}"
