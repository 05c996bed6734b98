"""Biases corrected so that rounding the weights does not move the mean of any output channel."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from quantizing import Feed, apply
from texts import bind, normal, outputs, reasons

from calib.moments import MomentsObserver
from onnxc.core import Change, Context
from onnxc.graph import Model, copy, load, opset, to_bytes, values
from onnxc.integer import round_weights
from onnxc.numerics.patches import Window
from onnxc.targets import choose
from passes.correct_bias import CorrectBias

IMAGE: Feed = {"x": np.abs(normal(16, 1, 3, 10, 10))}  # not centered, so that rounding shifts means


def network(bias: str = ", B", attributes: str = "") -> onnx.ModelProto:
    return bind(
        f"""g (float[1,3,10,10] x, float[6,3,3,3] W, float[6] B, float[4,6,3,3] V, float[4] C)
            => (float[1,4,6,6] y) {{
            c = Conv (x, W{bias})
            r = Relu (c)
            y = Conv (r, V, C) }}""",
        W=normal(6, 3, 3, 3) * np.float32([1, 1, 1, 30, 30, 30]).reshape(6, 1, 1, 1),
        B=normal(6),
        V=normal(4, 6, 3, 3),
        C=normal(4),
    )


def rounded(model: Model, target: str = "x86") -> Model:
    """The model with its weights on the grids that Quantize will hold them on."""
    result = copy(model)
    round_weights(result.graph, Context(opset(result.graph), choose(target)))
    return result


def means(model: Model | onnx.ModelProto, name: str, feed: Feed) -> NDArray[np.float64]:
    """Mean of each channel over all samples."""
    seen = [outputs(model, {k: v[i] for k, v in feed.items()})[name] for i in range(16)]
    stacked = np.stack(seen).astype(np.float64)
    channel = 2 if stacked.ndim > 3 else stacked.ndim - 1
    return np.asarray(stacked.mean(tuple(i for i in range(stacked.ndim) if i != channel)))


@pytest.mark.parametrize("bias", [", B", ""])
def test_means_of_a_rounded_network_are_those_of_the_float_one(bias: str) -> None:
    proto = network(bias)
    model, step = apply(proto, CorrectBias(), IMAGE, "x86")
    assert len(step.changes) == 2
    wanted = means(proto, "y", IMAGE)
    before = np.abs(means(rounded(load(proto)), "y", IMAGE) - wanted).max()
    after = np.abs(means(rounded(model), "y", IMAGE) - wanted).max()
    assert after < 1e-3 * np.abs(wanted).max()
    assert after < before / 20


def test_the_float_weights_stay() -> None:
    model, _ = apply(network(), CorrectBias(), IMAGE, "x86")
    for old, new in zip(load(network()).graph.nodes, model.graph.nodes, strict=True):
        if old.op == "Conv":
            np.testing.assert_array_equal(values(old.inputs[1]), values(new.inputs[1]))


def test_an_absent_bias_is_made_and_an_empty_one_filled() -> None:
    for bias in ("", ", "):
        model, _ = apply(network(bias), CorrectBias(), IMAGE, "x86")
        first = model.graph.nodes[0]
        assert values(first.inputs[2]).shape == (6,)
        assert values(first.inputs[2]).dtype == np.float32


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_gemm_keeps_the_shape_of_its_bias(shape: tuple[int, ...]) -> None:
    proto = bind(
        f"""g (float[N,6] x, float[6,5] W, float[{",".join(map(str, shape))}] B)
            => (float[N,5] y) {{ y = Gemm (x, W, B) }}""",
        W=normal(6, 5),
        B=normal(*shape),
    )
    feed = {"x": np.abs(normal(16, 1, 6))}
    model, step = apply(proto, CorrectBias(), feed, "x86")
    assert isinstance(step.changes[0], Change)
    assert values(model.graph.nodes[0].inputs[2]).shape == shape
    wanted = means(proto, "y", feed)
    np.testing.assert_allclose(means(rounded(model), "y", feed), wanted, rtol=0, atol=1e-4)


def test_a_shared_bias_is_copied() -> None:
    proto = bind(
        """g (float[1,3,10,10] x, float[6,3,3,3] W, float[6,3,3,3] V, float[6] B)
            => (float[1,6,8,8] y, float[1,6,8,8] z) {
            y = Conv (x, W, B)
            z = Conv (x, V, B) }""",
        W=normal(6, 3, 3, 3),
        V=normal(6, 3, 3, 3, seed=1),
        B=normal(6),
    )
    model, _ = apply(proto, CorrectBias(), IMAGE, "x86")
    first, second = (values(node.inputs[2]) for node in model.graph.nodes)
    assert not np.array_equal(first, second)
    for name in "yz":
        wanted = means(proto, name, IMAGE)
        np.testing.assert_allclose(means(rounded(model), name, IMAGE), wanted, rtol=0, atol=1e-3)


def test_products_without_a_bias_say_so() -> None:
    proto = bind(
        "g (float[N,6] x, float[6,5] W) => (float[N,5] y) { y = MatMul (x, W) }", W=normal(6, 5)
    )
    model, step = apply(proto, CorrectBias(), {"x": normal(16, 6)})
    assert reasons(list(step.skips)) == "bias not corrected: the node has none"
    assert to_bytes(model) == to_bytes(load(proto))


def test_weights_on_the_grid_already_move_no_mean() -> None:
    proto = bind(
        "g (float[1,3,10,10] x, float[2,3,1,1] W) => (float[1,2,10,10] y) { y = Conv (x, W) }",
        W=np.float32([[127, 1, -3], [-127, 64, 0]]).reshape(2, 3, 1, 1),
    )
    model, step = apply(proto, CorrectBias(), IMAGE)
    assert "the mean of its output stays" in reasons(list(step.skips))
    assert to_bytes(model) == to_bytes(load(proto))


def test_only_the_asked_for_nodes() -> None:
    proto = network()
    names = [node.name for node in load(proto).graph.nodes if node.op == "Conv"]
    _, step = apply(proto, CorrectBias(), IMAGE, "x86", exclude=(names[0],))
    assert [change.node for change in step.changes] == names[1:]
    _, step = apply(proto, CorrectBias(ops=("Gemm",)), IMAGE, "x86")
    assert not step.changes


def test_drift_that_was_not_measured_is_a_reason() -> None:
    model = load(network())
    results = CorrectBias().apply(model.graph, Context(13, choose("x86")))
    assert reasons(results).count("its drift was not measured") == 2


# --- from the means of the inputs


def test_a_mean_input_corrects_the_mean_output() -> None:
    """One layer, all of whose positions are rows: the closed form is exact."""
    proto = bind(
        """g (float[1,3,6,6] x, float[6,3,1,1] W) => (float[1,6,6,6] y) { y = Conv (x, W) }""",
        W=normal(6, 3, 1, 1),
    )
    feed = {"x": np.abs(normal(16, 1, 3, 6, 6))}
    whole = MomentsObserver(1, Window((1, 1)))
    whole.count, whole.total = 1, feed["x"].mean((0, 1, 3, 4), dtype=np.float64)[None]
    model = load(proto)
    (key,) = CorrectBias(by="mean").wants(model.graph, Context(13, choose("x86")))
    context = Context(13, choose("x86"), stats={key: whole})
    (change,) = CorrectBias(by="mean").apply(model.graph, context)
    assert isinstance(change, Change)
    wanted = means(proto, "y", feed)
    after = np.abs(means(rounded(model), "y", feed) - wanted).max()
    before = np.abs(means(rounded(load(proto)), "y", feed) - wanted).max()
    assert after < 1e-5 * np.abs(wanted).max() < before


def test_both_ways_bring_the_means_back() -> None:
    proto = network()
    wanted = means(proto, "y", IMAGE)
    before = np.abs(means(rounded(load(proto)), "y", IMAGE) - wanted).max()
    for way in (CorrectBias(), CorrectBias(by="mean")):
        model, step = apply(proto, way, IMAGE, "x86")
        assert len(step.changes) == 2
        assert np.abs(means(rounded(model), "y", IMAGE) - wanted).max() < before / 4


def test_only_the_means_keep_statistics() -> None:
    assert CorrectBias(by="mean").keeps_statistics
    assert not CorrectBias().keeps_statistics


def test_a_mean_that_is_not_known_is_a_reason() -> None:
    model = load(network())
    results = CorrectBias(by="mean").apply(model.graph, Context(13, choose("x86")))
    assert reasons(results).count("the mean of its input is not known") == 2
