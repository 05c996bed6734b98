"""Put the weights of each layer on few integers, chosen so that its outputs stay.

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    ŵ = s q,   −2^(b−1) ≤ q < 2^(b−1)

with one scale s for each output, or for each block of a sum (`onnxc.numerics.rounding`), layer
after layer, with the layers before it rounded already. W* is the weight that best makes of what the
layer now gets what it ought to give, C the metric around it (`onnxc.numerics.aim`), and the bias
follows: it takes in what rounding did to the mean. Without `reconstruct`, or where a layer has no
goal, W* is W and C that of its input. Where nothing is known of the input C is I.

A layer never loses more than by rounding to the nearest on the same bits: of both, the lesser.

The weights stay float here, on their grid. `quantize` finds the same integers again
(`onnxc.numerics.lattice`) and computes with them; where scales stand `apart`, in a Mul that ONNX
Runtime computes at load, the model computes in float. `store_codebooks` makes the file small. Of
blocks, `quantize_weights` finds the integers again, and stores them (`onnxc.numerics.blocks`).
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
from onnxc.integer import refusal, weight_grid
from onnxc.matrices import Layer, LeaveOut, error, layers, outside, place, shift_biases
from onnxc.numerics.affine import Grid
from onnxc.numerics.aim import Aim
from onnxc.numerics.blocks import known_blocks
from onnxc.numerics.lattice import lattice_scales
from onnxc.numerics.rounding import Method, Rounded, Wish, rounded
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
    before them (gptq), or coordinate descent from there. keep_ends: whether first and last layers
    keep 8 bits. reconstruct: whether outputs ought to be those that the model had, or those of the
    layer. scales: inside the weights, for kernels that compute in integers, or apart, to store them
    in few bits and compute in float. block: values of a sum that share a scale, 0 for all, where
    weights are stored so. smallest: bytes below which a weight is left alone.
    """

    name: ClassVar[str] = "quantize-layers"
    lossless: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    rounding: Method = "descent"
    keep_ends: bool = True
    reconstruct: bool = True
    scales: Literal["inside", "apart"] = "inside"
    block: Literal[0, 16, 32, 64, 128] = 0
    smallest: int = 0

    def __post_init__(self) -> None:
        if self.block and self.scales == "apart":
            raise OptionError("scales of blocks lie inside of a weight: leave out scales = apart")

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
        for layer in layers(graph, context.only.names(graph)):
            bits = WIDEST if any(n.name in kept for n in layer.nodes) else self.bits
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
        if self.scales == "inside" and not self.block:
            return self._unfit(layer, context)
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        if self.block:
            return _uncut(layer)
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

    def wish(self, bits: int, context: Context) -> Wish:
        """What a weight is put on; of 8 bits the integers that the kernels of the target take."""
        is_wide = bits == WIDEST
        if self.block:
            return Wish(Grid(bits, narrow=is_wide), self.block, is_mirrored=not is_wide)
        is_inside = is_wide and self.scales == "inside"
        return Wish(weight_grid(context.target) if is_inside else Grid(bits))

    def is_done(self, layer: Layer, bits: int) -> bool:
        """Whether a weight lies on so few integers already."""
        if self.block:
            rows = layer.matrix.reshape(-1, layer.matrix.shape[2], 1)
            return known_blocks(rows, bits, self.block) is not None
        axis = knowledge(layer.nodes[0]).out_axis
        along = None if axis is None else axis(layer.nodes[0])
        return lattice_scales(values(layer.weight), along, 2 ** (bits - 1)) is not None

    def solve(self, W: Array, E: Quadratic, bits: int, context: Context) -> Rounded:
        """W (groups, outputs, d) on its grid."""
        return rounded(W, E, self.wish(bits, context), self.rounding)


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
        is_done = self.whole.is_done(self.layer, self.bits)
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
        made = self.whole.solve(aim.W, aim.E, self.bits, context)
        yield from self._place(graph, made, 100 * aim.error(made.weight), "")
        if is_biased:
            set_bias(graph, node, aim.bias(made.weight).reshape(-1).astype(layer.weight.dtype))

    def _alone(self, graph: gs.Graph, context: Context) -> Iterator[Change]:
        """To itself."""
        layer = self.layer
        W, E = layer.matrix, error(layer, context)
        made = self.whole.solve(W, E, self.bits, context)
        reason = layer.unmeasured or "nothing is known of them"
        told = "" if E.blocks else f" if inputs are alike: {reason}"
        lost = 100 * E.error(W - made.weight) / max(E.error(W), 1e-300)
        yield from self._place(graph, made, lost, told)
        shift_biases(graph, layer, W - made.weight, context, "rounded")

    def _place(self, graph: gs.Graph, made: Rounded, lost: float, told: str) -> Iterator[Change]:
        what = f"{self.bits} bits, {lost:.2g} % of its output lost{told}"
        if self.whole.scales == "inside":
            yield from place(graph, self.layer, made.weight, "rounded", what)
            return
        yield from place(
            graph, self.layer, made.codes, "rounded", what, self.layer.gain(made.scales)
        )


def _uncut(layer: Layer) -> str:
    """Why the sums of a layer are not cut into blocks; empty if they are."""
    if layer.is_overlapping or not layer.keys:
        return "it is rounded where it is stored: " + (layer.unmeasured or "its outputs overlap")
    return ""


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
