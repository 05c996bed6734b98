"""Static quantization with Q/DQ pairs, placed where the runtime's fusion rules turn them into kernels.

A node computes in integers when its input, its weight and (for a convolution) its output are
quantized. From those heavy nodes the integers spread over the cheap operators between them:

    heavy      Conv, Gemm, MatMul with constant weights: the reason for all of it
    sum        Add, Mul, Concat, pools, Sigmoid …: join when everything they read is quantized already
    same       MaxPool, Reshape, Slice …: join likewise, and keep the scale of what they read
    absorbed   Relu or Clip behind a joined node: its bounds become those of the output's range

Everything else stays float and reads the float value, or the dequantized one where the maker only
has integers. Weights are symmetric, one scale a channel; biases are int32 at scale s_x · s_w.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from calib.observers import HistogramObserver
from calib.ranges import choose, squared_error
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import captured, constant, fresh, nbytes, opset, replace_uses, values
from onnxc.integer import (
    activation_grid,
    refused_nodes,
    scales,
    weight_axis,
    weight_grid,
    weighted_nodes,
)
from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid, bias_guard, parameters, quantize
from onnxc.ops import data_inputs, is_constant, knowledge, weight_of

Ranges = Literal["minmax", "percentile", "entropy", "mse"]
WIDE_OPSET = 21  # the first whose Q/DQ take 16 bits


@dataclass
class Placement:
    """Where Q/DQ pairs go. scale_of: the tensor whose scale a quantized tensor shares."""

    integer: list[gs.Node] = field(default_factory=list)
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    scale_of: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        while self.scale_of.get(name, name) != name:
            name = self.scale_of[name]
        return name

    def keys(self) -> dict[str, Key]:
        """The statistic that settles the range of each root."""
        roots = {name: self.root(name) for name in self.tensors}
        shared = {root for name, root in roots.items() if name != root}
        integer = {id(node) for node in self.integer}
        return {root: self._key(root, shared, integer) for root in roots.values()}

    def _key(self, root: str, shared: set[str], integer: set[int]) -> Key:
        """That of its values x, or where an Add and a clamp f alone read them, of f(x + s) − s.

        s is the other summand: a value counts no further than they let it through.
        """
        tensor = self.tensors[root]
        if root in shared or len(tensor.outputs) != 1 or id(tensor.outputs[0]) not in integer:
            return Key(root, "histogram")
        reader = tensor.outputs[0]
        others = [t for t in data_inputs(reader) if t is not tensor]
        behind = behind_activation(reader.outputs[0], set())
        if not knowledge(reader).adds or len(others) != 1 or behind is reader.outputs[0]:
            return Key(root, "histogram")
        return Key(behind.name, "histogram", minus=others[0].name)

    def add(self, tensor: gs.Tensor, scale_of: gs.Tensor | None = None) -> None:
        if tensor.name not in self.tensors:
            self.tensors[tensor.name] = tensor
            self.scale_of[tensor.name] = (scale_of or tensor).name


@register
@dataclass(frozen=True)
class Quantize:
    """Quantize weights and activations with ranges from calibration.

    ranges: how the range of an activation is chosen. bits: of weights; activation_bits: of
    activations. spread: whether cheap operators between heavy ones compute in integers too.
    power_of_two: scales are powers of two. ops: only heavy nodes of these operators; empty for all.
    leave: heavy nodes to leave float, whose Q/DQ pairs cost more than their kernels gain.
    """

    name: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False

    ranges: Ranges = "mse"
    bits: Literal[8, 16] = 8
    activation_bits: Literal[8, 16] = 8
    spread: bool = True
    power_of_two: bool = False
    ops: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        placement = self._placement(graph, context)
        return placement.keys().values()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        placement = self._placement(graph, context)
        skips: list[Change | Skip] = list(refused_nodes(graph, context, self.ops))
        skips += [Skip(name, "its Q/DQ cost more than its kernel gains") for name in self.leave]
        if max(self.bits, self.activation_bits) > 8 and context.opset < WIDE_OPSET:
            reason = f"16 bits need opset {WIDE_OPSET}, and the model has {context.opset}"
            return [*skips, *(Skip(n.name, reason) for n in placement.integer)]
        if not placement.integer:
            return skips
        writer = _Writer(graph, context, self, placement)
        return [*writer.write(), *skips]

    def _placement(self, graph: gs.Graph, context: Context) -> Placement:
        return place(graph, context, self.spread, self.ops, self.leave)


def place(
    graph: gs.Graph,
    context: Context,
    spread: bool = True,
    ops: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
) -> Placement:
    """The integer nodes and the tensors that carry Q/DQ pairs, in graph order."""
    placement = Placement()
    left = frozenset(leave)
    heavy = {id(n) for n in weighted_nodes(graph, context, ops) if n.name not in left}
    allowed = context.only.names(graph) if spread else frozenset[str]()
    pinned = {t.name for t in graph.outputs} | captured(graph)
    wanted = _leading(graph, heavy)
    for node in graph.nodes:
        if id(node) in heavy:
            placement.add(node.inputs[0])
        elif not (node.name in allowed and _can_join(node, placement, wanted)):
            continue
        placement.integer.append(node)
        _place_output(node, placement, wanted, pinned)
    return placement


def _leading(graph: gs.Graph, heavy: set[int]) -> set[str]:
    """Names of the tensors that a heavy node reads, directly or through operators that may join."""
    leading: set[str] = set()
    for node in reversed(graph.nodes):
        if id(node) in heavy:
            leading.add(node.inputs[0].name)
        elif _may_carry(node) and any(t.name in leading for t in node.outputs):
            leading.update(t.name for t in data_inputs(node))
    return leading


def _may_carry(node: gs.Node) -> bool:
    row = knowledge(node)
    return row.role in ("sum", "same", "activation") and (row.fits is None or row.fits(node))


def _can_join(node: gs.Node, placement: Placement, wanted: set[str]) -> bool:
    """All that it reads is quantized, and integers that it makes are read by a heavy node."""
    if knowledge(node).role == "activation" or not _may_carry(node):
        return False
    is_held = all(t.name in placement.tensors for t in data_inputs(node))
    return is_held and any(t.name in wanted for t in node.outputs)


def _place_output(
    node: gs.Node, placement: Placement, wanted: set[str], pinned: set[str]
) -> None:
    row = knowledge(node)
    for output in node.outputs:
        behind = output if row.role == "same" else behind_activation(output, pinned)
        if row.float_output and behind.name not in wanted:
            continue
        placement.add(behind, data_inputs(node)[0] if row.role == "same" else None)


def behind_activation(tensor: gs.Tensor, pinned: set[str]) -> gs.Tensor:
    """The tensor behind a Relu or Clip that alone reads this one, or the tensor itself."""
    while len(tensor.outputs) == 1 and tensor.name not in pinned:
        reader = tensor.outputs[0]
        if knowledge(reader).role != "activation" or reader.inputs[0] is not tensor:
            break
        tensor = reader.outputs[0]
    return tensor


def _fixed_point(
    observed: HistogramObserver, settings: Quantize, symmetric: bool
) -> tuple[np.float32, np.generic]:
    """A scale that is a power of two and a zero point of 0; unsigned where nothing is negative.

    Of the powers around the scale of the chosen range the one of lesser squared error; the greater
    one for min-max ranges, which must not clip.
    """
    is_signed = symmetric or float(np.min(observed.low)) < 0
    grid = Grid(settings.activation_bits, signed=is_signed)
    low, high = choose(observed, settings.ranges, grid.width, is_signed)
    scale, zero = parameters(low, high, grid, symmetric=True)
    if settings.ranges == "minmax":
        return np.float32(fixed.power_of_two(float(scale))), zero

    def error(scales: np.ndarray) -> np.ndarray:
        middle = np.full(scales.shape, float(zero) - grid.low)
        return squared_error(observed, scales, middle, 2**grid.width)

    return np.float32(fixed.closest(np.array([scale]), error)[0]), zero


class _Writer:
    """Writes the Q/DQ pairs of one placement into a graph."""

    def __init__(
        self, graph: gs.Graph, context: Context, settings: Quantize, placement: Placement
    ) -> None:
        self.graph, self.context, self.settings = graph, context, settings
        self.placement = placement
        self.scales: dict[str, tuple[np.float32, np.generic]] = {}
        self.weights: dict[tuple[int, int | None, bytes], gs.Tensor] = {}
        self.first: list[gs.Node] = []  # DQ of constants
        self.after: dict[str, list[gs.Node]] = {}
        self.ahead: list[gs.Node] = []  # Q/DQ of graph inputs

    def write(self) -> list[Change | Skip]:
        changes: list[Change | Skip] = []
        self.keys = self.placement.keys()
        for name in self.placement.tensors:
            self._choose(self.placement.root(name))
        for node in self.placement.integer:
            changes.append(self._integer(node))
        makers = {t.name: n for n in self.graph.nodes for t in n.outputs}
        for name, tensor in self.placement.tensors.items():
            self._pair(tensor, makers.get(name))
        nodes = [*self.first, *self.ahead]
        for node in self.graph.nodes:
            nodes += [node, *self.after.get(node.name, ())]
        self.graph.nodes = nodes
        return changes

    def _choose(self, root: str) -> None:
        if root in self.scales:
            return
        grid = activation_grid(self.context.target, self.settings.activation_bits)
        symmetric = self.context.target.symmetric
        observed = self.context.stats[self.keys[root]]
        if self.settings.power_of_two:
            self.scales[root] = _fixed_point(observed, self.settings, symmetric)
            return
        low, high = choose(observed, self.settings.ranges, grid.width, symmetric)
        self.scales[root] = parameters(low, high, grid, symmetric=symmetric)

    def _scale(self, name: str) -> tuple[np.float32, np.generic]:
        return self.scales[self.placement.root(name)]

    def _integer(self, node: gs.Node) -> Change:
        weight = weight_of(node) if knowledge(node).role == "weighted" else None
        if weight is None:
            return Change(node.name, f"{node.op} in integers")
        before = nbytes(weight)
        scale = self._weight(node, weight)
        size, channels = int(np.prod(weight.shape)), scale.size
        self._bias(node, scale)
        bits = self.settings.bits
        what = f"int{bits} weights, {channels} scale{'s' if channels > 1 else ''}"
        if self.settings.power_of_two:
            what = self._formats(node, scale)
        return Change(node.name, what, before, size * bits // 8 + 4 * channels)

    def _formats(self, node: gs.Node, scale: np.ndarray) -> str:
        """Fixed-point formats of what a node reads, multiplies by and makes."""
        made = behind_activation(node.outputs[0], set(self.placement.tensors)).name
        x, y = (self._format(t) for t in (node.inputs[0].name, made))
        return f"{x} · {fixed.name(scale, self.settings.bits, True)} -> {y}"

    def _format(self, tensor: str) -> str:
        if tensor not in self.placement.tensors:
            return "float"
        scale, zero = self._scale(tensor)
        return fixed.name(float(scale), self.settings.activation_bits, zero.dtype.kind == "i")

    def _weight(self, node: gs.Node, weight: gs.Constant) -> np.ndarray:
        """Replace the weight by DQ(integers); returns the scales (channels,) or ()."""
        grid = weight_grid(self.context.target, self.settings.bits)
        axis, array = weight_axis(node, self.context.target), values(weight)
        scale = scales(array, axis, grid, self.settings.power_of_two)
        bias = self._bias_of(node)
        if bias is not None:
            s_x, _ = self._scale(node.inputs[0].name)
            guarded = bias_guard(bias if axis is not None else np.abs(bias).max(), s_x, scale)
            scale = fixed.power_of_two(guarded).astype(np.float32) if self.settings.power_of_two else guarded
        key = (id(weight), axis, scale.tobytes())
        if key not in self.weights:
            q = quantize(array, scale, 0, grid, axis)
            self.weights[key] = self._dequantized(weight.name, q, scale, axis)
        position = knowledge(node).weight
        node.inputs[position] = self.weights[key]
        return scale

    def _bias_of(self, node: gs.Node) -> np.ndarray | None:
        position = knowledge(node).bias
        if position is None or position >= len(node.inputs) or not node.inputs[position].name:
            return None
        return values(node.inputs[position]).reshape(-1)

    def _bias(self, node: gs.Node, scale: np.ndarray) -> None:
        bias = self._bias_of(node)
        if bias is None:
            return
        position = knowledge(node).bias
        s_x, _ = self._scale(node.inputs[0].name)
        s_b = (np.float64(s_x) * scale.astype(np.float64)).astype(np.float32)
        limit = 2.0**31 - 1
        q = np.clip(np.rint(bias / s_b.astype(np.float64)), -limit, limit).astype(np.int32)
        axis = 0 if s_b.ndim else None
        node.inputs[position] = self._dequantized(node.inputs[position].name, q, s_b, axis)

    def _dequantized(
        self, name: str, q: np.ndarray, scale: np.ndarray, axis: int | None
    ) -> gs.Tensor:
        make = lambda suffix, array: constant(fresh(self.graph, f"{name}_{suffix}"), array)  # noqa: E731
        out = gs.Variable(fresh(self.graph, f"{name}_dequantized"), np.float32, q.shape)
        inputs = [make("quantized", q), make("scale", scale)]
        if q.dtype != np.int32:
            inputs.append(make("zero_point", np.zeros(scale.shape, q.dtype)))
        attrs = {} if axis is None else {"axis": axis}
        node_name = fresh(self.graph, f"{name}_DequantizeLinear")
        self.first.append(gs.Node("DequantizeLinear", node_name, attrs, inputs, [out]))
        return out

    def _pair(self, tensor: gs.Tensor, maker: gs.Node | None) -> None:
        """tensor -> Q -> DQ -> its readers."""
        graph, name = self.graph, tensor.name
        integer = {id(node) for node in self.placement.integer}
        scale, zero = self._scale(name)
        shared = [constant(fresh(graph, f"{name}_{k}"), v) for k, v in (("scale", scale), ("zero_point", zero))]
        q = gs.Variable(fresh(graph, f"{name}_quantized"), zero.dtype, tensor.shape)
        dq = gs.Variable(fresh(graph, f"{name}_dequantized"), np.float32, tensor.shape)
        only_integers = maker is not None and self._made_in_integers(tensor, integer)
        keep = [] if only_integers else [u for u in tensor.outputs if id(u) not in integer]
        replace_uses(tensor, dq, keep)
        source = tensor
        if only_integers and any(tensor is t for t in graph.outputs):
            source = gs.Variable(fresh(graph, f"{name}_float"), np.float32, tensor.shape)
            maker_outputs = maker.outputs
            maker_outputs[next(i for i, t in enumerate(maker_outputs) if t is tensor)] = source
            replace_uses(dq, tensor)
            dq = tensor
        pair = [
            gs.Node("QuantizeLinear", fresh(graph, f"{name}_QuantizeLinear"), {}, [source, *shared], [q]),
            gs.Node("DequantizeLinear", fresh(graph, f"{name}_DequantizeLinear"), {}, [q, *shared], [dq]),
        ]
        if maker is None:
            self.ahead += pair
        else:
            self.after.setdefault(maker.name, []).extend(pair)

    def _made_in_integers(self, tensor: gs.Tensor, integer: set[int]) -> bool:
        maker = tensor.inputs[0]
        while knowledge(maker).role == "activation" and id(maker) not in integer:
            if not maker.inputs[0].inputs:
                return False
            maker = maker.inputs[0].inputs[0]
        return id(maker) in integer
