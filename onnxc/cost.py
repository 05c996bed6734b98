"""What a model costs: bytes by type, parameters, and multiply-accumulates (MACs) of one sample.

A free dimension of the model's inputs counts as 1. What can be compressed is what the quantizing
passes say of each heavy node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.data import InputSpec, synthesize
from onnxc.errors import DataError, ModelError
from onnxc.graph import Model, as_declared, constants, copy, load, nbytes, opset, read, walk
from onnxc.integer import refusal
from onnxc.macs import MACS, macs
from onnxc.ops import knowledge, weight_of
from onnxc.runtime import Runtime
from onnxc.shapes import infer
from onnxc.stages import Source, staged
from onnxc.storage.package import is_package, plain
from onnxc.storage.stored import source, why_no_source
from onnxc.targets import Target, choose
from onnxc.weights import locations

Shape = Sequence[int | str | None] | None
Names = frozenset[str]


@dataclass(frozen=True)
class Port:
    """An input or output of the model."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class HeavyNode:
    """A node with multiply-accumulates: what it costs, and how it can be compressed or why not.

    weight: bytes of its constant weights. macs: None where shapes are unknown.
    """

    name: str
    op: str
    shape: tuple[int, ...] | None
    weight: int
    macs: int | None
    can: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `onnxc inspect` shows. bytes: of the file with its external data, where there is one."""

    bytes: int | None
    bytes_by_type: dict[str, int]
    parameters: int
    macs: int | None
    opset: int
    ops: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    quantized: str | None
    heavy: tuple[HeavyNode, ...]
    notes: tuple[str, ...] = ()


def inspect(source: str | Path | bytes | onnx.ModelProto | Model) -> Inspection:
    """What a model is made of; it is run once where shapes are not known otherwise.

    Raises ModelError when the model cannot be read.
    """
    model = copy(source) if isinstance(source, Model) else load(source)
    inputs, outputs = (tuple(map(_port, p)) for p in (model.graph.inputs, model.graph.outputs))
    notes = (*model.notes, *infer(model))
    heavy = _heavy_nodes(model)
    known = [node.macs for node in heavy if node.macs is not None]
    return Inspection(
        bytes=file_bytes(source) if isinstance(source, str | Path) else None,
        bytes_by_type=bytes_by_type(model.graph),
        parameters=sum(prod(c.shape) for c in constants(model.graph)),
        macs=sum(known) if known or not heavy else None,
        opset=opset(model.graph),
        ops=dict(Counter(n.op for g in walk(model.graph) for n in g.nodes).most_common()),
        inputs=inputs,
        outputs=outputs,
        quantized=quantized_as(model.graph),
        heavy=heavy,
        notes=(*notes, *_macs_notes(inputs, len(heavy), len(known))),
    )


def macs_by_node(model: Model) -> dict[str, float]:
    """Multiply-accumulates of each heavy node; 0 where shapes are known only at run time."""
    return {node.name: float(node.macs or 0) for node in inspect(model).heavy}


def bytes_by_type(graph: gs.Graph) -> dict[str, int]:
    """Bytes of the constants by element type, the largest first."""
    total: Counter[str] = Counter()
    for constant in constants(graph):
        total[type_name(constant.dtype)] += nbytes(constant)
    return dict(total.most_common())


def file_bytes(path: str | Path) -> int:
    """Bytes of a model file, together with the files of its external data. Raises ModelError."""
    path = Path(path)
    beside = () if is_package(path) else external_files(path)
    return sum(file.stat().st_size for file in (path, *beside))


def external_files(path: str | Path) -> list[Path]:
    """The files that hold a model's external data, sorted. Raises ModelError."""
    try:
        proto = read(Path(path))
    except ModelError as error:
        raise ModelError(f"{path} is not an ONNX model") from error
    model = plain(path)
    places = locations(_stored(proto.graph)) - {model.name}
    return sorted(model.parent / place for place in places)


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors that a model holds: initializers and attributes, nested bodies included."""
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        for body in (attribute.g, *attribute.graphs):
            yield from _stored(body)


def type_name(dtype: Any) -> str:
    """NumPy-style name of an element type given as NumPy type or ONNX number; "?" if unknown."""
    if not isinstance(dtype, int):
        return "?" if dtype is None else np.dtype(dtype).name
    name = str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def quantized_as(graph: gs.Graph) -> str | None:
    """How a model is quantized already: "qdq", "qoperator", "dynamic", "weight-only", or None."""
    nodes = [node for inner in walk(graph) for node in inner.nodes]
    ops = {node.op for node in nodes}
    kind = next((kind for kind, marks in _QUANTIZED.items() if ops & marks), None)
    return kind or ("weight-only" if any(map(_expands_codes, nodes)) else None)


def _expands_codes(node: gs.Node) -> bool:
    """Whether a node makes a float matrix of one that is stored in at most 8 bits."""
    if node.op != "Cast" or not isinstance(node.inputs[0], gs.Constant):
        return False
    if type_name(int(node.attrs["to"])) not in FLOATS:  # an index into a codebook
        return False
    codes = node.inputs[0]
    return len(codes.shape) >= 2 and type_name(codes.dtype) in ("int8", "uint8", "int4", "uint4")


def free_dimensions(graph: gs.Graph) -> Names:
    """Names of the dimensions that the inputs leave open."""
    return frozenset(d for t in graph.inputs for d in t.shape or () if isinstance(d, str))


def heavy_nodes(
    graph: gs.Graph, free: Names = frozenset(), target: str = "auto"
) -> Iterator[HeavyNode]:
    """Nodes with multiply-accumulates or a table to look up, nested bodies included, in order.

    free: names of dimensions that count as 1. target: a row of TARGETS.
    """
    row, folded, kind = choose(target), _foldable(graph), quantized_as(graph)
    for node in (n for inner in walk(graph) for n in inner.nodes if _is_heavy(n)):
        weights = [w for w in node.inputs if isinstance(w, gs.Constant) and len(w.shape) >= 2]
        can, reason = _verdict(node, row, folded)
        if can and kind:
            can, reason = False, f"the model is already quantized ({kind})"
        yield HeavyNode(
            name=node.name,
            op=node.op,
            shape=tuple(weights[0].shape) if weights else None,
            weight=sum(map(nbytes, weights)),
            macs=macs(node, free),
            can=can,
            reason=reason,
        )


_QUANTIZED: dict[str, frozenset[str]] = {
    "qoperator": frozenset(("QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd")),
    "dynamic": frozenset(
        (
            *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul"),
            *("MatMulIntegerToFloat", "DynamicQuantizeLSTM"),
        )
    ),
    "qdq": frozenset(("QuantizeLinear",)),
    "weight-only": frozenset(("DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")),
}

_INTEGER = frozenset(op for marks in _QUANTIZED.values() for op in marks)

_GROWING = ("Random", "ConstantOfShape")  # what they make is not folded, or only where it is small

FLOATS = frozenset(("float32", "float16", "float64", "bfloat16"))


def _verdict(node: gs.Node, target: Target, folded: Names) -> tuple[bool, str]:
    """Whether a heavy node can be compressed, and how or why not; folded: see `_foldable`."""
    row = knowledge(node)
    weight = (
        None if row.weight is None or row.weight >= len(node.inputs) else node.inputs[row.weight]
    )
    if node.op in _INTEGER:
        return False, "already integer"
    if weight is None:
        return False, f"no runtime has an integer kernel for {node.op}"
    if "DequantizeLinear" in _makers(weight):
        return False, "already quantized (its weight is dequantized in the graph)"
    if weight.name in folded:
        return True, "int8, after its weight is folded"
    refused = refusal(node, target)
    if not refused:
        return True, "int8, activations too"
    if source(weight)[0] is None:
        return False, why_no_source(node, weight)
    if node.op in target.dynamic:
        return True, "int8, activations as they come"
    return True, "weight alone in 8 or 4 bits" + (f" ({refused})" if row.role != "lookup" else "")


def _is_heavy(node: gs.Node) -> bool:
    is_table = knowledge(node).role == "lookup" and weight_of(node) is not None
    return node.op in MACS or is_table


def _makers(tensor: gs.Tensor) -> list[str]:
    return [node.op for node in tensor.inputs]


def _foldable(graph: gs.Graph) -> Names:
    """Names of the main graph's tensors that follow from its constants, and are not made large."""
    names: set[str] = set()
    for node in graph.nodes:
        known = (isinstance(t, gs.Constant) or not t.name or t.name in names for t in node.inputs)
        if node.inputs and not node.op.startswith(_GROWING) and all(known):
            names.update(t.name for t in node.outputs)
    return frozenset(names)


def _port(tensor: gs.Tensor) -> Port:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return Port(tensor.name, type_name(tensor.dtype), shape)


def _heavy_nodes(model: Model) -> tuple[HeavyNode, ...]:
    """The heavy nodes, with shapes observed in a run where inference left some open."""
    free = free_dimensions(model.graph)
    heavy = tuple(heavy_nodes(model.graph, free))
    if all(node.macs is not None for node in heavy):
        return heavy
    _observe(model)
    return tuple(heavy_nodes(model.graph, free))


def _observe(model: Model) -> None:
    """Run once with every free dimension of the inputs at 1, and note the shapes at heavy nodes."""
    graph = model.graph
    for tensor in graph.inputs:
        if tensor.shape is not None:
            tensor.shape = [d if isinstance(d, int) else 1 for d in tensor.shape]
    heavy = (node for node in graph.nodes if node.op in MACS)
    ports = (t for node in heavy for t in (*node.inputs, *node.outputs) if t.name)
    wanted = {t.name: t for t in ports if isinstance(t, gs.Variable)}
    try:
        feed = next(synthesize([_spec(t) for t in graph.inputs], 1).batches(1))
        names = [name for name in wanted if name not in feed]
        source = Source(*as_declared(model), model.scratch)
        runtime = Runtime(level="none", packs=False)
        found = staged(source, model.memory, feed, runtime, names).once(feed)
    except (DataError, ModelError, TypeError):  # strings, sequences, sizes that 1 does not fit
        return
    for name, array in found.items():
        wanted[name].shape = array.shape


def _spec(tensor: gs.Tensor) -> InputSpec:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return InputSpec(tensor.name, np.dtype(tensor.dtype), shape)


def _macs_notes(inputs: Sequence[Port], total: int, known: int) -> Iterator[str]:
    dims = (d for port in inputs for d in port.shape or ())
    free = [d or "one without a name" for d in dims if not isinstance(d, int)]
    if free and known:
        yield f"the MACs count each free dimension as 1: {', '.join(dict.fromkeys(free))}"
    if known < total:
        nodes = (
            "1 node whose shapes are"
            if total - known == 1
            else f"{total - known} nodes whose shapes are"
        )
        yield f"the MACs leave out {nodes} known only at run time"
