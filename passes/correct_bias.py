"""Correct the biases of heavy nodes for what rounding the weights did to the mean of their outputs.

    b <- b + E[y − ŷ]       for each output channel

y being the output in the graph as it is and ŷ the one with weights rounded (`perturb`), measured
layer after layer with all the layers before already corrected (`calib.twin`): correcting all at
once overshoots. Nagel 2019, "Data-free quantization through weight equalization and bias
correction", with data in place of the batch-norm statistics.

Without a run, from the mean mu of the rows of the layer's input alone (§4.2 there, `by` "mean"):

    b <- b + (W − Ŵ) mu

Either way means come back to those of the float graph, so that statistics of it still hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import values
from onnxc.integer import round_weights, rounded, weighted_nodes
from onnxc.moments import mean_output, moments_key
from onnxc.ops import knowledge, weight_of

Array = NDArray[np.float64]
MISSING = {
    "drift": "its drift was not measured",
    "mean": "the mean of its input is not known",
}


@register
@dataclass(frozen=True)
class CorrectBias:
    """Let the outputs of heavy nodes keep their means when the weights are rounded.

    bits, power_of_two, ops: of the rounding to come. by: what tells how means move: the drift of
    each output, measured layer after layer, or the mean of each input, as a statistics file has it.
    """

    name: ClassVar[str] = "correct-bias"
    lossless: ClassVar[bool] = False

    bits: int = 8
    power_of_two: bool = False
    ops: tuple[str, ...] = ()
    by: Literal["drift", "mean"] = "drift"

    @property
    def keeps_statistics(self) -> bool:
        return self.by == "mean"

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        nodes = weighted_nodes(graph, context, self.ops)
        keys = (self._key(node) for node in nodes if has_place(node))
        return [key for key in keys if key is not None]

    def perturb(self, graph: gs.Graph, context: Context) -> None:
        """What the drift is to be measured of: round the weights of a copy of the graph."""
        round_weights(graph, context, self.ops, self.bits, self.power_of_two)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        results: list[Change | Skip] = []
        for node in weighted_nodes(graph, context, self.ops):
            if not has_place(node):
                results.append(Skip(node.name, "bias not corrected: the node has none"))
                continue
            key = self._key(node)
            if key is None or key not in context.stats:
                results.append(Skip(node.name, f"bias not corrected: {MISSING[self.by]}"))
                continue
            shift = self._shift(node, context, context.stats[key])
            results.append(_correct(graph, node, shift))
        return results

    def _key(self, node: gs.Node) -> Key | None:
        if self.by == "mean":
            return moments_key(node)
        return Key(node.outputs[0].name, "drift", knowledge(node).y_axis)

    def _shift(self, node: gs.Node, context: Context, found: Any) -> Array:
        """E[y − ŷ] of each output channel."""
        if self.by == "drift":
            return np.asarray(found, np.float64)
        weight = weight_of(node)
        assert weight is not None
        exact = values(weight).astype(np.float64)
        on_grid = rounded(node, values(weight), context, self.bits, self.power_of_two)
        return mean_output(node, exact - on_grid, found.mean)


def _correct(graph: gs.Graph, node: gs.Node, drift: Array) -> Change | Skip:
    if not drift.any():
        return Skip(node.name, "bias not corrected: the mean of its output stays as it is")
    sizes = shift_bias(graph, node, drift, "corrected")
    if sizes is None:
        return Skip(node.name, "bias not corrected: it has another shape than the channels")
    shift = float(np.abs(drift).max())
    return Change(node.name, f"bias corrected by up to {shift:.2g}", *sizes)
