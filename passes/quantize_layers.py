"""Put the weights of each layer on few integers, chosen so that its outputs stay.

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    ŵ = s q,   −2^(b−1) ≤ q < 2^(b−1)

with one scale s for each output (`onnxc.numerics.rounding`), a power of two for fixed point, layer
after layer, with the layers
before it rounded already. W* is the weight that best makes of what the layer now gets what it ought
to give, C the metric around it (`onnxc.numerics.aim`), and the bias follows: it takes in what
rounding did to the mean. Without `reconstruct`, or where a layer has no goal, W* is W and C that of
its input. Where nothing is known of the input C is I.

A layer never loses more than by rounding to the nearest on the same bits: of both, the lesser;
unless it is rounded by chance, which keeps the weights as they are on average.

The weights stay float here, on their grid. `quantize` finds the same integers again
(`onnxc.numerics.lattice`) and computes with them; where scales stand `apart`, in a Mul that ONNX
Runtime computes at load, the model computes in float. `store_codebooks` makes the file small.
"""

from __future__ import annotations

import zlib
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
from onnxc.integer import refusal, weight_grid
from onnxc.matrices import Layer, LeaveOut, error, layers, outside, place, shift_biases
from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid
from onnxc.numerics.aim import Aim
from onnxc.numerics.lattice import lattice_scales
from onnxc.numerics.rounding import Method, Rounded, Wish, rounded, shifts
from onnxc.numerics.sparse import Quadratic
from onnxc.ops import data_inputs, knowledge
from onnxc.refits import set_bias

Array = NDArray[Any]

WIDEST = 8  # bits, which ends keep


@register
@dataclass(frozen=True)
class QuantizeLayers:
    """Round the weights of each layer to few bits, layer after layer.

    bits: of a weight, 2 to 8. rounding: each weight to the nearest, columns that make up for those
    before them (gptq), coordinate descent from there, or by chance (stochastic). keep_ends: whether
    first and last layers keep 8 bits. reconstruct: whether outputs ought to be those that the model
    had, or those of the layer. scales: inside the weights, for kernels that compute in integers, or
    apart, to store them in few bits and compute in float. smallest: bytes below which a weight is
    left alone. power_of_two: whether scales are powers of two. widths: LAYER=BITS for layers that
    have other bits than the rest, ends or not.
    """

    name: ClassVar[str] = "quantize-layers"
    lossless: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    rounding: Method = "descent"
    keep_ends: bool = True
    reconstruct: bool = True
    scales: Literal["inside", "apart"] = "inside"
    smallest: int = 0
    power_of_two: bool = False
    widths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, bits in self.of_layers.items():
            if not 2 <= bits <= WIDEST:
                raise OptionError(f"layer {name} cannot have {bits} bits: give 2 to {WIDEST}")

    @property
    def of_layers(self) -> dict[str, int]:
        """Bits of single layers. Raises OptionError for one that is not LAYER=BITS."""
        found = {}
        for text in self.widths:
            name, _, bits = text.rpartition("=")
            if not name or not bits.isdigit():
                raise OptionError(f"{text!r} is not LAYER=BITS, such as /conv1=3")
            found[name] = int(bits)
        return found

    @property
    def keeps_statistics(self) -> bool:
        """Means come back to what they were; refit to a goal, the rest may move."""
        return not self.reconstruct

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph))
        return [key for x in found if not self.obstacle(x, context) for key in x.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a layer, in the order of first nodes."""
        yield LeaveOut(tuple(outside(graph, "rounded")))
        kept = ends(graph) if self.keep_ends else frozenset[str]()
        given = self.of_layers
        for layer in layers(graph, context.only.names(graph)):
            bits = WIDEST if any(n.name in kept for n in layer.nodes) else self.bits
            bits = given.get(layer.name, bits)
            yield RoundLayer(self, layer, self.goal(layer, graph, context), bits)

    def goal(self, layer: Layer, graph: gs.Graph, context: Context) -> Goal | None:
        """What a layer ought to give, where that is known."""
        first, *others = layer.nodes
        is_fit = self.reconstruct and layer.is_linear and not others
        if not is_fit or why_no_goal(first, context):
            return None
        return goal_of(first, graph, context)

    def obstacle(self, layer: Layer, context: Context) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        if self.scales == "inside":
            return self._unfit(layer, context)
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        shape = (*layer.matrix.shape[:2], 1)
        is_apart = layer.gain(np.arange(1.0, 1 + np.prod(shape)).reshape(shape)) is not None
        return "" if is_apart else "its outputs lie along all axes of its weight"

    def _unfit(self, layer: Layer, context: Context) -> str:
        """Why kernels would not compute in these integers."""
        reasons = (refusal(node, context.target) for node in layer.nodes)
        reason = next(filter(None, reasons), "")
        if not reason and layer.is_overlapping:
            return f"several rows of its weight make an output of {layer.nodes[0].op}"
        return reason

    def grid(self, bits: int, context: Context) -> Grid:
        """The integers of a weight; of 8 bits those that the kernels of the target take."""
        is_wide = bits == WIDEST
        return weight_grid(context.target) if is_wide and self.scales == "inside" else Grid(bits)

    def wish(self, layer: Layer, bits: int, context: Context) -> Wish:
        """What a weight is put on; each layer draws other numbers."""
        grid = self.grid(bits, context)
        seed = zlib.crc32(f"{context.seed} {layer.name}".encode())
        return shifts(grid, seed) if self.power_of_two else Wish(grid, seed=seed)


@dataclass(frozen=True)
class RoundLayer:
    """Round one weight, as a whole pass wants it. goal: what its layer ought to give, or None."""

    whole: QuantizeLayers
    layer: Layer
    goal: Goal | None
    bits: int
    name: ClassVar[str] = "round-layer"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        if self.obstacle(context):
            return ()
        return self.layer.keys if self.goal is None else (key_of(self.layer.nodes[0], self.goal),)

    def obstacle(self, context: Context) -> str:
        return self.whole.obstacle(self.layer, context) or self._done()

    def _done(self) -> str:
        """Why nothing is left to do."""
        axis = knowledge(self.layer.nodes[0]).out_axis
        along = None if axis is None else axis(self.layer.nodes[0])
        weight, most = values(self.layer.weight), 2 ** (self.bits - 1)
        if self.whole.power_of_two:
            is_done = fixed.is_on_grid(weight, along, Grid(self.bits))
        else:
            is_done = lattice_scales(weight, along, most) is not None
        return f"it has {self.bits} bits already" if is_done else ""

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        reason = self.obstacle(context)
        if reason:
            return [Skip(node.name, f"not rounded: {reason}") for node in self.layer.nodes]
        found = self.goal and context.stats.get(key_of(self.layer.nodes[0], self.goal))
        return list(self._aimed(graph, found, context) if found else self._alone(graph, context))

    def _aimed(self, graph: gs.Graph, found: Any, context: Context) -> Iterator[Change]:
        """To the goal."""
        layer, node = self.layer, self.layer.nodes[0]
        W, is_biased = layer.matrix, has_bias(node)
        aim = Aim.of(found.folds, W, bias_of(node).reshape(W.shape[:2]), is_biased)
        made = self._solve(aim.W, aim.E, context)
        yield from self._place(graph, made, 100 * aim.error(made.weight), "")
        if is_biased:
            set_bias(graph, node, aim.bias(made.weight).reshape(-1).astype(layer.weight.dtype))

    def _alone(self, graph: gs.Graph, context: Context) -> Iterator[Change]:
        """To itself."""
        layer = self.layer
        W, E = layer.matrix, error(layer, context)
        made = self._solve(W, E, context)
        reason = layer.unmeasured or "nothing is known of them"
        told = "" if E.blocks else f" if inputs are alike: {reason}"
        lost = 100 * E.error(W - made.weight) / max(E.error(W), 1e-300)
        yield from self._place(graph, made, lost, told)
        shift_biases(graph, layer, W - made.weight, context, "rounded")

    def _solve(self, W: Array, E: Quadratic, context: Context) -> Rounded:
        """W (groups, outputs, d) on its grid."""
        return rounded(W, E, self.whole.wish(self.layer, self.bits, context), self.whole.rounding)

    def _place(self, graph: gs.Graph, made: Rounded, lost: float, told: str) -> Iterator[Change]:
        kind = f" as {fixed.name(made.scales, self.bits, True)}" if self.whole.power_of_two else ""
        what = f"{self.bits} bits{kind}, {lost:.2g} % of its output lost{told}"
        if self.whole.scales == "inside":
            yield from place(graph, self.layer, made.weight, "rounded", what)
            return
        yield from place(
            graph, self.layer, made.codes, "rounded", what, self.layer.gain(made.scales)
        )


def ends(graph: gs.Graph) -> frozenset[str]:
    """Names of heavy nodes that no other heavy node comes before, or behind."""
    heavy = [node for node in graph.nodes if knowledge(node).window is not None]
    return frozenset(_leading(graph.nodes, heavy) | _leading(graph.nodes[::-1], heavy, True))


def _leading(nodes: Collection[gs.Node], heavy: list[gs.Node], back: bool = False) -> set[str]:
    """Heavy nodes that depend on none, of nodes in order."""
    are_heavy, behind, found = {id(n) for n in heavy}, set[int](), set[str]()
    for node in nodes:
        near = node.outputs if back else data_inputs(node) or node.inputs
        linked = [n for t in near for n in (t.outputs if back else t.inputs)]
        is_behind = any(id(n) in behind or id(n) in are_heavy for n in linked)
        if is_behind:
            behind.add(id(node))
        elif id(node) in are_heavy:
            found.add(node.name)
    return found
