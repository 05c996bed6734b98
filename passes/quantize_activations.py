"""Put the quantized inputs of layers on few levels of their 8-bit grid, by a table.

    x -> QuantizeLinear -> Cast -> Gather (256 codes) -> DequantizeLinear -> layer

Kernels still compute in 8 bits and see what a device computes with that has b bits an activation,
or a table of its own: the values that it would have, but not its speed. Levels are those of LQ-Nets
(`onnxc.numerics.lookup`), fitted to the histogram of the tensor.

It comes behind `quantize`. Inputs of the first and last layers keep 8 bits, sums do too, and what
only moves values of few levels hands them on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.ranges import centres
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.ends import ends
from onnxc.graph import constant, fresh, insert, values
from onnxc.numerics.lookup import counted, few, lost, table, wrapped
from onnxc.ops import is_constant, knowledge

Array = NDArray[Any]

INDEX = onnx.TensorProto.INT32
Pair = tuple[gs.Node, gs.Node]  # QuantizeLinear and DequantizeLinear


@register
@dataclass(frozen=True)
class QuantizeActivations:
    """Put the quantized inputs of layers on few levels.

    bits: of an activation. keep_ends: whether inputs of first and last layers keep 8 bits.
    """

    name: ClassVar[str] = "quantize-activations"
    lossless: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 5, 6] = 4
    keep_ends: bool = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        found = self._inputs(graph, context)
        return dict.fromkeys(_key(pair) for _, pair in found if not isinstance(pair, str))

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        results: list[Change | Skip] = []
        made: dict[str, str] = {}
        after: dict[str, list[gs.Node]] = {}
        for node, pair in list(self._inputs(graph, context)):
            if isinstance(pair, str):
                results.append(Skip(node.name, pair))
                continue
            if _key(pair) not in context.stats or not context.stats[_key(pair)].binned:
                results.append(Skip(node.name, "nothing was measured of its input"))
                continue
            name = pair[0].name
            if name not in made:
                made[name], after[name] = self._write(graph, pair, context)
            results.append(Change(node.name, made[name]))
        insert(graph, after=after)
        return results

    def _inputs(self, graph: gs.Graph, context: Context) -> Iterator[tuple[gs.Node, Pair | str]]:
        """Heavy nodes with the Q/DQ pairs of their inputs, or why these keep their bits."""
        allowed = context.only.names(graph)
        kept = ends(graph) if self.keep_ends else frozenset[str]()
        for node in graph.nodes:
            if knowledge(node).window is None:
                continue
            if node.name not in allowed:
                yield node, "excluded"
            elif node.name in kept:
                yield node, "first and last layers keep 8 bits"
            else:
                yield node, _input_pair(node)

    def _write(self, graph: gs.Graph, pair: Pair, context: Context) -> tuple[str, list[gs.Node]]:
        """Cast and Gather between the nodes of a pair, and what they do in words."""
        q, dq = pair
        codes = q.outputs[0]
        zero, limits = _zero(q), np.iinfo(codes.dtype)
        low, high = int(limits.min), int(limits.max)
        observed = context.stats[_key(pair)]
        scale = float(values(q.inputs[1]).reshape(()))
        n = observed.counts.astype(np.float64)
        counts = counted(centres(observed), n, scale, zero, low, high)
        kept = few(counts, zero, low, self.bits)
        made = table(kept, low, high)
        name = codes.name
        index = gs.Variable(fresh(graph, f"{name}_index"), np.int32, codes.shape)
        level = gs.Variable(fresh(graph, f"{name}_level"), codes.dtype, codes.shape)
        known = constant(fresh(graph, f"{name}_levels"), wrapped(made, low, codes.dtype))
        dq.inputs[0] = level
        nodes = [
            gs.Node("Cast", fresh(graph, f"{name}/Cast"), {"to": int(INDEX)}, [codes], [index]),
            gs.Node("Gather", fresh(graph, f"{name}/Gather"), {"axis": 0}, [known, index], [level]),
        ]
        what = (
            f"its input on {len(kept)} levels, {lost(counts, made, low):.2%} of the variance lost"
        )
        return what, nodes


def _key(pair: Pair) -> Key:
    return Key(pair[0].inputs[0].name, "histogram")


def _input_pair(node: gs.Node) -> Pair | str:
    """The Q/DQ pair that makes the first input of a layer, or why there is none for levels."""
    dq = _maker(node.inputs[0], "DequantizeLinear")
    if dq is None:
        return "its input is not quantized"
    q = _maker(dq.inputs[0], "QuantizeLinear")
    if q is None:
        return "its input is on few levels already"
    if values(q.inputs[1]).size > 1 or len(q.outputs[0].outputs) > 1:
        return "its input has several scales or readers"
    mover = q.inputs[0].inputs[0] if q.inputs[0].inputs else None
    if mover is not None and knowledge(mover).role == "same" and _has_levels(mover.inputs[0]):
        return "its input is on few levels already"
    return q, dq


def _has_levels(tensor: gs.Tensor) -> bool:
    """Whether a tensor comes out of a table."""
    dq = _maker(tensor, "DequantizeLinear")
    return dq is not None and _maker(dq.inputs[0], "Gather") is not None


def _maker(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """What makes a tensor, if it is such a node with constant parameters."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != op:
        return None
    if op == "Gather":
        return maker if is_constant(maker.inputs[0]) else None
    return maker if all(map(is_constant, maker.inputs[1:])) else None


def _zero(q: gs.Node) -> int:
    return int(values(q.inputs[2]).reshape(())) if len(q.inputs) > 2 else 0
