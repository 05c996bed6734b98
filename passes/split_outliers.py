"""Split the channels of a few large weights or activations, so that all others get a finer step.

A channel that ends the range of a tensor, or of the weights that read it, becomes several, each
with a part of it (`onnxc.numerics.splitting`: outlier channel splitting, Zhao 2019). What makes the
channels, carries them along and reads them is widened (`onnxc.channels.widened`); where that cannot
be, one Gather copies them in front of the layers that read a tensor, if that is asked for. Inputs
are divided by way of what makes them (`onnxc.scalable`); where that is not linear, only weights are
split. The function stays.

Few channels, up to a share of all, are split, and only where the modelled error of what reads them
falls by more than WORTH.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.widened import Order
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import fresh, nbytes, store, values
from onnxc.integer import activation_grid, weight_axis, weight_grid
from onnxc.moments import matrix, moments_key
from onnxc.numerics.affine import along
from onnxc.numerics.splitting import Problem, Reader, Split, copies, part, split, steps
from onnxc.ops import knowledge, weight_of
from onnxc.outliers import Candidate, candidates
from onnxc.scalable import scale

Array = NDArray[Any]

WORTH = 0.8  # of the error as it is, that it has to be below


@register
@dataclass(frozen=True)
class SplitOutliers:
    """Split the channels of a few large weights or activations into several.

    share: of the channels of a tensor, how many copies there may be. bits: of the weights that are
    quantized later. per_tensor: whether a weight then has one scale in all. gather: whether
    channels of what cannot be widened are copied by a Gather.
    """

    name: ClassVar[str] = "split-outliers"
    lossless: ClassVar[bool] = True
    rescales: ClassVar[bool] = True

    share: float = 0.05
    bits: Literal[2, 3, 4, 5, 6, 8] = 8
    per_tensor: bool = False
    gather: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(
                f"share is a part of the channels, above 0 and up to 1, not {self.share:g}"
            )

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = candidates(graph, context, self.gather)
        return dict.fromkeys(key for x in found if not x.obstacle for key in x.statistics)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = candidates(graph, context, self.gather)
        return [self._apply(graph, candidate, context) for candidate in found]

    def _apply(self, graph: gs.Graph, candidate: Candidate, context: Context) -> Change | Skip:
        first = candidate.first
        if candidate.obstacle:
            return Skip(first, f"channels not split: {candidate.obstacle}")
        if any(key not in context.stats for key in candidate.statistics):
            return Skip(first, "channels not split: nothing was measured on them")
        q = weight_grid(context.target, self.bits).high
        found = split(self._problem(candidate, context, q), copies(self.share, candidate.count))
        left = found.after / found.before if found.before else 1.0
        if not left < WORTH:
            return Skip(first, f"channels not split: {left:.0%} of the error would stay")
        before = _bytes(candidate)
        self._write(graph, candidate, found, context, q)
        names = ", ".join(node.name for node in candidate.readers)
        what = f"{_told(found)}: {left:.0%} of the error is left in {names}"
        return Change(first, what, before, _bytes(candidate))

    def _problem(self, candidate: Candidate, context: Context, q: int) -> Problem:
        """Of the layers that read the channels."""
        grid = activation_grid(context.target)
        readers = [self._reader(candidate, node, context) for node in candidate.readers]
        low, high = candidate.ends(context)
        if context.target.symmetric:
            low, high = np.minimum(low, -high), np.maximum(high, -low)
        return Problem(low, high, readers, grid.high - grid.low, q, candidate.scaled is not None)

    def _reader(self, candidate: Candidate, node: gs.Node, context: Context) -> Reader:
        weight, key = weight_of(node), moments_key(node)
        assert weight is not None and key is not None
        W, numbers = matrix(node, values(weight))[0], candidate.numbers[node.name]
        columns = np.repeat(numbers, W.shape[1] // len(numbers))
        is_one = self._has_one_scale(node, context)
        return Reader.of(W, context.stats[key].diagonal[0], columns, candidate.count, is_one)

    def _has_one_scale(self, node: gs.Node, context: Context) -> bool:
        return self.per_tensor or weight_axis(node, context) is None

    def _write(
        self, graph: gs.Graph, candidate: Candidate, found: Split, context: Context, q: int
    ) -> None:
        """Divide what makes the channels, copy them, and part the weights that read them."""
        if (found.s > 1).any():
            assert candidate.scaled is not None
            group, numbers = candidate.scaled
            scale(graph, group, found.s[numbers], "split")
        assert candidate.copy is not None
        candidate.copy(found.k)
        for node in candidate.readers:
            order = Order.of(found.k[candidate.numbers[node.name]])
            _part(graph, node, order, self._has_one_scale(node, context), q)


def _part(graph: gs.Graph, node: gs.Node, order: Order, has_one_scale: bool, q: int) -> None:
    """Parts of a weight's columns in the place of as many equal ones."""
    row, old = knowledge(node), weight_of(node)
    assert row.in_axis is not None and row.out_axis is not None and old is not None
    inside, outside, w = row.in_axis(node), row.out_axis(node), values(old)
    if w.shape[inside] < len(order.position):  # a Gather copies what it reads, not the weight
        w = np.take(w, order.position, inside)
    k, i = (along(x, inside, w.ndim) for x in (order.count, order.turn))
    peaks = np.abs(w).max(axis=tuple(range(2, w.ndim)))
    peaks = peaks if outside == 0 else peaks.T
    peaks = peaks.max(axis=0, keepdims=True) if has_one_scale else peaks
    step = along(steps(peaks, order.count, q), None if has_one_scale else outside, w.ndim)
    made = part(w, k, i, step).astype(old.dtype)
    node.inputs[row.weight] = store(graph, fresh(graph, f"{old.name}_split"), made)


def _bytes(candidate: Candidate) -> int:
    """Of the weights that read the channels."""
    found = (weight_of(node) for node in candidate.readers)
    return sum(nbytes(weight) for weight in found if weight is not None)


def _told(found: Split) -> str:
    inputs, more = int((found.s > 1).sum()), int((found.k - 1).sum())
    weights = int((found.k > 1).sum()) - inputs
    parts = [f"{inputs} for their inputs"] * (inputs > 0)
    parts += [f"{weights} for their weights"] * (weights > 0)
    return f"{inputs + weights} of {len(found.k)} channels split ({', '.join(parts)}), {more} more"
