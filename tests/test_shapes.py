"""Shapes: inferred where ONNX can, observed where it cannot, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Parse

from onnxc import graph as border
from onnxc.graph import Model, load, to_proto, walk
from onnxc.shapes import infer


def shapes(model: Model) -> dict[str, Any]:
    nodes = (node for graph in walk(model.graph) for node in graph.nodes)
    made = (t for node in nodes for t in node.outputs)
    return {t.name: None if t.shape is None else tuple(t.shape) for t in made}


def feed(*shape: int) -> dict[str, Any]:
    return {"x": np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)}


def test_shapes_and_types_are_inferred(parse: Parse) -> None:
    text = """g (float[batch, 3, 8, 8] x) => (float[batch, 64] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Cast <to = 10> (a)
        c = Shape(b) d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
        y = Flatten(d) }"""
    model = load(parse(text, w=np.zeros((4, 3, 3, 3), np.float32)))
    assert infer(model) == []
    found = shapes(model)
    assert found["a"] == ("batch", 4, 8, 8)
    assert found["d"] == ("batch", 4, 4, 4)
    assert found["c"] == (4,)
    types = {t.name: t.dtype for node in model.graph.nodes for t in node.outputs}
    assert (types["a"], types["b"], types["c"]) == (np.float32, np.float16, np.int64)


def test_weights_are_not_needed(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[2, 40] x) => (float[2, 40] y) { a = MatMul(x, w) y = Neg(a) }"
    model = load(parse(text, w=np.zeros((40, 40), np.float32)))
    monkeypatch.setattr(border.weights, "fill", None)
    monkeypatch.setattr(border.weights, "to_tensor", None)
    infer(model)
    assert shapes(model)["a"] == (2, 40)


def test_wrong_shapes_in_the_file_are_corrected(parse: Parse) -> None:
    model = parse("g (float[n, 3] x) => (float[n, 3] y) { a = Neg(x) y = Abs(a) }")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, [7, 9]))
    loaded = load(model)
    infer(loaded)
    assert shapes(loaded)["a"] == ("n", 3)


CUSTOM = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[n, 8] x) => (float[n, 8] y) {
    a = com.microsoft.BiasGelu(x, w) b = Neg(a) y = Abs(b) }"""
BIAS = np.ones(8, np.float32)


def test_what_the_file_says_about_unknown_operators_is_kept(parse: Parse) -> None:
    model = parse(CUSTOM, w=BIAS)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, ["n", 8]))
    loaded = load(model)
    assert infer(loaded) == []
    assert shapes(loaded) == {"a": ("n", 8), "b": ("n", 8), "y": ("n", 8)}


def test_unknown_shapes_are_told(parse: Parse) -> None:
    model = load(parse(CUSTOM, w=BIAS))
    assert infer(model) == ["tensors without a known shape: 2, such as 'a', 'b'"]
    assert shapes(model)["a"] is None


def test_unknown_shapes_are_observed_without_freezing_free_dimensions(parse: Parse) -> None:
    model = load(parse(CUSTOM, w=BIAS))
    before = to_proto(model).graph.output
    assert infer(model, feed(2, 8)) == []
    assert shapes(model)["a"] == shapes(model)["b"] == (None, 8)
    assert model.graph.nodes[0].outputs[0].dtype == np.float32
    assert to_proto(model).graph.output == before
    assert len(model.graph.nodes) == 3


def test_observed_shapes_of_fixed_inputs_are_fixed(parse: Parse) -> None:
    model = load(parse(CUSTOM.replace("n, 8", "2, 8"), w=BIAS))
    infer(model, feed(2, 8))
    assert shapes(model)["a"] == (2, 8)


def test_sizes_that_depend_on_values_stay_open(parse: Parse) -> None:
    text = """g (float[2, 8] x) => (float[m, k] y) {
        flat = Reshape(x, s) i = NonZero(flat) t = Transpose(i)
        k = Cast <to = 1> (t) v = Cast <to = 7> (flat) first = Slice(v, zero, one)
        r = Expand(x, first3) first3 = Concat <axis = 0> (one, two, eight)
        g = ConstantOfShape(first) u = Concat <axis = 0> (k, k) y = Abs(u) }"""
    integers = {"s": [16], "zero": [0], "one": [1], "two": [2], "eight": [8]}
    model = load(parse(text, **{k: np.array(v, np.int64) for k, v in integers.items()}))
    assert infer(model, {"x": np.full((2, 8), 3, np.float32)}) == []
    found = shapes(model)
    assert found["t"] == (None, 1)
    assert found["g"] == (None,)
    assert found["r"] == (1, 2, 8)
    assert found["u"] == (None, 1)


def test_bodies_are_inferred_too(parse: Parse) -> None:
    text = """g (bool c, float[2, 3] x) => (float[p, q] y) {
        y = If (c) <then_branch = t () => (float[a, b] o) { i = Transpose(x) o = Neg(i) },
                    else_branch = e () => (float[d, f] z) { z = Neg(x) }> }"""
    model = load(parse(text))
    infer(model)
    assert shapes(model)["i"] == (3, 2)


def test_a_feed_that_does_not_run_is_told_and_nothing_raises(parse: Parse) -> None:
    model = load(parse(CUSTOM, w=BIAS))
    first, second = infer(model, feed(2, 5))
    assert first.startswith("shapes could not be observed: ONNX Runtime cannot run the model")
    assert second == "tensors without a known shape: 2, such as 'a', 'b'"


def test_sequences_and_maps_have_no_shape_and_do_no_harm(parse: Parse) -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) {
        s = SequenceConstruct(x, x) n = SequenceLength(s) zero = Sub(n, n)
        t = SequenceAt(s, zero) a = com.microsoft.BiasGelu(t, w) y = Abs(a) }"""
    model = load(parse(CUSTOM.split("\n")[0] + text, w=BIAS))
    assert infer(model, feed(2, 8)) == []
    assert shapes(model)["a"] == (2, 8)


def test_inference_of_broken_graphs_does_not_raise() -> None:
    x, y = (gs.Variable(name, np.dtype(np.float32), [2, 3]) for name in "xy")
    bad = gs.Variable("bad", np.dtype(np.float32), None)
    nodes = [
        gs.Node("Concat", "c", {"axis": 9}, [x, x], [bad]),
        gs.Node("Neg", "n", {}, [bad], [y]),
    ]
    model = Model(gs.Graph(nodes, [x], [y], opset=17))
    notes = infer(model, feed(2, 3))
    assert notes[0].startswith("shapes could not be observed: ONNX Runtime refuses the model")


def test_real_models_keep_running_after_inference(shared: Path) -> None:
    for path in sorted((shared / "models" / "zoo").glob("*.onnx"))[::7]:
        model = load(path)
        infer(model)
        assert sum(shape is not None for shape in shapes(model).values()) > 0, path.name
        onnx.checker.check_model(to_proto(model))
