"""Run a fixed-point model in integers alone, as a processor without floating point would.

`onnxc quantize --scheme fixed` writes Q/DQ pairs around float operators; what it means is integers
and shifts (`onnxc.numerics.fixed_reference`). This reads the pairs as such and gives every integer,
to check a device's own code against, layer by layer.

ONNX Runtime computes the same integers wherever its float32 arithmetic is exact: sums of products
below 2^24, which those of 8 bits keep, and means over a number of values that is a power of two.
Other means may differ where the exact one lies halfway between two integers; weights or activations
of 16 bits make sums that float32 rounds, so that some integers differ by a unit or a few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Context
from onnxc.errors import ModelError
from onnxc.graph import Model, copy, load, opset, values
from onnxc.numerics import fixed_reference as reference
from onnxc.numerics.affine import Grid
from onnxc.numerics.affine import quantize as quantized
from onnxc.numerics.fixed_reference import Number, Pool
from onnxc.ops import bounds, groups, knowledge
from onnxc.targets import Target
from passes.fold_constants import FoldConstants

Array = NDArray[Any]
Rule = Callable[[gs.Node, list[Number | None]], Number]

UNLIMITED = 1 << 62  # bytes that unpacked weights may take


@dataclass(frozen=True)
class Trace:
    """What a model makes of one batch in integers.

    integers: of every quantized activation, by the name of the tensor. outputs: those that integers
    settle, exact, by name. widths: bits that the sums of each heavy node need, by its name.
    """

    integers: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


def run_in_integers(model: Model | str | Path, feed: Mapping[str, Array]) -> Trace:
    """Every integer that a fixed-point model makes of a batch. model: or its file. feed: by name.

    Raises ModelError where a scale is no power of two, or integers depend on a node that computes
    in float.
    """
    graph = (copy(model) if isinstance(model, Model) else load(model)).graph
    FoldConstants(growth=UNLIMITED).apply(graph, Context(opset(graph), Target("any")))
    return _Run(feed).run(graph)


@dataclass
class _Run:
    """floats: why tensors are not held as numbers."""

    feed: Mapping[str, Array]
    trace: Trace = field(default_factory=Trace)
    numbers: dict[str, Number] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def run(self, graph: gs.Graph) -> Trace:
        for node in graph.nodes:
            try:
                self._step(node)
            except ValueError as error:
                raise ModelError(f"node {node.name!r} is not in fixed point: {error}") from error
        for tensor in graph.outputs:
            if tensor.name in self.numbers:
                self.trace.outputs[tensor.name] = self.numbers[tensor.name].value
        return self.trace

    def _step(self, node: gs.Node) -> None:
        name = node.outputs[0].name
        if node.op == "QuantizeLinear":
            self.trace.integers[name] = self._quantize(node)
        elif node.op == "DequantizeLinear":
            self.numbers[name] = self._dequantize(node)
        elif node.op not in RULES or not self._known(node):
            self.floats[name] = self._reason(node)
        else:
            given = [self.numbers.get(tensor.name) for tensor in node.inputs]
            self.numbers[name] = made = RULES[node.op](node, given)
            if knowledge(node).window is not None:
                self.trace.widths[node.name] = made.width

    def _known(self, node: gs.Node) -> bool:
        """Whether all that a node computes with are numbers."""
        is_alone = node.op in _MOVES or bool(knowledge(node).bounds)
        needed = node.inputs[:1] if is_alone else node.inputs
        return all(not tensor.name or tensor.name in self.numbers for tensor in needed)

    def _reason(self, node: gs.Node) -> str:
        """The first node that computes in float."""
        known = (self.floats[t.name] for t in node.inputs if t.name in self.floats)
        return next(known, f"node {node.name!r} ({node.op}) computes in float")

    def _quantize(self, node: gs.Node) -> Array:
        x, scale, zero = node.inputs[0], *map(values, node.inputs[1:3])
        if np.any(zero != 0) or scale.size > 1:
            raise ValueError("it has a zero point, or several scales")
        grid = Grid(8 * zero.dtype.itemsize, zero.dtype.kind == "i")
        if x.name in self.feed:
            return quantized(np.asarray(self.feed[x.name]), scale, zero, grid)
        if x.name not in self.numbers:
            why = self.floats.get(x.name, f"there is no input {x.name!r} in the feed")
            raise ValueError(why)
        return reference.quantize(self.numbers[x.name], scale, grid)

    def _dequantize(self, node: gs.Node) -> Number:
        x, scale = node.inputs[0], values(node.inputs[1])
        if len(node.inputs) > 2 and np.any(values(node.inputs[2]) != 0):
            raise ValueError("it has a zero point")
        q = values(x) if isinstance(x, gs.Constant) else self.trace.integers[x.name]
        return Number.of(q, scale, int(node.attrs.get("axis", 1)) if scale.size > 1 else None)


def _conv(node: gs.Node, given: list[Number | None]) -> Number:
    x, w, *rest = given
    assert x is not None and w is not None
    rank = x.a.ndim - 2
    return reference.convolve(
        *(x, w, rest[0] if rest else None),
        strides=_ints(node, "strides", (1,) * rank),
        pads=_pads(node, rank),
        dilations=_ints(node, "dilations", (1,) * rank),
        groups=groups(node),
    )


def _gemm(node: gs.Node, given: list[Number | None]) -> Number:
    x, w, *rest = given
    assert x is not None and w is not None
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        w = Number(w.a.T, w.n.T, w.d)
    return reference.multiply(x, w, rest[0] if rest else None)


def _pool(node: gs.Node, given: list[Number | None]) -> Number:
    assert given[0] is not None
    rank = given[0].a.ndim - 2
    ones = (1,) * rank
    pool = Pool(
        *(_ints(node, "kernel_shape", ones), _ints(node, "strides", ones)),
        *(_pads(node, rank), _ints(node, "dilations", ones)),
        is_ceiled=bool(node.attrs.get("ceil_mode", 0)),
        counts_pads=bool(node.attrs.get("count_include_pad", 0)),
    )
    make = reference.max_pool if node.op == "MaxPool" else reference.mean_pool
    return make(given[0], pool)


def _clip(node: gs.Node, given: list[Number | None]) -> Number:
    assert given[0] is not None
    return reference.clip(given[0], *bounds(node))


def _move(node: gs.Node, given: list[Number | None]) -> Number:
    """Values that only change their places."""
    assert given[0] is not None
    return given[0].moved(lambda x: _MOVES[node.op](x, node))


def _flatten(x: Array, node: gs.Node) -> Array:
    axis = int(node.attrs.get("axis", 1))
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _reshape(x: Array, node: gs.Node) -> Array:
    sizes = [int(size) for size in values(node.inputs[1])]
    keeps = not node.attrs.get("allowzero", 0)
    return x.reshape([x.shape[i] if s == 0 and keeps else s for i, s in enumerate(sizes)])


def _squeeze(x: Array, node: gs.Node) -> Array:
    axes = values(node.inputs[1]) if len(node.inputs) > 1 else np.flatnonzero(np.equal(x.shape, 1))
    return x.squeeze(tuple(map(int, axes)))


def _transpose(x: Array, node: gs.Node) -> Array:
    return x.transpose(node.attrs.get("perm") or None)


def _slice(x: Array, node: gs.Node) -> Array:
    starts, ends, *rest = (values(tensor).tolist() for tensor in node.inputs[1:])
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    cuts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        is_all = step < 0 and end < -x.shape[axis]
        cuts[axis] = slice(start, None if is_all else end, step)
    return x[tuple(cuts)]


def _pad(x: Array, node: gs.Node) -> Array:
    if node.attrs.get("mode", "constant") != "constant" or np.any(_constant(node, 2, 0) != 0):
        raise ValueError("it pads with other numbers than zero")
    axes = _constant(node, 3, range(x.ndim)).tolist()
    pads = values(node.inputs[1]).tolist()
    ends = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    return np.pad(x, [ends.get(axis, (0, 0)) for axis in range(x.ndim)])


def _constant(node: gs.Node, position: int, usual: Any) -> Array:
    is_given = position < len(node.inputs) and node.inputs[position].name
    return values(node.inputs[position]) if is_given else np.asarray(usual)


def _pads(node: gs.Node, rank: int) -> tuple[int, ...]:
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {node.attrs['auto_pad']} is not known here")
    return _ints(node, "pads", (0,) * (2 * rank))


def _ints(node: gs.Node, name: str, usual: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, node.attrs.get(name) or usual))


def _first(make: Callable[[Number], Number]) -> Rule:
    def rule(node: gs.Node, given: list[Number | None]) -> Number:
        assert given[0] is not None
        return make(given[0])

    return rule


def _all(make: Callable[[list[Number], gs.Node], Number]) -> Rule:
    return lambda node, given: make([x for x in given if x is not None], node)


_MOVES: dict[str, Callable[[Array, gs.Node], Array]] = {
    "Flatten": _flatten,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
}
RULES: dict[str, Rule] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _gemm,
    "Add": _all(lambda parts, node: reference.add(parts[0], parts[1])),
    "Concat": _all(lambda parts, node: reference.concatenate(parts, int(node.attrs["axis"]))),
    "Relu": _first(reference.relu),
    "Clip": _clip,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _first(reference.mean),
    **dict.fromkeys(_MOVES, _move),
}
