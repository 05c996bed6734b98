"""Problems between two states of a model, fidelity over data, and integer-kernel coverage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from texts import bind, normal, positive

from calib.data import InputSpec, open_data
from onnxc.check import compare, coverage, problems, snapshot
from onnxc.errors import DataError, ModelError
from onnxc.fidelity import SQNR_CAP, decibel
from onnxc.graph import Model, load
from onnxc.numerics.intervals import change_interval, share_interval

LAYER = "g (float[N,4] x, float[4,3] W) => (float[N,3] y) { y = MatMul (x, W) }"
FEED = {"x": normal(5, 4)}


def layer(noise: float = 0.0, name: str = "y", **weights: np.ndarray) -> onnx.ModelProto:
    W = weights.get("W", normal(4, 3)) + np.float32(noise) * normal(4, 3, seed=9)
    return bind(LAYER.replace(" y)", f" {name})").replace("{ y", f"{{ {name}"), W=W)


def both(a: onnx.ModelProto, b: onnx.ModelProto, lossless: bool = True) -> str:
    return "\n".join(problems(load(a), load(b), FEED, lossless))


def test_equal_models_have_no_problems() -> None:
    assert both(layer(), layer()) == ""


def test_rounding_passes_and_noise_does_not() -> None:
    assert both(layer(), layer(1e-5)) == ""
    assert "SQNR" in both(layer(), layer(1e-2))
    assert both(layer(), layer(1e-2), lossless=False) == ""


def test_nan_is_a_problem_even_of_a_lossy_pass() -> None:
    broken = layer(W=np.full((4, 3), np.nan, np.float32))
    assert "15 values that are NaN or infinite" in both(layer(), broken, lossless=False)
    assert both(broken, broken, lossless=False) == ""


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("g (float[N,4] x) => (float[N,3] z) { z = MatMul (x, W) }", "lost output 'y'"),
        (
            "g (float[M,4] x) => (float[M,3] y) { y = MatMul (x, W) }",
            "lost input 'x' float32[N, 4]",
        ),
        ("g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, W) }", "gained output 'y'"),
    ],
)
def test_interface_changes_are_named(text: str, lost: str) -> None:
    changed = bind(text.replace("x)", "x, float[4,3] W)"), W=normal(4, 3))
    assert lost in both(layer(), changed)


def test_order_of_inputs_is_interface() -> None:
    ab = bind("g (float[2] a, float[2] b) => (float[2] y) { y = Sub (a, b) }")
    ba = bind("g (float[2] b, float[2] a) => (float[2] y) { y = Sub (a, b) }")
    feed = {"a": normal(2), "b": normal(2)}
    assert "order" in "\n".join(problems(load(ab), load(ba), feed, True))


def test_invalid_node_is_named_but_an_old_fault_is_not() -> None:
    model = load(layer())
    model.graph.nodes[0].attrs["alpha"] = 1.0
    good, bad = snapshot(load(layer()), FEED), snapshot(model, FEED)
    found = "\n".join(problems(good, bad, FEED, True))
    assert "alpha" in found
    assert problems(bad, bad, FEED, True) == []


def test_integer_outputs_may_flip_only_rarely() -> None:
    text = """g (float[1000] x, float[1000] o) => (bool[1000] y) {
        s = Add (x, o)
        z = Sub (s, s)
        y = Less (z, s) }"""

    def flipped(count: int) -> Model:
        offset = np.where(np.arange(1000) < count, np.float32(-2), np.float32(0))
        return load(bind(text, o=offset))

    feed = {"x": np.ones(1000, np.float32)}
    assert problems(flipped(0), flipped(1), feed, True) == []
    assert "changed in 5 of 1000" in problems(flipped(0), flipped(5), feed, True)[0]


def test_snapshot_saves_the_reference_run() -> None:
    state = snapshot(load(layer()), FEED)
    assert problems(state, load(layer()), FEED, True) == []
    assert state.outputs is not None
    assert state.outputs["y"].shape == (5, 3)


def test_without_a_feed_the_model_is_still_opened() -> None:
    model = load(layer())
    model.graph.nodes[0].op = "NoSuchOperator"
    assert problems(load(layer()), model, None, True)


SPEC = (InputSpec("x", np.dtype(np.float32), ("N", 4)),)


def test_compare_gives_the_definitions() -> None:
    x, W, V = normal(40, 4), normal(4, 3), normal(4, 3) + np.float32(0.3) * normal(4, 3, seed=5)
    result = compare(
        layer(W=W).SerializeToString(),
        layer(W=V).SerializeToString(),
        open_data({"x": x}, SPEC),
        labels=(x @ V).argmax(-1),
        batch=7,
    )
    ref, out = (x @ W).astype(np.float64), (x @ V).astype(np.float64)
    assert result.samples == 40
    assert result.sqnr == pytest.approx(
        10 * math.log10((ref**2).sum() / ((ref - out) ** 2).sum()), abs=1e-3
    )
    assert result.cosine == pytest.approx(
        (ref * out).sum() / math.sqrt((ref**2).sum() * (out**2).sum()), abs=1e-6
    )
    assert result.max_abs_error == pytest.approx(np.abs(ref - out).max(), rel=1e-5)
    agreement = (ref.argmax(-1) == out.argmax(-1)).mean()
    assert 0 < agreement < 1
    assert result.agreement == pytest.approx(agreement)
    assert result.top1 == (pytest.approx(agreement), 1.0)
    assert (result.decisions, result.flips) == (40, (0, round(40 * (1 - agreement))))
    assert result.change_interval == change_interval(*result.flips, 40)
    assert result.top1_intervals == (share_interval(40 * agreement, 40), share_interval(40, 40))
    assert result.agreement_interval == result.top1_intervals[0]
    assert result.top5 == (1.0, 1.0)
    assert result.perplexity is None


def test_a_model_of_one_sample_a_run_is_compared_sample_by_sample() -> None:
    """The input leaves the batch free, but a state of one sample does not."""
    proto = bind(
        """g (float[N,3] x, float[1,3] s, float[3,6] W) => (float[N,6] y) {
            shape = Shape (s)
            r = Reshape (x, shape)
            y = MatMul (r, W) }""",
        s=normal(1, 3),
        W=normal(3, 6),
    )
    data = open_data({"x": normal(6, 3)}, [InputSpec("x", np.dtype(np.float32), ("N", 3))])
    found = compare(load(proto), load(proto), data, batch=4)
    assert found.samples == 6 and found.sqnr == SQNR_CAP


def test_equal_models_are_at_the_cap() -> None:
    data = layer().SerializeToString()
    result = compare(data, data, open_data({"x": normal(3, 4)}, SPEC))
    assert (result.sqnr, result.agreement, result.max_abs_error) == (SQNR_CAP, 1.0, 0.0)
    assert (result.decisions, result.flips, result.change_interval) == (0, None, None)


def test_outputs_that_are_no_numbers_are_told() -> None:
    """They are left out of what is compared, which would look as if all were well."""
    proto = bind("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Sqrt (x) z = Neg (x) }")
    data = proto.SerializeToString()
    x = np.array([[1, -1, 4, 9], [1, 4, 9, 16]], np.float32)
    result = compare(data, data, open_data({"x": x}, SPEC))
    assert result.notes == (
        "12.5% of output 'y' of the original are NaN and not compared: "
        "check the preprocessing and the weights",
    )
    assert result.outputs["y"].sqnr == SQNR_CAP


def test_language_model_is_judged_by_its_next_token() -> None:
    text = "g (int64[N,T] t, float[9,9] E) => (float[N,T,9] y) { y = Gather (E, t) }"
    E, tokens = normal(9, 9), np.random.default_rng(0).integers(0, 9, (6, 5))
    data = bind(text, E=E).SerializeToString()
    flat = bind(text, E=np.zeros((9, 9), np.float32)).SerializeToString()
    spec = (InputSpec("t", np.dtype(np.int64), ("N", "T")),)
    result = compare(data, flat, open_data({"t": tokens}, spec))
    logits = E[tokens[:, :-1]].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    likelihood = np.take_along_axis(p, tokens[:, 1:, None], -1)
    assert result.perplexity is not None
    assert result.perplexity[0] == pytest.approx(np.exp(-np.log(likelihood).mean()), rel=1e-5)
    assert result.perplexity[1] == pytest.approx(9.0, rel=1e-6)
    assert result.top1 is not None and result.flips is not None
    lost, won = result.flips
    assert result.decisions == 6 * 4
    assert (won - lost) / 24 == pytest.approx(result.top1[1] - result.top1[0])


def test_wrong_labels_and_lost_outputs_are_errors() -> None:
    data, samples = layer().SerializeToString(), open_data({"x": normal(3, 4)}, SPEC)
    with pytest.raises(DataError, match="2 labels for 3 samples"):
        compare(data, data, samples, labels=np.zeros(2, np.int64))
    with pytest.raises(ModelError, match="no output 'y'"):
        compare(data, layer(name="z").SerializeToString(), samples)


def test_decibel_limits() -> None:
    assert decibel(1.0, 0.0) == SQNR_CAP
    assert decibel(1.0, math.nan) == -math.inf
    assert decibel(0.0, 1.0) == -math.inf
    assert decibel(100.0, 1.0) == pytest.approx(20.0)


QDQ = """g (float[1,4,8,8] x, uint8[4,4,3,3] w, float s, uint8 z, float[4,4,1,1] f)
    => (float[1,4,6,6] y, float[1,4,8,8] m) {
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear (w, s, z)
    c = Conv (xd, wd)
    cq = QuantizeLinear (c, s, z)
    y = DequantizeLinear (cq, s, z)
    p = Conv (xd, f)
    m = MatMul (p, p) }"""


def test_coverage_counts_and_gives_reasons() -> None:
    model = bind(
        QDQ,
        w=np.full((4, 4, 3, 3), 130, np.uint8),
        s=np.array(0.05, np.float32),
        z=np.array(128, np.uint8),
        f=positive(4, 4, 1, 1),
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    found = coverage(model.SerializeToString())
    assert (found.integer, found.total) == (1, 3)
    reasons = {kernel.node: kernel.reason for kernel in found.left_float}
    assert reasons["Conv_6"] == "no Q/DQ at its weight and output"
    assert "two activations" in reasons["MatMul_7"]
    assert found.boundaries > 0


def test_coverage_of_bodies_and_orphans() -> None:
    text = """g (float[2,4] x, bool c, float[4,4] W, float s, uint8 z) => (float[2,4] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        y = If (c) <then_branch = a () => (float[2,4] u) { u = MatMul (d, W) },
                    else_branch = f () => (float[2,4] w) { w = Neg (d) }> }"""
    model = bind(text, W=normal(4, 4), s=np.array(0.1, np.float32), z=np.array(128, np.uint8))
    found = coverage(model.SerializeToString())
    assert (found.integer, found.total) == (0, 1)
    assert "inside the then_branch of If" in found.kernels[0].reason
    assert (found.boundaries, found.orphans) == (2, 2)


@pytest.mark.parametrize(
    ("zero", "tail", "reason"),
    [
        (np.array(0, np.int8), "e = DequantizeLinear (cq, s, p) y = Add (d, e)", "output int8"),
        (np.array(128, np.uint8), "r = Erf (c) y = Add (d, r)", "also read in float, by Erf"),
    ],
)
def test_reasons_behind_complete_pairs(zero: np.ndarray, tail: str, reason: str) -> None:
    kind = zero.dtype.name
    text = f"""g (float[1,4,8,8] x, uint8[4,4,3,3] w, float s, uint8 z, {kind} p)
        => (float[1,4,6,6] y) {{
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear (w, s, z)
        c = Conv (xd, wd)
        cq = QuantizeLinear (c, s, p)
        d = DequantizeLinear (cq, s, p)
        {tail} }}"""
    scale, middle = np.array(0.05, np.float32), np.array(128, np.uint8)
    model = bind(text, w=np.full((4, 4, 3, 3), 130, np.uint8), s=scale, z=middle, p=zero)
    found = coverage(model.SerializeToString())
    assert (found.integer, found.total) == (0, 1)
    assert reason in found.kernels[0].reason


def test_coverage_of_a_file_of_another_tool(shared: Path) -> None:
    found = coverage(shared / "peers" / "mobilenetv2" / "nncf.onnx")
    assert (found.integer, found.total) == (13, 53)
    reasons = [kernel.reason for kernel in found.left_float]
    assert sum("scale for each channel" in reason for reason in reasons) == 34
    assert found.orphans > 100
