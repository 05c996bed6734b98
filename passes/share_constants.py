"""Store equal constants once, and a matrix and its transpose once.

Exporters write a tied embedding twice: the table (V, D), and its transpose (D, V) for the product
at the end. The second becomes Transpose(table), which ONNX Runtime computes when it loads the file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, fresh, nbytes, reads, replace_uses, values

Mark = tuple[str, tuple[int, ...], bytes]  # type, shape and digest of a constant


@register
@dataclass(frozen=True)
class ShareConstants:
    """Store equal constants once, and a matrix and its transpose once.

    smallest: bytes below which a constant is left alone.
    """

    smallest: int = 1024

    name: ClassVar[str] = "share-constants"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        pinned = captured(graph) | {tensor.name for tensor in graph.outputs}
        results: list[Change | Skip] = []
        turns: list[gs.Node] = []
        seen: dict[Mark, gs.Constant] = {}
        for tensor in self._candidates(graph):
            first, is_turned = _find(tensor, seen)
            readers = [node.name for node in tensor.outputs]
            excluded = [name for name in readers if name not in allowed]
            if first is None:
                seen[_mark(values(tensor))] = tensor
            elif excluded:
                results += [Skip(name, "excluded") for name in excluded]
            elif tensor.name in pinned:
                results += [Skip(name, f"{tensor.name} is read elsewhere too") for name in readers]
            else:
                what = f"{tensor.name} is {first.name}{' transposed' if is_turned else ''}"
                results.append(Change(readers[0], what, nbytes(tensor), 0))
                turns += _share(graph, tensor, first, is_turned)
        graph.nodes = [*turns, *graph.nodes]
        return results

    def _candidates(self, graph: gs.Graph) -> list[gs.Constant]:
        """Constants that another one has the type and the shape of, turned or not."""
        found = {id(t): t for t in reads(graph) if isinstance(t, gs.Constant)}
        large = [t for t in found.values() if t.outputs and nbytes(t) >= self.smallest]
        alike = Counter(_kind(tensor) for tensor in large)
        return [tensor for tensor in large if alike[_kind(tensor)] > 1]


def _kind(tensor: gs.Constant) -> tuple[str, tuple[int, ...]]:
    shape = tuple(tensor.shape)
    return str(values(tensor).dtype), tuple(sorted(shape)) if len(shape) == 2 else shape


def _mark(array: NDArray[Any]) -> Mark:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return str(array.dtype), array.shape, hashlib.sha256(data).digest()


def _find(tensor: gs.Constant, seen: Mapping[Mark, gs.Constant]) -> tuple[gs.Constant | None, bool]:
    """An earlier constant with the same values, and whether it must be transposed."""
    array = values(tensor)
    equal = seen.get(_mark(array))
    if equal is not None or array.ndim != 2 or array.dtype.kind not in "fiu":
        return equal, False
    return seen.get(_mark(array.T)), True


def _share(
    graph: gs.Graph, tensor: gs.Constant, first: gs.Constant, is_turned: bool
) -> list[gs.Node]:
    """Let the readers of a constant read the first one, through a new Transpose where needed."""
    if not is_turned:
        replace_uses(tensor, first)
        return []
    turned = gs.Variable(fresh(graph, f"{first.name}_turned"), tensor.dtype, tensor.shape)
    replace_uses(tensor, turned)
    name = fresh(graph, f"{first.name}/Transpose")
    return [gs.Node("Transpose", name, {"perm": [1, 0]}, [first], [turned])]
