"""Put the weights of each layer on few integers, chosen so that its outputs stay.

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    ŵ = s q,   −2^(b−1) ≤ q < 2^(b−1)

with one scale s for each output, or for each block of a sum (`onnxc.numerics.rounding`), layer
after layer, with the layers before it rounded already. W* is the weight that best makes of what the
layer now gets what it ought to give, C the metric around it (`onnxc.numerics.aim`), and the bias
follows: it takes in what rounding did to the mean. Without `reconstruct`, or where a layer has no
goal, W* is W and C that of its input. Where nothing is known of the input C is I.

A layer never loses more than by rounding to the nearest on the same bits: of both, the lesser;
unless it is rounded by chance, which keeps the weights as they are on average.

The weights stay float here, on their grid. `quantize` finds the same integers again
(`onnxc.numerics.lattice`) and computes with them; where scales stand `apart`, in a Mul that ONNX
Runtime computes at load, the model computes in float. `store_codebooks` makes the file small. Of
blocks, `quantize_weights` finds the integers again, and stores them (`onnxc.numerics.blocks`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Pass, Skip, register
from onnxc.ends import ends
from onnxc.errors import OptionError
from onnxc.fitted import FitLayer, Made, along, is_on_lattice, layer_goal, unfit
from onnxc.graph import values
from onnxc.integer import weight_grid
from onnxc.matrices import Layer, LeaveOut, layers, outside
from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid
from onnxc.numerics.blocks import known_blocks
from onnxc.numerics.rounding import Method, Wish, rounded, shifts
from onnxc.numerics.sparse import Quadratic

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
    apart, to store them in few bits and compute in float. block: values of a sum that share a
    scale, 0 for all, where weights are stored so. smallest: bytes below which a weight is left
    alone. power_of_two: whether scales are powers of two, for fixed point. widths: LAYER=BITS for
    layers that have other bits than the rest, ends or not.
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
    power_of_two: bool = False
    widths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block and self.scales == "apart":
            raise OptionError("scales of blocks lie inside of a weight: leave out scales = apart")
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
            yield self._step(layer, bits, graph, context)

    def _step(self, layer: Layer, bits: int, graph: gs.Graph, context: Context) -> Pass:
        goal = layer_goal(layer, graph, context) if self.reconstruct else None
        is_done = self._is_done(layer, bits)
        reason = self.obstacle(layer, context) or (f"it has {bits} bits already" * is_done)
        made = partial(self._made, self.wish(layer, bits, context), bits)
        return FitLayer(layer, goal, reason, made, "rounded", ("rounded", "refit"))

    def obstacle(self, layer: Layer, context: Context) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        if self.scales == "inside" and not self.block:
            return unfit(layer, context.target)
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        if self.block:
            return _uncut(layer)
        return "" if layer.has_gains else "its outputs lie along all axes of its weight"

    def wish(self, layer: Layer, bits: int, context: Context) -> Wish:
        """What a weight is put on; of 8 bits the integers that the kernels of the target take.

        Each layer draws other numbers.
        """
        seed, is_wide = zlib.crc32(f"{context.seed} {layer.name}".encode()), bits == WIDEST
        if self.block:
            grid = Grid(bits, narrow=is_wide)
            return Wish(grid, self.block, is_mirrored=not is_wide, seed=seed)
        is_inside = is_wide and self.scales == "inside"
        grid = weight_grid(context.target) if is_inside else Grid(bits)
        return shifts(grid, seed) if self.power_of_two else Wish(grid, seed=seed)

    def _is_done(self, layer: Layer, bits: int) -> bool:
        """Whether a weight is on such integers already."""
        if self.block:
            rows = layer.matrix.reshape(-1, layer.matrix.shape[2], 1)
            return known_blocks(rows, bits, self.block) is not None
        if self.power_of_two:
            return fixed.is_on_grid(values(layer.weight), along(layer), Grid(bits))
        return is_on_lattice(layer, bits)

    def _made(self, wish: Wish, bits: int, W: Array, E: Quadratic) -> Made:
        made = rounded(W, E, wish, self.rounding)
        kind = f" as {fixed.name(made.scales, bits, True)}" if self.power_of_two else ""
        parts = None if self.scales == "inside" else (made.codes, made.scales)
        return Made(made.weight, f"{bits} bits{kind}", parts)


def _uncut(layer: Layer) -> str:
    """Why the sums of a layer are not cut into blocks; empty if they are."""
    if layer.is_overlapping or not layer.keys:
        return "it is rounded where it is stored: " + (layer.unmeasured or "its outputs overlap")
    return ""
