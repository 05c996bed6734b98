"""Channels centred between layers: the function stays, the tensor's range becomes narrower."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from quantizing import Feed, apply, decibels
from texts import bind, changed, context, normal, outputs, reasons

from onnxc.graph import Model, load, to_proto
from onnxc.shapes import infer
from passes.absorb_offsets import AbsorbOffsets
from passes.quantize import Quantize

IMAGE: Feed = {"x": normal(16, 1, 3, 8, 8)}
OFFSETS = np.float32([-30, -10, 0, 5, 20, 40])  # of channels about 5 wide


def network(between: str) -> onnx.ModelProto:
    text = f"""g (float[1,3,8,8] x, float[6,3,3,3] W, float[6] B, float[6,6,1,1] U, float[6] E,
            float[4,6,1,1] V, float[4] F, float[4,6,3,3] P, float[4,3,1,1] G)
            => (float[1,4,H,K] y) {{ c = Conv (x, W, B) {between} }}"""
    return bind(
        text,
        W=normal(6, 3, 3, 3) / 5,
        B=OFFSETS,
        U=normal(6, 6, 1, 1),
        E=normal(6),
        V=normal(4, 6, 1, 1),
        F=normal(4),
        P=normal(4, 6, 3, 3),
        G=normal(4, 3, 1, 1),
    )


MOVED = {
    "reader": ("y = Conv (c, V, F)", ["c"]),
    "reader without a bias": ("y = Conv (c, V)", ["c"]),
    "kernel": ("y = Conv (c, P, F)", ["c"]),
    "groups": ("y = Conv <group = 2> (c, G, F)", ["c"]),
    "residual": ("u = Conv (c, U, E) s = Add (u, c) y = Conv (s, V, F)", ["c", "s"]),
    "rectified branch": (
        "e = Conv (c, U) r = Relu (e) u = Conv (r, U, E) s = Add (c, u) y = Conv (s, V)",
        ["c", "s"],
    ),
}
KEPT = {
    "activation": "r = Relu (c) y = Conv (r, V, F)",
    "padding": "y = Conv <pads = [1, 1, 1, 1]> (c, P, F)",
    "same padding": 'y = Conv <auto_pad = "SAME_UPPER"> (c, P, F)',
    "another reader": "r = Relu (c) s = Add (r, c) y = Conv (s, V, F)",
    "product": "m = Mul (c, c) y = Conv (m, V, F)",
}


def width(model: Model | onnx.ModelProto, tensor: str) -> float:
    """From the least to the largest value of a tensor, over all samples."""
    proto = onnx.ModelProto()
    proto.CopyFrom(to_proto(model) if isinstance(model, Model) else model)
    proto.graph.output.add(name=tensor)
    found = [outputs(proto, {"x": x})[tensor] for x in IMAGE["x"]]
    return float(np.max(found) - np.min(found))


def unchanged(proto: onnx.ModelProto, model: Model) -> None:
    for x in IMAGE["x"][:4]:
        before, after = (outputs(m, {"x": x})["y"] for m in (proto, model))
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", MOVED)
def test_tensors_are_narrower_and_the_function_is_unchanged(name: str) -> None:
    between, tensors = MOVED[name]
    proto = network(between)
    model, step = apply(proto, AbsorbOffsets(), IMAGE)
    assert step.changes
    unchanged(proto, model)
    for tensor in tensors:
        assert width(model, tensor) < 0.7 * width(proto, tensor)


@pytest.mark.parametrize("name", KEPT)
def test_what_would_change_the_function_stays(name: str) -> None:
    proto = network(KEPT[name])
    model, step = apply(proto, AbsorbOffsets(), IMAGE)
    assert not step.changes
    np.testing.assert_array_equal(width(model, "c"), width(proto, "c"))


def test_a_layer_that_reads_along_another_axis_is_in_the_way() -> None:
    text = """g (float[1,6] x, float[6,6] W, float[6] B, float[1,4] V, float[4] F)
            => (float[6,4] y) { c = Gemm (x, W, B) y = Gemm <transA = 1> (c, V, F) }"""
    proto = bind(text, W=normal(6, 6), B=OFFSETS, V=normal(1, 4), F=normal(4))
    assert not apply(proto, AbsorbOffsets(), {"x": normal(16, 1, 6)})[1].changes


def test_long_sums_need_no_deep_stack() -> None:
    sums = " ".join(f"s{i + 1} = Add (s{i}, c)" for i in range(1500))
    proto = network(f"s0 = Add (c, c) {sums} y = Conv (s1500, V, F)")
    model = load(proto)
    infer(model, {"x": IMAGE["x"][0]})
    assert [key.tensor for key in AbsorbOffsets().wants(model.graph, context(model))] == ["c"]


def test_outputs_of_the_model_stay() -> None:
    proto = network("y = Conv (c, V, F)")
    shape = [1, 6, 6, 6]
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, shape)
    )
    assert not apply(proto, AbsorbOffsets(), IMAGE)[1].changes


def test_channels_around_one_value_stay_with_the_reason() -> None:
    proto = network("y = Conv (c, V, F)")
    for tensor in proto.graph.initializer:
        if tensor.name == "B":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(6, np.float32), "B"))
        if tensor.name == "W":
            same = np.repeat(normal(1, 3, 3, 3), 6, axis=0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(same, "W"))
    _, step = apply(proto, AbsorbOffsets(), IMAGE)
    assert not changed([*step.changes, *step.skips])
    assert "lie around one value" in reasons(list(step.skips))


def test_excluded_layers_stay() -> None:
    proto = network("y = Conv (c, V, F)")
    proto.graph.node[1].name = "last"
    _, step = apply(proto, AbsorbOffsets(), IMAGE, exclude=("last",))
    assert not step.changes


def test_what_quantization_gains() -> None:
    proto = network(MOVED["residual"][0])
    plain, _ = apply(proto, Quantize(), IMAGE)
    centred, _ = apply(to_proto(apply(proto, AbsorbOffsets(), IMAGE)[0]), Quantize(), IMAGE)
    assert decibels(proto, centred, IMAGE) > decibels(proto, plain, IMAGE) + 3
