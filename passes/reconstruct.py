"""Refit heavy nodes to the outputs of the original model, one after the other.

For each Conv, Gemm or MatMul whose weight or input is not what it was, with x̂ its input in the
rewritten graph with all nodes before it already refit,

    Ŵ, b̂ = argmin E‖t − Ŵ x̂ − b̂‖² + ridge,     zeros of W stay zero (`onnxc.numerics.refit`),

and a weight of few distinct values keeps as few (`onnxc.numerics.recluster`).

The goal t is the node's output in the original, or what the sum that it goes into leaves for it
(`onnxc.goals`). No label and no gradient is used.

With `nonlinear`, what counts is the error behind the activation, where a ReLU follows the node or
its sum: see `onnxc.numerics.nonlinear` (Zhang 2016, §3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Goal, Key, Pass, Skip, register
from onnxc.goals import goal_of, has_bias, maker_like, parts_of, why_no_goal
from onnxc.graph import captured, constant, fresh, nbytes, store
from onnxc.moments import from_matrix, moments_key
from onnxc.moved import moved
from onnxc.numerics.nonlinear import Bent, bend
from onnxc.numerics.recluster import codebook_of, refit_shared
from onnxc.numerics.refit import Fit, Sums, refit
from onnxc.ops import bounds, is_absorbed, knowledge, weight_of

Array = NDArray[Any]

WORTH = 0.01  # of the error: what a bias that is not there yet has to save


@register
@dataclass(frozen=True)
class Reconstruct:
    """Refit the weights that are not zero, layer after layer, to the original's outputs.

    blocks: where an output only goes into a sum, let the sum come out as in the original.
    nonlinear: where a ReLU follows, let what comes out of it be as in the original, which takes
    several times as long.
    """

    name: ClassVar[str] = "reconstruct"
    lossless: ClassVar[bool] = False

    blocks: bool = True
    nonlinear: bool = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for step in self.steps(graph, context):
            yield from step.wants(graph, context)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a heavy node, in the order of the graph."""
        kept = context.only.excluded(graph)  # the others follow what was done to any node
        changed = set[str]() if context.original is None else moved(graph, context.original)
        for node in list(graph.nodes):
            if knowledge(node).role == "weighted":
                reason = "excluded" if node.name in kept else why_no_goal(node, context)
                goal = None if reason else goal_of(node, graph, context, self.blocks)
                if goal is not None and changed.isdisjoint((node.outputs[0].name, goal.minus)):
                    reason = "not refit: it computes what it did in the original"
                high = _high(node, goal, graph) if goal is not None and self.nonlinear else None
                yield RefitNode(node.name, goal, reason, high)


@dataclass(frozen=True)
class RefitNode:
    """Refit one node. goal: what it ought to give. obstacle: why it cannot be refit, or empty.

    high: the largest output of the ReLU that follows, None where none does or it is not looked at.
    """

    node: str
    goal: Goal | None
    obstacle: str = ""
    high: float | None = None
    name: ClassVar[str] = "refit-node"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        whats = ("goal",) if self.high is None else ("goal", "rows")
        return [] if self.obstacle else [self._key(graph, what) for what in whats]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        if self.obstacle:
            return [Skip(self.node, self.obstacle)]
        found, rows = (context.stats.get(self._key(graph, what)) for what in ("goal", "rows"))
        if found is None:
            return [Skip(self.node, "not refit: its outputs were not compared with the original's")]
        return [self._refit(graph, self._find(graph), found, rows, context)]

    def _refit(
        self, graph: gs.Graph, node: gs.Node, found: Any, rows: Any, context: Context
    ) -> Change | Skip:
        W, b = parts_of(node)
        book = codebook_of(W)
        if book is None:
            best = _fit(node, found.folds, W, b)
        else:
            whole = parts_of(maker_like(node, context))
            best = refit_shared(found.folds, *whole, book, b, has_bias(node))
        scale = float(sum(s.variance().sum() for s in found.folds))
        if not best.after < best.before or scale <= 0:
            return Skip(node.name, "not refit: nothing lowers the error of its outputs")
        what = f"refit, error of its outputs {best.before / scale:.2%} to {best.after / scale:.2%}"
        if rows is None or self.high is None or book is not None:
            return _write(graph, node, best.W, best.b, what)
        is_biased = has_bias(node) or bool(best.b.any())
        bent = bend(found.folds, rows.folds, W, b, best, is_biased, self.high)
        return _write(graph, node, bent.W, bent.b, what + _told(bent))

    def _find(self, graph: gs.Graph) -> gs.Node:
        return next(node for node in graph.nodes if node.name == self.node)

    def _key(self, graph: gs.Graph, what: str) -> Key:
        key = moments_key(self._find(graph), what)
        assert key is not None
        return replace(key, goal=self.goal)


def _high(node: gs.Node, goal: Goal, graph: gs.Graph) -> float | None:
    """The largest output of the ReLU that alone reads a node's output, or the sum it goes into."""
    y = node.outputs[0] if goal.minus is None else node.outputs[0].outputs[0].outputs[0]
    pinned = {t.name for t in graph.outputs} | captured(graph)
    is_alone = len(y.outputs) == 1 and y.name not in pinned
    return bounds(y.outputs[0])[1] if is_alone and is_absorbed(y.outputs[0]) else None


def _fit(node: gs.Node, folds: Sequence[Sums], W: Array, b: Array) -> Fit:
    """The best linear fit, with a bias that is not there yet where that is worth it."""
    best = refit(folds, W, b, has_bias(node))
    if knowledge(node).bias is None or has_bias(node):
        return best
    more = refit(folds, W, b, True)
    return more if more.after < (1 - WORTH) * best.after else best


def _told(bent: Bent) -> str:
    """What is gained behind the activation, where something is."""
    less = 1 - bent.after / bent.before if bent.better.any() else 0.0
    return f", {less:.1%} less of it behind the activation" if less else ""


def _write(graph: gs.Graph, node: gs.Node, W: Array, b: Array, what: str) -> Change:
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.weight is not None
    old = [t for t in node.inputs if isinstance(t, gs.Constant)]
    before = sum(map(nbytes, old))
    array = from_matrix(node, W, tuple(weight.shape)).astype(weight.dtype)
    node.inputs[row.weight] = store(graph, fresh(graph, f"{weight.name}_refit"), array)
    if row.bias is not None and (has_bias(node) or b.any()):
        _set_bias(graph, node, b.reshape(-1).astype(weight.dtype))
    after = sum(nbytes(t) for t in node.inputs if isinstance(t, gs.Constant))
    return Change(node.name, what, before, after)


def _set_bias(graph: gs.Graph, node: gs.Node, bias: Array) -> None:
    position = knowledge(node).bias
    assert position is not None
    stem = node.inputs[position].name if has_bias(node) else f"{node.name}_bias"
    made = constant(fresh(graph, f"{stem}_refit"), bias)
    if position < len(node.inputs):
        node.inputs[position] = made
    else:
        node.inputs.append(made)
