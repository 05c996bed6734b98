"""What belongs to a model but not to its graph: kept at load by name, put back by name at save.

Documentation, metadata, versions, the declared inputs and outputs, types that are no tensors, node
attributes of rare kinds, function definitions. What is renamed or removed loses its entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

from onnxc.normal import assign, graphs

_NODE_FIELDS = ("doc_string", "metadata_props", "overload", "device_configurations")
_GRAPH_FIELDS = ("doc_string", "input", "output", "metadata_props", "quantization_annotation")
_CARRIED = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
}


@dataclass(frozen=True)
class Envelope:
    """model: without its graph. graphs: by scope, without nodes and weights. nodes: by name."""

    model: ModelProto = field(default_factory=ModelProto)
    graphs: dict[str, GraphProto] = field(default_factory=dict)
    nodes: dict[str, NodeProto] = field(default_factory=dict)


def take(model: ModelProto) -> Envelope:
    """Keep what the graph library would lose, and take from `model` what trips it."""
    kept = ModelProto()
    kept.CopyFrom(model)
    kept.ClearField("graph")
    del model.functions[:]
    envelope = Envelope(kept)
    for scope, graph in graphs(model.graph):
        envelope.graphs[scope] = _husk(graph)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if not _is_plain(value):
                value.ClearField("type")
        for node in graph.node:
            _take_node(node, envelope.nodes)
    return envelope


def restore(model: ModelProto, envelope: Envelope) -> None:
    """Put everything back that still has its place in `model`."""
    for scope, graph in graphs(model.graph):
        if scope in envelope.graphs:
            _restore_graph(graph, envelope.graphs[scope])
        for node in graph.node if envelope.nodes else ():
            if node.name in envelope.nodes:
                _restore_node(node, envelope.nodes[node.name])
    kept = ModelProto()
    kept.CopyFrom(envelope.model)
    for name in ("ir_version", "opset_import", "producer_name", "producer_version"):
        kept.ClearField(name)
    for name in ("producer_name", "producer_version"):
        setattr(model, name, getattr(envelope.model, name))
    model.MergeFrom(kept)


def _husk(graph: GraphProto) -> GraphProto:
    husk = GraphProto(name=graph.name)
    for name in _GRAPH_FIELDS:
        _copy_field(graph, husk, name)
    husk.value_info.extend(v for v in graph.value_info if _is_remarkable(v))
    return husk


def _restore_graph(graph: GraphProto, husk: GraphProto) -> None:
    graph.name = husk.name
    graph.ClearField("doc_string")
    _restore_values(graph, husk)
    _copy_field(husk, graph, "doc_string")
    _copy_field(husk, graph, "metadata_props")
    if not husk.quantization_annotation:
        return
    known = {name for node in graph.node for name in (*node.input, *node.output)}
    graph.quantization_annotation.extend(
        annotation
        for annotation in husk.quantization_annotation
        if known.issuperset(
            (annotation.tensor_name, *(p.value for p in annotation.quant_parameter_tensor_names))
        )
    )


def _restore_values(graph: GraphProto, husk: GraphProto) -> None:
    """The interface as declared, types that are no tensors, and the documentation of values."""
    declared = {value.name: value for value in (*husk.input, *husk.output)}
    for value in (*graph.input, *graph.output):
        if value.name in declared:
            value.CopyFrom(declared[value.name])
    if not husk.value_info:
        return
    made = {name for node in graph.node for name in node.output}
    present = {value.name: value for value in graph.value_info}
    for kept in husk.value_info:
        if not _is_plain(kept) and kept.name in made and kept.name not in present:
            graph.value_info.append(kept)
        elif kept.name in present:
            _copy_field(kept, present[kept.name], "doc_string")
            _copy_field(kept, present[kept.name], "metadata_props")


def _is_plain(value: ValueInfoProto) -> bool:
    """Whether the graph library reads this type right."""
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type > 0


def _is_remarkable(value: ValueInfoProto) -> bool:
    return not _is_plain(value) or bool(value.doc_string or value.metadata_props)


def _take_node(node: NodeProto, nodes: dict[str, NodeProto]) -> None:
    kept = NodeProto(name=node.name, op_type=node.op_type)
    for present, _ in node.ListFields():
        if present.name in _NODE_FIELDS:
            _copy_field(node, kept, present.name)
    kept.attribute.extend(a for a in node.attribute if not _is_carried(a))
    if kept.attribute:
        assign(node.attribute, [a for a in node.attribute if _is_carried(a)])
    if len(kept.ListFields()) > 2:
        nodes[node.name] = kept


def _restore_node(node: NodeProto, kept: NodeProto) -> None:
    for name in ("doc_string", "metadata_props"):
        _copy_field(kept, node, name)
    if node.op_type == kept.op_type:
        for name in ("overload", "device_configurations", "attribute"):
            _copy_field(kept, node, name)


def _is_carried(attribute: AttributeProto) -> bool:
    """Whether the graph library keeps this attribute: its kind, and neither empty nor binary."""
    if attribute.type not in _CARRIED or attribute.ref_attr_name:
        return False
    lists = {
        AttributeProto.FLOATS: attribute.floats,
        AttributeProto.INTS: attribute.ints,
        AttributeProto.STRINGS: attribute.strings,
    }
    if attribute.type in lists and not lists[attribute.type]:
        return False
    return all(_is_text(text) for text in (attribute.s, *attribute.strings))


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _copy_field(source: Any, target: Any, name: str) -> None:
    if name not in source.DESCRIPTOR.fields_by_name:
        return
    value = getattr(source, name)
    if isinstance(value, str):
        if value:
            setattr(target, name, value)
    else:
        getattr(target, name).extend(value)
