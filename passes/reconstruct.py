"""Refit heavy nodes to the outputs of the original model, one after the other.

For each Conv, Gemm or MatMul whose weight or input is not what it was, with x̂ its input in the
rewritten graph with all nodes before it already refit,

    Ŵ, b̂ = argmin E‖t − Ŵ x̂ − b̂‖² + ridge,     zeros of W stay zero (`onnxc.numerics.refit`),

and a weight of few distinct values keeps as few (`onnxc.numerics.recluster`).

The goal t is the node's output y in the original, before any activation. Where y only goes into a
sum s = y + r, it is

    t = s − r̂,     s of the original, r̂ of the rewritten graph,

so that what the residual stream has gone wrong by is made good at each block (He 2017, "Channel
pruning for accelerating very deep neural networks", §3.2 on multi-branch networks). No label and no
gradient is used.

With `nonlinear`, what counts is the error behind the activation, where a ReLU follows the node or
its sum: see `onnxc.numerics.nonlinear` (Zhang 2016, §3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import bias_of
from onnxc.core import Change, Context, Goal, Key, Pass, Skip, register
from onnxc.graph import captured, constant, fresh, nbytes, store, values
from onnxc.moments import from_matrix, matrix, moments_key, why_no_moments
from onnxc.moved import moved
from onnxc.numerics.nonlinear import Bent, bend
from onnxc.numerics.recluster import codebook_of, refit_shared
from onnxc.numerics.refit import Fit, Sums, refit
from onnxc.ops import bounds, data_inputs, is_absorbed, is_constant, knowledge, weight_of

Array = NDArray[Any]

WIDEST = 4608  # inputs of a layer, √(groups d²): H takes a few copies of 8 bytes times its square
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
                reason = "excluded" if node.name in kept else _obstacle(node, context)
                goal = None if reason else self._goal(node, graph, context)
                if goal is not None and changed.isdisjoint((node.outputs[0].name, goal.minus)):
                    reason = "not refit: it computes what it did in the original"
                high = _high(node, goal, graph) if goal is not None and self.nonlinear else None
                yield RefitNode(node.name, goal, reason, high)

    def _goal(self, node: gs.Node, graph: gs.Graph, context: Context) -> Goal:
        own = Goal(node.outputs[0].name, knowledge(node).y_axis)
        return (_sum_goal(node, graph, context) if self.blocks else None) or own


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
        W, b = _parts(node)
        book = codebook_of(W)
        if book is None:
            best = _fit(node, found.folds, W, b)
        else:
            whole = _parts(_maker_like(node, context))
            best = refit_shared(found.folds, *whole, book, b, _has_bias(node))
        scale = float(sum(s.variance().sum() for s in found.folds))
        if not best.after < best.before or scale <= 0:
            return Skip(node.name, "not refit: nothing lowers the error of its outputs")
        what = f"refit, error of its outputs {best.before / scale:.2%} to {best.after / scale:.2%}"
        if rows is None or self.high is None or book is not None:
            return _write(graph, node, best.W, best.b, what)
        is_biased = _has_bias(node) or bool(best.b.any())
        bent = bend(found.folds, rows.folds, W, b, best, is_biased, self.high)
        return _write(graph, node, bent.W, bent.b, what + _told(bent))

    def _find(self, graph: gs.Graph) -> gs.Node:
        return next(node for node in graph.nodes if node.name == self.node)

    def _key(self, graph: gs.Graph, what: str) -> Key:
        key = moments_key(self._find(graph), what)
        assert key is not None
        return replace(key, goal=self.goal)


def _obstacle(node: gs.Node, context: Context) -> str:
    """Why a heavy node cannot be refit; empty if it can."""
    reason, weight = why_no_moments(node), weight_of(node)
    if reason or weight is None:
        return f"not refit: {reason}"
    row = knowledge(node)
    assert row.window is not None
    if len(weight.shape) > 2 and not row.window(node).kernel:
        return f"not refit: the outputs of {node.op} overlap"
    d = math.prod(weight.shape) // _channels(node)[0]
    if row.window(node).groups * d * d > WIDEST**2:
        return f"not refit: with {d} inputs it is too wide"
    other = next((user for user in weight.outputs if user is not node), None)
    if other is not None:
        return f"not refit: its weight is shared with {other.name}"
    if _has_bias(node) and not _is_plain(node.inputs[row.bias], node):
        return "not refit: its bias is not one constant for each output"
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        return "not refit: it multiplies its output or its bias by a factor"
    if context.original is None:
        return "not refit: the original model is not known"
    maker = _maker(node.outputs[0].name, context.original)
    if maker is None:
        return "not refit: it is not in the original"
    is_heavy = knowledge(maker).role == "weighted" and weight_of(maker) is not None
    is_cut = is_heavy and _channels(maker) != _channels(node)
    return "not refit: it has other channels than in the original" if is_cut else ""


def _has_bias(node: gs.Node) -> bool:
    position = knowledge(node).bias
    return position is not None and position < len(node.inputs) and bool(node.inputs[position].name)


def _is_plain(bias: gs.Tensor, node: gs.Node) -> bool:
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.out_axis is not None
    return is_constant(bias) and tuple(bias.shape) in (
        (),
        (1,),
        _channels(node),
        (1, *_channels(node)),
    )


def _channels(node: gs.Node) -> tuple[int]:
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.out_axis is not None
    return (int(weight.shape[row.out_axis(node)]),)


def _sum_goal(node: gs.Node, graph: gs.Graph, context: Context) -> Goal | None:
    """What the original's sum leaves for this node, where its output only goes into one."""
    y = node.outputs[0]
    pinned = {t.name for t in graph.outputs} | captured(graph)
    if len(y.outputs) != 1 or y.name in pinned or not knowledge(y.outputs[0]).adds:
        return None
    add = y.outputs[0]
    others = [t for t in data_inputs(add) if t is not y]
    if len(others) != 1 or is_constant(others[0]):
        return None
    shapes = [t.shape for t in (y, others[0], add.outputs[0])]
    if None in shapes or any(list(shape) != list(shapes[0]) for shape in shapes):
        return None
    if not _has_same_sum(add, context) or _depends_on_later(others[0], node, graph):
        return None
    return Goal(add.outputs[0].name, knowledge(node).y_axis, others[0].name)


def _has_same_sum(add: gs.Node, context: Context) -> bool:
    """Whether the original has a sum of that name."""
    assert context.original is not None
    maker = _maker(add.outputs[0].name, context.original)
    return maker is not None and knowledge(maker).adds


def _maker(tensor: str, graph: gs.Graph) -> gs.Node | None:
    return next((n for n in graph.nodes if any(t.name == tensor for t in n.outputs)), None)


def _depends_on_later(tensor: gs.Tensor, node: gs.Node, graph: gs.Graph) -> bool:
    """Whether a heavy node that comes behind `node` has a part in a tensor."""
    order = {id(n): position for position, n in enumerate(graph.nodes)}
    pending, seen = [tensor], set[int]()
    while pending:
        for maker in pending.pop().inputs:
            if id(maker) in seen or id(maker) not in order:
                continue
            seen.add(id(maker))
            is_later = order[id(maker)] > order[id(node)]
            if is_later and knowledge(maker).role == "weighted":
                return True
            pending += [t for t in maker.inputs if not is_constant(t)]
    return False


def _high(node: gs.Node, goal: Goal, graph: gs.Graph) -> float | None:
    """The largest output of the ReLU that alone reads a node's output, or the sum it goes into."""
    y = node.outputs[0] if goal.minus is None else node.outputs[0].outputs[0].outputs[0]
    pinned = {t.name for t in graph.outputs} | captured(graph)
    is_alone = len(y.outputs) == 1 and y.name not in pinned
    return bounds(y.outputs[0])[1] if is_alone and is_absorbed(y.outputs[0]) else None


def _fit(node: gs.Node, folds: Sequence[Sums], W: Array, b: Array) -> Fit:
    """The best linear fit, with a bias that is not there yet where that is worth it."""
    best = refit(folds, W, b, _has_bias(node))
    if knowledge(node).bias is None or _has_bias(node):
        return best
    more = refit(folds, W, b, True)
    return more if more.after < (1 - WORTH) * best.after else best


def _parts(node: gs.Node) -> tuple[Array, Array]:
    """W (groups, outputs, d) and b (groups, outputs)."""
    weight = weight_of(node)
    assert weight is not None
    W = matrix(node, values(weight).astype(np.float64))
    return W, bias_of(node).reshape(W.shape[:2])


def _maker_like(node: gs.Node, context: Context) -> gs.Node:
    """The node of the original that is in its place, if its weight has the same shape."""
    assert context.original is not None
    maker = _maker(node.outputs[0].name, context.original)
    if maker is None or maker.op != node.op:
        return node
    mine, other = weight_of(node), weight_of(maker)
    assert mine is not None
    return maker if other is not None and other.shape == mine.shape else node


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
    if row.bias is not None and (_has_bias(node) or b.any()):
        _set_bias(graph, node, b.reshape(-1).astype(weight.dtype))
    after = sum(nbytes(t) for t in node.inputs if isinstance(t, gs.Constant))
    return Change(node.name, what, before, after)


def _set_bias(graph: gs.Graph, node: gs.Node, bias: Array) -> None:
    position = knowledge(node).bias
    assert position is not None
    stem = node.inputs[position].name if _has_bias(node) else f"{node.name}_bias"
    made = constant(fresh(graph, f"{stem}_refit"), bias)
    if position < len(node.inputs):
        node.inputs[position] = made
    else:
        node.inputs.append(made)
