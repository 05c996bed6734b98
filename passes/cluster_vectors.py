"""Let the weights of a layer share few vectors, chosen so that its outputs stay.

The rows of W are cut into sub-vectors, and each becomes a codeword of a book, times the scale of
its row (`onnxc.numerics.subvectors`). METHODS says what is cut:

    pq        sub-vectors of s columns, a length that suits the layer    Gong 2015, Wu 2016
    rq        the same, each a sum of codewords of several books         Gong 2015
    kernels   whole kernels of a convolution, s = their size             Son 2018
    filters   whole rows, s = d                                          after Dubey 2018

Dubey 2018 ("Coreset-based neural network compression") stands in for the filters of a layer by few
weighted ones that give the same activations. Here it is the counterpart in the metric C: K filters
and, for each output, which of them it takes and how much of it.

With data, layers are taken one after the other: codewords approach what a layer gives in the
original, on what it gets from the layers before it as they are by now (`onnxc.goals`), and its bias
makes the mean right. With statistics alone they approach W x on the original's own x.

The graph makes the weight of books and codes (`onnxc.storage.codewords`). What a sum of codewords
is made of can't be told from the sum, so nothing may change the weight after this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from onnxc.graph import nbytes
from onnxc.matrices import Layer, LeaveOut, layers, outside
from onnxc.numerics import vector_fit
from onnxc.numerics.codebook import PINNED
from onnxc.numerics.sparse import Quadratic
from onnxc.numerics.subvectors import Vectors
from onnxc.numerics.vector_fit import Bounds, Form
from onnxc.storage.codebooks import least_opset
from onnxc.storage.codewords import Codewords, overhead

Array = NDArray[Any]
VectorMethod = Literal["pq", "rq", "kernels", "filters"]

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 16, 18)


def _sub_vectors(layer: Layer, d: int) -> Sequence[int]:
    return LENGTHS


def _kernels(layer: Layer, d: int) -> Sequence[int]:
    """The size of a kernel; of a layer that has none, sub-vectors."""
    is_kernel = layer.is_linear and not layer.is_overlapping and layer.offsets > 1
    return (layer.offsets,) if is_kernel else LENGTHS


def _rows(layer: Layer, d: int) -> Sequence[int]:
    return (d,)


METHODS: dict[str, Callable[[Layer, int], Sequence[int]]] = {
    "pq": _sub_vectors,
    "rq": _sub_vectors,
    "kernels": _kernels,
    "filters": _rows,
}


@register
@dataclass(frozen=True)
class ClusterVectors:
    """Let the weights of each layer share few vectors.

    method: what is cut out of weights.
    rate: of vectors, bits a weight that codes, codebooks and scales take at most; 0 for what bits
    and length take.
    bits: of a code, at most, 1 to 8.
    length: of sub-vectors; 0 for the one of each layer that loses least.
    books: of rq, how many codewords are summed.
    forms: vectors of some layers in place of all that, as NODE=LENGTHxCOUNT, with an s behind it
    for a scale of each row.
    smallest: bytes below which a weight is left alone.
    reconstruct: whether layers are fitted to the original's outputs, one after the other, or each
    to what it gives by itself.
    """

    name: ClassVar[str] = "cluster-vectors"
    lossless: ClassVar[bool] = False

    method: VectorMethod = "pq"
    rate: float = 2.0
    bits: int = 8
    length: int = 0
    books: int = 2
    forms: tuple[str, ...] = ()
    smallest: int = 1024
    reconstruct: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits of a code are 1 to 8, not {self.bits}")
        if self.rate < 0:
            raise OptionError(f"rate is bits a weight, 0 or more, not {self.rate:g}")
        if self.length < 0:
            raise OptionError(f"length of sub-vectors is 0 or more, not {self.length}")
        if not 2 <= self.books <= 8:
            raise OptionError(f"books to be summed are 2 to 8, not {self.books}")
        if self.length and self.method in ("kernels", "filters"):
            raise OptionError(f"length goes with pq and rq; {self.method} have their own")
        self.given  # noqa: B018 - raises where an entry cannot be read

    @property
    def summary(self) -> str:
        """What is shared, in a few words."""
        most = f"{self.rate:g} bits a weight" if self.rate else f"{self.bits}-bit codes"
        return f"vectors by {self.method}, {most}"

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph), everything=True)
        return [key for layer in found if not self.obstacle(layer) for key in layer.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a layer, in the order of first nodes."""
        books = Codewords(graph, context.opset)
        yield LeaveOut(tuple(outside(graph, "clustered")))
        found = layers(graph, context.only.names(graph), everything=True)
        sizes = [layer.size for layer in found if not self.obstacle(layer)]
        typical = sum(sizes) / max(len(sizes), 1)
        for layer in found:
            goal = layer_goal(layer, graph, context) if self.reconstruct else None
            cut, reason = Cut(self, layer, books, typical, context.seed), self.obstacle(layer)
            yield FitLayer(layer, goal, reason, cut, "clustered", ("shared", "shared"), True)

    def obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        size = nbytes(layer.weight)
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        if layer.zeros >= PINNED * layer.size:
            return "its zeros would not stay: sparse weights share values, as by --method dp"
        return ""

    def lengths(self, layer: Layer, d: int) -> Sequence[int]:
        """Of sub-vectors that a layer of rows of d may be cut into."""
        lengths = (self.length,) if self.length else METHODS[self.method](layer, d)
        return [s for s in lengths if d % s == 0]

    @property
    def sums(self) -> int:
        """Codewords for each sub-vector."""
        return self.books if self.method == "rq" else 1

    @property
    def given(self) -> dict[str, Form]:
        """Forms by layer. Raises OptionError for an entry that cannot be read."""
        pairs = [entry.rpartition("=") for entry in self.forms]
        try:
            return {name: Form.read(text, self.sums) for name, _, text in pairs}
        except ValueError as error:
            raise OptionError(f"{error}: write NODE=9x64") from error

    def tried(self, layer: Layer, rows: int, d: int, opset: int) -> list[Form]:
        """The forms to try for a layer."""
        given = self.given.get(layer.name)
        if given is not None and d % given.length:
            return []
        if given is not None and given.bits in self.widths(opset):
            return [given]
        bounds = Bounds(self.rate, self.widths(opset), self.sums)
        return list(vector_fit.forms(rows, d, self.lengths(layer, d), bounds))

    def widths(self, opset: int) -> tuple[int, ...]:
        """Bits that codes may have."""
        return tuple(b for b in range(1, self.bits + 1) if least_opset(b) <= opset)


@dataclass(frozen=True)
class Cut:
    """Puts one layer on codewords, as a whole pass wants it. typical: weights of a layer."""

    whole: ClusterVectors
    layer: Layer
    books: Codewords
    typical: float
    seed: int

    def __call__(self, W: Array, E: Quadratic) -> Made | str:
        """The codewords of a weight; why there are none where no form is within bounds."""
        rows, d = W.shape[0] * W.shape[1], W.shape[2]
        opset, whole = self.books.opset, self.whole
        tried = [
            form
            for form in whole.tried(self.layer, rows, d, opset)
            if all(C.shape[1] % form.length == 0 for C in E.blocks)
        ]
        if not tried:
            rate = f" in {whole.rate:g} bits a weight" if whole.rate else ""
            size = nbytes(self.layer.weight)
            return f"its weight of {size} bytes has no room for a codebook{rate}"
        form, begun = vector_fit.choose(W, E, tried, self._overhead, self.typical, self.seed)
        found = vector_fit.finish(W, E, begun, form.is_scaled)
        return Made(found.weight, _told(form), write=partial(self._write, form, found))

    def _overhead(self, form: Form) -> int:
        return overhead(form, self.layer.is_turned, self.books.opset)

    def _write(self, form: Form, found: Vectors) -> int:
        """Put the nodes in place that make the weight; bytes stored."""
        layer, weight = self.layer, self.layer.weight
        if not form.is_plain:
            return self.books.put(weight, found, form.bits, layer.is_turned)
        levels = (found.books[0, :, 0] * found.scale.flat[0]).astype(weight.dtype)
        codes = layer.shaped(found.codes[0]).astype(np.intp)
        return self.books.write(weight, levels, codes, form.bits)


def _told(form: Form) -> str:
    """What a weight is, in a few words."""
    several = f" in each of {form.books} books" if form.books > 1 else ""
    scales = ", rows scaled" if form.is_scaled else ""
    return f"{form.count} codewords{several} of length {form.length}{scales}"
