"""Write matrix products with a bias as one Gemm without factors, the form of integer kernels.

    Add(MatMul(x, W), b)   ->  Gemm(x, W, b)            x a matrix, b one value a column
    Gemm(x, W, c; α, β)    ->  Gemm(x, α W, β c; 1, 1)

A bias that stays in an Add of its own is added in float, behind a product that was rounded already.
Left alone: x of another rank than 2; a product that something else reads; W or c that is not a
constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, constant, fresh, nbytes, store, tidy, values
from onnxc.ops import weight_of

FACTORS = ("alpha", "beta")
OPSET = 7  # before it, a Gemm said by an attribute that its bias is a row


@register
@dataclass(frozen=True)
class MergeBias:
    """Merge matrix products with the Add of their bias, and factors of Gemm with its weights."""

    name: ClassVar[str] = "merge-bias"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        pinned = {tensor.name for tensor in graph.outputs} | captured(graph)
        results: list[Change | Skip] = []
        for product, add in list(_biased(graph)) if context.opset >= OPSET else ():
            reason = _obstacle(product, add, pinned, allowed)
            results.append(Skip(product.name, reason) if reason else _merge(graph, product, add))
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        for gemm in list(_scaled(graph)):
            is_free = gemm.name in allowed
            results.append(_unscale(graph, gemm) if is_free else Skip(gemm.name, "excluded"))
        return results


def _biased(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Node]]:
    """MatMul with a constant matrix, and the Add of a constant that alone reads it."""
    for node in graph.nodes:
        weight = weight_of(node) if node.op == "MatMul" and not node.domain else None
        ranks = [len(t.shape or ()) for t in node.inputs]
        if weight is None or ranks != [2, 2] or len(node.outputs[0].outputs) != 1:
            continue
        add = node.outputs[0].outputs[0]
        if add.op == "Add" and not add.domain and _bias(add) is not None:
            yield node, add


def _bias(add: gs.Node) -> gs.Constant | None:
    return next((tensor for tensor in add.inputs if isinstance(tensor, gs.Constant)), None)


def _obstacle(product: gs.Node, add: gs.Node, pinned: set[str], allowed: frozenset[str]) -> str:
    """Why the two cannot become one, or an empty string."""
    bias = _bias(add)
    assert bias is not None
    if not {product.name, add.name} <= allowed:
        return "excluded"
    if product.outputs[0].name in pinned:
        return f"bias not merged: something else reads {product.outputs[0].name}"
    shape = tuple(bias.shape) or (1,)
    is_row = shape[-1] in (1, product.inputs[1].shape[1]) and set(shape[:-1]) <= {1}
    is_row = is_row and len(shape) <= 2
    return "" if is_row else "bias not merged: it is not one value a column"


def _merge(graph: gs.Graph, product: gs.Node, add: gs.Node) -> Change:
    old = _bias(add)
    assert old is not None
    row = np.broadcast_to(values(old).reshape(-1), product.inputs[1].shape[1:])
    bias = constant(fresh(graph, f"{old.name}_row"), np.ascontiguousarray(row))
    product.op, product.attrs = "Gemm", {}
    product.inputs = [*product.inputs, bias]
    output = add.outputs[0]
    add.inputs.clear()
    add.outputs.clear()
    product.outputs = [output]
    return Change(product.name, f"{add.op} {add.name} merged in", nbytes(old), nbytes(bias))


def _scaled(graph: gs.Graph) -> Iterator[gs.Node]:
    """Gemm nodes with factors that constants can take in."""
    for node in graph.nodes:
        if node.op != "Gemm" or node.domain or weight_of(node) is None:
            continue
        is_known = not _has_bias(node) or isinstance(node.inputs[2], gs.Constant)
        if is_known and any(node.attrs.get(key, 1.0) != 1.0 for key in FACTORS):
            yield node


def _has_bias(gemm: gs.Node) -> bool:
    return len(gemm.inputs) > 2 and bool(gemm.inputs[2].name)


def _unscale(graph: gs.Graph, gemm: gs.Node) -> Change:
    alpha, beta = (float(gemm.attrs.get(key, 1.0)) for key in FACTORS)
    _multiply(graph, gemm, 1, alpha)
    if _has_bias(gemm):
        _multiply(graph, gemm, 2, beta)
    gemm.attrs = {key: value for key, value in gemm.attrs.items() if key not in FACTORS}
    size = nbytes(gemm.inputs[1])
    return Change(gemm.name, f"factors {alpha:g} and {beta:g} merged in", size, size)


def _multiply(graph: gs.Graph, node: gs.Node, position: int, factor: float) -> None:
    old = node.inputs[position]
    array: NDArray[Any] = values(old)
    product = (array * array.dtype.type(factor)).astype(array.dtype)
    node.inputs[position] = store(graph, fresh(graph, f"{old.name}_scaled"), product)
