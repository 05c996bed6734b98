"""Refit one heavy node, weights that are not zero and bias, to what it ought to give.

    Ŵ, b̂ = argmin E‖t − Ŵ x̂ − b̂‖² + ridge,     zeros of W stay zero (`onnxc.numerics.refit`)

x̂ is its input in the rewritten graph with all nodes before it already refit, t what it ought to
give (`onnxc.goals`). What counts may also be the error behind a ReLU that follows
(`onnxc.numerics.nonlinear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import bias_of
from onnxc.core import Change, Context, Goal, Key, Skip
from onnxc.goals import key_of
from onnxc.graph import constant, fresh, nbytes, store, values
from onnxc.moments import from_matrix, matrix
from onnxc.numerics.nonlinear import Bent, bend
from onnxc.numerics.refit import Fit, Sums, refit
from onnxc.ops import has_bias, knowledge, weight_of

Array = NDArray[Any]

WORTH = 0.01  # of the error: what a bias that is not there yet has to save
FEW = 8  # weights for each distinct value: of fewer, they are not shared


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
            return [Skip(self.node, f"not refit: {self.obstacle}")]
        found, rows = (context.stats.get(self._key(graph, what)) for what in ("goal", "rows"))
        if found is None:
            return [Skip(self.node, "not refit: its outputs were not compared with the original's")]
        return [self._refit(graph, self._find(graph), found, rows)]

    def _refit(self, graph: gs.Graph, node: gs.Node, found: Any, rows: Any) -> Change | Skip:
        W, b = parts(node)
        if _is_shared(W):
            return Skip(node.name, "not refit: its weight has few values, which a refit would lose")
        best = _fit(node, found.folds, W, b)
        scale = float(sum(s.variance().sum() for s in found.folds))
        if not best.after < best.before or scale <= 0:
            return Skip(node.name, "not refit: nothing lowers the error of its outputs")
        what = f"refit, error of its outputs {best.before / scale:.2%} to {best.after / scale:.2%}"
        if rows is None or self.high is None:
            return _write(graph, node, best.W, best.b, what)
        is_biased = has_bias(node) or bool(best.b.any())
        bent = bend(found.folds, rows.folds, W, b, best, is_biased, self.high)
        return _write(graph, node, bent.W, bent.b, what + _told(bent))

    def _find(self, graph: gs.Graph) -> gs.Node:
        return next(node for node in graph.nodes if node.name == self.node)

    def _key(self, graph: gs.Graph, what: str) -> Key:
        assert self.goal is not None
        return key_of(self._find(graph), self.goal, what)


def _fit(node: gs.Node, folds: Sequence[Sums], W: Array, b: Array) -> Fit:
    """The best linear fit, with a bias that is not there yet where that is worth it."""
    best = refit(folds, W, b, has_bias(node))
    if knowledge(node).bias is None or has_bias(node):
        return best
    more = refit(folds, W, b, True)
    return more if more.after < (1 - WORTH) * best.after else best


def _is_shared(W: Array) -> bool:
    """Whether few values make up a weight, such as those of a codebook; 0 does not count."""
    return FEW * len(np.unique(W[W != 0])) < int(np.count_nonzero(W))


def parts(node: gs.Node) -> tuple[Array, Array]:
    """W (groups, outputs, d) and b (groups, outputs)."""
    weight = weight_of(node)
    assert weight is not None
    W = matrix(node, values(weight).astype(np.float64))
    return W, bias_of(node).reshape(W.shape[:2])


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
        set_bias(graph, node, b.reshape(-1).astype(weight.dtype))
    after = sum(nbytes(t) for t in node.inputs if isinstance(t, gs.Constant))
    return Change(node.name, what, before, after)


def set_bias(graph: gs.Graph, node: gs.Node, bias: Array, suffix: str = "refit") -> None:
    position = knowledge(node).bias
    assert position is not None
    stem = node.inputs[position].name if has_bias(node) else f"{node.name}_bias"
    made = constant(fresh(graph, f"{stem}_{suffix}"), bias)
    if position < len(node.inputs):
        node.inputs[position] = made
    else:
        node.inputs.append(made)
