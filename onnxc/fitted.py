"""Give a layer a weight of some kind, such as of few values, fitted to what it ought to give.

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    Ŵ of that kind

W* is the weight that best makes of what the layer now gets what it ought to give (`onnxc.goals`), C
the metric around it, and the bias makes the mean right (`onnxc.numerics.aim`). Where a layer has no
goal, or none was measured, W* is W, C that of its input, and biases take in what that did to the
mean. Where nothing is known of the input C is I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import bias_of, has_place
from onnxc.core import Change, Context, Goal, Key, Skip
from onnxc.goals import goal_of, key_of, why_no_goal
from onnxc.graph import nbytes, values
from onnxc.integer import refusal
from onnxc.matrices import Layer, error, place, shift_biases
from onnxc.numerics.aim import Aim
from onnxc.numerics.lattice import lattice_scales
from onnxc.numerics.sparse import Quadratic
from onnxc.ops import has_bias, knowledge
from onnxc.refits import set_bias
from onnxc.targets import Target

Array = NDArray[Any]


@dataclass(frozen=True)
class Made:
    """A weight of some kind. weight: Ŵ, (groups, outputs, d). what: it is, in a few words.

    parts: V and g, (groups, outputs, 1), of Ŵ = g V, where V is to be stored and g to stand apart.
    write: puts nodes in the place of the weight that make it, and tells bytes stored.
    """

    weight: Array
    what: str
    parts: tuple[Array, Array] | None = None
    write: Callable[[], int] | None = None


Solve = Callable[[Array, Quadratic], Made | str]  # of W and E; or why there is no such weight


def layer_goal(layer: Layer, graph: gs.Graph, context: Context) -> Goal | None:
    """What a layer ought to give, where that is known."""
    first, *others = layer.nodes
    if others or not layer.is_linear or why_no_goal(first, context):
        return None
    return goal_of(first, graph, context)


def unfit(layer: Layer, target: Target) -> str:
    """Why kernels of a target would not compute in integers of a layer; empty if they do."""
    reasons = (refusal(node, target) for node in layer.nodes)
    reason = next(filter(None, reasons), "")
    if not reason and layer.is_overlapping:
        return f"several rows of its weight make an output of {layer.nodes[0].op}"
    return reason


def is_on_lattice(layer: Layer, bits: int) -> bool:
    """Whether a weight is integers of so many bits already, times a scale for each output."""
    return lattice_scales(values(layer.weight), along(layer), 2 ** (bits - 1)) is not None


def along(layer: Layer) -> int | None:
    """The axis of a weight along which its outputs lie, where there is one."""
    axis = knowledge(layer.nodes[0]).out_axis
    return None if axis is None else axis(layer.nodes[0])


@dataclass(frozen=True)
class FitLayer:
    """A step of a sequential pass: one layer gets the weight that a solver makes.

    goal: what the layer ought to give; None for what it gives. obstacle: why it stays as it is, or
    empty. done: what was not done then, in a word. suffixes: of names of weights, and of biases
    that are fitted to a goal. adds_bias: whether layers without a bias get one for their goal.
    """

    layer: Layer
    goal: Goal | None
    obstacle: str
    solve: Solve
    done: str
    suffixes: tuple[str, str]
    adds_bias: bool = False
    name: ClassVar[str] = "fit-layer"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        if self.obstacle:
            return ()
        return self.layer.keys if self.goal is None else (key_of(self.layer.nodes[0], self.goal),)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        if self.obstacle:
            return self._skips(self.obstacle)
        found = self.goal and context.stats.get(key_of(self.layer.nodes[0], self.goal))
        return self._aimed(graph, found) if found else self._alone(graph, context)

    def _aimed(self, graph: gs.Graph, found: Any) -> list[Change | Skip]:
        """To the goal. found: the sums of what the layer gets and what it ought to give."""
        node, W = self.layer.nodes[0], self.layer.matrix
        is_biased = has_place(node) if self.adds_bias else has_bias(node)
        aim = Aim.of(found.folds, W, bias_of(node).reshape(W.shape[:2]), is_biased)
        made = self.solve(aim.W, aim.E)
        if isinstance(made, str):
            return self._skips(made)
        if is_biased:
            bias = aim.bias(made.weight).reshape(-1).astype(self.layer.weight.dtype)
            set_bias(graph, node, bias, self.suffixes[1])
        return [*self._place(graph, made, aim.error(made.weight))]

    def _alone(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        """To itself."""
        W, E = self.layer.matrix, error(self.layer, context)
        made = self.solve(W, E)
        if isinstance(made, str):
            return self._skips(made)
        reason = self.layer.unmeasured or "nothing is known of them"
        told = "" if E.blocks else f" if inputs are alike: {reason}"
        lost = E.error(W - made.weight) / max(E.error(W), 1e-300)
        shift_biases(graph, self.layer, W - made.weight, context, self.suffixes[0])
        return [*self._place(graph, made, lost, told)]

    def _place(self, graph: gs.Graph, made: Made, lost: float, told: str = "") -> Iterator[Change]:
        layer, (first, *others) = self.layer, self.layer.nodes
        what = f"{made.what}, {100 * lost:.2g} % of its output lost{told}"
        if made.write is None:
            V, g = made.parts or (made.weight, None)
            gain = None if g is None else layer.gain(g)
            yield from place(graph, layer, V, self.suffixes[0], what, gain)
            return
        yield Change(first.name, what, nbytes(layer.weight), made.write())
        yield from (Change(node.name, f"shares its weight with {first.name}") for node in others)

    def _skips(self, reason: str) -> list[Change | Skip]:
        return [Skip(node.name, f"not {self.done}: {reason}") for node in self.layer.nodes]
