"""Put the weights of each layer on few levels of a published scheme, so that its outputs stay.

    min tr (W* − Ŵ) C (W* − Ŵ)ᵀ,    ŵ = (B t)[a],    t numbers of each output

    scheme     bits    levels of an output
    pow2       2..5    0, ± 2^k, the same window of k for a layer         INQ (Zhou 2017)
    ternary    2       −a, 0, b                                           TWN, TTQ, TGA
    binary     1..4    ± a_1 ± … ± a_M, as many bases as bits             Guo 2017; Xu 2018
    admm       2..5    0, ± α 2^k                                         Leng 2018
    levels     1..5    any                                                ZipML 2017

(`onnxc.numerics.discrete`), layer after layer, with the layers before it on levels already. W* is
the weight that best makes of what the layer now gets what it ought to give, C the metric around it
(`onnxc.fitted`). Where nothing is known of the input, such as of a table or of a recurrent state, C
is I.

Of one number for each output levels are integers times a scale. It stands `apart`, in a Mul that
ONNX Runtime computes at load, or `inside` the weights, for kernels that compute in integers; the
latter ternary weights have a = b. Of several numbers the graph makes the weight of numbers and
codes (`onnxc.storage.row_levels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Pass, Skip, register
from onnxc.ends import ends
from onnxc.errors import OptionError
from onnxc.fitted import FitLayer, Made, is_on_lattice, layer_goal, unfit
from onnxc.graph import nbytes
from onnxc.integer import weight_grid
from onnxc.matrices import Layer, LeaveOut, layers, outside
from onnxc.numerics.affine import Grid
from onnxc.numerics.codebook import PINNED
from onnxc.numerics.discrete import SCHEMES, discrete
from onnxc.numerics.rounding import Wish, rounded
from onnxc.numerics.sparse import Quadratic
from onnxc.storage.codebooks import stored_bytes
from onnxc.storage.row_levels import RowLevels, needed_opset, row_bytes
from onnxc.targets import Target

Array = NDArray[Any]
Scheme = Literal["pow2", "ternary", "binary", "admm", "levels"]

WIDEST = 8  # bits, which ends keep
SHARED = 320  # bytes that the first chain of a file may take besides its own
SOLVERS = {"binary": "bases"}  # what numerics call it
INTEGERS = {"ternary": "twn"}  # the scheme of one number for each output


@register
@dataclass(frozen=True)
class QuantizeLevels:
    """Put the weights of each layer on few levels of a scheme, layer after layer.

    scheme: which levels. bits: of a code, 2 of ternary; of binary, how many bases. keep_ends:
    whether first and last layers keep 8 bits. reconstruct: whether outputs ought to be those that
    the model had, or those of the layer. scales: apart, to compute in float, or inside the weights,
    for kernels that compute in integers. smallest: bytes below which a weight is left alone.
    """

    name: ClassVar[str] = "quantize-levels"
    lossless: ClassVar[bool] = False

    scheme: Scheme = "ternary"
    bits: int = 2
    keep_ends: bool = True
    reconstruct: bool = True
    scales: Literal["inside", "apart"] = "apart"
    smallest: int = 1024

    def __post_init__(self) -> None:
        least, most = SCHEMES[self.solver].bits
        if not least <= self.bits <= most:
            span = f"{least} to {most}" if most > least else f"{least}"
            raise OptionError(f"bits of {self.scheme} are {span}, not {self.bits}")

    @property
    def keeps_statistics(self) -> bool:
        """Means come back to what they were; refit to a goal, the rest may move."""
        return not self.reconstruct

    @property
    def solver(self) -> str:
        """The scheme of `onnxc.numerics.discrete`."""
        names = INTEGERS if self.scales == "inside" else SOLVERS
        return names.get(self.scheme, SOLVERS.get(self.scheme, self.scheme))

    @property
    def pattern(self) -> Array:
        return SCHEMES[self.solver].pattern(self.bits)

    @property
    def summary(self) -> str:
        """What weights are put on, in a few words."""
        count = f"{self.bits} {'base' if self.scheme == 'binary' else 'bit'}{'s'[: self.bits > 1]}"
        return "ternary" if self.scheme == "ternary" else f"{self.scheme} of {count}"

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return [key for x in self._layers(graph, context) if not x.obstacle for key in x.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a layer, in the order of first nodes."""
        yield LeaveOut(tuple(outside(graph, "quantized")))
        kept = ends(graph) if self.keep_ends else frozenset[str]()
        books = RowLevels(graph, context.opset)
        for layer in self._layers(graph, context):
            is_end = any(node.name in kept for node in layer.nodes)
            goal = layer_goal(layer, graph, context) if self.reconstruct else None
            made = partial(self._rounded, context) if is_end else partial(self._made, layer, books)
            reason = self.obstacle(layer, context, is_end)
            yield FitLayer(layer, goal, reason, made, "quantized", ("levels", "refit"))

    def _layers(self, graph: gs.Graph, context: Context) -> list[Layer]:
        """Tables and weights of recurrent states, too, where the model computes in float."""
        return layers(graph, context.only.names(graph), everything=self.scales == "apart")

    def obstacle(self, layer: Layer, context: Context, is_end: bool) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        if is_on_lattice(layer, WIDEST) if is_end else _most_levels(layer) <= len(self.pattern):
            return "it has few levels already"
        if self.scales == "inside":
            return unfit(layer, context.target)
        return self._unsaved(layer, is_end) or self._unwritable(layer, is_end, context.opset)

    def _unsaved(self, layer: Layer, is_end: bool) -> str:
        """Why a file would not get smaller."""
        (groups, outputs, d), size = layer.matrix.shape, nbytes(layer.weight)
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        rows, itemsize = groups * outputs, np.dtype(layer.weight.dtype).itemsize
        stored = row_bytes(self.pattern, rows, d, itemsize)
        if is_end or self._has_one_number(layer):
            count, bits = (1 << WIDEST, WIDEST) if is_end else (len(self.pattern), self.bits)
            stored = stored_bytes(layer.size, count, bits, itemsize) + rows * itemsize
        is_smaller = stored + SHARED < size
        return "" if is_smaller else f"of {size} bytes of its weight, that saves none"

    def _unwritable(self, layer: Layer, is_end: bool, opset: int) -> str:
        """Why operators would not make its weight."""
        if is_end:
            return "" if layer.has_gains else "its outputs lie along all axes of its weight"
        needed = 1 if self._has_one_number(layer) else needed_opset(self.bits)
        return "" if opset >= needed else f"codes need opset {needed}, and the model has {opset}"

    def _has_one_number(self, layer: Layer) -> bool:
        """Whether levels are those of one codebook, times a gain."""
        return self.pattern.shape[1] == 1 and (layer.has_gains or self.scheme == "pow2")

    def _made(self, layer: Layer, books: RowLevels, W: Array, E: Quadratic) -> Made:
        """W (groups, outputs, d) on levels."""
        has_zeros = layer.zeros >= PINNED * layer.size
        W = np.where(layer.matrix == 0, 0, W) if has_zeros else W
        found = discrete(W, E, self.solver, self.bits, has_zeros)
        weight = found.weight
        if self.scales == "inside" or self.scheme == "pow2":
            return Made(weight, self.summary)
        if self._has_one_number(layer):
            steps = found.pattern[found.codes, 0]
            return Made(weight, self.summary, (steps, found.t))
        write = partial(books.put, layer.weight, found, layer.is_turned)
        return Made(weight, self.summary, write=write)

    def _rounded(self, context: Context, W: Array, E: Quadratic) -> Made:
        """W of an end on integers."""
        is_inside = self.scales == "inside"
        grid = weight_grid(context.target) if is_inside else Grid(WIDEST)
        made = rounded(W, E, Wish(grid), "descent")
        parts = None if is_inside else (made.codes, made.scales)
        return Made(made.weight, f"{WIDEST} bits", parts)


def _most_levels(layer: Layer) -> int:
    """Distinct values in an output, where they are most."""
    steps = np.diff(np.sort(layer.matrix, axis=2), axis=2)
    return 1 + int(np.count_nonzero(steps, axis=2).max(initial=0))


def why_no_integers(levels: QuantizeLevels, target: Target) -> str:
    """Why levels are no integers of kernels of a target, times a scale; empty if they are."""
    whole = replace(levels, scales="inside")
    if whole.pattern.shape[1] > 1:
        return f"{levels.summary} has levels of its own for each output"
    most, allowed = int(whole.pattern.max()), weight_grid(target).high
    return f"{levels.summary} has integers up to {most}" if most > allowed else ""
