"""Reconstruct: layer after layer, the outputs of the original come back as far as they can."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, changed, context, normal, outputs, reasons

from calib.data import Dataset, InputSpec, open_data
from onnxc.core import Change, Skip
from onnxc.graph import Model, constant, copy, fresh, load, to_bytes, values
from onnxc.moved import moved
from onnxc.pipeline import Calibration, Step, compress
from passes.reconstruct import Reconstruct

Array = NDArray[Any]
IMAGES = normal(24, 3, 10, 10)


def network(**weights: Array) -> onnx.ModelProto:
    """A residual block whose inner channel 5 is the sum of channels 0 and 1, as both are positive.

    Its second convolution can do without channel 5, and its sum drifts with the stem.
    """
    A = normal(6, 4, 1, 1)
    A[:2] = np.abs(A[:2])
    A[5] = A[0] + A[1]
    given = {
        "S": np.abs(normal(4, 3, 3, 3)),
        "A": A,
        "B": normal(4, 6, 3, 3),
        "bb": normal(4),
        "F": normal(4, 5),
        "bf": normal(5),
    }
    given |= weights
    return bind(
        """g (float[N,3,10,10] x, float[4,3,3,3] S, float[6,4,1,1] A, float[4,6,3,3] B,
              float[4] bb, float[4,5] F, float[5] bf) => (float[N,5] y) {
            s = Conv <pads: ints = [1,1,1,1]> (x, S)
            r = Relu (s)
            a = Conv (r, A)
            p = Relu (a)
            b = Conv <pads: ints = [1,1,1,1]> (p, B, bb)
            t = Add (b, r)
            q = Relu (t)
            g = GlobalAveragePool (q)
            f = Flatten (g)
            y = Gemm (f, F, bf) }""",
        **given,
    )


def without(weight: Array, channel: int) -> Array:
    """The weight with an input channel set to zero."""
    cut = weight.copy()
    cut[:, channel] = 0
    return cut


def named(proto: onnx.ModelProto) -> Model:
    model = load(proto)
    for node in model.graph.nodes:
        node.name = node.outputs[0].name
    return model


def replace(model: Model, node: str, position: int, array: Array) -> None:
    found = next(n for n in model.graph.nodes if n.name == node)
    found.inputs[position] = constant(fresh(model.graph, "new"), array)


def weight(model: Model, node: str) -> Array:
    found = next(n for n in model.graph.nodes if n.name == node)
    return values(found.inputs[1])


def dataset(images: Array = IMAGES, batch: int | str = "N") -> Dataset:
    ports = [InputSpec("x", np.dtype(np.float32), (batch, *images.shape[1:]))]
    return open_data({"x": images}, ports)


def reconstruct(
    model: Model,
    original: Model,
    blocks: bool = True,
    data: Dataset | None = None,
    **only: tuple[str, ...],
) -> Step:
    calibration = Calibration(data or dataset(), original=original)
    (step,) = compress(model, [Reconstruct(blocks)], context(model, **only), calibration)
    return step


def results(step: Step) -> list[Change | Skip]:
    return [*step.changes, *step.skips]


def error(model: Model, original: Model, tensor: str = "y") -> float:
    """Of the outputs, relative to their variance."""
    found, wanted = (outputs(m, {"x": IMAGES})[tensor] for m in (model, original))
    return float(((found - wanted) ** 2).mean() / wanted.var())


def test_a_channel_that_others_tell_is_restored() -> None:
    original, model = named(network()), named(network())
    replace(model, "b", 1, without(weight(model, "b"), 5))
    assert error(model, original) > 0.01
    step = reconstruct(model, original)
    assert not step.problems
    assert "b" in changed(results(step))
    assert not weight(model, "b")[:, 5].any()
    assert error(model, original) < 1e-5


def test_untouched_layers_before_the_change_are_left_alone() -> None:
    original, model = named(network()), named(network())
    replace(model, "b", 1, without(weight(model, "b"), 3))
    step = reconstruct(model, original)
    assert {skip.node for skip in step.skips} >= {"s", "a"}
    assert "it computes what it did in the original" in reasons(results(step))


def test_an_equal_model_stays_byte_for_byte_and_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = named(network()), named(network())
    monkeypatch.setattr("calib.walk.Walk.reach", lambda *given: pytest.fail("the model was run"))
    before = to_bytes(model)
    step = reconstruct(model, original)
    assert not step.changes
    assert to_bytes(model) == before


def test_what_the_stream_has_gone_wrong_by_is_made_good_in_the_sum() -> None:
    def shifted() -> Model:
        """The bias of the sum's other summand is off, and cannot be refit."""
        return named(stream(np.float32([1, -2, 3, 0.5])))

    original = named(stream(np.zeros(4, np.float32)))
    kept, alone = shifted(), shifted()
    reconstruct(kept, original, exclude=("o",))
    reconstruct(alone, original, blocks=False, exclude=("o",))
    assert error(kept, original) < 1e-5
    assert error(alone, original) > 0.1


def stream(shift: Array) -> onnx.ModelProto:
    return bind(
        """g (float[N,3,10,10] x, float[4,3,1,1] O, float[4] bo, float[4,3,3,3] B, float[4] bb)
            => (float[N,4,10,10] y) {
            o = Conv (x, O, bo)
            b = Conv <pads: ints = [1,1,1,1]> (x, B, bb)
            y = Add (o, b) }""",
        O=normal(4, 3, 1, 1),
        bo=shift,
        B=normal(4, 3, 3, 3),
        bb=normal(4),
    )


def test_of_two_convolutions_into_one_sum_the_later_makes_up_for_the_earlier() -> None:
    original, model = (named(stream(np.zeros(4, np.float32))) for _ in range(2))
    replace(model, "o", 1, without(weight(model, "o"), 1))
    step = reconstruct(model, original)
    assert "b" in changed(results(step))
    assert not weight(model, "o")[:, 1].any()
    assert error(model, original) < 1e-5  # the 3x3 kernel holds the 1x1 that was lost


def test_excluded_nodes_are_untouched_and_said() -> None:
    original, model = named(network()), named(network())
    replace(model, "b", 1, without(weight(model, "b"), 5))
    before = to_bytes(model)
    step = reconstruct(model, original, exclude=("*",))
    assert not step.changes and to_bytes(model) == before
    assert {skip.reason for skip in step.skips} == {"not refit: excluded"}


GROUPED = """g (float[N,4,8,8] x, float[8,2,3,3] A, float[8,1,3,3] D, float[8] bd)
    => (float[N,8,8,8] y) {
    a = Conv <group: int = 2, pads: ints = [1,1,1,1]> (x, A)
    y = Conv <group: int = 8, pads: ints = [1,1,1,1]> (a, D, bd) }"""


def test_grouped_and_depthwise_convolutions() -> None:
    weights = {"A": normal(8, 2, 3, 3), "D": normal(8, 1, 3, 3), "bd": normal(8)}
    original = named(bind(GROUPED, **weights))
    weights["A"] = weights["A"] * np.float32(1.2)
    model = named(bind(GROUPED, **weights))
    step = reconstruct(model, original, data=dataset(normal(24, 4, 8, 8)))
    assert "a" in changed(results(step))
    feed = {"x": normal(4, 4, 8, 8, seed=1)}
    np.testing.assert_allclose(outputs(model, feed)["y"], outputs(original, feed)["y"], atol=1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        "y = MatMul (x, W)",
        "y = Gemm (x, W)",
        "y = Gemm <transB = 1> (x, V)",
        "t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, W)",
    ],
)
def test_matrices(layer: str) -> None:
    text = f"g (float[N,6] x, float[6,3] W, float[3,6] V) => (float[N,3] y) {{ {layer} }}"
    W = normal(6, 3)
    original = named(bind(text, W=W, V=np.ascontiguousarray(W.T)))
    model = named(bind(text, W=W / 2, V=np.ascontiguousarray(W.T) / 2))
    step = reconstruct(model, original, data=dataset(normal(64, 6)))
    assert changed(results(step)) == ["y"]
    feed = {"x": normal(5, 6, seed=1)}
    np.testing.assert_allclose(outputs(model, feed)["y"], outputs(original, feed)["y"], atol=1e-3)


def test_a_sequence_multiplied_by_a_matrix() -> None:
    text = "g (float[N,7,6] x, float[6,3] W) => (float[N,7,3] y) { y = MatMul (x, W) }"
    original, model = (named(bind(text, W=normal(6, 3) / s)) for s in (1, 2))
    reconstruct(model, original, data=dataset(normal(16, 7, 6)))
    feed = {"x": normal(5, 7, 6, seed=1)}
    np.testing.assert_allclose(outputs(model, feed)["y"], outputs(original, feed)["y"], atol=1e-3)


def test_a_bias_is_added_where_it_helps_and_not_where_it_does_not() -> None:
    text = "g (float[N,6] x, float[6,3] W{port}) => (float[N,3] y) {{ y = Gemm (x, W{bias}) }}"
    W = normal(6, 3)
    plain, biased = text.format(port="", bias=""), text.format(port=", float[3] b", bias=", b")
    data = dataset(normal(64, 6))
    for original in (bind(plain, W=W), bind(biased, W=W, b=np.full(3, 5, np.float32))):
        model = named(bind(plain, W=W / 2))
        reconstruct(model, named(original), data=data)
        is_biased = len(original.graph.initializer) == 2
        assert (len(model.graph.nodes[0].inputs) == 3) == is_biased


def test_weights_of_few_values_keep_them() -> None:
    original, model = named(network()), named(network())
    array = np.round(values(original.graph.nodes[4].inputs[1]))
    replace(model, "b", 1, array)
    step = reconstruct(model, original)
    assert "b" not in changed(results(step))
    assert "its weight has few values" in reasons(results(step))


def test_shared_weights_and_overlapping_outputs_are_skipped_with_reasons() -> None:
    text = """g (float[N,3,8,8] x, float s, float[3,3,1,1] W, float[3,2,3,3] T)
        => (float[N,2,10,10] y) {
        m = Mul (x, s)
        a = Conv (m, W)
        b = Conv (a, W)
        y = ConvTranspose (b, T) }"""
    weights = {"W": normal(3, 3, 1, 1), "T": normal(3, 2, 3, 3)}
    original = named(bind(text, s=np.array(1, np.float32), **weights))
    model = named(bind(text, s=np.array(2, np.float32), **weights))
    step = reconstruct(model, original, data=dataset(normal(8, 3, 8, 8)))
    assert not step.changes
    said = reasons(results(step))
    assert "its weight is shared with b" in said
    assert "the outputs of ConvTranspose overlap" in said


def test_batches_of_one_give_the_same_to_rounding() -> None:
    def fixed(proto: onnx.ModelProto) -> onnx.ModelProto:
        for port in (*proto.graph.input, *proto.graph.output):
            port.type.tensor_type.shape.dim[0].dim_value = 1
        return proto

    found = []
    for change, batch in ((lambda p: p, "N"), (fixed, 1)):
        original, model = named(change(network())), named(change(network()))
        replace(model, "b", 1, without(weight(model, "b"), 3))
        reconstruct(model, original, data=dataset(batch=batch))
        found.append(weight(model, "b"))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_without_data_nothing_is_refit_and_it_is_said() -> None:
    original, model = named(network()), named(network())
    replace(model, "b", 1, without(weight(model, "b"), 5))
    calibration = Calibration(None, original=original)
    (step,) = compress(model, [Reconstruct()], context(model), calibration)
    assert not step.changes
    assert "not compared with the original" in reasons(results(step))


def test_moved_tensors_are_those_behind_a_change() -> None:
    original = named(network())
    assert moved(original.graph, copy(original).graph) == set()
    model = named(network())
    replace(model, "b", 1, without(weight(model, "b"), 5))
    assert moved(model.graph, original.graph) == {"b", "t", "q", "g", "f", "y"}


def test_a_layer_whose_channels_were_cut_is_skipped() -> None:
    original, model = named(network()), named(network())
    replace(model, "a", 1, weight(model, "a")[:5])
    replace(model, "b", 1, weight(model, "b")[:, :5])
    step = reconstruct(model, original)
    assert not step.problems
    assert "other channels than in the original" in reasons(results(step))
    assert "b" in changed(results(step))


def test_one_sample_teaches_nothing() -> None:
    original, model = named(network()), named(network())
    replace(model, "b", 1, without(weight(model, "b"), 5))
    step = reconstruct(model, original, data=dataset(IMAGES[:1]))
    assert not step.changes and not step.problems


def bent(model: Model, original: Model, data: Dataset | None = None) -> Step:
    calibration = Calibration(data or dataset(), original=original)
    (step,) = compress(model, [Reconstruct(nonlinear=True)], context(model), calibration)
    assert not step.problems
    return step


@pytest.mark.parametrize(
    "behind",
    [
        "y = Relu (b)",
        "y = Clip (b, low, high)",
        "r = Relu (x) t = Add (b, r) y = Relu (t)",
        "r = Relu (x) t = Add (r, b) y = Clip (t, low, high)",
    ],
)
def test_what_comes_out_of_the_relu_is_nearer_than_by_least_squares(behind: str) -> None:
    """The lost channel makes outputs that are negative without it more so, and does no more."""
    text = f"""g (float[N,3,10,10] x, float[3,3,1,1] B, float[3] bb, float low, float high)
        => (float[N,3,10,10] y) {{
        b = Conv (x, B, bb)
        {behind} }}"""
    images = IMAGES.copy()
    images[:, 1] = -np.maximum(-images[:, 0], 0)
    given = {"low": np.array(0, np.float32), "high": np.array(2, np.float32)}
    B = np.float32([[1, 8, 0.2], [2, 9, -0.1], [1, 7, 0.1]])[..., None, None]
    given |= {"B": B, "bb": np.zeros(3, np.float32)}
    original, errors = named(bind(text, **given)), []
    for refit in (reconstruct, bent):
        model = named(bind(text, **given))
        replace(model, "b", 1, without(weight(model, "b"), 1))
        (change,) = refit(model, original, data=dataset(images)).changes
        assert not weight(model, "b")[:, 1].any()
        found, wanted = (outputs(m, {"x": images})["y"] for m in (model, original))
        errors.append(float(((found - wanted) ** 2).mean()))
    assert errors[1] < 0.75 * errors[0]
    assert "less of it behind the activation" in change.what


def test_where_no_relu_follows_alone_layers_are_refit_as_without() -> None:
    text = """g (float[N,3,10,10] x, float[3,3,3,3] B, float[3] bb, float[5,3,1,1] C)
        => (float[N,3,10,10] y, float[N,5,10,10] z) {
        b = Conv <pads: ints = [1,1,1,1]> (x, B, bb)
        y = Relu (b)
        z = Conv (b, C) }"""
    weights = {"B": normal(3, 3, 3, 3), "bb": normal(3), "C": normal(5, 3, 1, 1)}
    original, one, other = (named(bind(text, **weights)) for _ in range(3))
    for model in (one, other):
        replace(model, "b", 1, without(weight(model, "b"), 1))
    reconstruct(one, original)
    bent(other, original)
    assert to_bytes(one) == to_bytes(other)


def test_a_network_is_refit_through_its_activations_and_twice_the_same() -> None:
    original, found = named(network()), []
    for _ in range(2):
        model = named(network())
        replace(model, "a", 1, weight(model, "a") * np.float32(0.7))
        replace(model, "b", 1, without(weight(model, "b"), 3))
        bent(model, original)
        found.append(to_bytes(model))
        assert error(model, original) < 0.01
    assert found[0] == found[1]
