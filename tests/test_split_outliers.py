"""Outlier channels are split, by widening what makes them or by a Gather; the function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import Feed, apply, dataset, decibels
from test_equalize import unchanged
from texts import bind, normal, ops, reasons

from onnxc.channels.widened import Order
from onnxc.core import Context
from onnxc.errors import OptionError
from onnxc.graph import load, to_bytes, to_proto, values
from onnxc.pipeline import Calibration
from onnxc.quantization import QuantizeSettings, ways
from onnxc.shapes import infer
from onnxc.targets import choose
from onnxc.workpiece import Workpiece
from passes.quantize import Quantize
from passes.split_outliers import SplitOutliers

IMAGE: Feed = {"x": normal(16, 1, 3, 10, 10)}
TOKENS: Feed = {"x": normal(24, 1, 7, 16)}
HALF = SplitOutliers(share=0.25)


def outliers(array: Any, axis: int, factor: float = 20) -> Any:
    """The same with one slice much larger than the others."""
    made = np.array(array)
    np.moveaxis(made, axis, 0)[2] *= factor
    return made


BETWEEN = {
    "relu": "d = Relu (c)",
    "not homogeneous": "s = Sigmoid (c) d = Mul (c, s)",
    "pool": "r = Clip (c, l, h) d = MaxPool <kernel_shape = [2, 2]> (r)",
    "depthwise": "r = Relu (c) e = Conv <group = 6> (r, D, E) d = Relu (e)",
    "residual": "r = Relu (c) e = Conv <pads = [1,1,1,1]> (r, U, E) a = Add (e, r) d = Relu (a)",
}


def convolved(
    between: str, read: str = "y = Conv (d, V)", made: str = "1,4,K,L"
) -> onnx.ModelProto:
    text = f"""g (float[1,3,10,10] x, float[6,3,3,3] W, float[6] B, float[6,1,3,3] D, float l,
            float h, float[6,6,3,3] U, float[6] E, float[4,6,1,1] V, float[384,4] F)
            => (float[{made}] y) {{ c = Conv (x, W, B) {between} {read} }}"""
    return bind(
        text,
        W=normal(6, 3, 3, 3),
        B=normal(6),
        D=normal(6, 1, 3, 3),
        U=outliers(normal(6, 6, 3, 3), 1),
        E=normal(6, seed=1),
        V=outliers(normal(4, 6, 1, 1), 1),
        l=np.float32(0).reshape(()),
        h=np.float32(6).reshape(()),
        F=np.repeat(outliers(normal(6, 4), 0), 64, axis=0),
    )


@pytest.mark.parametrize("name", BETWEEN)
def test_convolutions_are_widened(name: str) -> None:
    proto = convolved(BETWEEN[name])
    model, step = apply(proto, HALF, IMAGE)
    assert len(step.changes) == 1
    assert "of 6 channels split" in step.changes[0].what
    unchanged(proto, model, IMAGE, 2e-6)
    assert ops(model) == ops(load(proto))
    last = model.graph.nodes[-1]
    assert last.inputs[1].shape[1] > 6
    assert to_bytes(load(to_proto(model))) == to_bytes(model)


@pytest.mark.parametrize("name", ["relu", "depthwise"])
def test_weights_of_one_scale_gain(name: str) -> None:
    """The first copy halves the one step that all weights of a layer share."""
    proto, one = convolved(BETWEEN[name]), Quantize(per_tensor=True)
    plain, _ = apply(proto, one, IMAGE, "x86")
    model, _ = apply(proto, SplitOutliers(share=0.5, per_tensor=True), IMAGE, "x86")
    both, _ = apply(model, one, IMAGE, "x86")
    assert decibels(proto, both, IMAGE) > decibels(proto, plain, IMAGE) + 1


def test_a_flattened_axis_keeps_its_order() -> None:
    proto = convolved("d = Relu (c)", "f = Flatten (d) y = Gemm (f, F)", "1,4")
    model, step = apply(proto, HALF, IMAGE)
    assert len(step.changes) == 1
    unchanged(proto, model, IMAGE, 5e-6)
    assert model.graph.nodes[-1].inputs[1].shape[0] % 64 == 0


def test_inputs_are_divided_where_their_maker_is_linear() -> None:
    """A channel that is much larger than all others ends the range of its tensor."""
    proto = bind(
        """g (float[1,7,16] x, float[16,24] P, float[24] S, float[24,8] V) => (float[1,7,8] y) {
            u = MatMul (x, P) v = Add (u, S) r = Relu (v) y = MatMul (r, V) }""",
        P=outliers(normal(16, 24), 1),
        S=outliers(normal(24), 0),
        V=normal(24, 8),
    )
    plain, _ = apply(proto, Quantize(ranges="minmax"), TOKENS, "x86")
    model, step = apply(proto, HALF, TOKENS, "x86")
    assert "1 for their inputs" in step.changes[0].what
    unchanged(proto, model, TOKENS, 2e-6)
    both, _ = apply(model, Quantize(ranges="minmax"), TOKENS, "x86")
    assert decibels(proto, both, TOKENS) > decibels(proto, plain, TOKENS) + 6


NORM = """g (float[1,7,16] x, float[16] G, float[16] S, float[16,20] W, float[16,12] V)
    => (float[1,7,20] y, float[1,7,12] z) {
    h = LayerNormalization (x, G, S) y = MatMul (h, W) z = MatMul (h, V) }"""


def normed() -> onnx.ModelProto:
    return bind(
        NORM,
        opset=17,
        G=outliers(1 + normal(16) / 10, 0),
        S=normal(16),
        W=normal(16, 20),
        V=normal(16, 12),
    )


def test_a_gather_copies_what_a_norm_makes_only_if_asked_for() -> None:
    proto = normed()
    left, step = apply(proto, HALF, TOKENS, "x86")
    assert not step.changes
    assert to_bytes(left) == to_bytes(load(proto))
    asked = SplitOutliers(share=0.25, gather=True)
    model, step = apply(proto, asked, TOKENS, "x86")
    assert len(step.changes) == 1
    assert ops(model) == ["LayerNormalization", "Gather", "MatMul", "MatMul"]
    unchanged(proto, model, TOKENS, 2e-6)
    _, step = apply(to_proto(model), asked, TOKENS, "x86")
    assert not step.changes
    assert "copies of others already" in reasons(list(step.skips))
    plain, _ = apply(proto, Quantize(ranges="minmax"), TOKENS, "x86")
    both, _ = apply(model, Quantize(ranges="minmax"), TOKENS, "x86")
    assert decibels(proto, both, TOKENS) > decibels(proto, plain, TOKENS) + 3


def test_a_second_run_changes_nothing() -> None:
    model, _ = apply(convolved(BETWEEN["depthwise"]), HALF, IMAGE)
    written = to_bytes(model)
    again, step = apply(model, HALF, IMAGE)
    assert not step.changes
    assert "copies of others already" in reasons(list(step.skips))
    assert to_bytes(again) == written


OBSTACLES = {
    "has an order of its own": "e = Concat <axis = 1> (c, c) d = Slice (e, i, j, k)",
    "is an output of the model": "d = Relu (c)",
    "is excluded": "d = Relu (c)",
    "of the error would stay": "d = Relu (c)",
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_stands_in_the_way_is_told(reason: str) -> None:
    proto = convolved(OBSTACLES[reason])
    for name, number in (("i", 0), ("j", 6), ("k", 1)):
        array = np.array([number], np.int64)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if "output" in reason:
        port = onnx.helper.make_tensor_value_info("c", 1, [1, 6, 8, 8])
        proto.graph.output.add().CopyFrom(port)
    if "stay" in reason:
        even = onnx.numpy_helper.from_array(np.ones((4, 6, 1, 1), np.float32), "V")
        next(w for w in proto.graph.initializer if w.name == "V").CopyFrom(even)
    exclude = (load(proto).graph.nodes[0].name,) if "excluded" in reason else ()
    model, step = apply(proto, HALF, IMAGE, exclude=exclude)
    assert not step.changes
    assert reason in reasons(list(step.skips))
    assert to_bytes(model) == to_bytes(load(proto))


def test_nothing_measured_nothing_split() -> None:
    model = load(convolved("d = Relu (c)"))
    infer(model)
    results = HALF.apply(model.graph, Context(13, choose("x86-vnni")))
    assert "nothing was measured" in reasons(results)


def test_halves_differ_by_half_a_step() -> None:
    """So that they round to what the whole weight rounds to."""
    proto = convolved("d = Relu (c)")
    before = values(load(proto).graph.nodes[-1].inputs[1])
    model, _ = apply(proto, HALF, IMAGE)
    after = values(model.graph.nodes[-1].inputs[1])
    np.testing.assert_allclose(after[:, 2] + after[:, 6:].sum(axis=1), before[:, 2], rtol=1e-6)
    step = np.abs(after).max(axis=(1, 2, 3)) / 127
    apart = after[:, 6, 0, 0] - after[:, 2, 0, 0]
    np.testing.assert_allclose(apart, step / (after.shape[1] - 5), rtol=1e-4)


def test_order() -> None:
    order = Order.of(np.array([1, 3, 2]))
    np.testing.assert_array_equal(order.position, [0, 1, 2, 1, 2, 1])
    np.testing.assert_array_equal(order.turn, [0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(order.count, [1, 3, 2, 3, 2, 3])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_are_shares(share: float) -> None:
    with pytest.raises(OptionError, match="above 0"):
        SplitOutliers(share=share)
    with pytest.raises(OptionError, match="is a share of the channels"):
        QuantizeSettings(split_outliers=share)


def test_what_the_option_goes_with() -> None:
    for wrong in ({"format": "dynamic"}, {"activations": "float"}, {"scheme": "fixed"}):
        with pytest.raises(OptionError, match="--split-outliers"):
            QuantizeSettings(split_outliers=0.05, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["auto", 4])
def test_the_place_of_the_pass(bits: Any) -> None:
    """Behind what moves channels, in front of what looks at weights."""
    model = load(convolved("d = Relu (c)"))
    infer(model)
    context, asked = (
        Context(13, choose("x86-vnni")),
        QuantizeSettings(bits=bits, split_outliers=0.1),
    )
    with pytest.raises(OptionError, match="give --data"):
        ways(asked, Workpiece(model, context, Calibration(None)))
    found = ways(asked, Workpiece(model, context, Calibration(dataset(model, IMAGE))))
    assert found
    for passes in found.values():
        names = [pass_.name for pass_ in passes]
        place = names.index("split-outliers")
        assert passes[place] == SplitOutliers(0.1, bits=8 if bits == "auto" else 4)
        assert names[place - 1] == "absorb-offsets"
        assert "quantize" in names[place:]
    assert all(name.startswith("static") for name in found)
