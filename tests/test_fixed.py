"""Fixed point: scales, formats, shifts, and files that a processor with shifts alone can run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from texts import bind, normal, outputs, reasons

from calib.collect import collect
from calib.data import InputSpec, open_data
from onnxc.compression import Plan, compress_model
from onnxc.core import Change, Context
from onnxc.errors import OptionError
from onnxc.graph import Model, load, opset, to_proto, values
from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid, dequantize, quantize
from onnxc.pipeline import Calibration
from onnxc.quantization import QuantizeSettings
from onnxc.runtime import Runtime, run, session
from onnxc.targets import Target, choose
from onnxc.tasks import QUANTIZE
from passes.quantize import Quantize

NARROW = Grid(narrow=True)
scales = st.floats(2.0**-100, 2.0**100)


@given(scale=scales)
def test_the_powers_around_a_scale(scale: float) -> None:
    below, above = (float(p) for p in fixed.neighbours(scale))
    assert above == float(fixed.power_of_two(scale))
    assert math.frexp(below)[0] == math.frexp(above)[0] == 0.5
    assert below <= scale <= above < 2 * scale
    assert below == above or above == 2 * below


@given(n=st.integers(-120, 120), bits=st.sampled_from([8, 16]), signed=st.booleans())
def test_a_format_names_its_range(n: int, bits: int, signed: bool) -> None:
    """Qm.n and UQm.n: 2^m is where the integers of the grid end."""
    grid, scale = Grid(bits, signed), 2.0**-n
    kind, digits = fixed.name(scale, bits, signed).split("Q")
    m, of_n = digits.rsplit(".", 1)
    assert (kind == "") == signed
    assert int(of_n) == n == int(fixed.fraction_bits(scale))
    assert (grid.high + 1) * scale == 2.0 ** int(m)


def test_names_of_formats() -> None:
    assert fixed.name(2.0**-5, 8, True) == "Q2.5"
    assert fixed.name(2.0**-5, 8, False) == "UQ3.5"
    assert fixed.name(np.float32([2.0**-9, 2.0**-7]), 8, True) == "Q0.7 to Q-2.9"
    with pytest.raises(ValueError, match="power of two"):
        fixed.name(0.3, 8, True)


@given(seed=st.integers(0, 10**6), axis=st.sampled_from([None, 0, 1, -1]))
def test_weight_scales_have_the_lesser_error(seed: int, axis: int | None) -> None:
    weight = np.random.default_rng(seed).standard_t(2, (5, 6)).astype(np.float32)
    chosen = fixed.weight_scales(weight, axis, NARROW)

    def error(scale: NDArray[Any]) -> NDArray[Any]:
        q = dequantize(quantize(weight, scale, 0, NARROW, axis), scale, 0, axis)
        others = None if axis is None else 1 - axis % 2
        return np.asarray(((q - weight).astype(np.float64) ** 2).sum(others))

    above = fixed.power_of_two(np.abs(weight).max(None if axis is None else 1 - axis % 2) / 127)
    least = np.minimum(error(above / 2), error(above))
    np.testing.assert_allclose(error(chosen), least, rtol=1e-12)
    assert np.all((chosen == above) | (chosen == above / 2))


@given(
    seed=st.integers(0, 10**6),
    axis=st.sampled_from([None, 0, 1]),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
)
def test_a_weight_on_few_integers_keeps_them_few(seed: int, axis: int | None, bits: int) -> None:
    rng = np.random.default_rng(seed)
    high = 2 ** (bits - 1) - 1
    q = rng.integers(-high, high + 1, (5, 6))
    n = rng.integers(-9, 9, (5, 1) if axis == 0 else (1, 6) if axis == 1 else (1, 1))
    weight = np.float32(q * 2.0**-n)
    scale = fixed.weight_scales(weight, axis, NARROW)
    made = quantize(weight, scale, 0, NARROW, axis)
    np.testing.assert_array_equal(dequantize(made, scale, 0, axis), weight)
    assert np.unique(made).size <= 2 * high + 1
    assert fixed.is_on_grid(weight, axis, Grid(bits))
    assert not fixed.is_on_grid(weight + np.float32(1 / 3), axis, Grid(bits))


@given(scale=scales)
def test_the_nearer_power_is_at_most_a_third_away(scale: float) -> None:
    found = float(fixed.nearest(scale))
    assert found in [float(p) for p in fixed.neighbours(scale)]
    assert abs(found - scale) <= scale / 3 * (1 + 1e-12)


def test_one_outlier_is_clipped_rather_than_all_rounded_twice_as_coarsely() -> None:
    weight = np.append(np.linspace(-1, 1, 10_001), 1.02).astype(np.float32)
    assert fixed.weight_scales(weight[:, None], None, NARROW) == 2.0**-7
    assert fixed.power_of_two(1.02 / 127) == 2.0**-6


@given(a=st.integers(-(2**40), 2**40), k=st.integers(-8, 30))
def test_rescaling_rounds_as_real_numbers_do(a: int, k: int) -> None:
    exact = Fraction(a) / Fraction(2) ** k
    even, up = (int(fixed.rescale(np.int64([a]), k, r)[0]) for r in get_args(fixed.Rounding))
    assert even == round(exact)
    assert up == math.floor(exact + Fraction(1, 2))
    assert up - even in (0, 1)


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "plain": ("group: int = 1", (6, 3, 3, 3), {}),
    "strided": (
        "strides: ints = [2, 1], pads: ints = [1, 0, 2, 1]",
        (6, 3, 3, 3),
        {"strides": (2, 1), "pads": (1, 0, 2, 1)},
    ),
    "dilated": ("dilations: ints = [2, 3]", (6, 3, 2, 2), {"dilations": (2, 3)}),
    "grouped": ("group: int = 3", (6, 1, 3, 3), {"groups": 3}),
}


@dataclass(frozen=True)
class Layer:
    """The constants of the only heavy node between Q/DQ, and what the node computes in a run."""

    model: Model
    x: NDArray[Any]
    w: NDArray[Any]
    b: NDArray[Any]
    scales: tuple[Any, Any, Any, Any]  # of x, w, b, y
    zeros: tuple[Any, Any, Any]  # of x, w, y
    y: dict[str, NDArray[Any]]  # by level of optimization
    changes: tuple[Change, ...]


def fixed_point(proto: onnx.ModelProto, x: NDArray[np.float32], bits: int) -> Layer:
    model = load(proto)
    bare = Context(opset(model.graph), Target("any"))
    pass_ = Quantize(bits=bits, activation_bits=bits, power_of_two=True)  # type: ignore[arg-type]
    data = open_data({"x": x}, (InputSpec("x", np.dtype(np.float32), x.shape),))
    keys = list(pass_.wants(model.graph, bare))
    stats = collect(model, keys, data, threads=1).stats
    done = pass_.apply(model.graph, Context(bare.opset, bare.target, stats))
    heavy = next(n for n in model.graph.nodes if n.op in ("Conv", "Gemm"))
    pairs = [tensor.inputs[0] for tensor in heavy.inputs]
    quantizer = heavy.outputs[0].outputs[0]
    while quantizer.op != "QuantizeLinear":
        quantizer = quantizer.outputs[0].outputs[0]
    made = {level: integers(model, quantizer, x, level) for level in ("none", "all")}
    (w, s_w, z_w), (b, s_b) = ([values(t) for t in pair.inputs] for pair in pairs[1:])
    grid = [values(t) for t in (*pairs[0].inputs[1:], *quantizer.inputs[1:])]
    q_x = quantize(x, grid[0], grid[1], Grid(bits, grid[1].dtype.kind == "i"))
    changes = tuple(change for change in done if isinstance(change, Change))
    return Layer(
        model, q_x, w, b, (grid[0], s_w, s_b, grid[2]), (grid[1], z_w, grid[3]), made, changes
    )


def integers(model: Model, quantizer: gs.Node, x: NDArray[Any], level: str) -> NDArray[Any]:
    """The output of a Q in a run."""
    proto = to_proto(model)
    proto.graph.output.add(name=quantizer.outputs[0].name)
    found = run(session(proto.SerializeToString(), Runtime(level=level)), {"x": x})
    return np.asarray(found[quantizer.outputs[0].name])


def conv(kind: str, bits: int, tail: str = "") -> Layer:
    """A convolution, perhaps a Relu, and another convolution that wants integers."""
    attributes, shape, _ = CONVOLUTIONS[kind]
    read = "r" if tail else "c"
    proto = bind(
        f"""g (float[2,3,9,9] x, float[6,3,3,3] W, float[6] B, float[2,6,1,1] V)
            => (float[N,2,H,V] y) {{
            c = Conv <{attributes}> (x, W, B)
            {tail}
            y = Conv ({read}, V) }}""",
        opset=21,
        W=normal(*shape) / 3,
        B=normal(6),
        V=normal(2, 6, 1, 1),
    )
    return fixed_point(proto, normal(2, 3, 9, 9, seed=1), bits)


def sums_of(layer: Layer, kind: str) -> NDArray[np.int64]:
    settings = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
    settings |= CONVOLUTIONS[kind][2]
    return fixed.convolve(layer.x, layer.w, layer.b, **settings)  # type: ignore[arg-type]


def reference(layer: Layer, sums: NDArray[np.int64], rounding: fixed.Rounding = "even") -> Any:
    """What shifts make of sums of products, whose channels lie on axis 1."""
    n_x, n_w, n_b, n_y = (fixed.fraction_bits(s) for s in layer.scales)
    np.testing.assert_array_equal(n_b, n_x + n_w)
    k = (n_x + n_w - n_y).reshape(1, -1, *[1] * (sums.ndim - 2))
    grid = Grid(layer.w.dtype.itemsize * 8, layer.zeros[2].dtype.kind == "i")
    return fixed.clip(fixed.rescale(sums, k, rounding), grid)


def steps(a: Any, b: Any) -> int:
    """The largest difference of two arrays of integers."""
    return int(np.abs(a.astype(np.int64) - b.astype(np.int64)).max())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_of_8_bits_is_integers_and_shifts(kind: str) -> None:
    layer = conv(kind, 8)
    sums = sums_of(layer, kind)
    assert np.unique(layer.y["none"]).size > 50
    np.testing.assert_array_equal(reference(layer, sums), layer.y["none"])
    np.testing.assert_array_equal(reference(layer, sums), layer.y["all"])
    assert steps(reference(layer, sums, "up"), layer.y["all"]) <= 1


def test_a_convolution_of_16_bits_differs_by_one_unit_at_most() -> None:
    layer = conv("plain", 16)
    sums = sums_of(layer, "plain")
    assert layer.w.dtype == np.int16
    assert np.unique(layer.y["none"]).size > 400
    for rounding in get_args(fixed.Rounding):
        assert steps(reference(layer, sums, rounding), layer.y["none"]) <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_gemm_is_integers_and_shifts(bits: int) -> None:
    proto = bind(
        """g (float[5,12] x, float[7,12] W, float[7] B, float[7,3] V, float[3] U)
             => (float[5,3] y) {
            h = Gemm <transB: int = 1> (x, W, B)
            y = Gemm (h, V, U) }""",
        opset=21,
        W=normal(7, 12),
        B=normal(7),
        V=normal(7, 3),
        U=normal(3),
    )
    layer = fixed_point(proto, normal(5, 12, seed=1), bits)
    made = reference(layer, fixed.matmul(layer.x, layer.w.T, layer.b))
    assert steps(made, layer.y["none"]) <= (0 if bits == 8 else 1)
    assert steps(made, layer.y["all"]) <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_every_scale_is_a_power_of_two_and_every_zero_point_zero(bits: int) -> None:
    layer = conv("grouped", bits, "r = Relu (c)")
    s_x, s_w, s_b, s_y = (s.astype(np.float64) for s in layer.scales)
    for s in (s_x, s_w, s_b, s_y, s_x * s_w / s_y):
        assert np.all(np.frexp(s)[0] == 0.5)
    np.testing.assert_array_equal(s_b, s_x * s_w)
    assert all(np.all(zero == 0) for zero in layer.zeros)
    assert [zero.dtype.kind for zero in layer.zeros] == ["i", "i", "u"]
    assert {node.domain or "" for node in layer.model.graph.nodes} == {""}
    assert np.abs(layer.b.astype(np.int64)).max() <= 2**30


def test_changes_name_the_formats() -> None:
    layer = conv("plain", 8, "r = Relu (c)")
    s_x, s_w, _, s_y = layer.scales
    x, w, y = fixed.name(s_x, 8, True), fixed.name(s_w, 8, True), fixed.name(s_y, 8, False)
    assert layer.changes[0].what == f"{x} · {w} -> {y}"
    assert layer.changes[1].what.endswith("-> float") or "->" in layer.changes[1].what


def test_a_tiny_weight_does_not_overflow_its_bias() -> None:
    proto = bind(
        """g (float[2,3,4,4] x, float[2,3,1,1] W, float[2] B) => (float[2,2,4,4] y) {
            y = Conv (x, W, B) }""",
        opset=21,
        W=np.stack([normal(3, 1, 1), 1e-9 * normal(3, 1, 1)]),
        B=np.float32([1, 100]),
    )
    x = normal(2, 3, 4, 4)
    layer = fixed_point(proto, x, 16)
    assert np.abs(layer.b.astype(np.int64)).max() <= 2**30
    np.testing.assert_allclose(
        outputs(layer.model, {"x": x})["y"], outputs(proto, {"x": x})["y"], atol=0.02
    )


def test_16_bits_need_opset_21() -> None:
    proto = bind(
        "g (float[1,4] x, float[4,4] W) => (float[1,4] y) { y = MatMul (x, W) }", W=normal(4, 4)
    )
    model = load(proto)
    context = Context(13, Target("any"))
    results = Quantize(bits=16, activation_bits=16, power_of_two=True).apply(model.graph, context)
    assert "need opset 21" in reasons(results)
    assert not any(isinstance(result, Change) for result in results)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "fixed", "format": "qoperator"}, "standard operators"),
        ({"scheme": "fixed", "format": "dynamic"}, "standard operators"),
        ({"scheme": "fixed", "format": "weight-only"}, "standard operators"),
        ({"scheme": "fixed", "activations": "float"}, "computes in integers"),
        ({"bits": 16}, "--scheme fixed"),
        ({"bits": 16, "format": "dynamic"}, "--scheme fixed"),
        ({"scheme": "fixed", "bits": 16, "rounding": "descent"}, "take 8 bits"),
        ({"scheme": "fixed", "bits": 16, "activations": 8}, "activations of 16"),
        ({"bits": 4, "format": "qoperator"}, "qdq or weight-only"),
        ({"activations": "float", "format": "qdq"}, "weight-only"),
        ({"activations": 8, "format": "weight-only"}, "--format qdq"),
        ({"bits": 4, "format": "dynamic"}, "weight-only"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        QuantizeSettings(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"scheme": "fixed"}, {"int8"}),
        ({"scheme": "fixed", "bits": 16, "format": "qdq"}, {"int16"}),
        ({"scheme": "fixed", "bits": 8, "rounding": "stochastic"}, {"int8"}),
        ({"bits": 4, "keep_ends": False}, {"int4", "uint4"}),
        ({"bits": 4, "keep_ends": False, "format": "weight-only"}, {"int4", "uint4"}),
        ({"format": "qoperator"}, {"int8"}),
    ],
)
def test_settings_reach_the_file(settings: dict[str, Any], kinds: set[str]) -> None:
    proto = bind(
        """g (float[N,3,8,8] x, float[16,3,3,3] W, float[16] B, float[16,64] M)
             => (float[N,64] y) {
            c = Conv (x, W, B)
            r = Relu (c)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            y = MatMul (f, M) }""",
        W=normal(16, 3, 3, 3),
        B=normal(16),
        M=normal(16, 64),
    )
    x = normal(16, 3, 8, 8)
    data = open_data({"x": x}, (InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8)),))
    plan = Plan(QUANTIZE, QuantizeSettings(**settings), choose("x86-vnni"))
    found = compress_model(plan, load(proto), Calibration(data), data)
    stored = {
        t.dtype.name
        for n in found.model.graph.nodes
        for t in n.inputs
        if isinstance(t, gs.Constant)
    }
    assert stored & kinds
    assert found.comparison.sqnr > 12


def test_a_real_network_in_fixed_point(shared: Any) -> None:
    """resnet20: at least 25 dB with 8 bits and 50 with 16, every scale a power of two."""
    model = shared / "models" / "resnet20.onnx"
    x = normal(24, 3, 32, 32)
    data = open_data({"input": x}, (InputSpec("input", np.dtype(np.float32), ("N", 3, 32, 32)),))
    for bits, least in ((8, 25), (16, 50)):
        settings = QuantizeSettings(scheme="fixed", bits=bits)  # type: ignore[arg-type]
        plan = Plan(QUANTIZE, settings, choose("x86-vnni"))
        found = compress_model(plan, load(model), Calibration(data), data)
        assert found.comparison.sqnr > least
        for node in found.model.graph.nodes:
            if node.op in ("QuantizeLinear", "DequantizeLinear"):
                fixed.fraction_bits(values(node.inputs[1]))
