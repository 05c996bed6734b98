"""Which range each quantized tensor got, and what calibration had seen of its values.

A pair of scale s and zero point z represents the values from s (q_min − z) to s (q_max − z); what
lies more than s / 2 outside is clipped. How much that is, is counted in the calibration's
histogram of the tensor, in the graph that the quantizing pass got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.observers import SIDE, HistogramObserver
from onnxc.core import Key, Pass
from onnxc.graph import Model, values, walk

SHOWN = 64  # bins of a picture

Array = NDArray[Any]
Memo = Mapping[Any, Mapping[Key, Any]]  # of `onnxc.pipeline.Calibration`


@dataclass(frozen=True)
class Span:
    """One quantized tensor.

    type: of its integers. low, high: the values that they reach. least, most: those that
    calibration saw. clipped: share of the values outside. counts: a histogram of the values from
    least to most, in bins of one width.
    """

    tensor: str
    type: str
    scale: float
    zero_point: int
    low: float
    high: float
    least: float
    most: float
    clipped: float
    counts: tuple[int, ...] = ()

    @property
    def used(self) -> float:
        """Share of the integers' range that the seen values cover."""
        inside = min(self.most, self.high) - max(self.least, self.low)
        return max(inside, 0.0) / max(self.high - self.low, 1e-30)


def spans(model: Model, seen: Mapping[str, HistogramObserver]) -> tuple[Span, ...]:
    """Of the activations with one scale each that have a histogram; in the order of the graph."""
    found: dict[str, Span] = {}
    for graph in walk(model.graph):
        for node in graph.nodes:
            for name, parts in _grids(node):
                if name in seen and name not in found:
                    found |= {span.tensor: span for span in _span(name, parts, seen[name])}
    return tuple(found.values())


def _grids(node: gs.Node) -> Iterator[tuple[str, list[gs.Tensor]]]:
    """Tensors that a node quantizes, or makes in integers, each with its scale and zero point.

    The latter are known by their names, "y_scale" and "y_zero_point".
    """
    if node.op == "QuantizeLinear":
        yield node.inputs[0].name, node.inputs[1:]
        return
    named = {tensor.name: tensor for tensor in node.inputs}
    stems = (name.removesuffix("_scale") for name in named if name.endswith("_scale"))
    for stem in stems:
        zero = named.get(f"{stem}_zero_point")
        if zero is not None:
            yield stem, [named[f"{stem}_scale"], zero]


def histograms(memo: Memo, passes: tuple[Pass, ...]) -> dict[str, HistogramObserver]:
    """Those of tensors, by name, of the graph as it stood last on the way of these passes."""
    found: dict[str, HistogramObserver] = {}
    states = [(key[0], stats) for key, stats in memo.items() if _is_on_way(key[0], passes)]
    for _, stats in sorted(states, key=lambda item: len(item[0])):
        found |= {
            key.tensor: observed
            for key, observed in stats.items()
            if isinstance(observed, HistogramObserver) and key.minus is None and observed.binned
        }
    return found


def _is_on_way(state: Any, passes: tuple[Pass, ...]) -> bool:
    return isinstance(state, tuple) and state == passes[: len(state)]


def _span(name: str, parts: list[gs.Tensor], seen: HistogramObserver) -> Iterator[Span]:
    """Nothing where the scale is computed, or one for each channel."""
    constants = [tensor for tensor in parts if isinstance(tensor, gs.Constant)]
    if not seen.is_finite or len(constants) < len(parts):
        return
    scale, *zeros = (np.asarray(values(constant)) for constant in constants)
    zero = zeros[0] if zeros else np.uint8(0)
    if scale.size != 1 or zero.dtype.kind not in "iu":
        return
    s, z, limits = float(scale.item()), int(zero.item()), np.iinfo(zero.dtype)
    low, high = s * (int(limits.min) - z), s * (int(limits.max) - z)
    clipped = _outside(seen, low - s / 2, high + s / 2)
    yield Span(
        name, zero.dtype.name, s, z, low, high, seen.low, seen.high, clipped, _few_bins(seen)
    )


def _centres(seen: HistogramObserver) -> Array:
    j = np.arange(1 - SIDE, SIDE)
    centres: Array = (j + 0.5 * np.sign(j)) * seen.width
    return centres


def _outside(seen: HistogramObserver, low: float, high: float) -> float:
    x = _centres(seen)
    return float(seen.counts[(x < low) | (x > high)].sum() / max(seen.binned, 1))


def _few_bins(seen: HistogramObserver) -> tuple[int, ...]:
    if not seen.low < seen.high:
        return (seen.binned,)
    centres = np.clip(_centres(seen), seen.low, seen.high)
    counts, _ = np.histogram(centres, SHOWN, (seen.low, seen.high), weights=seen.counts)
    return tuple(int(count) for count in counts)
