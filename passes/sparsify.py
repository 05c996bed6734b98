"""Make weights zero where the outputs feel it least, and fit the others to the outputs.

For a layer with the second moments H and the mean mu of its input (`onnxc.moments`), the weight Ŵ
is the solution of `onnxc.numerics.sparse`, and the bias takes in what the mean output moved by:

    Ŵ = argmin E(Ŵ) with so many zeros,      b <- b + (W − Ŵ) mu

How many zeros a layer gets is decided for all of them together (`allocation` global): with E_l(s)
the error that a share s of zeros makes, relative to the power of the layer's output,

    min Σ_l E_l(s_l),     Σ_l n_l s_l = sparsity · Σ_l n_l,

so that thin layers, and mostly the first and the last, keep more. N:M patterns are counted along
the input channels, for each output and kernel offset: of M consecutive ones N stay, which is what
sparse tensor cores skip in weights laid out with the channels last.

Without moments, weights go by magnitude. Weights that several layers share get the sum of their H.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.matrices import Layer, error, layers, outside, put
from onnxc.numerics import sparse
from onnxc.numerics.sparse import Pattern, Quadratic

Array = NDArray[Any]

SLACK = 1e-6  # of a share of zeros


@register
@dataclass(frozen=True)
class Sparsify:
    """Make weights zero where the outputs feel it least.

    sparsity: share of the weights of all layers together that are zero.
    nm: N:M, such as 2:4, in place of a share: of M consecutive input channels N stay.
    criterion: what tells which weights matter. With obs the others are fitted to the outputs.
    allocation: whether layers share the zeros so that their errors add up to the least.
    """

    name: ClassVar[str] = "sparsify"
    lossless: ClassVar[bool] = False

    sparsity: float = 0.5
    nm: str = ""
    criterion: Literal["obs", "magnitude", "wanda", "obd"] = "obs"
    allocation: Literal["global", "uniform"] = "global"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise OptionError(f"sparsity is a share between 0 and 1, not {self.sparsity:g}")
        if self.nm and self.pattern is None:
            raise OptionError(f"nm is N:M with N below M, such as 2:4, not {self.nm!r}")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M, or None."""
        found = re.fullmatch(r"(\d+):(\d+)", self.nm)
        pair = (int(found[1]), int(found[2])) if found else (0, 0)
        return pair if 0 < pair[0] < pair[1] else None

    @property
    def summary(self) -> str:
        """What becomes zero, in a few words."""
        what = self.nm or f"{100 * self.sparsity:g} % zero"
        how = "" if self.nm else f", {self.allocation}"
        return f"{what} by {self.criterion}{how}"

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = layers(graph, context.only.names(graph))
        return [key for layer in found if not self._obstacle(layer) for key in layer.keys]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        with threadpool_limits(1, user_api="blas"):  # most matrices are too small to share
            return self._apply(graph, context)

    def _apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = layers(graph, context.only.names(graph))
        results: list[Change | Skip] = list(outside(graph, "sparse"))
        obstacles = [(layer, self._obstacle(layer)) for layer in found]
        for layer, reason in obstacles:
            results += [Skip(n.name, f"not sparse: {reason}") for n in layer.nodes if reason]
        rest = [layer for layer, reason in obstacles if not reason]
        for layer, share in zip(rest, self._shares(rest, context), strict=True):
            results += self._rewrite(graph, layer, share, context)
        return results

    def _obstacle(self, layer: Layer) -> str:
        """Why a weight stays as it is, or cannot have the N:M pattern; empty if it can."""
        obstacle = layer.obstacle or layer.unmeasured
        if obstacle or self.pattern is None:
            return obstacle
        channels, m = layer.channels, self.pattern[1]
        return f"its {channels} input channels are no multiple of {m}" if channels % m else ""

    def _shares(self, found: Sequence[Layer], context: Context) -> list[float]:
        """The share of zeros of each layer."""
        sizes = [layer.size for layer in found]
        if self.pattern is not None:
            return [1 - self.pattern[0] / self.pattern[1]] * len(found)
        if self.allocation == "uniform":
            return [self.sparsity] * len(found)
        if sum(layer.zeros for layer in found) >= (self.sparsity - SLACK) * sum(sizes):
            return [layer.zeros / layer.size for layer in found]
        curves = [self._curve(layer, context) for layer in found]
        return sparse.allocate(curves, sizes, self.sparsity)

    def _curve(self, layer: Layer, context: Context) -> Array:
        E = error(layer, context)
        return sparse.curve(layer.matrix, E, self._criterion(E))

    def _criterion(self, E: Quadratic) -> sparse.Criterion:
        """Without moments there is only the magnitude."""
        return self.criterion if E.blocks else "magnitude"

    def _keeps(self, layer: Layer, share: float) -> Pattern:
        """Which scores of a layer stay."""
        if self.pattern is not None:
            return sparse.n_of_m(*self.pattern, layer.offsets)
        keep = layer.size - math.ceil(share * layer.size - SLACK)
        return sparse.largest_in_rows(keep) if self.criterion == "wanda" else sparse.largest(keep)

    def _rewrite(
        self, graph: gs.Graph, layer: Layer, share: float, context: Context
    ) -> Iterator[Change | Skip]:
        W, keeps = layer.matrix, self._keeps(layer, share)
        if not (W[~keeps(np.abs(W))]).any():
            none = "none of its weights is to be zero"
            reason = none if share < SLACK else "it is that sparse already"
            yield from (Skip(node.name, f"not sparse: {reason}") for node in layer.nodes)
            return
        E = error(layer, context)
        found = sparse.sparse(W, E, self._criterion(E), keeps)
        zeros, lost = np.mean(found == 0), E.error(W - found) / E.error(W)
        what = f"made sparse, {100 * zeros:.1f} % zero, {100 * lost:.2g} % of its output lost"
        if not E.blocks:
            what += " if inputs are alike: nothing is known of them, so by magnitude"
        yield from put(graph, layer, found, context, "sparse", what)
