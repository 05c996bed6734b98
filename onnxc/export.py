"""A graph of the graph library as a protobuf, its weights beside it.

The message is what the exporter of the graph library writes, made in place: that one copies each
node three times on its way, and tells the type of each tensor, wanted or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxc import normal, weights
from onnxc.edit import attributes, constants, reads, uncollected, walk


def exported(
    graph: gs.Graph, typed: Collection[str] | None = None
) -> tuple[onnx.ModelProto, list[weights.Values]]:
    """A skeleton (see `onnxc.weights`) and its weights.

    typed: names of tensors inside whose type is told; None: of all of which it is known.
    """
    proto, held = onnx.ModelProto(), list[weights.Values]()
    proto.opset_import.extend(_opset_imports(graph))
    with _stubs(graph, held), uncollected():
        _write(graph, proto.graph, typed)
    _share_constants(graph, proto.graph)
    return proto, held


def _write(graph: gs.Graph, proto: onnx.GraphProto, typed: Collection[str] | None) -> None:
    proto.name = graph.name
    for node in graph.nodes:
        made = proto.node.add(op_type=node.op, name=node.name or None, domain=node.domain)
        made.input.extend([tensor.name for tensor in node.inputs])
        made.output.extend([tensor.name for tensor in node.outputs])
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                body = made.attribute.add(name=name, type=onnx.AttributeProto.GRAPH)
                _write(value, body.g, typed)
            else:
                made.attribute.extend(OnnxExporter.export_attributes({name: value}))
    ports = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    proto.input.extend(map(_type, graph.inputs))
    proto.output.extend(map(_type, graph.outputs))
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Constant):
            proto.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        elif name not in ports and (typed is None or name in typed) and _is_known(tensor):
            proto.value_info.append(_type(tensor))


def _type(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    proto: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    return proto


def _is_known(tensor: gs.Variable) -> bool:
    return tensor.dtype is not None or tensor.shape is not None


@contextmanager
def _stubs(graph: gs.Graph, held: list[weights.Values]) -> Iterator[None]:
    """While open, each constant shows a protobuf of its own: whole if small, else a stub."""
    before = [(tensor, tensor._values) for tensor in (*constants(graph), *attributes(graph))]
    try:
        for tensor, data in before:
            if isinstance(data, np.ndarray | weights.ExternalValues):
                tensor._values = LazyValues(weights.stub(tensor.name, data, held))
        yield
    finally:
        for tensor, data in before:
            tensor._values = data


def _opset_imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """Versions of all domains in use, as copies; a domain that a pass brought in gets version 1."""
    versions = {o.domain: o.version for o in graph.import_domains or ()}
    used = {node.domain or "" for inner in walk(graph) for node in inner.nodes}
    if "" in used or "" in versions:
        versions[""] = graph.opset
    for domain in sorted(used - versions.keys()):
        versions[domain] = 1
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _share_constants(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Store what several graphs read once, in the outermost, not in each."""
    bodies = [body for _, body in normal.graphs(proto) if body is not proto]
    if not bodies:
        return
    readers: Counter[int] = Counter()
    names: dict[int, str] = {}
    for inner in walk(graph):
        here = {id(t): t.name for t in reads(inner) if isinstance(t, gs.Constant)}
        readers.update(here.keys())
        names.update(here)
    owners = Counter(names.values())
    shared = {names[i] for i, count in readers.items() if count > 1 and owners[names[i]] == 1}
    outermost = {tensor.name for tensor in proto.initializer}
    for body in bodies:
        for tensor in body.initializer:
            if tensor.name in shared - outermost:
                proto.initializer.add().CopyFrom(tensor)
                outermost.add(tensor.name)
        normal.assign(body.initializer, [t for t in body.initializer if t.name not in shared])
