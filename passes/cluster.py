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
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Pass, Skip, register
from onnxc.errors import OptionError
from onnxc.fitted import FitLayer, Made, layer_goal
from onnxc.goals import goal_of, why_no_goal
from onnxc.graph import values
from onnxc.matrices import Layer, LeaveOut, layers, outside
from onnxc.numerics import codebook, gain
from onnxc.numerics.codebook import PINNED, Codebook, snap
from onnxc.numerics.kmeans import Init, Points
from onnxc.numerics.sharing import METHODS, Method, Wish, bit_price, share
from onnxc.numerics.sparse import Quadratic
from onnxc.refits import RefitNode

Array = NDArray[Any]

MANY = 1 << 26  # products of a sweep over codes: of more, only the better start is followed


@register
@dataclass(frozen=True)
class Cluster:
    """Let the weights of each layer share few values.

    bits: of a code, 1 to 8: 2^bits values.
    method: what finds the values.
    init: where kmeans, hessian, ecsq and gmm start.
    refine: whether codes and values are then fitted to the outputs.
    reconstruct: whether outputs ought to be those of the original model, or those of the layer.
    gains: whether each output has a factor of its own; auto: where that does more than longer codes
    would, and never for ecsq, whose codes of weak outputs are short anyway.
    price: of ecsq, what a bit of code length is worth, in bits of accuracy.
    prices: the same of some layers, as NODE=SHARE, in shares of the power of the layer's outputs.
    grid: values are any floats, or int8 times one scale.
    smallest: bytes below which a weight is left alone.
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
    prices: tuple[str, ...] = ()
    grid: Literal["float", "int8"] = "float"
    smallest: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits of a code are 1 to 8, not {self.bits}")
        if self.price < 0:
            raise OptionError(f"price is 0 or more, not {self.price:g}")
        if self.grid == "int8" and self.gains == "always":
            raise OptionError("values on one grid of int8 have no gains: leave out --gains always")
        if any(price < 0 for price in self.of_layers.values()):
            raise OptionError("prices are 0 or more")

    @property
    def of_layers(self) -> dict[str, float]:
        """Prices by layer. Raises OptionError for an entry that is not NODE=SHARE."""
        found = {}
        for text in self.prices:
            name, _, share = text.rpartition("=")
            try:
                found[name] = float(share)
            except ValueError as error:
                raise OptionError(
                    f"prices are NODE=SHARE, such as /conv1=1e-7, not {text!r}"
                ) from error
        return found

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
            yield from (self._step(layer, graph, context) for layer in mine)
            if any(not self.obstacle(layer) for layer in mine):
                is_moved = True
            elif mine and is_moved and self._may_refit(node, kept, context):
                yield RefitNode(node.name, goal_of(node, graph, context))

    def _may_refit(self, node: gs.Node, kept: Collection[str], context: Context) -> bool:
        return self.reconstruct and node.name not in kept and not why_no_goal(node, context)

    def _step(self, layer: Layer, graph: gs.Graph, context: Context) -> Pass:
        is_fit = self.reconstruct and self.refine
        goal = layer_goal(layer, graph, context) if is_fit else None
        made = partial(self._made, layer, context.seed)
        return FitLayer(layer, goal, self.obstacle(layer), made, "clustered", ("shared", "refit"))

    def obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        count = len(np.unique(values(layer.weight)))
        return f"it has {count} values already" if count <= 2**self.bits else ""

    def _made(self, layer: Layer, seed: int, W: Array, E: Quadratic) -> Made:
        """The weight on a codebook, with gains of outputs in front where they are worth it."""
        has_zeros = layer.zeros >= PINNED * layer.size
        W = np.where(layer.matrix == 0, 0, W) if has_zeros else W
        price = self.of_layers.get(layer.name)
        unit = None if price is None else price * E.error(W)
        book, gains = self.shared(W, E, layer, has_zeros, seed, unit)
        has_gains = bool((gains != 1).any())
        what = f"{len(book.levels)} values" + (" with gains" if has_gains else "")
        if self.method == "ecsq":
            what += f" in {book.entropy:.2f} bits a code"
        return Made(gains * book.weight, what, (book.weight, gains) if has_gains else None)

    def shared(
        self,
        W: Array,
        E: Quadratic,
        layer: Layer,
        has_zeros: bool,
        seed: int,
        unit: float | None = None,
    ) -> tuple[Codebook, Array]:
        """The codebook of a weight, (groups, outputs, d), and the gains of outputs in front.

        unit: what a bit of code costs, in the error of the outputs; None for the price.
        """
        wish = Wish(2**self.bits, self.init, self.price, seed, unit)

        def solve(W: Array, start: Codebook | None) -> Codebook:
            return self._book(W, E, has_zeros, wish, start)

        if self._has_gains(W, E, layer, has_zeros, wish):
            return gain.fit(W, E, solve)
        return solve(W, None), np.ones((*W.shape[:2], 1))

    def _has_gains(self, W: Array, E: Quadratic, layer: Layer, zeros: bool, wish: Wish) -> bool:
        is_priced = METHODS[self.method].has_price and self.gains == "auto"
        if (
            is_priced
            or self.gains == "never"
            or self.grid == "int8"
            or layer.gain(gain.gains(W)) is None
        ):
            return False
        if self.gains == "always":
            return True
        weights = E.diagonal if E.blocks else np.ones((W.shape[0], W.shape[2]))
        return gain.is_worth_it(W, weights, lambda W: self._levels(W, E, zeros, wish))

    def _levels(self, W: Array, E: Quadratic, has_zeros: bool, wish: Wish) -> Array:
        """Of a weight as it is, before outputs count."""
        weights = np.broadcast_to(E.diagonal[:, None], W.shape) if E.blocks else None
        return share(W, weights, self.method, wish, has_zeros)

    def _book(
        self, W: Array, E: Quadratic, has_zeros: bool, wish: Wish, before: Codebook | None
    ) -> Codebook:
        """before: a codebook that was good for other gains."""
        move = None if self.grid == "float" else snap
        levels = self._levels(W, E, has_zeros, wish) if before is None else before.levels
        pinned = codebook.pin_of(levels) if has_zeros else None
        start = codebook.plain(W, levels if move is None else move(levels), pinned)
        if not (self.refine and E.blocks):
            return codebook.solve_levels(W, E, start, move)
        weights = np.broadcast_to(E.diagonal[:, None], W.shape)
        has_price = METHODS[self.method].has_price
        price = wish.unit if has_price else 0.0
        if price is None:
            price = bit_price(Points.of(W, weights), start.levels, self.price)
        starts = [start, codebook.feed_forward(W, E, start)]
        if W.size * W.shape[2] > MANY:
            starts = [min(starts, key=lambda book: E.error(W - book.weight))]
        found = [codebook.fit(W, E, each, price, move) for each in starts]
        return min(found, key=lambda book: codebook.cost(W, E, book, price))
