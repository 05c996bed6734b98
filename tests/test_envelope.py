"""What belongs to a model but not to its graph survives load, rewriting and save."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import Outputs, Parse
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from onnxc.graph import copy, load, set_opset, to_proto

X = np.array([1.0, -2.0, 3.0], np.float32)


def entry(key: str, value: str) -> StringStringEntryProto:
    return StringStringEntryProto(key=key, value=value)


@pytest.fixture
def documented(parse: Parse) -> ModelProto:
    text = "g (float[n, 3] x) => (float[n, 3] y) { a = Mul(x, w) b = Neg(a) y = Exp(b) }"
    model = parse(text, w=X)
    model.producer_name, model.producer_version = "exporter", "1.2"
    model.domain, model.model_version, model.doc_string = "org.example", 7, "about the model"
    model.metadata_props.append(entry("author", "someone"))
    graph = model.graph
    graph.name, graph.doc_string = "net", "about the graph"
    graph.metadata_props.append(entry("scope", "all"))
    for node, name in zip(graph.node, ("mul", "neg", "exp"), strict=True):
        node.name, node.doc_string = name, f"about {name}"
        node.metadata_props.append(entry("source", f"{name}.py"))
    graph.input[0].doc_string = "an image"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.value_info.append(
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 3], "the product")
    )
    graph.value_info[0].metadata_props.append(entry("layer", "first"))
    note = graph.quantization_annotation.add(tensor_name="a")
    note.quant_parameter_tensor_names.append(entry("SCALE_TENSOR", "w"))
    return model


def test_everything_is_put_back(documented: ModelProto) -> None:
    documented.graph.value_info.append(
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 3])
    )
    for loaded in (load(documented), copy(load(documented))):
        assert to_proto(loaded) == documented


def test_what_is_removed_loses_its_entry(documented: ModelProto) -> None:
    model = load(documented)
    first, second, third = model.graph.nodes
    second.inputs = [model.graph.inputs[0]]
    model.graph.nodes = [second, third]
    proto = to_proto(model)
    assert [node.doc_string for node in proto.graph.node] == ["about neg", "about exp"]
    assert not proto.graph.quantization_annotation
    assert not [v for v in proto.graph.value_info if v.name == "a"]
    assert first.name == "mul"
    onnx.checker.check_model(proto)


def test_the_declared_interface_stays(documented: ModelProto) -> None:
    model = load(documented)
    model.graph.outputs[0].shape = [1, 3]
    model.graph.inputs[0].shape = [1, 3]
    proto = to_proto(model)
    assert proto.graph.input == documented.graph.input
    assert proto.graph.output == documented.graph.output


def test_the_source_is_never_changed(documented: ModelProto) -> None:
    before = documented.SerializeToString()
    model = load(documented)
    model.graph.nodes[0].inputs[1].name = "renamed"
    model.graph.nodes[1].domain = "com.microsoft"
    set_opset(model.graph, 19)
    twin = copy(model)
    twin.graph.nodes[0].inputs[1].name = "again"
    twin.graph.nodes[0].attrs["new"] = 1
    exported = to_proto(twin)
    assert [t.name for t in exported.graph.initializer] == ["again"]
    assert [t.name for t in to_proto(model).graph.initializer] == ["renamed"]
    assert "new" not in model.graph.nodes[0].attrs
    assert documented.SerializeToString() == before


def rare() -> dict[str, onnx.AttributeProto]:
    tensor = helper.make_tensor("", TensorProto.FLOAT, [1], [1.0])
    return {
        "type": helper.make_attribute("a", helper.make_tensor_type_proto(TensorProto.FLOAT, [1])),
        "types": helper.make_attribute(
            "a", [helper.make_tensor_type_proto(TensorProto.FLOAT, [1])]
        ),
        "tensors": helper.make_attribute("a", [tensor, tensor]),
        "empty integers": helper.make_attribute("a", [], attr_type=onnx.AttributeProto.INTS),
        "empty texts": helper.make_attribute("a", [], attr_type=onnx.AttributeProto.STRINGS),
        "bytes": helper.make_attribute("a", b"\xff\xfe"),
        "list of bytes": helper.make_attribute("a", [b"\xff", b"x"]),
    }


@pytest.mark.parametrize("kind", rare())
def test_attributes_of_rare_kinds_are_kept(parse: Parse, kind: str) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>'
    model = parse(f"{header} g (float[3] x) => (float[3] y) {{ y = custom.Op <alpha = 2.0> (x) }}")
    model.graph.node[0].name = "node"
    model.graph.node[0].attribute.append(rare()[kind])
    loaded = load(model)
    assert list(loaded.graph.nodes[0].attrs) == ["alpha"]
    assert to_proto(loaded).graph.node[0] == model.graph.node[0]
    loaded.graph.nodes[0].op = "Other"  # another operator has no such attribute
    assert [a.name for a in to_proto(loaded).graph.node[0].attribute] == ["alpha"]


def test_overloads_of_kept_functions_survive(parse: Parse, outputs: Outputs) -> None:
    model = parse(
        '<ir_version: 10, opset_import: ["" : 17, "local" : 1]>'
        "g (float[3] x) => (float[3] y) { a = local.f (x) y = local.f (a) }"
        '<domain: "local", opset_import: ["" : 18]> f (x) => (y) { y = Add(x, x) }'
        '<domain: "local", opset_import: ["" : 18]> f (x) => (y) { y = Neg(x) }'
    )
    for number, (node, function) in enumerate(zip(model.graph.node, model.functions, strict=True)):
        node.name, node.overload, function.overload = f"n{number}", f"v{number}", f"v{number}"
    proto = to_proto(load(model))
    assert [node.overload for node in proto.graph.node] == ["v0", "v1"]
    assert proto.functions == model.functions
    y = outputs(model, x=X)["y"]  # old releases of ONNX Runtime take the last of them for both
    np.testing.assert_array_equal(outputs(proto, x=X)["y"], y)


def test_sequences_inside_and_outside_keep_their_types(parse: Parse, outputs: Outputs) -> None:
    text = """g (seq(float[3]) s, float[3] x) => (seq(float[3]) out, float[3] y)
        <seq(float[3]) inner> {
        inner = SequenceInsert(s, x) out = SequenceInsert(inner, x)
        zero = Constant <value_int = 0> () y = SequenceAt(out, zero) }"""
    model = parse(text)
    for loaded in (load(model), copy(load(model))):
        proto = to_proto(loaded)
        assert proto.graph.input == model.graph.input
        assert proto.graph.output == model.graph.output
        assert [v for v in proto.graph.value_info if v.name == "inner"] == list(
            model.graph.value_info
        )
        onnx.checker.check_model(proto, full_check=True)
        found = outputs(loaded, s=[X, X], x=2 * X)
        np.testing.assert_array_equal(found["y"], X)
        assert len(found["out"]) == 4


def test_a_pipeline_that_ends_in_maps_survives(outputs: Outputs) -> None:
    attributes = {"classlabels_int64s": [3, 4], "domain": "ai.onnx.ml"}
    node = helper.make_node("ZipMap", ["x"], ["y"], **attributes)
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        )
    )
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([node], "g", [port], [helper.make_value_info("y", kind)])
    domains = [helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    loaded = load(model)
    proto = to_proto(loaded)
    assert proto.graph.output == model.graph.output
    assert [o.domain for o in proto.opset_import] == ["ai.onnx.ml"]
    assert outputs(loaded, x=np.array([[0.25, 0.75]], np.float32))["y"] == [{3: 0.25, 4: 0.75}]
