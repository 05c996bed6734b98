"""What a rewritten graph may compute differently from the original, by comparing the two."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.graph import bodies, values
from onnxc.ops import is_constant


def moved(graph: gs.Graph, original: gs.Graph) -> set[str]:
    """Names of the tensors of a graph that may have other values than in the original.

    A tensor stays where the node of the original that makes one of its name does the same with the
    same constants, and reads tensors that stay. A node with bodies is taken to differ.
    """
    makers = {t.name: node for node in original.nodes for t in node.outputs if t.name}
    ports = {port.name for port in original.inputs}
    found = {port.name for port in graph.inputs if port.name not in ports}
    for node in graph.nodes:
        outputs = [t.name for t in node.outputs if t.name]
        other = makers.get(outputs[0]) if outputs else None
        if other is None or not _is_same(node, other, found):
            found.update(outputs)
    return found


def _is_same(node: gs.Node, other: gs.Node, moved: set[str]) -> bool:
    kinds = ((n.op, n.domain or "", len(n.inputs)) for n in (node, other))
    names = ([t.name for t in n.outputs] for n in (node, other))
    if len(set(kinds)) > 1 or bodies(node) or not _are_equal(*names):
        return False
    pairs = zip(node.inputs, other.inputs, strict=True)
    return _are_equal(node.attrs, other.attrs) and all(_stays(a, b, moved) for a, b in pairs)


def _stays(tensor: gs.Tensor, other: gs.Tensor, moved: set[str]) -> bool:
    if not is_constant(tensor) or not is_constant(other):
        return tensor.name == other.name and tensor.name not in moved
    a, b = values(tensor), values(other)
    is_like = a.shape == b.shape and a.dtype == b.dtype
    return is_like and (np.shares_memory(a, b) or bool(np.array_equal(a, b)))


def _are_equal(a: Any, b: Any) -> bool:
    """Equality of attributes, tensors among them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_equal(a[key], b[key]) for key in a)
    if isinstance(a, gs.Constant) and isinstance(b, gs.Constant):
        return bool(np.array_equal(values(a), values(b)))
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
