"""Rewrite Q/DQ pairs as QOperator nodes: the file then holds what the integer kernels compute.

    DQ(x) · DQ(w) -> Conv -> Q                =>   QLinearConv
    DQ(a) · DQ(b) -> Add -> Q                 =>   QLinearAdd
    DQ(x) -> MaxPool -> Q, of one scale       =>   MaxPool of the integers
    DQ(x) -> Conv -> Relu -> Q                =>   QLinearConv, then Clip where it does anything

The last one because Q(y) = clip(round(y / s) + z) is monotone: Q(clip(y, l, h)) equals
clip(Q(y), Q(l), Q(h)), so a Relu or Clip acts on the integers, and does nothing where Q(l) and Q(h)
are the ends of their type. A Gemm becomes QGemm of com.microsoft, with its bias inside and a float
output where no Q follows; a MatMul without Q becomes MatMulIntegerToFloat. What ONNX Runtime has no
such operator for stays between Q/DQ, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, constant, fresh, tidy, values
from onnxc.numerics.affine import Grid, quantize
from onnxc.ops import data_inputs, knowledge
from onnxc.qoperator import FORMS, Form, Integers, Result, Site

KINDS = ("int8", "uint8")
SIZES = ("Shape", "Size")  # read a tensor, but none of its values
FILLS = {"Pad": 2}  # operators that bring in a value: its position
Names = set[str]


class RefusalError(Exception):
    """A node that stays between Q/DQ, with the reason that the Skip gives."""


@register
@dataclass(frozen=True)
class ToQOperator:
    """Replace Q/DQ pairs and the nodes between them by operators on integers."""

    name: ClassVar[str] = "to-qoperator"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        pinned = {t.name for t in graph.outputs} | captured(graph)
        results: list[Change | Skip] = []
        for node in list(graph.nodes):
            try:
                if not _is_between(node, pinned):
                    continue
                if node.name not in allowed:
                    raise RefusalError("excluded")
                results.append(_convert(graph, node, pinned))
            except RefusalError as refusal:
                results.append(Skip(node.name, str(refusal)))
        if any(isinstance(result, Change) for result in results):
            _read_sizes_of_integers(graph)
            tidy(graph)
        return results


def _is_between(node: gs.Node, pinned: Names) -> bool:
    """Whether a node reads DQ alone, and a Q reads it or it is heavy."""
    role = _role(node)
    if role not in ("weighted", "product", "sum", "same"):
        return False
    if any(_dequantized(tensor) is None for tensor in _operands(node)):
        return False
    return role in ("weighted", "product") or _result(node.outputs[0], pinned) is not None


def _role(node: gs.Node) -> str:
    row = knowledge(node)
    if row.fits is not None and not row.fits(node):
        return "opaque"
    return "same" if node.op in FILLS and not node.domain else row.role


def _operands(node: gs.Node) -> list[gs.Tensor]:
    if _role(node) == "same":
        return [node.inputs[0]]
    weight = knowledge(node).weight
    return data_inputs(node) if weight is None else [node.inputs[0], node.inputs[weight]]


def _dequantized(tensor: gs.Tensor) -> gs.Node | None:
    """The DQ that makes a tensor."""
    maker = tensor.inputs[0] if tensor.inputs else None
    return maker if maker is not None and _is(maker, "DequantizeLinear") else None


def _is(node: gs.Node, op: str) -> bool:
    return bool(node.op == op and not node.domain)


def _result(tensor: gs.Tensor, pinned: Names) -> Result | None:
    """The Q that alone reads a tensor, past Relu and Clip; None where the tensor stays float."""
    behind: list[gs.Node] = []
    while tensor.name not in pinned and len(tensor.outputs) == 1:
        (reader,) = tensor.outputs
        if _is(reader, "QuantizeLinear"):
            integers = _integers(reader, reader.outputs[0])
            return Result(integers, reader, tuple(behind))
        if knowledge(reader).role != "activation" or reader.inputs[0] is not tensor:
            return None
        behind.append(reader)
        tensor = reader.outputs[0]
    return None


def _integers(pair: gs.Node, q: gs.Tensor) -> Integers:
    """What a Q or DQ says of its integers. Raises RefusalError."""
    grid = pair.inputs[1:3]
    if len(grid) < 2 or not all(isinstance(tensor, gs.Constant) for tensor in grid):
        raise RefusalError("the scale or zero point of its Q/DQ is computed or left out")
    if pair.attrs.get("block_size", 0):
        raise RefusalError("a scale of its Q/DQ belongs to a block, and kernels take none")
    is_vector = values(grid[0]).size > 1
    scale, zero = grid
    found = Integers(q, scale, zero, int(pair.attrs.get("axis", 1)) if is_vector else None)
    if found.kind not in KINDS:
        raise RefusalError(f"its Q/DQ are {found.kind}, and kernels take 8 bits")
    return found


def _convert(graph: gs.Graph, node: gs.Node, pinned: Names) -> Change:
    """Write a node in integers. Raises RefusalError, and nothing is changed then."""
    if _role(node) == "same":
        _move(graph, node, pinned)
        return Change(node.name, f"{node.op} of integers")
    site = _site(node, pinned)
    form, before = _form(site), node.op
    bounds = _bounds(site.result)
    node.inputs = form.inputs(site)
    node.attrs = {key: value for key, value in node.attrs.items() if key in form.keeps}
    node.op, node.domain = form.op, form.domain
    if site.result is not None:
        _write(graph, node, 0, site.result, bounds)
    return Change(node.name, f"{before} -> {form.op}")


def _site(node: gs.Node, pinned: Names) -> Site:
    operands = tuple(_read(tensor) for tensor in _operands(node))
    site = Site(node, operands, result=_result(node.outputs[0], pinned))
    position = knowledge(node).bias
    if position is None or position >= len(node.inputs) or not node.inputs[position].name:
        return site
    return replace(site, bias=_bias(node.inputs[position], operands))


def _read(tensor: gs.Tensor) -> Integers:
    maker = _dequantized(tensor)
    assert maker is not None
    return _integers(maker, maker.inputs[0])


def _bias(tensor: gs.Tensor, operands: tuple[Integers, ...]) -> gs.Tensor:
    """The integers of a bias, which must be at scale s_x · s_w. Raises RefusalError."""
    maker = _dequantized(tensor)
    if maker is None or maker.inputs[0].dtype != np.int32:
        raise RefusalError("its bias is not int32")
    s_x, s_w = (values(operand.scale).astype(np.float64) for operand in operands)
    if not np.allclose(values(maker.inputs[1]), s_x * s_w, rtol=1e-5, atol=0):
        raise RefusalError("its bias has another scale than its products")
    return maker.inputs[0]


def _form(site: Site) -> Form:
    """The integer operator for a node. Raises RefusalError where there is none that fits."""
    node, made = site.node, site.result
    if node.op not in FORMS:
        raise RefusalError(f"ONNX Runtime has no {node.op} of integers")
    form = FORMS[node.op] if made is not None else FORMS[node.op].floats
    if form is None:
        raise RefusalError("its output is read in float")
    inputs = site.operands[:1] if form.weight_axis else site.operands
    activations = [*inputs, *([made.integers] if made else [])]
    kinds = dict.fromkeys(each.kind for each in activations)
    if len(kinds) > 1:
        raise RefusalError(f"it mixes {' and '.join(kinds)}, and kernels take one of them")
    if any(each.axis is not None for each in activations):
        raise RefusalError("an activation has a scale for each channel, and kernels take one")
    if form.weight_axis is not None:
        _refuse_weight(site, form.weight_axis(node))
    if set(node.attrs.get("dilations", ())) - {1} and "dilations" not in form.keeps:
        raise RefusalError(f"{form.op} has no dilations")
    return form


def _refuse_weight(site: Site, axis: int) -> None:
    x, weight = site.operands
    rank = len(weight.q.shape or ())
    if weight.axis is not None and (weight.axis % max(rank, 1) != axis or rank < 2):
        raise RefusalError("the scales of its weight lie along another axis than kernels take")
    if weight.axis is not None and site.node.op == "MatMul" and rank != 2:
        raise RefusalError(f"its weight has {rank} axes and several scales; kernels take 2")
    if x.kind == "int8" and weight.kind == "uint8":
        raise RefusalError("its input is int8 and its weight uint8, and kernels take no such pair")


def _move(graph: gs.Graph, node: gs.Node, pinned: Names) -> None:
    """Let a node that only moves values move integers. Raises RefusalError."""
    source = _read(node.inputs[0])
    moved = [i for i, tensor in enumerate(node.outputs) if tensor.dtype != np.int64]
    results = {i: _result(node.outputs[i], pinned) for i in moved}
    for result in results.values():
        if result is None:
            raise RefusalError("its output is read in float")
        if not result.integers.is_like(source):
            raise RefusalError("its output has another scale than its input")
    fill = _fill(graph, node, source)
    bounds = {i: _bounds(result) for i, result in results.items()}
    node.inputs = [source.q, *node.inputs[1:]]
    if fill is not None:
        position = FILLS[node.op]
        padding = [gs.Variable.empty() for _ in range(position - len(node.inputs))]
        node.inputs = [*node.inputs[:position], *padding, fill, *node.inputs[position + 1 :]]
    for i, result in results.items():
        assert result is not None
        _write(graph, node, i, result, bounds[i])


def _fill(graph: gs.Graph, node: gs.Node, source: Integers) -> gs.Constant | None:
    """The integer of the value that an operator brings in: 0 unless it says so."""
    position = FILLS.get(node.op)
    if position is None or node.attrs.get("mode", "constant") != "constant":
        return None
    given = node.inputs[position] if position < len(node.inputs) else gs.Variable.empty()
    if given.name and not isinstance(given, gs.Constant):
        raise RefusalError("the value that it brings in is computed")
    value = values(given) if given.name else np.zeros((), np.float32)
    return constant(fresh(graph, f"{node.name}_value"), _quantized(value.reshape(()), source))


def _quantized(value: np.ndarray, to: Integers) -> np.ndarray:
    """Q of values, by the scale and zero point of a tensor."""
    grid = Grid(signed=to.kind == "int8")
    scale, zero = (values(tensor).reshape(()) for tensor in (to.scale, to.zero))
    return quantize(value, scale, zero, grid).astype(grid.dtype)


def _bounds(result: Result | None) -> np.ndarray | None:
    """Q(l) and Q(h) of the activations before a Q; None where they are the ends of the type."""
    low, high = -inf, inf
    for node in result.behind if result else ():
        least, most = _range(node)
        low, high = min(max(low, least), most), min(max(high, least), most)
    if result is None:
        return None
    ends = _quantized(np.array([low, high]), result.integers)
    limits = np.iinfo(ends.dtype)
    return None if (ends[0], ends[1]) == (limits.min, limits.max) else ends


def _range(activation: gs.Node) -> tuple[float, float]:
    """Least and largest output of a Relu or Clip. Raises RefusalError for a computed bound."""
    positions = knowledge(activation).bounds
    if not positions:
        return 0.0, inf
    ends = [-inf, inf]
    for side, position in enumerate(positions):
        given = activation.inputs[position] if position < len(activation.inputs) else None
        if given is None or not given.name:
            continue
        if not isinstance(given, gs.Constant):
            raise RefusalError(f"{activation.name} behind it has a computed bound")
        ends[side] = float(values(given).reshape(()))
    return ends[0], ends[1]


def _write(
    graph: gs.Graph, node: gs.Node, position: int, result: Result, bounds: np.ndarray | None
) -> None:
    """Let a node make the integers that a Q made."""
    q = result.integers.q
    result.quantizer.outputs.clear()
    if bounds is None:
        node.outputs[position] = q
        return
    clip, inner = result.behind[0], gs.Variable(fresh(graph, f"{q.name}_wide"), q.dtype, q.shape)
    node.outputs[position] = inner
    ends = [
        constant(fresh(graph, f"{q.name}_{side}"), np.array(end))
        for side, end in zip(("low", "high"), bounds, strict=True)
    ]
    clip.op, clip.attrs, clip.inputs, clip.outputs = "Clip", {}, [inner, *ends], [q]


def _read_sizes_of_integers(graph: gs.Graph) -> None:
    for node in graph.nodes:
        maker = _dequantized(node.inputs[0]) if node.op in SIZES and not node.domain else None
        if maker is not None:
            node.inputs[0] = maker.inputs[0]
