"""Drift of a quantized network's layers: added to the biases, it makes their means float's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, normal

from calib import tap
from calib.data import Dataset, InputSpec, open_data
from calib.twin import drift
from onnxc.errors import OptionError
from onnxc.graph import load
from onnxc.runtime import run, session

Array = NDArray[Any]
IMAGES = normal(16, 3, 12, 12) + np.float32(0.5)
LAYERS = ("a", "b", "c", "y")
SHAPES = {"A": (8, 3, 3, 3), "B": (8, 8, 3, 3), "C": (8, 8, 1, 1), "F": (8, 5)}


def floored(weight: Array, step: float) -> Array:
    """Rounded down: every weight errs to the same side, so the means drift."""
    return (np.floor(weight / step) * step).astype(np.float32)


def network(step: float | None = None, opset: int = 13, **biases: Array) -> onnx.ModelProto:
    weights = {n: normal(*s, seed=i) / np.float32(4) for i, (n, s) in enumerate(SHAPES.items())}
    if step is not None:
        weights = {n: floored(w, step) for n, w in weights.items()}
    channels = {"a": 8, "b": 8, "c": 8, "y": 5}
    for name, count in channels.items():
        weights[f"b{name}"] = biases.get(name, normal(count, seed=9)).astype(np.float32)
    return bind(
        """g (float[N,3,12,12] x, float[8,3,3,3] A, float[8,8,3,3] B, float[8,8,1,1] C,
              float[8,5] F, float[8] ba, float[8] bb, float[8] bc, float[5] by)
             => (float[N,5] y) {
            a = Conv <pads: ints = [1,1,1,1]> (x, A, ba)
            r = Relu (a)
            b = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (r, B, bb)
            s = Relu (b)
            c = Conv (s, C, bc)
            t = Add (c, s)
            p = GlobalAveragePool (t)
            f = Flatten (p)
            y = Gemm (f, F, by) }""",
        opset,
        **weights,
    )


def dataset(batch: int | str = "N", images: Array = IMAGES) -> Dataset:
    return open_data({"x": images}, [InputSpec("x", np.dtype(np.float32), (batch, 3, 12, 12))])


def layers(proto: onnx.ModelProto) -> dict[str, Array]:
    return run(session(tap.tapped(proto, LAYERS).SerializeToString()), {"x": IMAGES})


def offsets(current: onnx.ModelProto) -> dict[str, float]:
    """Largest error of a channel's mean, in standard deviations of the float channel."""
    found, wanted = layers(current), layers(network())
    return {
        name: float(
            np.max(
                np.abs(mean(found[name]) - mean(wanted[name]))
                / np.moveaxis(wanted[name], 1, 0).reshape(wanted[name].shape[1], -1).std(axis=1)
            )
        )
        for name in LAYERS
    }


def mean(x: Array) -> Array:
    return np.asarray(x.mean(axis=tuple(i for i in range(x.ndim) if i != 1)))


def corrected(step: float, found: dict[str, Array], opset: int = 13) -> onnx.ModelProto:
    counts = {"a": 8, "b": 8, "c": 8, "y": 5}
    biases = {n: normal(counts[n], seed=9) + found[n] for n in LAYERS}
    return network(step, opset, **biases)


@pytest.mark.parametrize("opset", [13, 18])
def test_adding_the_drift_to_the_biases_removes_it_from_every_layer(opset: int) -> None:
    step = 0.05
    assert min(offsets(network(step)).values()) > 0.05
    found = drift(load(network(opset=opset)), load(network(step, opset)), LAYERS, dataset())
    assert {n: d.shape for n, d in found.items()} == {"a": (8,), "b": (8,), "c": (8,), "y": (5,)}
    assert max(offsets(corrected(step, found, opset)).values()) < 1e-3


def test_layers_are_corrected_one_after_the_other() -> None:
    step = 0.05
    found = drift(load(network()), load(network(step)), LAYERS, dataset())
    quantized, original = layers(network(step)), layers(network())
    at_once = {n: mean(original[n]) - mean(quantized[n]) for n in LAYERS}
    np.testing.assert_allclose(found["a"], at_once["a"], atol=1e-5)
    assert max(offsets(corrected(step, at_once)).values()) > 0.01


def test_equal_models_do_not_drift_and_no_tensors_cost_nothing() -> None:
    found = drift(load(network()), load(network()), LAYERS, dataset())
    assert max(float(np.abs(d).max()) for d in found.values()) < 1e-5
    assert drift(load(network()), load(network()), (), dataset()) == {}


def test_uneven_batches_are_weighted_by_their_samples() -> None:
    shifted = network(None, a=normal(8, seed=9) + 1)
    found = drift(load(network()), load(shifted), ["a"], dataset(images=normal(21, 3, 12, 12)))
    np.testing.assert_allclose(found["a"], -np.ones(8), atol=1e-5)


def test_a_fixed_batch_is_measured_sample_by_sample_and_said() -> None:
    def fixed(proto: onnx.ModelProto) -> onnx.ModelProto:
        for port in (*proto.graph.input, *proto.graph.output):
            port.type.tensor_type.shape.dim[0].dim_value = 1
        return proto

    notes: list[str] = []
    models = load(fixed(network())), load(fixed(network(0.05)))
    found = drift(*models, LAYERS, dataset(1), notes=notes)
    assert len(notes) == 1 and "1 sample(s) at a time" in notes[0]
    assert max(offsets(corrected(0.05, found)).values()) < max(offsets(network(0.05)).values())


def test_quantized_graphs_and_bodies_feed_on_the_corrected_tensor() -> None:
    text = """g (float[N,3,12,12] x, float[3,3,1,1] W, float k, float s, uint8 z, bool[1] go)
             => (float[N,3,12,12] y) {{
            a = Conv (x, W)
            {middle}
            i = If (go) <
                then_branch = t () => (float[N,3,12,12] p) {{ p = Mul (d, k) }},
                else_branch = e () => (float[N,3,12,12] n) {{ n = Neg (d) }} >
            y = Conv (i, W) }}"""
    bound = {
        "k": np.array(2, np.float32),
        "s": np.array(0.1, np.float32),
        "z": np.array(128, np.uint8),
        "go": np.array([True]),
    }
    quantize = "q = QuantizeLinear (a, s, z) d = DequantizeLinear (q, s, z)"
    weight = normal(3, 3, 1, 1)
    original = bind(text.format(middle="d = Identity (a)"), W=weight, **bound)
    current = bind(text.format(middle=quantize), W=floored(weight, 0.2), **bound)
    found = drift(load(original), load(current), ["a", "y"], dataset())
    wanted = {n: run(session(original.SerializeToString()), {"x": IMAGES})[n] for n in ("y",)}
    proto = onnx.ModelProto()
    proto.CopyFrom(current)
    for index, name in ((0, "a"), (-1, "y")):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(found[name].astype(np.float32), f"bias_{name}")
        )
        proto.graph.node[index].input.append(f"bias_{name}")
    result = run(session(proto.SerializeToString()), {"x": IMAGES})["y"]
    np.testing.assert_allclose(mean(result), mean(wanted["y"]), atol=1e-3 * wanted["y"].std())


def test_less_memory_means_smaller_batches_and_nearly_the_same_drift() -> None:
    notes: list[str] = []
    models = load(network()), load(network(0.05))
    small = drift(*models, LAYERS, dataset(), max_memory=1 << 20, notes=notes)
    assert "1 sample(s) at a time" in notes[0]
    large = drift(*models, LAYERS, dataset())
    assert all(np.abs(small[n] - large[n]).max() < 0.5 * np.abs(large[n]).max() for n in LAYERS)


def test_a_tensor_that_one_model_lacks_is_named() -> None:
    with pytest.raises(OptionError, match="'nowhere' is not made by both models"):
        drift(load(network()), load(network()), ["nowhere"], dataset())
