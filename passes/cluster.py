"""Let the weights of a layer share few values, chosen so that its outputs stay.

For W with the second moments H and the mean mu of its layer's input, Ŵ has at most K = 2^bits
distinct values, a codebook c with codes a (`onnxc.numerics.codebook`):

    min tr (W − Ŵ) C (W − Ŵ)ᵀ,   Ŵ = c[a],   C = H − mu muᵀ,      b <- b + (W − Ŵ) mu

The levels c start from one of `onnxc.numerics.sharing.METHODS` on the weights, each counting with
C_jj. Then codes and levels are fitted in turn to C. Without moments C is I, and levels are those of
the weights alone.

A weight that has many zeros keeps them: one level is 0, so that what was made sparse stays sparse.
On the `grid` int8 levels are multiples of max |c| / 127, as integer kernels want them.

The weights stay plain here; `store_codebooks` is what makes the file small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import values
from onnxc.matrices import Layer, error, layers, outside, put
from onnxc.numerics import codebook
from onnxc.numerics.codebook import Codebook
from onnxc.numerics.kmeans import Init, Points
from onnxc.numerics.recluster import PINNED, snap
from onnxc.numerics.sharing import METHODS, Method, Wish, bit_price, share

Array = NDArray[Any]


@register
@dataclass(frozen=True)
class Cluster:
    """Let the weights of each layer share few values.

    bits: of a code, 1 to 8: 2^bits values. method: what finds the values. init: where kmeans,
    hessian, ecsq and gmm start. refine: whether codes and values are then fitted to the outputs.
    price: of ecsq, what a bit of code length is worth, in bits of accuracy. grid: values are any
    floats, or int8 times one scale. smallest: bytes below which a weight is left alone.
    """

    name: ClassVar[str] = "cluster"
    lossless: ClassVar[bool] = False

    bits: int = 4
    method: Method = "dp"
    init: Init = "linear"
    refine: bool = True
    price: float = 1.0
    grid: Literal["float", "int8"] = "float"
    smallest: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits of a code are 1 to 8, not {self.bits}")
        if self.price < 0:
            raise OptionError(f"price is 0 or more, not {self.price:g}")

    @property
    def summary(self) -> str:
        """What is shared, in a few words."""
        return f"{self.bits}-bit codebooks by {self.method}" + (
            " on int8" if self.grid == "int8" else ""
        )

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph), everything=True)
        return [key for layer in found if not self._obstacle(layer) for key in layer.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        results: list[Change | Skip] = list(outside(graph, "clustered"))
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            for layer in layers(graph, context.only.names(graph), everything=True):
                reason = self._obstacle(layer)
                if reason:
                    results += [Skip(n.name, f"not clustered: {reason}") for n in layer.nodes]
                else:
                    results += self._rewrite(graph, layer, context)
        return results

    def _obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is; empty if it need not."""
        if layer.obstacle:
            return layer.obstacle
        size = layer.size * np.dtype(layer.weight.dtype).itemsize
        if size < self.smallest:
            return f"its weight has {size} bytes, fewer than {self.smallest}"
        count = len(np.unique(values(layer.weight)))
        return f"it has {count} values already" if count <= 2**self.bits else ""

    def _rewrite(self, graph: gs.Graph, layer: Layer, context: Context) -> Iterator[Change]:
        W, E = layer.matrix, error(layer, context)
        found = self._shared(W, E, layer.zeros >= PINNED * layer.size, context.seed)
        lost = E.error(W - found.weight) / max(E.error(W), 1e-300)
        told = f"{len(found.levels)} values, {100 * lost:.2g} % of its output lost"
        if self.method == "ecsq":
            told += f", {found.entropy:.2f} bits a code"
        if not E.blocks:
            told += f" if inputs are alike: {layer.unmeasured or 'nothing is known of them'}"
        yield from put(graph, layer, found.weight, context, "shared", told)

    def _shared(self, W: Array, E: Any, has_zeros: bool, seed: int) -> Codebook:
        """The codebook of a weight (groups, outputs, d)."""
        weights = np.broadcast_to(E.diagonal[:, None], W.shape) if E.blocks else None
        wish = Wish(2**self.bits, self.init, self.price, seed)
        levels = share(W, weights, self.method, wish, has_zeros)
        pinned = codebook.pin_of(levels) if has_zeros else None
        is_free = self.grid == "float"
        book = codebook.plain(W, levels if is_free else snap(levels), pinned)
        if not (self.refine and E.blocks):
            return book
        price = 0.0
        if METHODS[self.method].has_price:
            price = bit_price(Points.of(W, weights), levels, self.price)
        start = codebook.feed_forward(W, E, book)
        return codebook.fit(W, E, start, price, None if is_free else snap)
