"""Which heavy nodes run in integer kernels, read back from ONNX Runtime's own optimized graph.

Q/DQ pairs are only a wish: the runtime fuses a node into an integer kernel when the pattern around
it fits one of its rules. So the optimized graph is written out and its heavy nodes are counted,
nested bodies included, with a reason for each one that still runs in float. Q/DQ are fused at the
level "extended"; what "all" adds moves layouts and hides names, so it is left out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import onnx

from onnxc.boundary import Boundary
from onnxc.cuts import BASE
from onnxc.files import TemporaryFolder
from onnxc.graph import Model, read, skeleton
from onnxc.runtime import Runtime, session
from onnxc.stages import open_stages

RECURRENT = frozenset(("LSTM", "GRU", "RNN"))
CONVOLUTIONS = frozenset(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"))
PRODUCTS = frozenset(("Gemm", "FusedGemm", "MatMul", "FusedMatMul"))
FLOAT_HEAVY = RECURRENT | CONVOLUTIONS | PRODUCTS
INTEGER_CONVOLUTIONS = frozenset(("QLinearConv", "ConvInteger", "QLinearConvTranspose"))
INTEGER_PRODUCTS = frozenset(("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"))
COMPRESSED = frozenset(("DynamicQuantizeMatMul", "MatMulNBits", "DynamicQuantizeLSTM"))
INTEGER_HEAVY = INTEGER_CONVOLUTIONS | INTEGER_PRODUCTS | COMPRESSED
FUSED = re.compile(r"(_quant|/MatMulScaleFusion/)?(_token_\d+)*$")  # what fusions append to names


@dataclass(frozen=True)
class Kernel:
    """One heavy node of the optimized graph. reason: why it runs in float, empty if it does not."""

    node: str
    op: str
    integer: bool
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Heavy nodes of an optimized graph, in order.

    boundaries: QuantizeLinear and DequantizeLinear nodes left in it. orphans: those among them that
    no kernel absorbed, on constants or back to back: they cost time and quantize nothing.
    """

    kernels: tuple[Kernel, ...]
    boundaries: int
    orphans: int

    @property
    def total(self) -> int:
        return len(self.kernels)

    @property
    def integer(self) -> int:
        return sum(kernel.integer for kernel in self.kernels)

    @property
    def left_float(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if not kernel.integer)


@dataclass
class _Scope:
    """A graph of the dump with who makes and who reads each tensor; bodies see outer constants."""

    graph: onnx.GraphProto
    where: str = ""
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    maker: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants |= {t.name: t for t in self.graph.initializer}
        for node in self.graph.node:
            self.maker |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def makes(self, name: str) -> str:
        return self.maker[name].op_type if name in self.maker else ""

    def read_by(self, name: str) -> list[str]:
        return [node.op_type for node in self.readers.get(name, ())]


def coverage(model: Model | bytes | Path, runtime: Runtime = Runtime()) -> Coverage:
    """Optimize a model as `runtime` does, and count. Raises ModelError where that is refused."""
    level = "extended" if runtime.level == "all" else runtime.level
    parts = _optimized(model, replace(runtime, level=level, packs=False))
    names = _names(model)
    scopes = [scope for part in parts for scope in _scopes(part, "", {})]
    kernels = (kernel for scope in scopes for kernel in _kernels(scope, names))
    borders = [sum(column) for column in zip(*(_borders(scope) for scope in scopes), strict=True)]
    return Coverage(tuple(kernels), borders[0], borders[1])


def _optimized(model: Model | bytes | Path, runtime: Runtime) -> Iterator[onnx.GraphProto]:
    """The optimized graph, or those of the stages of a model that does not fit in its bound."""
    with TemporaryFolder() as folder:
        dump = Path(folder) / "optimized.onnx"
        if not isinstance(model, Model):
            session(model, runtime, dump)
            yield onnx.load(dump, load_external_data=False).graph
            return
        taps = max((model.memory or 0) - BASE, 0) // 3  # what writing it takes besides
        staged = open_stages(model, None, runtime, taps=taps)
        for stage in staged.stages:
            staged.session(stage, Boundary(), dump)
            yield onnx.load(dump, load_external_data=False).graph


def _names(source: Model | bytes | Path) -> dict[str, str]:
    """Node names as the user knows them, by name and by output tensor: fusions rename nodes."""
    if isinstance(source, Model):
        graph = skeleton(source)[0].graph
    elif isinstance(source, bytes):
        graph = onnx.ModelProto.FromString(source).graph
    else:
        graph = read(source).graph
    named = {node.name: node.name for node in graph.node if node.name}
    return {out: node.name for node in graph.node for out in node.output if node.name} | named


def _scopes(
    graph: onnx.GraphProto, where: str, constants: dict[str, onnx.TensorProto]
) -> Iterator[_Scope]:
    scope = _Scope(graph, where, dict(constants))
    yield scope
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                inside = f"{attribute.name} of {node.op_type} {node.name}"
                yield from _scopes(attribute.g, inside, scope.constants)


def _kernels(scope: _Scope, names: dict[str, str]) -> Iterator[Kernel]:
    for node in scope.graph.node:
        keys = (node.name, FUSED.sub("", node.name), *node.output)
        name = next((names[key] for key in keys if key in names), node.name or node.output[0])
        if node.op_type in INTEGER_HEAVY:
            yield Kernel(name, node.op_type, True)
        elif node.op_type in FLOAT_HEAVY:
            yield Kernel(name, node.op_type, False, _reason(node, scope))


def _reason(node: onnx.NodeProto, scope: _Scope) -> str:
    """Why a heavy node was not fused into an integer kernel, in words."""
    kind = node.op_type
    dequantized = [scope.makes(name) == "DequantizeLinear" for name in node.input[:2]]
    weight = node.input[1]
    is_constant = _is_fixed(weight, scope) or _is_stored(weight, scope)
    if scope.where and not any(dequantized):
        return f"inside the {scope.where}, and nested bodies stay float"
    if kind in RECURRENT:
        return f"{kind} is left in float; it has an integer kernel only as dynamic LSTM"
    if "MatMul" in kind and not is_constant and not any(dequantized):
        return "multiplies two activations, which is left in float"
    sides = ("input", "weight" if is_constant else "second input")
    bare = [side for side, done in zip(sides, dequantized, strict=True) if not done]
    bare += [] if "QuantizeLinear" in scope.read_by(node.output[0]) else ["output"]
    if bare:
        return f"no Q/DQ at its {' and '.join(bare)}"
    return _misfit(node, scope)


def _misfit(node: onnx.NodeProto, scope: _Scope) -> str:
    """Why Q/DQ on all sides were not enough."""
    readers = scope.readers[node.output[0]]
    floats = [reader for reader in readers if reader.op_type != "QuantizeLinear"]
    if floats:
        return f"its output is also read in float, by {floats[0].op_type} {floats[0].name}"
    source, weight, result = (*(scope.maker[name] for name in node.input[:2]), readers[0])
    for side, border in (("input", source), ("output", result)):
        if _is_per_axis(border, scope):
            return f"its {side} has a scale for each channel, and kernels take one in all"
    kinds = [_stored_type(border, scope) for border in (source, weight, result)]
    if kinds[0] != kinds[2]:
        return f"its input is {kinds[0]}, but its output {kinds[2]}"
    return (
        f"has Q/DQ on all sides, but ONNX Runtime has no integer {node.op_type} "
        f"for {kinds[0]} and {kinds[1]}"
    )


def _is_per_axis(border: onnx.NodeProto, scope: _Scope) -> bool:
    scale = scope.constants.get(border.input[1])
    return scale is not None and prod(scale.dims) > 1


def _is_fixed(name: str, scope: _Scope) -> bool:
    """Whether a tensor is a constant, or follows from constants alone, Q/DQ aside."""
    if name in scope.constants:
        return True
    maker = scope.maker.get(name)
    if maker is None or not maker.input or maker.op_type == "DequantizeLinear":
        return False
    return all(_is_fixed(given, scope) for given in maker.input if given)


def _is_stored(name: str, scope: _Scope) -> bool:
    return scope.makes(name) == "DequantizeLinear" and scope.maker[name].input[0] in scope.constants


def _stored_type(border: onnx.NodeProto, scope: _Scope) -> str:
    """Element type at a Q or DQ, of its zero point or its constant; uint8 if neither is known."""
    names = border.input[2:3] or border.input[:1]
    found = [scope.constants[name].data_type for name in names if name in scope.constants]
    return onnx.TensorProto.DataType.Name(found[0]).lower() if found else "uint8"


def _borders(scope: _Scope) -> tuple[int, int]:
    """Q/DQ nodes left, and those among them that nothing absorbed."""
    left = [n for n in scope.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return len(left), sum(_is_orphan(node, scope) for node in left)


def _is_orphan(node: onnx.NodeProto, scope: _Scope) -> bool:
    if node.op_type == "DequantizeLinear":
        return node.input[0] in scope.constants or scope.makes(node.input[0]) == "QuantizeLinear"
    readers = scope.read_by(node.output[0])
    return bool(readers) and all(reader == "DequantizeLinear" for reader in readers)
