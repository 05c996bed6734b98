"""Store weights of few distinct values as a codebook and codes of 1 to 8 bits, without loss.

    w = levels[code],   b = ⌈log₂ number of levels⌉ bits for a code

The graph makes the weight of the two by operators that ONNX Runtime computes when it loads the file
(`onnxc.storage.codebooks`): the speed and the memory of the plain weight, a file of b bits a value.
Works on float weights and on the integers in front of DequantizeLinear alike, so that what
`cluster` shares is stored small whatever was done to it since. A weight stays where that saves
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, gathering, nbytes, values
from onnxc.numerics.packing import bits_for
from onnxc.ops import QUANTIZERS, is_constant, knowledge
from onnxc.storage.codebooks import WIDEST, Books, least_opset, stored_bytes

Array = NDArray[Any]

STORED = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.uint8))
SAMPLE = 4096  # values that tell most weights of many values apart


@register
@dataclass(frozen=True)
class StoreCodebooks:
    """Store weights of few distinct values in few bits; ONNX Runtime unpacks them at load.

    least: bytes that a weight has to save.
    """

    name: ClassVar[str] = "store-codebooks"
    lossless: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = True

    least: int = 1

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed, read = context.only.names(graph), captured(graph)
        books = Books(graph, context.opset)
        results: list[Change | Skip] = []
        with gathering(graph):
            for weight in _weights(graph, allowed, read):
                results += self._store(books, weight)
        return results

    def _store(self, books: Books, weight: gs.Constant) -> Iterator[Change | Skip]:
        node = _reader(weight).name
        levels, codes = few_levels(values(weight))
        if not len(levels):
            yield Skip(node, "not stored in fewer bits: it has too many distinct values")
            return
        bits, itemsize = bits_for(len(levels)), np.dtype(weight.dtype).itemsize
        before = nbytes(weight)
        if bits >= 8 * itemsize:
            yield Skip(node, f"not stored in fewer bits: {len(levels)} values fill its type")
        elif before - stored_bytes(codes.size, len(levels), bits, itemsize) < self.least:
            yield Skip(node, f"not stored in fewer bits: of {before} bytes, that saves none")
        elif books.opset < (needed := least_opset(bits)):
            yield Skip(node, f"{bits} bits need opset {needed}, and the model has {books.opset}")
        else:
            after = books.write(weight, levels, codes, bits)
            yield Change(node, f"{len(levels)} values, codes of {bits} bits", before, after)


def few_levels(array: Array) -> tuple[Array, Array]:
    """The distinct values and which of them is where; no values where they are too many."""
    none = np.zeros(0, array.dtype), np.zeros(0, np.uint8)
    if len(np.unique(array.reshape(-1)[:SAMPLE])) > 1 << WIDEST:
        return none
    levels, codes = np.unique(array, return_inverse=True)
    is_few = len(levels) <= 1 << WIDEST and np.isfinite(levels).all()
    return (levels, codes.reshape(array.shape)) if is_few else none


def _weights(graph: gs.Graph, allowed: frozenset[str], read: set[str]) -> Iterator[gs.Constant]:
    """Constants that only nodes of the main graph read, each of them as a weight."""
    found: dict[int, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.dtype in STORED and len(tensor.shape) > 1:
                found.setdefault(id(tensor), tensor)
    outside = {id(tensor) for tensor in graph.outputs}
    for weight in found.values():
        is_inside = id(weight) not in outside and weight.name not in read
        if is_inside and all(
            _is_allowed(n, allowed) and _is_weight(n, weight) for n in weight.outputs
        ):
            yield weight


def _is_allowed(node: gs.Node, allowed: frozenset[str]) -> bool:
    """Whether a node may be touched, or is one that was made for such nodes to read."""
    pending, seen = [node], {id(node)}
    while pending:
        current = pending.pop()
        if current.name in allowed:
            continue
        if current.op not in QUANTIZERS and current.op != "Mul":
            return False
        readers = [n for n in current.outputs[0].outputs if id(n) not in seen]
        seen.update(map(id, readers))
        pending += readers
    return True


def _is_weight(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node multiplies by a tensor, looks it up, or makes a weight of it."""
    row, position = knowledge(node), next(i for i, t in enumerate(node.inputs) if t is tensor)
    if node.op in QUANTIZERS or row.role == "same":
        return position == 0
    if node.op == "Mul":
        return _is_scaled(node, tensor, node.inputs[1 - position])
    return row.window is not None or (row.weight == position and row.role == "lookup")


def _is_scaled(mul: gs.Node, tensor: gs.Tensor, gain: gs.Tensor) -> bool:
    """Whether a product of constants is made to be read as a weight, and of them the tensor is it.

    gain: the other one, of fewer values.
    """
    product = mul.outputs[0]
    is_pair = is_constant(tensor) and is_constant(gain) and prod(gain.shape) < prod(tensor.shape)
    return (
        is_pair and bool(product.outputs) and all(_is_weight(n, product) for n in product.outputs)
    )


def _reader(tensor: gs.Tensor) -> gs.Node:
    """The layer that reads a weight, behind a gain too."""
    first = tensor.outputs[0]
    return _reader(first.outputs[0]) if first.op == "Mul" else first
