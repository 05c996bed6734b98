"""Drop nodes that provably return their first input: Identity, Dropout, no-op casts and reshapes.

NOOPS says for each operator when y = x holds for every input, from attributes, constants and the
static shape and type of x alone. What cannot be proven stays. A graph output keeps its name: the
node before takes it over, and where there is none (an input is returned) the node stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, tidy, values

SLICE = ("starts", "ends", "axes", "steps")  # its inputs from opset 10, attributes before
ALWAYS_REPORTED = (
    "Identity",
    "Dropout",
)  # a user expects these to go, so a Skip says why one stays

Array = NDArray[Any]
Test = Callable[[gs.Node, int], bool]


def _is_plain_dropout(node: gs.Node, opset: int) -> bool:
    if opset < 7:
        return bool(node.attrs.get("is_test", 0))
    mode = _given(node, 2)
    return mode is None or _equals(mode, False)


def _is_same_type(node: gs.Node, opset: int) -> bool:
    x = node.inputs[0]
    return x.dtype is not None and _onnx_type(x.dtype) == node.attrs.get("to")


def _is_same_shape(node: gs.Node, opset: int) -> bool:
    """Each target dimension repeats that of x, or copies it by 0; one of them may be −1."""
    target, shape = _numbers(node, 1), node.inputs[0].shape
    if target is None or shape is None or len(target) != len(shape) or 0 in shape:
        return False
    copies = not node.attrs.get("allowzero", 0)
    free = [d for d, s in zip(target, shape, strict=True) if d != s and not (d == 0 and copies)]
    return not free or free == [-1]


def _is_unmoved(node: gs.Node, opset: int) -> bool:
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    order = node.attrs.get("perm", list(range(rank))[::-1] if rank is not None else None)
    return order is not None and list(order) == sorted(order)


def _is_unpadded(node: gs.Node, opset: int) -> bool:
    pads = _numbers(node, 1) if opset >= 11 else node.attrs.get("pads", node.attrs.get("paddings"))
    return pads is not None and not np.any(pads)


def _is_whole_slice(node: gs.Node, opset: int) -> bool:
    parts = [_slice_part(node, opset, i, key) for i, key in enumerate(SLICE, start=1)]
    if None in parts:
        return False
    starts, ends, axes, steps = (part or [] for part in parts)
    if any(starts) or any(step != 1 for step in steps):
        return False
    shape = node.inputs[0].shape
    on = axes or range(len(ends))
    return all(_covers(end, shape, axis) for end, axis in zip(ends, on, strict=True))


def _covers(end: int, shape: list[int | str | None] | None, axis: int) -> bool:
    if end >= np.iinfo(np.int32).max:
        return True
    size = shape[axis] if shape is not None else None
    return isinstance(size, int) and end >= size


def _is_alone(node: gs.Node, opset: int) -> bool:
    return len(node.inputs) == 1


def _is_ones(node: gs.Node, opset: int) -> bool:
    """Expand or Tile by ones; Expand by a longer shape would add axes."""
    sizes, shape = _numbers(node, 1), node.inputs[0].shape
    return (
        sizes is not None
        and shape is not None
        and len(sizes) <= len(shape)
        and all(size == 1 for size in sizes)
    )


def _is_neutral(value: float) -> Test:
    """The second operand is one number, `value`, and adds no axes."""

    def test(node: gs.Node, opset: int) -> bool:
        other, shape = node.inputs[1], node.inputs[0].shape
        if not isinstance(other, gs.Constant) or not _equals(other, value):
            return False
        rank = len(other.shape)
        return rank == 0 or (shape is not None and rank <= len(shape))

    return test


NOOPS: dict[str, Test] = {
    "Identity": lambda node, opset: True,
    "Dropout": _is_plain_dropout,
    "Cast": _is_same_type,
    "Reshape": _is_same_shape,
    "Transpose": _is_unmoved,
    "Pad": _is_unpadded,
    "Slice": _is_whole_slice,
    "Expand": _is_ones,
    "Tile": _is_ones,
    "Mul": _is_neutral(1),
    "Div": _is_neutral(1),
    "Pow": _is_neutral(1),
    "Add": _is_neutral(0),
    "Sub": _is_neutral(0),
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _is_alone),
}


@register
@dataclass(frozen=True)
class DropIdentity:
    """Drop nodes that provably return their input: Identity, Dropout, no-op casts and reshapes."""

    name: ClassVar[str] = "drop-identity"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        inner = captured(graph)
        outputs = {tensor.name for tensor in graph.outputs}
        inputs = {tensor.name for tensor in graph.inputs}
        results: list[Change | Skip] = []
        for node in list(graph.nodes):
            if node.domain not in (None, "", "ai.onnx") or node.op not in NOOPS:
                continue
            reason = _why_not(node, context.opset, allowed, inner, outputs, inputs)
            if reason is None:
                _bypass(node, node.outputs[0].name in outputs)
                results.append(Change(node.name, f"{node.op} returns its input"))
            elif reason and node.op in ALWAYS_REPORTED:
                results.append(Skip(node.name, reason))
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results


def _why_not(
    node: gs.Node,
    opset: int,
    allowed: frozenset[str],
    inner: set[str],
    outputs: set[str],
    inputs: set[str],
) -> str | None:
    """Why a node stays, or None if it can go."""
    x, y = node.inputs[0], node.outputs[0]
    if node.name not in allowed:
        return "excluded"
    if not NOOPS[node.op](node, opset):
        return "not provably a no-op"
    if any(extra.name in outputs | inner or extra.outputs for extra in node.outputs[1:]):
        return "its second output is used"
    if y.name in inner:
        return f"a nested body reads {y.name}"
    if y.name not in outputs:
        return None
    if isinstance(x, gs.Constant) or x.name in inputs | outputs or not x.inputs:
        return f"gives the graph output {y.name} its name"
    return f"a nested body reads {x.name}" if x.name in inner else None


def _bypass(node: gs.Node, is_output: bool) -> None:
    """Readers of y read x; for a graph output, the maker of x gives y and readers of x read y."""
    x, y = node.inputs[0], node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    if is_output:
        source = x.inputs[0]
        source.outputs = [y if tensor is x else tensor for tensor in source.outputs]
        x, y = y, x
    for reader in list(y.outputs):
        reader.inputs = [x if tensor is y else tensor for tensor in reader.inputs]


def _given(node: gs.Node, index: int) -> gs.Tensor | None:
    """An optional input, or None where it is left out."""
    return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None


def _numbers(node: gs.Node, index: int) -> list[int] | None:
    """A constant input as integers, or None."""
    tensor = _given(node, index)
    return [int(v) for v in values(tensor).reshape(-1)] if isinstance(tensor, gs.Constant) else None


def _slice_part(node: gs.Node, opset: int, index: int, key: str) -> list[int] | None:
    """starts, ends, axes or steps: empty where left out, None where not constant."""
    if opset < 10:
        return list(node.attrs.get(key, []))
    return _numbers(node, index) if _given(node, index) is not None else []


def _equals(tensor: gs.Tensor, value: float) -> bool:
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return False
    return bool((values(tensor) == value).all())


def _onnx_type(dtype: Any) -> int:
    return (
        dtype
        if isinstance(dtype, int)
        else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    )
