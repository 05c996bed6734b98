"""Channels brought to one scale: the function stays, the activations share one range better."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import Feed, apply, decibels
from texts import bind, changed, normal, outputs, reasons

from onnxc.core import Context
from onnxc.graph import Model, load, to_bytes, to_proto, values
from onnxc.shapes import infer
from onnxc.targets import choose
from passes.equalize import HEADROOM, LIMIT, Equalize, channel_groups, factors
from passes.quantize import Quantize

IMAGE: Feed = {"x": normal(16, 1, 3, 10, 10)}
SPREAD = np.float32([0.01, 0.1, 1, 1, 10, 100])  # what channels are worth before


def spread(*shape: int, seed: int = 0) -> Any:
    """Weights whose output channels are of very different sizes."""
    return normal(*shape, seed=seed) * SPREAD.reshape(-1, *[1] * (len(shape) - 1))


def spread_of(proto: onnx.ModelProto, tensor: str, feed: Feed) -> float:
    """Largest over smallest channel of a tensor."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output.add(name=tensor)
    x = outputs(tapped, {k: v[0] for k, v in feed.items()})[tensor]
    peaks = np.abs(x).max(axis=(0, *range(2, x.ndim)))
    return float(peaks.max() / peaks.min())


def unchanged(proto: onnx.ModelProto, model: Model, feed: Feed, limit: float = 1e-5) -> None:
    """Outputs are equal to `limit` of the largest, on every sample."""
    for index in range(4):
        sample = {name: x[index] for name, x in feed.items()}
        before, after = outputs(proto, sample), outputs(model, sample)
        for name, expected in before.items():
            atol = limit * float(np.abs(expected).max())
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=atol)


BETWEEN = {
    "relu": "d = Relu (c)",
    "leaky relu": "d = LeakyRelu <alpha = 0.1> (c)",
    "max pool": "r = Relu (c) d = MaxPool <kernel_shape = [2, 2]> (r)",
    "average pool": "d = AveragePool <kernel_shape = [2, 2], pads = [1, 0, 0, 1]> (c)",
    "global average pool": "r = Relu (c) d = GlobalAveragePool (r)",
    "depthwise": "r = Relu (c) e = Conv <group = 6> (r, D, E) d = Relu (e)",
    "residual": "r = Relu (c) e = Conv <pads = [1,1,1,1]> (r, U, E) a = Add (e, r) d = Relu (a)",
}


def network(between: str) -> onnx.ModelProto:
    text = f"""g (float[1,3,10,10] x, float[6,3,3,3] W, float[6] B, float[6,1,3,3] D,
            float[6,6,3,3] U, float[6] E, float[4,6,1,1] V) => (float[1,4,H,K] y) {{
        c = Conv (x, W, B) {between} y = Conv (d, V) }}"""
    return bind(
        text,
        W=spread(6, 3, 3, 3),
        B=normal(6) * SPREAD,
        D=normal(6, 1, 3, 3),
        U=normal(6, 6, 3, 3) / SPREAD.reshape(1, -1, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
        E=normal(6, seed=1) * SPREAD,
        V=normal(4, 6, 1, 1) / SPREAD.reshape(1, -1, 1, 1),
    )


@pytest.mark.parametrize("name", BETWEEN)
def test_the_function_is_unchanged(name: str) -> None:
    proto = network(BETWEEN[name])
    before = spread_of(proto, "c", IMAGE)
    model, step = apply(proto, Equalize(), IMAGE)
    assert step.changes
    unchanged(proto, model, IMAGE)
    assert spread_of(to_proto(model), "c", IMAGE) < before / 20


@pytest.mark.parametrize("name", ["relu", "depthwise", "residual"])
def test_what_quantization_gains(name: str) -> None:
    """Activations of very different channels share one scale: equalizing them is worth 6 dB."""
    proto = network(BETWEEN[name])
    plain, _ = apply(proto, Quantize(), IMAGE)
    equalized, _ = apply(proto, Equalize(), IMAGE)
    both, _ = apply(equalized, Quantize(), IMAGE)
    assert decibels(proto, both, IMAGE) > decibels(proto, plain, IMAGE) + 6


def clipped(high: float = 6.0, low: float = 0.0) -> onnx.ModelProto:
    return bind(
        """g (float[1,3,10,10] x, float[6,3,3,3] W, float l, float h, float[4,6,1,1] V)
            => (float[1,4,8,8] y) {
            c = Conv (x, W)
            r = Clip (c, l, h)
            y = Conv (r, V) }""",
        W=spread(6, 3, 3, 3) / 10,
        V=normal(4, 6, 1, 1) / SPREAD.reshape(1, -1, 1, 1),
        l=np.array(low, np.float32),
        h=np.array(high, np.float32),
    )


def test_a_clip_bounds_the_factors() -> None:
    """Channels are only scaled up, one that is cut off stays, and little more is cut off."""
    proto = clipped()
    model, step = apply(proto, Equalize(), IMAGE)
    assert step.changes
    before, after = (values(m.graph.nodes[0].inputs[1]) for m in (load(proto), model))
    ratio = np.abs(after).max((1, 2, 3)) / np.abs(before).max((1, 2, 3))
    assert ratio.min() >= 1 - 1e-6
    assert ratio[-1] == pytest.approx(1, abs=1e-6)
    assert ratio.max() > 5
    assert decibels(proto, model, IMAGE) > 30


def test_channels_that_a_clip_cuts_off_are_left_alone() -> None:
    """Peaks in front of a Clip say nothing: 100 and 1,000 are both cut off at 6."""
    proto = clipped()
    weight = 100 * normal(6, 3, 3, 3) * SPREAD[::-1, None, None, None] + 50
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    model, _ = apply(proto, Equalize(), IMAGE)
    assert decibels(proto, model, IMAGE) > 60


def test_a_clip_that_does_not_start_at_zero_stands_in_the_way() -> None:
    _, step = apply(clipped(low=-1.0), Equalize(), IMAGE)
    assert "(Clip) reads it" in reasons(list(step.skips))


OBSTACLES = {
    "(Sigmoid) reads it": "d = Sigmoid (c)",
    "(Mul) reads it": "d = Mul (c, c)",
    "(Tanh) makes a part of it": "e = Conv (x, W, B) t = Tanh (e) d = Add (c, t)",
    "is an input or output of the graph": "d = Add (c, z)",
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_locked_groups_say_why(reason: str) -> None:
    proto = network(OBSTACLES[reason])
    feed = dict(IMAGE)
    if "z" in OBSTACLES[reason]:
        proto.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("z", 1, [1, 6, 8, 8]))
        feed["z"] = normal(16, 1, 6, 8, 8)
    model, step = apply(proto, Equalize(), feed)
    assert not step.changes
    assert reason in reasons(list(step.skips))
    assert to_bytes(model) == to_bytes(load(proto))


def test_a_computed_bias_and_a_grouped_reader_stand_in_the_way() -> None:
    text = """g (float[1,3,10,10] x, float[6,3,3,3] W, float[6] B, float[4,3,1,1] V)
        => (float[1,4,8,8] y) {
        %s
        r = Relu (c)
        y = Conv <group = %d> (r, V) }"""
    weights = {"W": spread(6, 3, 3, 3), "B": normal(6), "V": normal(4, 3, 1, 1)}
    computed = bind(text % ("b = Exp (B) c = Conv (x, W, b)", 2), **weights)
    grouped = bind(text % ("c = Conv (x, W, B)", 2), **weights)
    reason = reasons(list(apply(computed, Equalize(), IMAGE)[1].skips))
    assert "is computed" in reason
    assert "is a grouped convolution" in reasons(list(apply(grouped, Equalize(), IMAGE)[1].skips))


def test_a_tensor_that_a_body_captures_stands_in_the_way() -> None:
    proto = bind(
        """g (float[1,3,10,10] x, bool b, float[6,3,3,3] W, float[4,6,1,1] V)
            => (float[1,4,8,8] y, float[1,6,8,8] z) {
            c = Conv (x, W)
            y = Conv (c, V)
            z = If (b) <then_branch = p () => (float[1,6,8,8] u) { u = Neg (c) },
                        else_branch = q () => (float[1,6,8,8] v) { v = Exp (c) }> }""",
        W=spread(6, 3, 3, 3) / 100,
        V=normal(4, 6, 1, 1),
    )
    model, step = apply(proto, Equalize(), {**IMAGE, "b": np.full(16, True)})
    assert not step.changes
    assert "a nested body reads c" in reasons(list(step.skips))
    assert to_bytes(model) == to_bytes(load(proto))


def test_shared_weights_are_copied() -> None:
    proto = bind(
        """g (float[1,6,8,8] x, float[6,6,1,1] W) => (float[1,6,8,8] y) {
            c = Conv (x, W)
            r = Relu (c)
            y = Conv (r, W) }""",
        W=normal(6, 6, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
    )
    feed = {"x": normal(16, 1, 6, 8, 8)}
    model, step = apply(proto, Equalize(), feed)
    assert step.changes
    unchanged(proto, model, feed)


def test_dead_channels_keep_their_weights() -> None:
    weight = spread(6, 3, 3, 3)
    weight[2] = 0
    proto = network("d = Relu (c)")
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    bias = onnx.numpy_helper.from_array(np.zeros(6, np.float32), "B")
    proto.graph.initializer[1].CopyFrom(bias)
    model, _ = apply(proto, Equalize(), IMAGE)
    unchanged(proto, model, IMAGE)
    first, second = (values(n.inputs[1]) for n in (model.graph.nodes[0], model.graph.nodes[-1]))
    before = values(load(proto).graph.nodes[-1].inputs[1])
    assert not first[2].any()
    np.testing.assert_array_equal(second[:, 2], before[:, 2])


def test_factors() -> None:
    np.testing.assert_allclose(factors(np.array([1.0, 4.0, 16.0])), [0.5, 1, 2], rtol=1e-12)
    np.testing.assert_allclose(factors(np.array([0.0, 4.0, 4.0])), [1, 1, 1], rtol=1e-12)
    np.testing.assert_array_equal(factors(np.zeros(3)), np.ones(3))
    assert factors(np.array([1e-30, 1.0])).min() == 1 / LIMIT
    low = 6 / HEADROOM / 4
    np.testing.assert_allclose(factors(np.array([low, 5, 6]), bound=6.0), [0.5, 1, 1], rtol=1e-12)


def test_groups_follow_adds_and_end_at_readers() -> None:
    model = load(network(BETWEEN["residual"]))
    infer(model)
    names = frozenset(node.name for node in model.graph.nodes)
    groups = {g.producers[0].name: g for g in channel_groups(model.graph, names)}
    tied = groups[model.graph.nodes[0].name]
    assert {t.name for t in tied.tensors} == {"c", "r", "e", "a", "d"}
    assert len(tied.producers) == 2
    assert [n.outputs[0].name for n in tied.readers] == ["e", "y"]
    assert not tied.obstacle


def test_excluded_and_second_run() -> None:
    proto = network("d = Relu (c)")
    first, last = (load(proto).graph.nodes[i].name for i in (0, -1))
    for name in (first, last):
        model, step = apply(proto, Equalize(), IMAGE, exclude=(name,))
        assert not step.changes
        assert f"{name} is excluded" in reasons(list(step.skips))
        assert to_bytes(model) == to_bytes(load(proto))
    results = Equalize().apply(load(proto).graph, Context(13, choose("x86-vnni")))
    assert changed(results) == []


def test_equal_channels_are_left_alone() -> None:
    proto = network("d = Relu (c)")
    weight = np.repeat(normal(1, 3, 3, 3), 6, axis=0)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    bias = onnx.numpy_helper.from_array(np.ones(6, np.float32), "B")
    proto.graph.initializer[1].CopyFrom(bias)
    _, step = apply(proto, Equalize(), IMAGE)
    assert "already share one scale" in reasons(list(step.skips))
