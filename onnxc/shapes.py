"""Shapes and types of the tensors inside a graph: inferred, and where that fails, observed.

ONNX inference runs on a skeleton without the weights, so the size of a model does not matter. What
it leaves open is observed in one run with Shape nodes, whose outputs are tiny. An observed size
counts only where it cannot depend on the feed: free dimensions of the inputs are doubled in another
run, and a size that moved stays open; so does what lies behind operators whose output size depends
on values. Declared inputs and outputs are never touched; symbolic dimensions keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape

from onnxc.errors import ModelError
from onnxc.graph import Model, bodies, fresh, skeleton, stored, walk
from onnxc.normal import graphs
from onnxc.runtime import Runtime, dtype_of, run, session
from onnxc.stages import Source, staged

Shape = tuple[int | str | None, ...]
Feed = Mapping[str, NDArray[Any]]
Compute = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]

_SIZE_BY_VALUE = frozenset(
    ("NonZero", "NonMaxSuppression", "Unique", "Compress", "Loop", "If", "Scan", "StringSplit")
)
_SIZE_OPERANDS = {  # op: the first input whose values, not whose shape, set the size of the output
    **dict.fromkeys(("Range", "ConstantOfShape"), 0),
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Slice", "Pad", "TopK", "OneHot", "Split"), 1),
    **{"Upsample": 1, "Resize": 2},
}
_INFERENCE_ERRORS = (
    *(RuntimeError, ValueError, TypeError),
    *(onnx.shape_inference.InferenceError, onnx.checker.ValidationError),
)


def infer(
    model: Model, feed: Feed | None = None, proto: onnx.ModelProto | None = None
) -> list[str]:
    """Set `.shape` and `.dtype` of the tensors inside `model.graph` and its bodies, in place.

    feed: one batch by input name; with it, shapes that inference does not find are observed. proto:
    the skeleton of the model, where there is one already. Returns sentences on what stays unknown;
    never raises for a model that loads.
    """
    inferred = _inferred(skeleton(model)[0] if proto is None else proto)
    for scope, graph in _scopes(model.graph):
        _apply(graph, inferred.get(scope, {}))
    open_ones = _open_tensors(model.graph, inferred.get("", {}))
    notes = []
    if open_ones and feed is not None:
        try:
            _observe(model, open_ones, feed)
        except ModelError as error:
            notes.append(f"shapes could not be observed: {error}")
    unknown = [t for t in open_ones if t.shape is None]
    if unknown:
        some = ", ".join(repr(t.name) for t in unknown[:3])
        notes.append(f"tensors without a known shape: {len(unknown)}, such as {some}")
    return notes


def _scopes(graph: gs.Graph, scope: str = "") -> Iterable[tuple[str, gs.Graph]]:
    """The graph and its bodies, named like the scopes of `onnxc.normal.graphs`."""
    yield scope, graph
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _scopes(value, f"{node.name}.{name}")


def _inferred(proto: onnx.ModelProto) -> dict[str, dict[str, onnx.ValueInfoProto]]:
    """Types by scope and name: inferred from scratch, then with the file's own for the rest."""
    declared, symbols = _values(proto), _symbols(proto)
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for _, graph in graphs(bare.graph):
        del graph.value_info[:]
    found = _values(_run_inference(bare), symbols)
    if all(declared[scope].keys() <= found.get(scope, {}).keys() for scope in declared):
        return found
    for scope, graph in graphs(bare.graph):
        known = found.get(scope, {})
        graph.value_info.extend(v for name, v in declared[scope].items() if name not in known)
    return _values(_run_inference(bare), symbols)


def _run_inference(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except _INFERENCE_ERRORS:
        return proto


def _values(
    proto: onnx.ModelProto, symbols: set[str] | None = None
) -> dict[str, dict[str, onnx.ValueInfoProto]]:
    """Types by scope and name; of symbolic dimensions only those in `symbols`, if given."""
    for _, graph in graphs(proto.graph):
        for dim in _dims(graph.value_info):
            if symbols is not None and dim.dim_param not in symbols:
                dim.ClearField("dim_param")
    return {
        scope: {v.name: v for v in graph.value_info if v.type.WhichOneof("value")}
        for scope, graph in graphs(proto.graph)
    }


def _symbols(proto: onnx.ModelProto) -> set[str]:
    """Names of dimensions that the model has; inference makes up more, which mean nothing."""
    listed = ((*g.input, *g.output, *g.value_info) for _, g in graphs(proto.graph))
    return {dim.dim_param for values in listed for dim in _dims(values)}


def _dims(values: Iterable[onnx.ValueInfoProto]) -> Iterator[Any]:
    for value in values:
        yield from value.type.tensor_type.shape.dim


def _apply(graph: gs.Graph, found: Mapping[str, onnx.ValueInfoProto]) -> None:
    ports = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in (t for node in graph.nodes for t in node.outputs):
        value = found.get(tensor.name)
        if value is None or id(tensor) in ports or not value.type.HasField("tensor_type"):
            continue
        if value.type.tensor_type.elem_type:
            tensor.dtype = get_onnx_tensor_dtype(value)
        shape = get_onnx_tensor_shape(value)
        if shape is not None:
            tensor.shape = _merge(shape, tensor.shape)


def _merge(new: Iterable[int | str | None], old: Iterable[int | str | None] | None) -> Shape:
    """The new shape, its open dimensions filled from an old one of the same rank."""
    now, before = tuple(d if d != "" else None for d in new), tuple(old or ())
    if len(now) != len(before):
        return now
    return tuple(b if a is None else a for a, b in zip(now, before, strict=True))


def _open_tensors(graph: gs.Graph, found: Mapping[str, onnx.ValueInfoProto]) -> list[gs.Variable]:
    """Tensors between nodes whose shape or type is not fully known; sequences and maps are none."""
    ports = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    others = {name for name, value in found.items() if not value.type.HasField("tensor_type")}
    made = (t for node in graph.nodes for t in node.outputs if t.name and t.name not in others)
    return [t for t in made if id(t) not in ports and _is_open(t)]


def _is_open(tensor: gs.Variable) -> bool:
    return tensor.dtype is None or tensor.shape is None or None in tensor.shape


def _observe(model: Model, tensors: list[gs.Variable], feed: Feed) -> None:
    names = {fresh(model.graph, f"shape_of_{t.name}"): t for t in tensors}
    proto, held = skeleton(model)
    _probe(proto, names)
    compute, types = _opened(model, proto, held, list(names), feed)
    first = compute(dict(feed))
    second = _run_doubled(compute, model.graph, feed, first)
    moving = _sized_by_values(model.graph)
    for probe, tensor in names.items():
        sizes: Shape = tuple(int(d) for d in first[probe])
        again = tuple(int(d) for d in second[probe]) if second else ()
        is_fixed = tensor.name not in moving and len(again) == len(sizes)
        pairs = zip(sizes, again, strict=True) if is_fixed else ((None, 0) for _ in sizes)
        observed = tuple(a if a == b else None for a, b in pairs)
        tensor.shape = _merge(tensor.shape or observed, observed)
        tensor.dtype = types.get(tensor.name) if tensor.dtype is None else tensor.dtype


def _opened(
    model: Model, proto: onnx.ModelProto, held: list[Any], names: list[str], feed: Feed
) -> tuple[Compute, dict[str, Any]]:
    """A function from a feed to some outputs, and types as far as ONNX Runtime tells them."""
    if model.scratch is not None:  # it may not fit in memory
        runtime = Runtime(level="basic", packs=False)
        source = Source(proto, held, model.scratch)
        return staged(source, model.memory, feed, runtime, names).once, {}
    with stored(proto, held) as whole:
        opened = session(whole, Runtime(level="basic", lean=True))
    types = {port.name: dtype_of(port.type) for port in opened.get_outputs()}
    return partial(run, opened, outputs=names), types


def _probe(proto: onnx.ModelProto, names: Mapping[str, gs.Variable]) -> None:
    """Give a model the shapes of some tensors as outputs, and the tensors, for their types."""
    if all(o.domain for o in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("", 13))
    for probe, tensor in names.items():
        proto.graph.node.append(onnx.helper.make_node("Shape", [tensor.name], [probe]))
        integers = onnx.helper.make_tensor_value_info(probe, onnx.TensorProto.INT64, None)
        proto.graph.output.append(integers)
        proto.graph.output.add(name=tensor.name)


def _run_doubled(
    compute: Compute, graph: gs.Graph, feed: Feed, first: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """A run with every free dimension of the inputs doubled; empty when the model refuses it."""
    double = dict(feed)
    for tensor in graph.inputs:
        for axis, size in enumerate(tensor.shape or ()):
            if not isinstance(size, int) and tensor.name in double:
                double[tensor.name] = np.concatenate([double[tensor.name]] * 2, axis)
    if all(double[name].shape == feed[name].shape for name in feed):
        return first
    try:
        return compute(double)
    except ModelError:
        return {}


def _sized_by_values(graph: gs.Graph) -> set[str]:
    """Names of the tensors whose size depends on values of the inputs, not on shapes alone."""
    moving: set[str] = set()
    by_value = {t.name for t in graph.inputs}  # what follows from values; Shape and Size stop it
    for node in graph.nodes:
        inner = (n for body in bodies(node) for g in walk(body) for n in g.nodes)
        reads = {t.name for n in (node, *inner) for t in n.inputs}
        operands = [t.name for t in node.inputs][_SIZE_OPERANDS.get(node.op, len(node.inputs)) :]
        is_sized = node.op in _SIZE_BY_VALUE or not by_value.isdisjoint(operands)
        made = {t.name for t in node.outputs}
        if is_sized or moving & reads:
            moving |= made
        if moving & made or (by_value & reads and node.op not in ("Shape", "Size")):
            by_value |= made
    return moving
