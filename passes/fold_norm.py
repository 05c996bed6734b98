"""Fold batch normalization, and per-channel Mul, Div, Add, Sub, into the linear layer before it.

Each of them is y = k ⊙ x + c over the channels of x:

    BatchNormalization   k = s / √(v + ε),   c = b − k ⊙ m
    Mul, Div             k = a  or  1 / a,   c = 0
    Add, Sub             k = 1 or −1,        c = a  or  −a

so after x = W ∗ z + B the pair becomes one layer with W' = k ⊙ W and B' = k ⊙ B + c, computed in
float64. The output channels of W are axis 0 for Conv, axis 1 within each group for ConvTranspose,
the last axis for MatMul and Gemm (axis 0 with transB). In Gemm, W' absorbs k beside alpha, and B'
absorbs beta. MatMul has no bias: that of the Add behind it is used, or a norm turns into that Add.

Left alone: a norm in training mode; an intermediate result that something else reads; weights that
are not constants. A weight that other nodes read too is copied, not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, constant, fresh, nbytes, store, tidy, values

NORM = "BatchNormalization"
ARITHMETIC = ("Mul", "Div", "Add", "Sub")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORM_OPSET = 7  # before it, broadcasting and the mode of a norm were attributes

Vector = NDArray[np.float64]


class RefusalError(Exception):
    """A pair that cannot be folded, with the reason that the Skip gives."""


@dataclass(frozen=True)
class Layer:
    """A linear node and where its bias is: its own input, or the Add that follows a MatMul.

    rank: of its output, None if unknown. axis: the channel axis of its output.
    """

    linear: gs.Node
    last: gs.Node
    rank: int | None
    axis: int

    @property
    def weight(self) -> gs.Tensor:
        return self.linear.inputs[1]

    @property
    def bias(self) -> gs.Tensor | None:
        if self.linear.op == "MatMul":
            return (
                None if self.last is self.linear else self.last.inputs[_constant_index(self.last)]
            )
        return self.linear.inputs[2] if _has(self.linear, 2) else None

    @property
    def channels(self) -> int:
        shape = self.weight.shape
        if self.linear.op == "ConvTranspose":
            return int(shape[1] * self.linear.attrs.get("group", 1))
        if self.linear.op == "Conv" or self.linear.attrs.get("transB", 0):
            return int(shape[0])
        return int(shape[-1])


@register
@dataclass(frozen=True)
class FoldNorm:
    """Fold batch normalization and per-channel arithmetic into the linear layer before it."""

    name: ClassVar[str] = "fold-norm"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        if context.opset < NORM_OPSET:
            return [Skip(n.name, f"opset {context.opset} is too old") for n in _norms(graph)]
        allowed = context.only.names(graph)
        pinned = captured(graph) | {tensor.name for tensor in graph.outputs}
        results = [
            _consider(graph, node, pinned, allowed)
            for node in list(graph.nodes)
            if node.op == NORM or _follows_linear(node)
        ]
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results


def _norms(graph: gs.Graph) -> Iterator[gs.Node]:
    return (node for node in graph.nodes if node.op == NORM)


def _consider(
    graph: gs.Graph, node: gs.Node, pinned: set[str], allowed: frozenset[str]
) -> Change | Skip:
    try:
        layer = _layer_before(node)
        _guard(layer, node, pinned, allowed)
        k, c = _affine(node, layer)
        return _fold(graph, layer, node, k, c, pinned)
    except RefusalError as refusal:
        return Skip(node.name, str(refusal))


def _follows_linear(node: gs.Node) -> bool:
    """Arithmetic with a constant behind constant weights; a MatMul keeps its Add."""
    if node.op not in ARITHMETIC or sum(isinstance(t, gs.Constant) for t in node.inputs) != 1:
        return False
    before = _producer(_other(node))
    if before is None:
        return False
    if _is_bias_add(before):
        return True
    if before.op not in LINEAR or not isinstance(before.inputs[1], gs.Constant):
        return False
    return before.op != "MatMul" or node.op in ("Mul", "Div")


def _is_bias_add(node: gs.Node) -> bool:
    """An Add of a constant row behind a MatMul with constant weights."""
    if node.op != "Add" or sum(isinstance(t, gs.Constant) for t in node.inputs) != 1:
        return False
    before = _producer(_other(node))
    return (
        before is not None and before.op == "MatMul" and isinstance(before.inputs[1], gs.Constant)
    )


def _layer_before(node: gs.Node) -> Layer:
    x = node.inputs[0] if node.op == NORM else _other(node)
    last = _producer(x)
    if last is None:
        raise RefusalError("reads an input of the model, so there is no layer before it")
    linear = _producer(_other(last)) if _is_bias_add(last) else last
    if linear is None or linear.op not in LINEAR or linear.domain not in (None, "", "ai.onnx"):
        raise RefusalError(f"follows {last.op} {last.name}, which has no weights to fold into")
    if not isinstance(linear.inputs[1], gs.Constant):
        raise RefusalError(f"the weight of {linear.name} is not a constant")
    rank = _rank(linear, last)
    return Layer(linear, last, rank, 1 if "Conv" in linear.op or node.op == NORM else -1)


def _rank(linear: gs.Node, last: gs.Node) -> int | None:
    if "Conv" in linear.op:
        return len(linear.inputs[1].shape)
    if linear.op == "Gemm":
        return 2
    known = [t.shape for t in (linear.inputs[0], linear.outputs[0], last.outputs[0]) if t.shape]
    return len(known[0]) if known else None


def _guard(layer: Layer, node: gs.Node, pinned: set[str], allowed: frozenset[str]) -> None:
    """Raise RefusalError where folding would be wrong or is not wanted."""
    inner = {layer.linear.outputs[0].name: layer.linear.outputs[0]}
    inner[layer.last.outputs[0].name] = layer.last.outputs[0]
    for name, tensor in inner.items():
        if name in pinned or len(tensor.outputs) != 1:
            raise RefusalError(f"something else reads {name}, the result before it")
    outside = {layer.linear.name, layer.last.name, node.name} - allowed
    if outside:
        raise RefusalError(f"{min(outside)} is excluded")
    if layer.linear.op == "MatMul" and len(layer.weight.shape) != 2:
        raise RefusalError(f"the weight of {layer.linear.name} is not a matrix")
    if layer.bias is not None and not isinstance(layer.bias, gs.Constant):
        raise RefusalError(f"the bias of {layer.linear.name} is not a constant")
    if node.op == NORM and layer.axis != (layer.rank or 0) - 1 and "Conv" not in layer.linear.op:
        raise RefusalError(
            f"normalizes axis 1, which is not the output axis of {layer.linear.name}"
        )


def _affine(node: gs.Node, layer: Layer) -> tuple[Vector, Vector]:
    """(k, c) of a node, each of shape (channels,)."""
    if node.op == NORM:
        return _norm_affine(node, layer.channels)
    index = _constant_index(node)
    a = _per_channel(node.inputs[index], layer)
    if node.op == "Mul":
        return a, np.zeros_like(a)
    if node.op == "Div" and index == 0:
        raise RefusalError("divides a constant by the result, which is not linear")
    if node.op == "Div":
        with np.errstate(divide="ignore"):
            return 1 / a, np.zeros_like(a)
    if node.op == "Sub":
        return (np.ones_like(a), -a) if index == 1 else (-np.ones_like(a), a)
    return np.ones_like(a), a


def _norm_affine(node: gs.Node, channels: int) -> tuple[Vector, Vector]:
    used = [tensor for tensor in node.outputs[1:] if tensor.name]
    if node.attrs.get("training_mode", 0) or used:
        raise RefusalError("is in training mode")
    if not node.attrs.get("spatial", 1):
        raise RefusalError("normalizes each position by itself (spatial = 0)")
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:5]):
        raise RefusalError("has parameters that are not constants")
    s, b, m, v = (values(tensor).astype(np.float64) for tensor in node.inputs[1:5])
    if s.shape != (channels,):
        raise RefusalError(f"has {s.size} channels where the layer before has {channels}")
    with np.errstate(all="ignore"):  # a result that is not finite is refused later
        k = s / np.sqrt(v + node.attrs.get("epsilon", 1e-5))
        return k, b - k * m


def _per_channel(tensor: gs.Constant, layer: Layer) -> Vector:
    """A constant as one value a channel. RefusalError if it varies along another axis."""
    array = values(tensor)
    n, channels = array.ndim, layer.channels
    if n > (1 if layer.rank is None else layer.rank):
        raise RefusalError("its constant may have more axes than the result before it")
    axis = n - 1 if layer.axis == -1 else n - (layer.rank or n) + layer.axis
    size = array.shape[axis] if 0 <= axis < n else 1
    if array.size != size or size not in (1, channels):
        raise RefusalError("its constant does not have one value a channel")
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,)).copy()


def _fold(
    graph: gs.Graph, layer: Layer, node: gs.Node, k: Vector, c: Vector, pinned: set[str]
) -> Change:
    """Write W' and B' and let the layer give the node's output. RefusalError if they overflow."""
    linear, old = layer.linear, layer.weight
    kind = values(old).dtype
    with np.errstate(all="ignore"):
        weight = _scaled(values(old).astype(np.float64), k, linear).astype(kind)
        bias = (_bias(layer) * k + c).astype(kind)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise RefusalError("the folded weights would not be finite")
    parts = [*node.inputs, old, *([layer.bias] if layer.bias is not None else [])]
    before = sum(nbytes(tensor) for tensor in parts if isinstance(tensor, gs.Constant))
    linear.inputs[1] = _replacement(graph, old, weight, pinned)
    after = weight.nbytes
    if linear.op != "MatMul":
        _set_bias(graph, linear, bias, pinned)
        _take_output(layer.last, node)
    elif layer.bias is not None:
        index = _constant_index(layer.last)
        row = bias.reshape((1,) * (len(layer.bias.shape) - 1) + (-1,))
        layer.last.inputs[index] = _replacement(graph, layer.bias, row, pinned)
        _take_output(layer.last, node)
    elif node.op == NORM:
        _become_add(graph, node, bias)
    else:
        _take_output(linear, node)
        bias = bias[:0]
    return Change(linear.name, f"{node.op} {node.name} folded in", before, after + bias.nbytes)


def _scaled(weight: Vector, k: Vector, linear: gs.Node) -> Vector:
    """k ⊙ W along the output channels."""
    if linear.op == "ConvTranspose":
        groups = int(linear.attrs.get("group", 1))
        split = weight.reshape(groups, -1, *weight.shape[1:])
        rows = k.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))
        return (split * rows).reshape(weight.shape)
    if linear.op == "Conv" or linear.attrs.get("transB", 0):
        return weight * k.reshape(-1, *(1,) * (weight.ndim - 1))
    return weight * k


def _bias(layer: Layer) -> Vector:
    """B of shape (channels,), with Gemm's beta in it."""
    if layer.bias is None:
        return np.zeros(layer.channels)
    array = values(layer.bias).astype(np.float64)
    if array.size not in (1, layer.channels) or array.size not in (1, *array.shape[-1:]):
        raise RefusalError(f"the bias of {layer.linear.name} is not one value a channel")
    beta = layer.linear.attrs.get("beta", 1.0) if layer.linear.op == "Gemm" else 1.0
    return np.broadcast_to(beta * array.reshape(-1), (layer.channels,))


def _set_bias(graph: gs.Graph, linear: gs.Node, bias: NDArray[Any], pinned: set[str]) -> None:
    if linear.op == "Gemm" and linear.attrs.get("beta", 1.0) != 1.0:
        linear.attrs["beta"] = 1.0
    if _has(linear, 2):
        linear.inputs[2] = _replacement(graph, linear.inputs[2], bias, pinned)
        return
    row = constant(fresh(graph, f"{linear.name}_bias"), bias)
    linear.inputs = [*linear.inputs[:2], row]


def _replacement(
    graph: gs.Graph, old: gs.Constant, array: NDArray[Any], pinned: set[str]
) -> gs.Constant:
    """A new constant under the old name, or a fresh one if something else reads the old one."""
    is_shared = old.name in pinned or len(old.outputs) > 1
    return store(graph, fresh(graph, old.name) if is_shared else old.name, array)


def _take_output(layer: gs.Node, node: gs.Node) -> None:
    output = node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    layer.outputs = [output]


def _become_add(graph: gs.Graph, norm: gs.Node, bias: NDArray[Any]) -> None:
    x, y = norm.inputs[0], norm.outputs[0]
    norm.op, norm.attrs = "Add", {}
    norm.inputs = [x, constant(fresh(graph, f"{norm.name}_bias"), bias)]
    norm.outputs = [y]


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _constant_index(node: gs.Node) -> int:
    return next(i for i, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant))


def _other(node: gs.Node) -> gs.Tensor:
    """The operand of a two-operand node that is not the constant."""
    constants: Sequence[bool] = [isinstance(tensor, gs.Constant) for tensor in node.inputs]
    return node.inputs[constants.index(False)]


def _has(node: gs.Node, index: int) -> bool:
    """Whether an optional input is given."""
    return len(node.inputs) > index and bool(node.inputs[index].name)
