"""Let a half-precision model compute in float32 inside; its inputs and outputs stay float16.

    x -> Cast(float32) -> the graph, in float32 -> Cast(float16) -> y

Processors without half-precision kernels do the same, node by node, and Q/DQ pairs are float32. A
weight that integers may take the place of becomes float32 in the file; any other large constant
stays as it is, behind a Cast, so that the file does not grow. Nested bodies are widened with the
graph around them. A model with nothing to quantize stays in half precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constant, fresh, nbytes, replace_uses, store, values, walk
from onnxc.ops import knowledge, weight_of

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")  # that hold an element type
LARGE = 1024  # bytes of a constant that is kept in half precision
OPSET = 6  # before it, Cast named types in words


@register
@dataclass(frozen=True)
class Widen:
    """Let a half-precision model compute in float32, with its inputs and outputs as they were."""

    name: ClassVar[str] = "widen"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        heavy = list(_half_weights(graph))
        chosen = [node for node in heavy if node.name in allowed]
        if not chosen:
            return [Skip(node.name, "excluded") for node in heavy]
        if context.opset < OPSET:
            return [Skip(node.name, f"opset {context.opset} is too old to widen") for node in heavy]
        before = {node.name: nbytes(_weight(node)) for node in heavy}
        _widen(graph, {id(_weight(node)) for node in heavy})
        return [
            Change(node.name, "computes in float32", before[node.name], nbytes(_weight(node)))
            for node in heavy
        ]


def _half_weights(graph: gs.Graph) -> Iterator[gs.Node]:
    """Heavy nodes, nested bodies included, whose constant weight is float16."""
    for inner in walk(graph):
        for node in inner.nodes:
            weight = weight_of(node) if knowledge(node).role in ("weighted", "recurrent") else None
            if weight is not None and weight.dtype == np.float16:
                yield node


def _weight(node: gs.Node) -> gs.Constant:
    weight = weight_of(node)
    assert weight is not None
    return weight


def _widen(graph: gs.Graph, weights: set[int]) -> None:
    """Make everything float32. weights: ids of constants that become so whatever their size."""
    casts = []
    for tensor in filter(_is_half, graph.inputs):
        wide = _variable(graph, tensor)
        replace_uses(tensor, wide)
        casts.append(_cast(graph, tensor, wide, FLOAT))
    casts += _widen_constants(graph, weights)
    ports = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    narrowed = [_narrowed(graph, t) for t in graph.outputs if _is_half(t) and t.inputs]
    for body in (inner for inner in walk(graph) if inner is not graph):
        for tensor in filter(_is_half, (*body.inputs, *body.outputs)):
            tensor.name = fresh(graph, f"{tensor.name}_widened")  # the old name's type is declared
    for inner in walk(graph):
        for tensor in _variables(inner):
            if _is_half(tensor) and id(tensor) not in ports:
                tensor.dtype = np.float32
        for node in inner.nodes:
            _widen_attributes(node)
    graph.nodes = [*casts, *graph.nodes, *narrowed]


def _is_half(tensor: gs.Tensor) -> bool:
    return bool(tensor.dtype == np.float16)


def _variables(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """What is no constant: of the main graph and of a body, with the body's own ports."""
    for tensors in (graph.inputs, graph.outputs, *((*n.inputs, *n.outputs) for n in graph.nodes)):
        yield from (tensor for tensor in tensors if not isinstance(tensor, gs.Constant))


def _variable(graph: gs.Graph, half: gs.Tensor) -> gs.Variable:
    return gs.Variable(fresh(graph, f"{half.name}_widened"), np.float32, half.shape)


def _cast(graph: gs.Graph, source: gs.Tensor, result: gs.Tensor, kind: int) -> gs.Node:
    name = fresh(graph, f"{source.name}_Cast")
    return gs.Node("Cast", name, {"to": int(kind)}, [source], [result])


def _narrowed(graph: gs.Graph, output: gs.Tensor) -> gs.Node:
    """What made the output -> Cast(float16) -> the output."""
    wide = _variable(graph, output)
    replace_uses(output, wide)
    maker = output.inputs[0]
    maker.outputs = [wide if tensor is output else tensor for tensor in maker.outputs]
    return _cast(graph, wide, output, HALF)


def _widen_constants(graph: gs.Graph, weights: set[int]) -> list[gs.Node]:
    """Put float32 in the place of each constant; the Casts of large ones that stay float16."""
    wide: dict[int, gs.Tensor] = {}
    casts: list[gs.Node] = []
    for tensors, position in _half_constants(graph):
        old = tensors[position]
        if id(old) not in wide and nbytes(old) > LARGE and id(old) not in weights:
            wide[id(old)] = _variable(graph, old)
            casts.append(_cast(graph, old, wide[id(old)], FLOAT))
        elif id(old) not in wide:
            array = values(old).astype(np.float32)
            wide[id(old)] = store(graph, fresh(graph, f"{old.name}_widened"), array)
        tensors[position] = wide[id(old)]
    return casts


def _half_constants(graph: gs.Graph) -> list[tuple[list[gs.Tensor], int]]:
    """Where float16 constants are read, or returned by a body: a list of tensors and a position."""
    lists = [node.inputs for inner in walk(graph) for node in inner.nodes]
    lists += [body.outputs for body in walk(graph) if body is not graph]
    return [
        (tensors, position)
        for tensors in lists
        for position, tensor in enumerate(tensors)
        if isinstance(tensor, gs.Constant) and _is_half(tensor)
    ]


def _widen_attributes(node: gs.Node) -> None:
    """Attributes that name float16 name float32, and tensors in attributes become float32."""
    for key, value in node.attrs.items():
        if key in TYPE_ATTRIBUTES and _names_half(value):
            node.attrs[key] = int(FLOAT)
        if isinstance(value, gs.Constant) and _is_half(value):
            node.attrs[key] = constant(value.name, values(value).astype(np.float32))


def _names_half(value: Any) -> bool:
    return isinstance(value, int) and value == HALF
