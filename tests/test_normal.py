"""The normal form: what load changes so that passes meet no surprises, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import Outputs, Parse
from onnx import ModelProto, TensorProto, helper

from onnxc.errors import ModelError
from onnxc.graph import load, opset, to_bytes, to_proto, walk

X = np.array([1.0, -2.0, 3.0], np.float32)


def node_names(model: ModelProto) -> list[str]:
    return [node.name for graph in walk(load(model).graph) for node in graph.nodes]


def test_blank_and_repeated_node_names_become_unique(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { a = Neg(x) b = Abs(a) c = Neg(b) y = Abs(c) }")
    for node, name in zip(model.graph.node, ("", "same", "same", "Neg_0"), strict=True):
        node.name = name
    assert node_names(model) == ["Neg_0_1", "same", "same_1", "Neg_0"]
    assert node_names(to_proto(load(model))) == node_names(model)


def test_names_are_unique_across_bodies(parse: Parse) -> None:
    model = parse("""g (bool c, float[3] x) => (float[3] y) {
        y = If (c) <then_branch = t () => (float[3] a) { a = Neg(x) },
                    else_branch = e () => (float[3] b) { b = Neg(x) }> }""")
    names = node_names(model)
    assert len(names) == len(set(names)) == 3


CONSTANTS = {
    "value_float": (0.5, TensorProto.FLOAT, ()),
    "value_floats": ([0.5, 1.5], TensorProto.FLOAT, (2,)),
    "value_int": (3, TensorProto.INT64, ()),
    "value_ints": ([3, 4, 5], TensorProto.INT64, (3,)),
    "value_string": ("a", TensorProto.STRING, ()),
    "value_strings": (["a", "bc"], TensorProto.STRING, (2,)),
    "value": (
        helper.make_tensor("", TensorProto.DOUBLE, (1, 1), [2.0]),
        TensorProto.DOUBLE,
        (1, 1),
    ),
}


@pytest.mark.parametrize("attribute", CONSTANTS)
def test_constant_nodes_become_constants(attribute: str, outputs: Outputs) -> None:
    value, kind, shape = CONSTANTS[attribute]
    nodes = [
        helper.make_node("Constant", [], ["c"], **{attribute: value}),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    port = helper.make_tensor_value_info("y", kind, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [port]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    loaded = load(model)
    assert [node.op for node in loaded.graph.nodes] == ["Identity"]
    np.testing.assert_array_equal(outputs(loaded)["y"], outputs(model)["y"])


def test_a_constant_node_that_is_an_output_stays(parse: Parse, outputs: Outputs) -> None:
    model = parse("g (float[3] x) => (float[2] c, float[3] y) {"
                  "c = Constant <value = float[2] {1, 2}> () y = Neg(x) }")  # fmt: skip
    loaded = load(model)
    assert [node.op for node in loaded.graph.nodes] == ["Constant", "Neg"]
    np.testing.assert_array_equal(outputs(loaded, x=X)["c"], [1, 2])


def test_constant_nodes_in_bodies_become_constants(parse: Parse, outputs: Outputs) -> None:
    model = parse("""g (bool c, float[3] x) => (float[3] y) {
        y = If (c) <then_branch = t () => (float[3] a)
                       { k = Constant <value = float[1] {2}> () a = Mul(x, k) },
                    else_branch = e () => (float[3] b)
                       { k = Constant <value = float[1] {3}> () b = Mul(x, k) }> }""")
    loaded = load(model)
    assert sorted(n.op for g in walk(loaded.graph) for n in g.nodes) == ["If", "Mul", "Mul"]
    for condition, factor in ((True, 2), (False, 3)):
        y = outputs(loaded, c=np.array(condition), x=X)["y"]
        np.testing.assert_array_equal(y, X * factor)


@pytest.mark.parametrize(("ir_version", "is_told"), [(3, False), (8, True)])
def test_initializers_that_are_inputs_become_constants(
    parse: Parse, outputs: Outputs, ir_version: int, is_told: bool
) -> None:
    model = parse("g (float[3] x, float[3] w) => (float[3] y) { y = Mul(x, w) }", w=X)
    model.ir_version = ir_version
    loaded = load(model)
    assert [t.name for t in loaded.graph.inputs] == ["x"]
    assert any("also inputs" in note and "w" in note for note in loaded.notes) is is_told
    onnx.checker.check_model(to_proto(loaded), full_check=True)
    np.testing.assert_array_equal(outputs(loaded, x=X)["y"], X * X)


@pytest.mark.parametrize(("old", "new", "opset_version"), [(3, 8, 13), (9, 9, 13), (8, 10, 21)])
def test_ir_version_is_raised_to_what_the_model_needs(
    parse: Parse, old: int, new: int, opset_version: int
) -> None:
    header = f'<ir_version: {old}, opset_import: ["" : {opset_version}]>'
    loaded = load(parse(header + "g (float[3] x) => (float[3] y) { y = Neg(x) }"))
    assert to_proto(loaded).ir_version == new
    assert loaded.notes == (() if old == new else (f"ir_version raised from {old} to {new}",))


def test_ir_version_is_lowered_to_what_runtimes_read(parse: Parse) -> None:
    model = parse('<ir_version: 13, opset_import: ["" : 21]> g (float[3] x) => (float[3] y)'
                  "{ y = Neg(x) }")  # fmt: skip
    loaded = load(model)
    assert to_proto(loaded).ir_version == 10
    assert loaded.notes == ("ir_version lowered from 13 to 10",)


def test_a_model_from_before_operator_sets_loads(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    model.ir_version = 2
    del model.opset_import[:]
    assert opset(load(model).graph) == 1


def test_the_long_name_of_the_standard_domain_is_the_same_domain(
    parse: Parse, outputs: Outputs
) -> None:
    model = parse('<ir_version: 8, opset_import: ["ai.onnx" : 17]>'
                  "g (float[3] x) => (float[3] y) { y = ai.onnx.Neg(x) }")  # fmt: skip
    loaded = load(model)
    assert opset(loaded.graph) == 17
    assert [o.domain for o in to_proto(loaded).opset_import] == [""]
    np.testing.assert_array_equal(outputs(loaded, x=X)["y"], -X)


def test_unsorted_nodes_are_sorted_stably(parse: Parse, outputs: Outputs) -> None:
    model = parse(
        "g (float[3] x) => (float[3] y) { a = Neg(x) y = Add(a, b) b = Abs(x) c = Exp(x) }"
    )
    loaded = load(model)
    assert [node.op for node in loaded.graph.nodes] == ["Neg", "Abs", "Add", "Exp"]
    np.testing.assert_array_equal(outputs(loaded, x=X)["y"], np.abs(X) - X)


def test_a_node_is_sorted_after_what_its_bodies_read(parse: Parse, outputs: Outputs) -> None:
    model = parse("""g (bool c, float[3] x) => (float[3] y) {
        y = If (c) <then_branch = t () => (float[3] a) { a = Neg(late) },
                    else_branch = e () => (float[3] b) { b = Abs(x) }>
        late = Exp(x) }""")
    loaded = load(model)
    assert [node.op for node in loaded.graph.nodes] == ["Exp", "If"]
    y = outputs(loaded, c=np.array(True), x=X)["y"]
    np.testing.assert_allclose(y, -np.exp(X), rtol=1e-6)


def test_a_long_chain_in_reverse_does_not_recurse() -> None:
    count = 5000
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in ("t0", f"t{count}")]
    graph = helper.make_graph(nodes[::-1], "g", ports[:1], ports[1:])
    loaded = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    made = [node.outputs[0].name for node in loaded.graph.nodes]
    assert made == [f"t{i + 1}" for i in range(count)]


def test_a_cycle_is_refused(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { a = Add(x, b) b = Neg(a) y = Neg(b) }")
    model.graph.node[0].name = "first"
    with pytest.raises(ModelError, match=r"Add node 'first' is part of a cycle"):
        load(model)


def test_a_body_that_hides_an_outer_name_keeps_its_own(parse: Parse, outputs: Outputs) -> None:
    model = parse(
        """g (bool c, float[3] x) => (float[3] y) {
        t = Mul(x, w)
        z = If (c) <then_branch = inner () => (float[3] u)
                       <float[3] w = {10, 10, 10}> { t = Mul(x, w) u = Identity(t) },
                    else_branch = e () => (float[3] v) { v = Neg(t) }>
        y = Add(z, t) }""",
        w=np.full(3, 2, np.float32),
    )
    loaded = load(model)
    for condition, expected in ((True, 12 * X), (False, 0 * X)):
        y = outputs(loaded, c=np.array(condition), x=X)["y"]
        np.testing.assert_array_equal(y, expected)


FUNCTION = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[3] x) => (float[3] y) { a = local.double(x) y = local.double(a) }
    <domain: "local", opset_import: ["" : 17]>
    double (x) => (y) { two = Constant <value = float {2}> () y = Mul(x, two) }"""


def test_functions_are_inlined(parse: Parse, outputs: Outputs) -> None:
    loaded = load(parse(FUNCTION))
    assert [node.op for node in loaded.graph.nodes] == ["Mul", "Mul"]
    assert "1 local function was inlined, as ONNX Runtime does" in loaded.notes
    np.testing.assert_array_equal(outputs(loaded, x=X)["y"], 4 * X)


def test_functions_of_another_opset_are_kept(parse: Parse, outputs: Outputs) -> None:
    loaded = load(parse(FUNCTION.replace('"" : 17]>\n    double', '"" : 18]>\n    double')))
    assert [node.op for node in loaded.graph.nodes] == ["double", "double"]
    assert [f.name for f in to_proto(loaded).functions] == ["double"]
    onnx.checker.check_model(to_proto(loaded))


def sparse() -> ModelProto:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    indices = helper.make_tensor("", TensorProto.INT64, [1], [1])
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[3] y) { y = Mul(x, w) }'
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    return model


def typed_input(kind: onnx.TypeProto) -> ModelProto:
    port = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    node = helper.make_node("Thing", ["strange"], ["y"], domain="custom")
    graph = helper.make_graph([node], "g", [helper.make_value_info("strange", kind)], [port])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("custom", 1)])


TENSOR = helper.make_tensor_type_proto(TensorProto.FLOAT, [3])
REFUSED = {
    "sparse initializer": (sparse(), r"'w' is sparse"),
    "map input": (
        typed_input(helper.make_map_type_proto(TensorProto.INT64, TENSOR)),
        r"input 'strange' is a map",
    ),
    "optional input": (
        typed_input(helper.make_optional_type_proto(TENSOR)),
        r"'strange' is optional",
    ),
    "sparse input": (
        typed_input(helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [3])),
        r"'strange' is a sparse tensor",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_carried_is_refused_in_one_sentence(what: str) -> None:
    model, sentence = REFUSED[what]
    with pytest.raises(ModelError, match=sentence) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_a_list_of_graphs_is_refused(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    inner = parse("i () => (float[3] z) { z = Identity(x) }").graph
    model.graph.node[0].name = "switch"
    model.graph.node[0].attribute.append(helper.make_attribute("cases", [inner, inner]))
    with pytest.raises(ModelError, match="'switch' has a list of graphs"):
        load(model)


def test_an_invalid_graph_is_refused_with_the_checkers_words(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    model.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match=r"the graph is invalid: No Op registered for NoSuchOp"):
        load(model)


def test_a_wrong_attribute_type_is_found_on_the_way_back(parse: Parse) -> None:
    loaded = load(parse("g (float[3] x) => (float[3] y) { y = LeakyRelu <alpha = 0.5> (x) }"))
    loaded.graph.nodes[0].attrs["alpha"] = 1
    with pytest.raises(ModelError, match="alpha"):
        load(to_bytes(loaded))


def test_experimental_ops_load_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("Affine", ["x"], ["y"], alpha=2.0, beta=1.0)
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)]))
    assert capfd.readouterr() == ("", "")


def test_training_information_is_dropped_and_told(parse: Parse) -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    model.training_info.add()
    loaded = load(model)
    assert "training information was dropped" in loaded.notes
    assert not to_proto(loaded).training_info
