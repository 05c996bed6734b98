"""UpgradeOpset: what changed between opsets computes the same after, or the model stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, reasons, step

from onnxc.graph import load, opset, to_bytes, walk
from passes.upgrade_opset import UpgradeOpset

IMAGE = {"x": normal(1, 3, 6, 6)}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "squeeze": (11, "s = Squeeze <axes = [0]> (x) y = Unsqueeze <axes = [0]> (s)", {}),
    "softmax over the rest": (11, "y = Softmax <axis = 1> (x)", {}),
    "softmax default axis": (7, "y = LogSoftmax (x)", {}),
    "upsample nearest": (9, 'y = Upsample <mode = "nearest"> (x, k)', {"k": (1, 1, 2, 3)}),
    "upsample linear": (9, 'y = Upsample <mode = "linear"> (x, k)', {"k": (1, 1, 2, 2)}),
    "upsample attribute": (
        7,
        'y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]> (x)',
        {},
    ),
    "resize": (10, 'y = Resize <mode = "linear"> (x, k)', {"k": (1, 1, 1.5, 2.5)}),
    "slice": (9, "y = Slice <axes = [2], starts = [1], ends = [-1]> (x)", {}),
    "pad": (10, "y = Pad <pads = [0,0,1,1,0,0,2,2], value = 0.5> (x)", {}),
    "clip": (6, "y = Clip <min = -0.5, max = 0.5> (x)", {}),
    "reduce": (11, "y = ReduceSum <axes = [1], keepdims = 0> (x)", {}),
    "split": (11, "y, z = Split <axis = 3, split = [2, 4]> (x)", {}),
    "top k": (9, "y, z = TopK <axis = 3, k = 2> (x)", {}),
    "dropout": (7, "d = Dropout <ratio = 0.3> (x) y = Neg (d)", {}),
    "image scaler": (7, "y = ImageScaler <bias = [1.0, 2.0, 3.0], scale = 0.5> (x)", {}),
    "affine": (7, "y = Affine <alpha = 2.0, beta = -1.0> (x)", {}),
    "crop": (7, "y = Crop <border = [1, 2, 0, 1]> (x)", {}),
    "crop to size": (7, "y = Crop <border = [1, 2, 0, 0], scale = [3, 2]> (x)", {}),
}


def model_of(name: str) -> onnx.ModelProto:
    version, nodes, weights = CASES[name]
    given = "".join(f", float[4] {key}" for key in weights)
    extra = (
        ", int64[a,b,c,d] z" if name == "top k" else ", float[a,b,c,e] z" if ", z" in nodes else ""
    )
    kind = "float[b,c,d]" if name == "reduce" else "float[a,b,c,d]"
    text = f"g (float[1,3,6,6] x{given}) => ({kind} y{extra}) {{ {nodes} }}"
    return bind(text, version, **{k: np.array(v, np.float32) for k, v in weights.items()})


@pytest.mark.parametrize("name", CASES)
def test_upgraded_model_computes_the_same(name: str) -> None:
    model, done = step(model_of(name), UpgradeOpset(), IMAGE)
    assert done.problems == ()
    assert len(done.changes) == 1
    assert opset(model.graph) == 13


@pytest.mark.parametrize("version", [14, 17, 21])
def test_any_version_can_be_asked_for(version: int) -> None:
    model, done = step(model_of("softmax over the rest"), UpgradeOpset(version), IMAGE)
    assert done.problems == ()
    assert opset(model.graph) == version


def test_bodies_are_upgraded_too() -> None:
    text = """g (float[1,4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = a () => (float[4] u) { u = Squeeze <axes = [0]> (x) },
                    else_branch = b () => (float[4] w) {
                        t = Squeeze <axes = [0]> (x)
                        w = Neg (t) }> }"""
    for chosen in (True, False):
        feed = {"x": normal(1, 4), "c": np.array(chosen)}
        model, done = step(bind(text, 11), UpgradeOpset(), feed)
        assert done.problems == ()
        assert {inner.opset for inner in walk(model.graph)} == {13}


def test_interface_and_large_weights_are_kept() -> None:
    text = """g (float[N,40] x, float[40,30] W) => (float[M,30] y, int64[M] z) {
        h = MatMul (x, W)
        y = Softmax <axis = 1> (h)
        z = ArgMax <axis = 1, keepdims = 0> (y) }"""
    weight = normal(40, 30)
    model, done = step(bind(text, 9, W=weight), UpgradeOpset(), {"x": normal(2, 40)})
    assert done.problems == ()
    assert [list(t.shape) for t in model.graph.outputs] == [["M", 30], ["M"]]
    held = next(t for n in model.graph.nodes for t in n.inputs if t.name == "W")
    np.testing.assert_array_equal(held.values, weight)


def test_outputs_that_are_no_tensors_keep_their_types() -> None:
    text = """g (float[4] x) => (seq(float[1]) y) {
        u = Unsqueeze <axes = [0]> (x)
        s = Squeeze <axes = [0]> (u)
        y = SplitToSequence (s) }"""
    model = load(bind(text, 11))
    before = model.graph.outputs[0].dtype
    results = UpgradeOpset().apply(model.graph, context(model))
    assert len(changed(results)) == 1
    assert model.graph.outputs[0].dtype == before
    assert onnx.checker.check_model(to_bytes(model), full_check=True) is None


def test_new_model_is_untouched() -> None:
    model = load(bind("g (float[2] x) => (float[2] y) { y = Abs (x) }", 17))
    before = to_bytes(model)
    assert UpgradeOpset().apply(model.graph, context(model)) == []
    assert to_bytes(model) == before


def test_old_scan_is_refused() -> None:
    text = """g (float[1,2] s, float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) {
        y, z = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] c)
            => (float[2] d, float[2] e) { d = Add (a, c) e = Identity (d) }> (, s, x) }"""
    model = load(bind(text, 8))
    results = UpgradeOpset().apply(model.graph, context(model))
    assert "loops over batches" in reasons(results)


def test_what_cannot_be_converted_stays_with_a_reason() -> None:
    text = "g (float[2] x) => (float[2] y) { y = ScaledTanh <alpha = 1.0, beta = 2.0> (x) }"
    model = load(bind(text, 7))
    before = to_bytes(model)
    results = UpgradeOpset().apply(model.graph, context(model))
    assert len(results) == 1
    assert "stays at opset 7" in reasons(results)
    assert to_bytes(model) == before
    assert ops(model) == ["ScaledTanh"]
