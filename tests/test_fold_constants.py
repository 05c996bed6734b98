"""FoldConstants: what is fixed is computed once; what must not be folded stays, with a reason."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, reasons, step

from onnxc.graph import load, to_bytes
from passes.fold_constants import FoldConstants

FEED = {"x": normal(2, 3)}


def test_chain_of_constants_becomes_one() -> None:
    text = """g (float[2,3] x, float[3,4] W, float s) => (float[2,3] y) {
        t = Transpose <perm = [1, 0]> (W)
        m = Mul (t, s)
        r = Relu (m)
        u = Transpose <perm = [1, 0]> (r)
        c = ReduceSum <keepdims = 0> (u)
        y = Mul (x, c) }"""
    proto = bind(text, W=normal(3, 4), s=np.array(2.0, np.float32))
    model, done = step(proto, FoldConstants(), FEED)
    assert ops(model) == ["Mul"]
    assert not done.problems
    assert [change.what for change in done.changes] == ["5 nodes computed once"]


def test_half_precision_weight_behind_a_cast_is_folded() -> None:
    text = """g (float[2,3] x, float16[3,512] W) => (float[2,512] y) {
        w = Cast <to = 1> (W)
        y = MatMul (x, w) }"""
    weight = normal(3, 512, dtype=np.float16)
    model, _ = step(bind(text, W=weight), FoldConstants(), FEED)
    assert ops(model) == ["MatMul"]
    np.testing.assert_array_equal(model.graph.nodes[0].inputs[1].values, weight.astype(np.float32))


def test_values_that_grow_the_file_stay() -> None:
    text = """g (float[2,3] x, int64[2] n) => (float[2,9000] y) {
        w = ConstantOfShape <value = float[1] {0.5}> (n)
        y = MatMul (x, w) }"""
    proto = bind(text, n=np.array([3, 9000]))
    model, done = step(proto, FoldConstants(), FEED)
    assert ops(model) == ["ConstantOfShape", "MatMul"]
    assert "would add 107,928 bytes" in done.skips[0].reason
    model, done = step(proto, FoldConstants(growth=200_000), FEED)
    assert ops(model) == ["MatMul"]
    assert done.changes


def test_growth_is_a_limit_for_the_whole_file() -> None:
    bodies = "".join(f"c{i} = ConstantOfShape (n) a{i + 1} = Add (a{i}, c{i}) " for i in range(40))
    ports = "(float[2,300] x, int64[1] n) => (float[2,300] y)"
    text = f"g {ports} {{ a0 = Neg (x) {bodies} y = Neg (a40) }}"
    proto = bind(text, n=np.array([300]))
    model, done = step(proto, FoldConstants(), {"x": normal(2, 300)})
    assert 0 < len(done.changes) < 40
    assert len(done.changes) + len(done.skips) == 40
    assert len(to_bytes(model)) < len(proto.SerializeToString()) + FoldConstants().growth + 4096


def test_static_shapes_are_folded() -> None:
    text = """g (float[N,3,4] x, int64[2] i, int64[1] m) => (float[a,b] y) {
        s = Shape (x)
        k = Gather (s, i)
        e = ReduceProd <keepdims = 1> (k)
        t = Concat <axis = 0> (m, e)
        y = Reshape (x, t) }"""
    proto = bind(text, i=np.array([1, 2]), m=np.array([-1]))
    model, done = step(proto, FoldConstants(), {"x": normal(2, 3, 4)})
    assert ops(model) == ["Reshape"]
    assert not done.problems
    np.testing.assert_array_equal(model.graph.nodes[0].inputs[1].values, [-1, 12])


def test_dynamic_shape_stays() -> None:
    text = """g (float[N,3] x) => (int64[2] y) {
        s = Shape (x)
        y = Neg (s) }"""
    model, done = step(bind(text), FoldConstants(), FEED)
    assert ops(model) == ["Shape", "Neg"]
    assert not done.changes


STAYS = {
    "random": "r = RandomNormal <shape = [3]> () y = Add (x, r)",
    "quantized": "q = QuantizeLinear (W, s, z) w = DequantizeLinear (q, s, z) y = Add (x, w)",
    "graph output": "y = Abs (x) o = Neg (W)",
    "body": """c = If (b) <then_branch = p () => (float[3] u) { u = Neg (W) },
                           else_branch = q () => (float[3] v) { v = Abs (W) }> y = Add (x, c)""",
    "captured": """n = Neg (W) i = ReduceSum <keepdims = 0> (x) j = Cast <to = 9> (i)
                   c = If (j) <then_branch = p () => (float[3] u) { u = Neg (n) },
                               else_branch = q () => (float[3] v) { v = Abs (n) }>
                   y = Add (x, c)""",
}


@pytest.mark.parametrize("name", STAYS)
def test_left_alone_byte_for_byte(name: str) -> None:
    more = ", float[3] o" if name == "graph output" else ""
    text = f"""g (float[2,3] x, float[3] W, float s, uint8 z, bool b) => (float[2,3] y{more}) {{
        {STAYS[name]} }}"""
    weights = {
        "W": normal(3),
        "s": np.array(0.1, np.float32),
        "z": np.array(128, np.uint8),
        "b": np.array(True),
    }
    model = load(bind(text, **weights))
    before = to_bytes(model)
    results = FoldConstants().apply(model.graph, context(model))
    assert changed(results) == []
    assert to_bytes(model) == before
    if name == "captured":
        assert "a nested body reads its value" in reasons(results)


def test_what_the_runtime_cannot_compute_is_skipped_alone() -> None:
    text = """g (float[2,3] x, float[3] W, float[2] V) => (float[2,3] y) {
        bad = Add (W, V)
        n = Neg (W)
        a = Add (x, n)
        y = Add (a, bad) }"""
    model = load(bind(text, W=normal(3), V=normal(2)))
    results = FoldConstants().apply(model.graph, context(model))
    assert len(changed(results)) == 1
    assert "ONNX Runtime" in reasons(results)
    assert ops(model) == ["Add", "Add", "Add"]


def test_excluded_nodes_stay() -> None:
    text = "g (float[2,3] x, float[3] W) => (float[2,3] y) { n = Neg (W) y = Add (x, n) }"
    model = load(bind(text, W=normal(3)))
    before = to_bytes(model)
    results = FoldConstants().apply(model.graph, context(model, exclude=("op:Neg",)))
    assert results == []
    assert to_bytes(model) == before


def test_several_outputs_and_strings() -> None:
    text = """g (float[2,4] x, float[4] W, string[2] names, string[2] more)
            => (float[2,2] y, bool o) {
        a, b = Split <axis = 0> (W)
        s, t = Split <axis = 1> (x)
        m = Mul (s, a)
        n = Mul (t, b)
        y = Add (m, n)
        e = Equal (names, more)
        o = Not (e) }"""
    proto = bind(text, 19, W=normal(4))
    text_tensors = (("names", [b"cat", b"dog"]), ("more", [b"cat", b"cow"]))
    for name, values in text_tensors:
        proto.graph.input.pop()
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.STRING, [2], values)
        proto.graph.initializer.append(tensor)
    for node in proto.graph.node[:2]:
        node.attribute.append(onnx.helper.make_attribute("num_outputs", 2))
    model, done = step(proto, FoldConstants(), {"x": normal(2, 4)})
    assert not done.problems
    assert ops(model).count("Split") == 1
    assert "Equal" not in ops(model)
