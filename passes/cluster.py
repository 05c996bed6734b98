"""Let the weights of a layer share few values, chosen so that its outputs stay.

Ŵ has at most K = 2^bits distinct values, a codebook c with codes a (`onnxc.numerics.codebook`),

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,   Ŵ = c[a],

layer after layer, with the layers before it clustered already. W* is the weight that best makes of
what the layer now gets what it ought to give, C the metric around it (`onnxc.numerics.aim`), and
the bias follows. Without `reconstruct`, or where a layer has no goal, W* is W and C that of its
input; layers that are not clustered stay then, and are refit otherwise. Where nothing is known of
the input, such as of a table or of a recurrent state, C is I.

The levels c start from one of `onnxc.numerics.sharing.METHODS`, each weight counting with C_jj.
Then codes and levels are fitted in turn. With gains an output has a factor of its own in front of
the codebook (`onnxc.numerics.gain`): more bytes, less error where outputs differ in strength.

A weight that has many zeros keeps them: one level is 0, so that what was made sparse stays sparse.
On the `grid` int8 levels are multiples of max |c| / 127, as integer kernels want them.

The weights stay plain here; `store_codebooks` is what makes the file small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.biases import bias_of
from onnxc.core import Change, Context, Goal, Key, Pass, Skip, register
from onnxc.errors import OptionError
from onnxc.goals import goal_of, has_bias, key_of, why_no_goal
from onnxc.graph import values
from onnxc.matrices import Layer, LeaveOut, error, layers, outside, place, shift_biases
from onnxc.numerics import codebook, gain
from onnxc.numerics.aim import Aim
from onnxc.numerics.codebook import PINNED, Codebook, snap
from onnxc.numerics.kmeans import Init, Points
from onnxc.numerics.sharing import METHODS, Method, Wish, bit_price, share
from onnxc.numerics.sparse import Quadratic
from onnxc.refits import RefitNode, set_bias

Array = NDArray[Any]

MANY = 1 << 26  # products of a sweep over codes: of more, only the better start is followed


@register
@dataclass(frozen=True)
class Cluster:
    """Let the weights of each layer share few values.

    bits: of a code, 1 to 8: 2^bits values. method: what finds the values. init: where kmeans,
    hessian, ecsq and gmm start. refine: whether codes and values are then fitted to the outputs.
    reconstruct: whether outputs ought to be those of the original model, or those of the layer.
    gains: whether each output has a factor of its own; auto: where that does more than longer codes
    would. price: of ecsq, what a bit of code length is worth, in bits of accuracy. grid: values are
    any floats, or int8 times one scale. smallest: bytes below which a weight is left alone.
    """

    name: ClassVar[str] = "cluster"
    lossless: ClassVar[bool] = False

    bits: int = 4
    method: Method = "dp"
    init: Init = "linear"
    refine: bool = True
    reconstruct: bool = True
    gains: Literal["auto", "never", "always"] = "auto"
    price: float = 1.0
    grid: Literal["float", "int8"] = "float"
    smallest: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits of a code are 1 to 8, not {self.bits}")
        if self.price < 0:
            raise OptionError(f"price is 0 or more, not {self.price:g}")
        if self.grid == "int8" and self.gains == "always":
            raise OptionError("values on one grid of int8 have no gains: leave out --gains always")

    @property
    def summary(self) -> str:
        """What is shared, in a few words."""
        return f"{self.bits}-bit codebooks by {self.method}" + (
            " on int8" if self.grid == "int8" else ""
        )

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph), everything=True)
        return [key for layer in found if not self.obstacle(layer) for key in layer.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a layer, in the order of first nodes, and one for what is refit in between."""
        found = layers(graph, context.only.names(graph), everything=True)
        yield LeaveOut(tuple(outside(graph, "clustered")))
        is_moved, kept = False, context.only.excluded(graph)
        for node in list(graph.nodes):
            mine = [layer for layer in found if layer.nodes[0] is node]
            yield from (ClusterLayer(self, x, self.goal(x, graph, context)) for x in mine)
            if any(not self.obstacle(layer) for layer in mine):
                is_moved = True
            elif mine and is_moved and self._may_refit(node, kept, context):
                yield RefitNode(node.name, goal_of(node, graph, context))

    def _may_refit(self, node: gs.Node, kept: Collection[str], context: Context) -> bool:
        return self.reconstruct and node.name not in kept and not why_no_goal(node, context)

    def goal(self, layer: Layer, graph: gs.Graph, context: Context) -> Goal | None:
        """What a layer ought to give, where that is known."""
        first, *others = layer.nodes
        is_fit = self.reconstruct and self.refine and layer.is_linear and not others
        if not is_fit or why_no_goal(first, context):
            return None
        return goal_of(first, graph, context)

    def obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        count = len(np.unique(values(layer.weight)))
        return f"it has {count} values already" if count <= 2**self.bits else ""

    def shared(self, W: Array, E: Quadratic, layer: Layer, seed: int) -> tuple[Codebook, Array]:
        """The codebook of a weight, (groups, outputs, d), and the gains of outputs in front."""
        has_zeros = layer.zeros >= PINNED * layer.size

        def solve(W: Array, start: Codebook | None) -> Codebook:
            return self._book(W, E, has_zeros, seed, start)

        if self._has_gains(W, E, layer, has_zeros, seed):
            return gain.fit(W, E, solve)
        return solve(W, None), np.ones((*W.shape[:2], 1))

    def _has_gains(self, W: Array, E: Quadratic, layer: Layer, zeros: bool, seed: int) -> bool:
        if self.gains == "never" or self.grid == "int8" or layer.gain(gain.gains(W)) is None:
            return False
        if self.gains == "always":
            return True
        weights = E.diagonal if E.blocks else np.ones((W.shape[0], W.shape[2]))
        return gain.is_worth_it(W, weights, lambda W: self._levels(W, E, zeros, seed))

    def _levels(self, W: Array, E: Quadratic, has_zeros: bool, seed: int) -> Array:
        """Of a weight as it is, before outputs count."""
        weights = np.broadcast_to(E.diagonal[:, None], W.shape) if E.blocks else None
        wish = Wish(2**self.bits, self.init, self.price, seed)
        return share(W, weights, self.method, wish, has_zeros)

    def _book(
        self, W: Array, E: Quadratic, has_zeros: bool, seed: int, before: Codebook | None
    ) -> Codebook:
        """before: a codebook that was good for other gains."""
        move = None if self.grid == "float" else snap
        levels = self._levels(W, E, has_zeros, seed) if before is None else before.levels
        pinned = codebook.pin_of(levels) if has_zeros else None
        start = codebook.plain(W, levels if move is None else move(levels), pinned)
        if not (self.refine and E.blocks):
            return codebook.solve_levels(W, E, start, move)
        weights = np.broadcast_to(E.diagonal[:, None], W.shape)
        has_price = METHODS[self.method].has_price
        price = bit_price(Points.of(W, weights), start.levels, self.price) if has_price else 0.0
        starts = [start, codebook.feed_forward(W, E, start)]
        if W.size * W.shape[2] > MANY:
            starts = [min(starts, key=lambda book: E.error(W - book.weight))]
        found = [codebook.fit(W, E, each, price, move) for each in starts]
        return min(found, key=lambda book: codebook.cost(W, E, book, price))


@dataclass(frozen=True)
class ClusterLayer:
    """Cluster one weight, as a whole pass wants it. goal: what its layer ought to give, or None."""

    whole: Cluster
    layer: Layer
    goal: Goal | None
    name: ClassVar[str] = "cluster-layer"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        if self.whole.obstacle(self.layer):
            return ()
        return self.layer.keys if self.goal is None else (key_of(self.layer.nodes[0], self.goal),)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        reason = self.whole.obstacle(self.layer)
        if reason:
            return [Skip(node.name, f"not clustered: {reason}") for node in self.layer.nodes]
        found = self.goal and context.stats.get(key_of(self.layer.nodes[0], self.goal))
        return list(self._aimed(graph, found, context) if found else self._alone(graph, context))

    def _aimed(self, graph: gs.Graph, found: Any, context: Context) -> Iterator[Change]:
        """To the goal."""
        layer, node = self.layer, self.layer.nodes[0]
        W, is_biased = layer.matrix, has_bias(node)
        aim = Aim.of(found.folds, W, bias_of(node).reshape(W.shape[:2]), is_biased)
        goal = np.where(W == 0, 0, aim.W) if layer.zeros >= PINNED * layer.size else aim.W
        book, gains = self.whole.shared(goal, aim.E, layer, context.seed)
        told = f", {100 * aim.error(gains * book.weight):.2g} % of its output lost"
        yield from self._place(graph, book, gains, told)
        if is_biased:
            bias = aim.bias(gains * book.weight).reshape(-1)
            set_bias(graph, node, bias.astype(layer.weight.dtype))

    def _alone(self, graph: gs.Graph, context: Context) -> Iterator[Change]:
        """To itself."""
        layer = self.layer
        W, E = layer.matrix, error(layer, context)
        book, gains = self.whole.shared(W, E, layer, context.seed)
        made = gains * book.weight
        told = f", {100 * E.error(W - made) / max(E.error(W), 1e-300):.2g} % of its output lost"
        if not E.blocks:
            told += f" if inputs are alike: {layer.unmeasured or 'nothing is known of them'}"
        yield from self._place(graph, book, gains, told)
        shift_biases(graph, layer, W - made, context, "shared")

    def _place(self, graph: gs.Graph, book: Codebook, gains: Array, told: str) -> Iterator[Change]:
        has_gains = bool((gains != 1).any())
        what = f"{len(book.levels)} values" + (" with gains" if has_gains else "") + told
        if self.whole.method == "ecsq":
            what += f", {book.entropy:.2f} bits a code"
        given = self.layer.gain(gains) if has_gains else None
        yield from place(graph, self.layer, book.weight, "shared", what, given)
