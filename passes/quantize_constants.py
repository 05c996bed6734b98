"""Write the weights of nodes whose input is quantized already as integers, and their biases.

What comes between `quantize` with weights left float and this sees activations as the runtime will
give them, so that weights may be fitted to make up for their rounding (`quantize_layers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import nbytes, values
from onnxc.held import Constants
from onnxc.integer import refused_nodes, weighted_nodes
from onnxc.ops import is_constant, weight_of


@register
@dataclass(frozen=True)
class QuantizeConstants:
    """Quantize weights and biases of nodes between Q/DQ pairs.

    power_of_two: whether scales of weights are powers of two.
    """

    name: ClassVar[str] = "quantize-constants"
    lossless: ClassVar[bool] = False

    power_of_two: bool = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        results: list[Change | Skip] = list(refused_nodes(graph, context))
        constants = Constants(graph, context, power_of_two=self.power_of_two)
        for node in list(weighted_nodes(graph, context)):
            results.append(_write(node, constants))
        graph.nodes = [*constants.nodes, *graph.nodes]
        return results


def _write(node: gs.Node, constants: Constants) -> Change | Skip:
    makers, weight = node.inputs[0].inputs, weight_of(node)
    assert weight is not None
    if not makers or makers[0].op != "DequantizeLinear" or not is_constant(makers[0].inputs[1]):
        return Skip(node.name, "its input is not quantized")
    s_x = values(makers[0].inputs[1])
    if s_x.size > 1:
        return Skip(node.name, "its input has a scale for each channel; kernels take one")
    before, count = nbytes(weight), int(np.prod(weight.shape))
    scale = constants.write(node, np.float32(s_x.reshape(())))
    what = f"int8 weights, {scale.size} scale{'s' if scale.size > 1 else ''}"
    return Change(node.name, what, before, count + 4 * scale.size)
