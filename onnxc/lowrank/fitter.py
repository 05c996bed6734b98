"""What the factors of a layer are fitted to: a weight W, the moments of its rows x, and a goal.

    symmetric     W x of the same rows:                H = E[x xᵀ],  W as it is
    asymmetric    t, what the layer gives in the original, where x̂ is what it gets by now:

        W̃ = argmin E‖t − W̃ x̂ − b̃‖² + ridge,      Ĥ = E[x̂ x̂ᵀ]

(Zhang 2016, "Accelerating very deep convolutional networks", §3.3; `onnxc.numerics.refit`). Factors
Ŵ of W̃ in the metric Ĥ then lose E‖(W̃ − Ŵ) x̂‖² more than W̃ does. Where there is a place for a
bias, H is about the mean and the bias makes the mean of the outputs what it ought to be:

    b̂ = t̄ − Ŵ x̄

Where n rows are few, H is shrunk (`onnxc.numerics.covariance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import bias_of, has_place
from onnxc.core import Context, Goal, Key
from onnxc.lowrank import factors
from onnxc.lowrank.layers import Layer
from onnxc.moments import moments_key
from onnxc.numerics import lowrank
from onnxc.numerics.covariance import centred, shrunk
from onnxc.numerics.lowrank import Factors
from onnxc.numerics.refit import refit
from onnxc.ops import is_odd_bias, knowledge

Array = NDArray[Any]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Fitter:
    """W (groups, o, c, *kernel): the goal of factors. H: (groups, d, d), None without data.

    means: x̄ of each node's input, (groups, d), by the node's name, where a bias can take it up.
    gap: t̄ − W x̄ − b, (groups, o): what the goal itself leaves to the bias.
    """

    W: Array
    H: Array | None
    means: Mapping[str, Array] = field(default_factory=dict)
    gap: Array | float = 0.0

    @classmethod
    def of(cls, layer: Layer, context: Context) -> Fitter:
        """What statistics there are decides."""
        first = layer.nodes[0]
        key = goal_key(first)
        if key.goal is not None and key in context.stats:
            return cls.asymmetric(first, context.stats[key])
        return cls.symmetric(layer, context)

    @classmethod
    def symmetric(cls, layer: Layer, context: Context) -> Fitter:
        """Several nodes count alike."""
        W = factors.tensor(layer.nodes[0])
        pairs = ((node.name, moments_key(node)) for node in layer.nodes)
        found = {n: context.stats[k] for n, k in pairs if k is not None and k in context.stats}
        if not found:
            return cls(W, None)
        means = {n.name: found[n.name].mean for n in layer.nodes if _has_mean(n, found)}
        each = [shrunk(centred(s.second, means.get(n)), s.count) for n, s in found.items()]
        return cls(W, np.mean(each, axis=0), means)

    @classmethod
    def asymmetric(cls, node: gs.Node, found: Any) -> Fitter:
        """found: the sums of what it gets and what it ought to give, in two folds."""
        is_biased, W = takes_mean(node), factors.tensor(node)
        flat, b = W.reshape(*W.shape[:2], -1), bias_of(node).reshape(W.shape[:2])
        goal = refit(found.folds, flat, b, is_biased).W
        sums = found.folds[0] + found.folds[1]
        m = sums.moments(is_biased)
        means = {node.name: m.x} if is_biased else {}
        gap = m.t - np.einsum("god,gd->go", goal, m.x) - b
        return cls(goal.reshape(W.shape), shrunk(m.H, sums.count), means, gap)

    def fit(self, method: str, ranks: Ints) -> Factors:
        return lowrank.factorize(method, self.W, self.H, ranks)

    def error(self, made: Factors) -> float:
        """E‖(W − Ŵ) x‖² / E‖W x‖² with these moments."""
        return lowrank.relative_error(self.W, made.made, self.H)

    def shift(self, node: gs.Node, made: Factors) -> Array | None:
        """What the bias of a node has to move by, (groups · o,); None where it cannot."""
        if node.name not in self.means:
            return None
        lost = (self.W - made.made).reshape(*self.W.shape[:2], -1)
        moved = np.einsum("god,gd->go", lost, self.means[node.name]) + self.gap
        return np.asarray(moved.reshape(-1))


def takes_mean(node: gs.Node) -> bool:
    """Whether a bias can take up what the mean of the output moves by."""
    is_fit = has_place(node) and not is_odd_bias(node)
    return is_fit and all(node.attrs.get(k, 1.0) == 1.0 for k in ("alpha", "beta"))


def _has_mean(node: gs.Node, found: Mapping[str, Any]) -> bool:
    return node.name in found and takes_mean(node)


def goal_key(node: gs.Node) -> Key:
    """Of a node's input with what it gives in the original; of the input where that is not W x."""
    row, key = knowledge(node), moments_key(node)
    assert key is not None
    is_linear = row.role == "weighted" and (row.bias is None or takes_mean(node))
    if not is_linear:
        return key
    return replace(key, what="goal", goal=Goal(node.outputs[0].name, row.y_axis))
