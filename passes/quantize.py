"""Static quantization with Q/DQ pairs, placed where the runtime's fusion rules make them kernels.

`onnxc.placement` says which nodes compute in integers and which tensors carry a pair. Everything
else stays float and reads the float value, or the dequantized one if its maker has only integers.
Weights are symmetric, one scale a channel; biases are int32 at scale s_x · s_w.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.observers import HistogramObserver
from calib.ranges import choose, importance, squared_error
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constant, fresh, nbytes, replace_uses, values
from onnxc.held import Constants
from onnxc.integer import activation_grid, refused_nodes
from onnxc.moments import channel_powers, moments_key
from onnxc.numerics import fixed
from onnxc.numerics.affine import TINY, Grid, parameters
from onnxc.ops import bounds, is_absorbed, knowledge, weight_of
from onnxc.placement import Placement, behind_activation, place

Ranges = Literal["minmax", "percentile", "entropy", "mse", "aciq", "hwgq", "output"]
WIDE_OPSET = 21  # the first whose Q/DQ take 16 bits

Array = NDArray[Any]


@register
@dataclass(frozen=True)
class Quantize:
    """Quantize weights and activations with ranges from calibration.

    ranges: how the range of an activation is chosen. bits: of weights; activation_bits: of
    activations. spread: whether cheap operators between heavy ones compute in integers too.
    power_of_two: scales are powers of two. ops: only heavy nodes of these operators; empty for all.
    leave: heavy nodes to leave float, whose Q/DQ pairs cost more than their kernels gain.
    sensitive: others to leave float, for the outputs lose too much by them.
    per_tensor: one scale for all of a weight, so that a weight of few values keeps them few.
    weights: whether weights are quantized, too; if not, `quantize-constants` may do it later.
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
    per_tensor: bool = False
    weights: bool = True
    sensitive: tuple[str, ...] = ()

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        placement = self._placement(graph, context)
        keys = placement.keys().values()
        return [*keys, *(_moments(placement) if self.ranges == "output" else ())]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        skips: list[Change | Skip] = list(refused_nodes(graph, context, self.ops))
        skips += [Skip(name, "its Q/DQ cost more than its kernel gains") for name in self.leave]
        skips += [Skip(name, "the outputs lose most by it") for name in self.sensitive]
        placement = self._placement(graph, context)
        if max(self.bits, self.activation_bits) > 8 and context.opset < WIDE_OPSET:
            reason = f"16 bits need opset {WIDE_OPSET}, and the model has {context.opset}"
            return [*skips, *(Skip(n.name, reason) for n in placement.integer)]
        left = (*self.leave, *self.sensitive)
        while unknown := _unmeasured(placement, context):
            nodes = [node.name for node in placement.touching(unknown)]
            reason = f"the range of {min(unknown)} is not known: it has no finite statistics"
            skips += [Skip(name, reason) for name in nodes]
            left = (*left, *nodes)
            placement = place(graph, context, self.spread, self.ops, left)
        if not placement.integer:
            return skips
        return [*_Writer(graph, context, self, placement).write(), *skips]

    def _placement(self, graph: gs.Graph, context: Context) -> Placement:
        left = (*self.leave, *self.sensitive)
        return place(graph, context, self.spread, self.ops, left)


def _unmeasured(placement: Placement, context: Context) -> set[str]:
    """Roots without statistics: their values were not finite."""
    return {root for root, key in placement.keys().items() if key not in context.stats}


def _moments(placement: Placement) -> Iterator[Key]:
    """Of the inputs of heavy nodes."""
    found = (moments_key(n) for n in placement.integer if knowledge(n).role == "weighted")
    return (key for key in found if key is not None)


def _weight_of_errors(
    key: Key, observed: HistogramObserver, placement: Placement, context: Context
) -> Array | None:
    """ω of the bins of a tensor for the layers that read it; None where there are none."""
    if key.minus is not None or not isinstance(observed, HistogramObserver):
        return None
    found: list[tuple[Array, Array]] = []
    for node in placement.integer:
        wanted = moments_key(node) if knowledge(node).role == "weighted" else None
        stats = None if wanted is None else context.stats.get(wanted)
        if stats is not None and placement.root(node.inputs[0].name) == key.tensor:
            found.append(channel_powers(node, stats.diagonal))
    if not found:
        return None
    m = found[0][1]
    alike = [(u, own) for u, own in found if len(own) == len(m)]
    u = sum(u / max(float(u @ own), TINY) for u, own in alike)  # each reader's output counts alike
    return importance(observed, np.asarray(u), m)


def _fixed_point(
    observed: HistogramObserver, settings: Quantize, symmetric: bool, omega: Array | None = None
) -> tuple[np.float32, Any]:
    """A scale that is a power of two and a zero point of 0; unsigned where nothing is negative.

    Of the powers around the scale of the chosen range the one of lesser squared error; the greater
    one for min-max ranges, which must not clip.
    """
    is_signed = symmetric or float(np.min(observed.low)) < 0
    grid = Grid(settings.activation_bits, signed=is_signed)
    low, high = choose(observed, settings.ranges, grid.width, is_signed, importance=omega)
    scale, zero = parameters(low, high, grid, symmetric=True)
    if settings.ranges == "minmax":
        return np.float32(fixed.power_of_two(float(scale))), zero

    def error(tried: Array) -> Array:
        middle = np.full(tried.shape, float(zero) - grid.low)
        return squared_error(observed, tried, middle, 2**grid.width, omega)

    return np.float32(fixed.closest(np.array([scale]), error)[0]), zero


class _Writer:
    """Writes the Q/DQ pairs of one placement into a graph."""

    def __init__(
        self, graph: gs.Graph, context: Context, settings: Quantize, placement: Placement
    ) -> None:
        self.graph, self.context, self.settings = graph, context, settings
        self.placement = placement
        self.integer = {id(node) for node in placement.integer}
        self.scales = {root: self._choose(key) for root, key in placement.keys().items()}
        bits, pow2 = settings.bits, settings.power_of_two
        self.constants = Constants(graph, context, bits, pow2, settings.per_tensor)
        self.ahead: list[gs.Node] = []  # Q/DQ of graph inputs
        self.after: dict[str, list[gs.Node]] = {}

    def write(self) -> list[Change | Skip]:
        changes: list[Change | Skip] = [self._integer(node) for node in self.placement.integer]
        makers = {t.name: n for n in self.graph.nodes for t in n.outputs}
        for name, tensor in self.placement.tensors.items():
            self._pair(tensor, makers.get(name))
        nodes = [*self.constants.nodes, *self.ahead]
        for node in self.graph.nodes:
            nodes += [node, *self.after.get(node.name, ())]
        self.graph.nodes = nodes
        return changes

    def _choose(self, key: Key) -> tuple[np.float32, Any]:
        """Scale and zero point of a root."""
        symmetric = self.context.target.symmetric
        observed, omega = self.context.stats[key], None
        if self.settings.ranges == "output":
            omega = _weight_of_errors(key, observed, self.placement, self.context)
        if self.settings.power_of_two:
            return _fixed_point(observed, self.settings, symmetric, omega)
        grid = activation_grid(self.context.target, self.settings.activation_bits)
        low, high = choose(observed, self.settings.ranges, grid.width, symmetric, importance=omega)
        return parameters(low, high, grid, symmetric=symmetric)

    def _scale(self, name: str) -> tuple[np.float32, Any]:
        return self.scales[self.placement.root(name)]

    def _integer(self, node: gs.Node) -> Change:
        weight = weight_of(node) if knowledge(node).role == "weighted" else None
        if weight is None:
            return Change(node.name, f"{node.op} in integers")
        self._shield_bias(node)
        if not self.settings.weights:
            return Change(node.name, f"{node.op} on integers, with float weights")
        before, bits = nbytes(weight), self.settings.bits
        scale = self.constants.write(node, self._scale(node.inputs[0].name)[0])
        what = f"int{bits} weights, {scale.size} scale{'s' if scale.size > 1 else ''}"
        if self.settings.power_of_two:
            what = self._formats(node, scale)
        size = int(np.prod(weight.shape)) * bits // 8 + 4 * scale.size
        return Change(node.name, what, before, size)

    def _formats(self, node: gs.Node, scale: Array) -> str:
        """Fixed-point formats of what a node reads, multiplies by and makes."""
        made = behind_activation(node.outputs[0], set(self.placement.tensors)).name
        x, y = (self._format(t) for t in (node.inputs[0].name, made))
        return f"{x} · {fixed.name(scale, self.settings.bits, True)} -> {y}"

    def _format(self, tensor: str) -> str:
        if tensor not in self.placement.tensors:
            return "float"
        scale, zero = self._scale(tensor)
        return fixed.name(float(scale), self.settings.activation_bits, zero.dtype.kind == "i")

    def _shield_bias(self, node: gs.Node) -> None:
        """Make the bias in an Add behind a product that returns float a matrix of one row.

        ONNX Runtime merges a product and a vector into a Gemm, which it then leaves float.
        """
        output = node.outputs[0]
        if output.name in self.placement.tensors or len(output.shape or ()) < 2:
            return
        for reader in output.outputs:
            for position, tensor in enumerate(reader.inputs):
                if (
                    knowledge(reader).adds
                    and isinstance(tensor, gs.Constant)
                    and len(tensor.shape) == 1
                ):
                    row = values(tensor).reshape(1, -1)
                    reader.inputs[position] = constant(fresh(self.graph, f"{tensor.name}_row"), row)

    def _pair(self, tensor: gs.Tensor, maker: gs.Node | None) -> None:
        """tensor -> Q -> DQ -> its readers; those in float read the tensor, if it is float."""
        graph, name = self.graph, tensor.name
        is_integer = maker is not None and self._made_in_integers(maker)
        floats = [reader for reader in tensor.outputs if id(reader) not in self.integer]
        dq = gs.Variable(fresh(graph, f"{name}_dequantized"), np.float32, tensor.shape)
        replace_uses(tensor, dq, keep=() if is_integer else floats)
        source = tensor
        if maker is not None and is_integer and any(tensor is t for t in graph.outputs):
            source = gs.Variable(fresh(graph, f"{name}_float"), np.float32, tensor.shape)
            maker.outputs = [source if t is tensor else t for t in maker.outputs]
            replace_uses(dq, tensor)
            dq = tensor
        pair = self._nodes(name, source, dq)
        if maker is not None and is_integer:
            self._apart(tensor, maker)
        if maker is None:
            self.ahead += pair
        else:
            self.after.setdefault(maker.name, []).extend(pair)

    def _apart(self, tensor: gs.Tensor, clamp: gs.Node) -> None:
        """Another pair, of the same scale, in front of a clamp that its kernel cannot take in.

        The range ends above the bound, where its scale is a power of two: the kernel then makes
        integers, and limiting them comes to the same as limiting what they are rounded from.
        """
        scale, zero = self._scale(tensor.name)
        top = float(scale) * (np.iinfo(zero.dtype).max - int(zero))
        if not is_absorbed(clamp) or not bounds(clamp)[1] < top - float(scale) / 2:
            return
        made = clamp.inputs[0]
        if not made.inputs or id(made.inputs[0]) not in self.integer:
            return
        self.placement.scale_of[made.name] = tensor.name
        dq = gs.Variable(fresh(self.graph, f"{made.name}_dequantized"), np.float32, made.shape)
        clamp.inputs[0] = dq
        pair = self._nodes(made.name, made, dq)
        self.after.setdefault(made.inputs[0].name, []).extend(pair)

    def _nodes(self, name: str, source: gs.Tensor, result: gs.Tensor) -> list[gs.Node]:
        """source -> Q -> DQ -> result."""
        graph, (scale, zero) = self.graph, self._scale(name)
        grid = [
            constant(fresh(graph, f"{name}_{what}"), value)
            for what, value in (("scale", scale), ("zero_point", zero))
        ]
        q = gs.Variable(fresh(graph, f"{name}_quantized"), zero.dtype, source.shape)
        makers = (("QuantizeLinear", source, q), ("DequantizeLinear", q, result))
        return [
            gs.Node(op, fresh(graph, f"{name}_{op}"), {}, [x, *grid], [y]) for op, x, y in makers
        ]

    def _made_in_integers(self, maker: gs.Node) -> bool:
        """Whether a node computes in integers, or is an activation behind one that does."""
        while is_absorbed(maker) and id(maker) not in self.integer:
            if not maker.inputs[0].inputs:
                return False
            maker = maker.inputs[0].inputs[0]
        return id(maker) in self.integer
