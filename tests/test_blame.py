"""Which layer makes the error of a rewritten model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantizing import apply, dataset
from texts import bind, normal

from calib.data import Preprocess
from onnxc.advice import advise
from onnxc.blame import examine
from onnxc.distortion import Distortion
from onnxc.graph import Model, load, to_proto
from onnxc.kernels import coverage
from onnxc.pipeline import prepare
from onnxc.request import open_feeds
from onnxc.runtime import Runtime
from onnxc.targets import choose
from onnxc.twins import match
from passes.cluster import Cluster
from passes.equalize import Equalize
from passes.factorize import Factorize
from passes.quantize import Quantize
from passes.quantize_dynamic import QuantizeDynamic
from passes.to_qoperator import ToQOperator

EXACT = Runtime(level="none")  # sums never saturate, whatever the processor
FEED = {"x": np.abs(normal(12, 1, 4, 8, 8))}
CHAIN = """g (float[1,4,8,8] x, float[8,4,3,3] W0, float[8,8,3,3] W1, float[8,8,1,1] W2,
           float[5,8] W3, float[8] B) => (float[1,5] y) {
    a = Conv <pads: ints = [1,1,1,1]> (x, W0, B)
    ar = Relu (a)
    b = Conv <pads: ints = [1,1,1,1]> (ar, W1, B)
    br = Relu (b)
    c = Conv (br, W2, B)
    s = Add (c, ar)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    y = Gemm <transB: int = 1> (f, W3) }"""
HEAVY = ["Conv_a", "Conv_b", "Conv_c", "Gemm_y"]


def chain(size: int = 8, **weights: Any) -> onnx.ModelProto:
    """Three convolutions, a sum, and a product at the end; nodes are called OP_OUTPUT."""
    given_ = {
        "W0": normal(8, 4, 3, 3) / 6,
        "W1": normal(8, 8, 3, 3) / 8,
        "W2": normal(8, 8, 1, 1) / 3,
        "W3": normal(5, 8),
        "B": normal(8) / 10,
    }
    text = CHAIN.replace("float[1,4,8,8]", f"float[1,4,{size},{size}]")
    proto = bind(text, **{**given_, **weights})
    for node in proto.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return proto


def blamed(proto: onnx.ModelProto, result: Model) -> dict[str, Any]:
    """Layers by node, in the order of their own error, the worst first."""
    data = dataset(load(proto), FEED)
    found = examine(load(proto), result, data, EXACT).layers
    return {x.twin.node: x for x in sorted(found, key=lambda x: x.own if x.own else 0.0)}


def scaled(model: Model, name: str, factor: float) -> Model:
    """The same with the scale of one tensor another one."""
    proto = to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            value = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
            return load(proto)
    raise AssertionError(f"{name} is not in the model")


def test_a_range_that_was_cut_is_named_first() -> None:
    proto = chain()
    made, _ = apply(proto, Quantize(ranges="minmax"), FEED)
    before = blamed(proto, made)
    found = blamed(proto, scaled(made, "br_scale", 0.3))
    worst = next(iter(found.values()))
    assert worst.twin.node == "Conv_b"
    assert worst.own < 25 < before["Conv_b"].own
    assert worst.cause.startswith("cutting at 0 to")
    assert found["Conv_a"].own == pytest.approx(before["Conv_a"].own, abs=0.01)
    assert found["Conv_c"].sqnr < before["Conv_c"].sqnr - 3  # it only passes the error on
    assert found["Conv_c"].own == pytest.approx(before["Conv_c"].own, abs=0.01)


def test_a_weight_with_an_outlier_is_named_first_and_told_what_helps() -> None:
    W1 = normal(8, 8, 3, 3) / 8
    W1[0] *= 200
    B = np.zeros(8, np.float32)
    W2 = normal(8, 8, 1, 1) / 3
    W2[:, 0] /= 1e4  # the outlier is not heard at the outputs
    proto = chain(W1=W1, B=B, W2=W2)
    made, _ = apply(proto, Quantize(ranges="minmax", per_tensor=True), FEED)
    data, original = dataset(load(proto), FEED), load(proto)
    seen = examine(original, made, data, EXACT)
    prepare(original)
    advice = advise(seen.layers, original.graph, coverage(made), choose("x86-vnni"))
    nodes = next(a.nodes for a in advice if "one scale" in a.what)
    assert nodes[0] == "Conv_b"


def test_a_range_that_is_too_wide_is_told() -> None:
    proto = chain()
    made, _ = apply(proto, Quantize(ranges="minmax"), FEED)
    found = blamed(proto, scaled(made, "ar_scale", 12.0))
    assert next(iter(found)) == "Conv_a"
    assert "too wide" in found["Conv_a"].cause


def test_every_layer_is_found_and_runs_alone_in_every_format() -> None:
    proto = chain()
    static, _ = apply(proto, Quantize(), FEED)
    assert set(HEAVY) <= set(blamed(proto, static))
    integers, _ = apply(static, ToQOperator(), FEED)
    dynamic, _ = apply(proto, QuantizeDynamic(), FEED)
    factors, _ = apply(proto, Factorize(macs=0.9), FEED)
    shared, _ = apply(proto, Cluster(bits=3, smallest=16), FEED)
    for made in (static, integers, dynamic, factors, shared):
        found = blamed(proto, made)
        assert set(HEAVY) <= set(found)
        assert all(found[name].own is not None for name in HEAVY)
        assert all(found[name].sqnr > 5 for name in HEAVY)
    assert blamed(proto, factors)["Conv_a"].own < 60


def test_the_error_of_the_original_against_itself_is_nothing() -> None:
    proto = chain()
    assert all(x.own == x.sqnr == 200.0 for x in blamed(proto, load(proto)).values())


def test_equalized_tensors_are_compared_as_what_they_stand_for() -> None:
    W0, W1 = normal(8, 4, 3, 3) / 6, normal(8, 8, 3, 3) / 8
    gains = np.geomspace(0.1, 10, 8).astype(np.float32)
    proto = chain(W1=W1 * gains[:, None, None, None], W0=W0)
    even, step = apply(proto, Equalize(), FEED)
    assert step.changes
    made, _ = apply(even, Quantize(), FEED)
    found = blamed(proto, made)
    assert found["Conv_b"].fit is not None
    assert all(found[name].own > 20 for name in HEAVY)
    assert all(found[name].sqnr > 20 for name in HEAVY)


def test_names_that_are_gone_are_found_by_weights_and_order() -> None:
    proto = chain()
    other = onnx.ModelProto.FromString(proto.SerializeToString())
    renamed = {"a": "1", "ar": "2", "b": "3", "br": "4", "c": "5", "s": "6", "p": "7", "f": "8"}
    for node in other.graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    found = match(load(proto).graph, load(other).graph)
    assert [twin.node for twin in found.found if twin.heavy] == HEAVY
    assert not found.lost
    assert [twin.stand_in for twin in found.found if twin.heavy][:3] == ["2", "4", "5"]


def test_layers_that_cannot_be_compared_are_told_with_reasons() -> None:
    proto = chain()
    other = chain(W0=normal(8, 4, 3, 3))
    for node in list(other.graph.node)[:4]:
        for names in (node.input, node.output):
            names[:] = [f"new_{n}" if n in ("a", "ar", "b", "br") else n for n in names]
    data = dataset(load(proto), FEED)
    thin = bind(
        """g (float[1,4,8,8] x, float[5,4] W) => (float[1,5] y) {
        p = GlobalAveragePool (x)
        f = Flatten (p)
        y = Gemm <transB: int = 1> (f, W) }""",
        W=normal(5, 4),
    )
    found = examine(load(proto), load(thin), data, EXACT)
    assert {skip.node for skip in found.unmatched} >= {"Conv_a", "Conv_b", "Conv_c"}
    assert all(skip.reason for skip in found.unmatched)
    assert [x.node for x in found.blames] == ["Gemm_y"]


@given(st.integers(0, 50), st.floats(0.3, 3.0))
def test_a_scaled_tensor_is_recognized_and_noise_is_not(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 5, 20))
    gains = np.exp(spread * np.linspace(-0.5, 0.5, 5))[None, :, None]
    noise = 0.01 * rng.standard_normal(x.shape)
    scaled_, noisy, cut = Distortion(1), Distortion(1), Distortion(1)
    scaled_.update(x, gains * (x + noise) + 1)
    noisy.update(x, x + 10 * noise)
    cut.update(x, np.clip(x, -0.7, 0.7))
    assert scaled_.fit is not None
    assert scaled_.sqnr == pytest.approx(40, abs=1.5)
    assert noisy.fit is None and noisy.sqnr == pytest.approx(20, abs=1)
    assert cut.fit is None
    np.testing.assert_allclose(scaled_.fit.gain, gains.ravel(), rtol=0.02)


def test_a_fit_is_undone() -> None:
    x = normal(4, 3, 5)
    moved = Distortion(1)
    z = x * np.array([1, 2, 4], np.float32)[:, None] + np.float32(3)
    moved.update(x, z)
    fit = moved.fit
    assert fit is not None
    np.testing.assert_allclose(fit(x), z, atol=1e-4)
    np.testing.assert_allclose(fit.undone(z), x, atol=1e-4)


@pytest.mark.parametrize("tool", ["ort_default", "inc", "nncf", "quark_a8w8", "onnxsim_static"])
def test_layers_of_files_by_other_tools_are_found(tool: str, shared: Path) -> None:
    original = shared / "models" / "resnet20.onnx"
    images = Preprocess(preset="imagenet", resize="none")
    data = open_feeds(original, shared / "data" / "cifar10" / "calib", images, 4, 0)
    result = load(shared / "peers" / "resnet20" / f"{tool}.onnx")
    seen = examine(load(original), result, data)
    heavy = [layer for layer in seen.layers if layer.twin.heavy]
    assert len(heavy) == 20 and not seen.unmatched
    assert sum(layer.own is not None for layer in heavy) >= 18
    assert all(layer.own > 10 for layer in heavy if layer.own is not None)
