"""Replace what does not depend on the inputs by its value.

A node is *fixed* when all its inputs are constants or outputs of fixed nodes. The tensors that
leave the fixed part are its *frontier*; ONNX Runtime computes them in one small model, and
constants take their place. Shape, Size, and a Gather from Shape are fixed too where the dimensions
are static.

Left alone: random operators; QuantizeLinear and DequantizeLinear, which are there to be fused;
nodes with nested bodies; outputs of the graph; and values that would make the file grow by more
than `growth` bytes, such as a large ConstantOfShape. Growth is counted in elements, so that a
weight stored in half precision behind a Cast still becomes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import ModelError
from onnxc.graph import (
    Model,
    bodies,
    captured,
    constant,
    fresh,
    is_spilling,
    nbytes,
    replace_uses,
    skeleton,
    store,
    tidy,
    values,
)
from onnxc.runtime import Runtime
from onnxc.stages import open_stages

RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout")
)
DRAWN = frozenset(("Multinomial", "Bernoulli"))
QUANTIZED = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"))
KEPT = RANDOM | DRAWN | QUANTIZED | {"Constant"}
NODE_BYTES = 64  # of a node in a file, about
STANDARD = (None, "", "ai.onnx")

Array = NDArray[Any]


@dataclass(frozen=True)
class Frontier:
    """A tensor that leaves the fixed part, the nodes that make it, and the constants they read."""

    tensor: gs.Tensor
    node: gs.Node
    nodes: tuple[gs.Node, ...]
    sources: tuple[gs.Constant, ...]

    def growth(self, elements: int, width: int) -> int:
        """Bytes that the value adds: constants that nothing else reads, and the nodes, go."""
        alone = (source for source in self.sources if len(source.outputs) == 1)
        freed = sum(int(prod(source.shape)) for source in alone)
        return (elements - freed) * width - NODE_BYTES * len(self.nodes)


@register
@dataclass(frozen=True)
class FoldConstants:
    """Replace what does not depend on the inputs by its value.

    growth: bytes that folding may add to the file in all.
    """

    growth: int = 16384

    name: ClassVar[str] = "fold-constants"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        results: list[Change | Skip] = [*_fold_shapes(graph, allowed)]
        inner = captured(graph)
        frontiers = []
        for frontier in _frontiers(graph, allowed):
            if frontier.tensor.name in inner:
                results.append(Skip(frontier.node.name, "a nested body reads its value"))
            else:
                frontiers.append(frontier)
        results += self._fold(graph, frontiers)
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results

    def _fold(self, graph: gs.Graph, frontiers: Sequence[Frontier]) -> list[Change | Skip]:
        """Fold in order while the file has room to grow; known sizes spare useless computing."""
        sizes = _sizes(graph, frontiers)
        small = [f for f in frontiers if f.growth(*sizes.get(f.tensor.name, (0, 1))) <= self.growth]
        is_large = is_spilling(graph)
        computed = (_one_by_one if is_large else _compute)(graph, small)
        results: list[Change | Skip] = []
        room = self.growth
        for frontier in frontiers:
            value = computed.get(frontier.tensor.name)
            if isinstance(value, str):
                results.append(Skip(frontier.node.name, value))
                continue
            if value is None:
                growth = frontier.growth(*sizes[frontier.tensor.name])
            else:
                growth = frontier.growth(int(prod(value.shape)), value.dtype.itemsize)
            if value is None or growth > room:
                reason = f"its value would add {growth:,} bytes, past the {self.growth:,} allowed"
                results.append(Skip(frontier.node.name, reason))
                continue
            room -= max(growth, 0)
            results.append(_replace(graph, frontier, value))
        return results


def _fold_shapes(graph: gs.Graph, allowed: frozenset[str]) -> list[Change]:
    """Shape, Size and Gather of Shape where the dimensions they give are static."""
    changes = []
    outputs = {tensor.name for tensor in graph.outputs}
    for node in graph.nodes:
        if node.name not in allowed or node.domain not in STANDARD or node.op not in SHAPES:
            continue
        value = None if node.outputs[0].name in outputs else SHAPES[node.op](node)
        if value is not None:
            tensor = constant(fresh(graph, f"{node.outputs[0].name}_value"), value)
            replace_uses(node.outputs[0], tensor)
            changes.append(Change(node.name, f"{node.op} is static", 0, value.nbytes))
    return changes


def _shape_value(node: gs.Node) -> Array | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    taken = list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    return np.array(taken, np.int64) if all(isinstance(d, int) for d in taken) else None


def _size_value(node: gs.Node) -> Array | None:
    shape = node.inputs[0].shape
    is_static = shape is not None and all(isinstance(d, int) for d in shape)
    return np.array(prod(shape), np.int64) if is_static else None


def _gather_value(node: gs.Node) -> Array | None:
    """The dimensions that a Gather picks from a Shape, others may be dynamic."""
    source = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if source is None or source.op != "Shape" or not isinstance(node.inputs[1], gs.Constant):
        return None
    shape = source.inputs[0].shape
    if shape is None or source.attrs.keys() & {"start", "end"}:
        return None
    picks = values(node.inputs[1])
    if picks.size and not (-len(shape) <= picks.min() and picks.max() < len(shape)):
        return None
    taken = [shape[int(i)] for i in picks.reshape(-1)]
    is_static = all(isinstance(d, int) for d in taken)
    return np.array(taken, np.int64).reshape(picks.shape) if is_static else None


SHAPES = {"Shape": _shape_value, "Size": _size_value, "Gather": _gather_value}


def _frontiers(graph: gs.Graph, allowed: frozenset[str]) -> list[Frontier]:
    """One sweep: fixed nodes with what they are made of, then the tensors that leave them."""
    outputs = {tensor.name for tensor in graph.outputs}
    made: dict[str, tuple[dict[str, gs.Node], dict[str, gs.Constant]]] = {}
    fixed: list[gs.Node] = []
    for node in graph.nodes:
        given = [tensor for tensor in node.inputs if tensor.name]
        if not all(isinstance(t, gs.Constant) or t.name in made for t in given):
            continue
        if not _may_fold(node, allowed) or not outputs.isdisjoint(t.name for t in node.outputs):
            continue
        nodes: dict[str, gs.Node] = {}
        sources: dict[str, gs.Constant] = {}
        for tensor in given:
            if isinstance(tensor, gs.Constant):
                sources[tensor.name] = tensor
            else:
                nodes |= made[tensor.name][0]
                sources |= made[tensor.name][1]
        nodes[node.name] = node
        made |= {tensor.name: (nodes, sources) for tensor in node.outputs if tensor.name}
        fixed.append(node)
    names = {node.name for node in fixed}
    return [
        Frontier(tensor, node, *(tuple(part.values()) for part in made[tensor.name]))
        for node in fixed
        for tensor in node.outputs
        if tensor.name and any(reader.name not in names for reader in tensor.outputs)
    ]


def _may_fold(node: gs.Node, allowed: frozenset[str]) -> bool:
    is_plain = node.domain in STANDARD and node.op not in KEPT and not bodies(node)
    return is_plain and node.name in allowed


def _program(graph: gs.Graph, frontiers: Sequence[Frontier]) -> Model:
    """A model without inputs that computes the frontier."""
    wanted = {node.name for frontier in frontiers for node in frontier.nodes}
    part = gs.Graph(
        nodes=[node for node in graph.nodes if node.name in wanted],
        outputs=[frontier.tensor for frontier in frontiers],
        name="fixed",
        opset=graph.opset,
        import_domains=graph.import_domains,
        ir_version=graph.ir_version,
    )
    return Model(part)


def _sizes(graph: gs.Graph, frontiers: Sequence[Frontier]) -> dict[str, tuple[int, int]]:
    """Elements of each value and bytes of one, where shape inference tells without computing it."""
    if not frontiers:
        return {}
    try:
        proto = onnx.shape_inference.infer_shapes(skeleton(_program(graph, frontiers))[0])
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    sizes = {}
    for port in (*proto.graph.value_info, *proto.graph.output):
        kind = port.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            sizes[port.name] = prod(d.dim_value for d in kind.shape.dim), width
    return sizes


def _compute(graph: gs.Graph, frontiers: Sequence[Frontier]) -> dict[str, gs.Constant | str]:
    """Values by tensor name; the reason in words for one that ONNX Runtime cannot compute."""
    if not frontiers:
        return {}
    names = [frontier.tensor.name for frontier in frontiers]
    runtime = Runtime(level="none", packs=False)
    try:
        found = open_stages(_program(graph, frontiers), {}, runtime, names).once({})
        return {name: _kept(graph, name, value) for name, value in found.items()}
    except ModelError as error:
        if len(frontiers) == 1:
            return {names[0]: str(error)}
    return _one_by_one(graph, frontiers)


def _one_by_one(graph: gs.Graph, frontiers: Sequence[Frontier]) -> dict[str, gs.Constant | str]:
    found: dict[str, gs.Constant | str] = {}
    for frontier in frontiers:
        found |= _compute(graph, [frontier])
    return found


def _kept(graph: gs.Graph, name: str, value: Any) -> gs.Constant | str:
    if not isinstance(value, np.ndarray):
        return "its value is not a tensor"
    return store(graph, fresh(graph, f"{name}_value"), value)


def _replace(graph: gs.Graph, frontier: Frontier, value: gs.Constant) -> Change:
    old = frontier.tensor
    before = sum(nbytes(source) for source in frontier.sources if len(source.outputs) == 1)
    replace_uses(old, value)
    what = f"{len(frontier.nodes)} node{'s' * (len(frontier.nodes) > 1)} computed once"
    return Change(frontier.node.name, what, before, nbytes(value))
