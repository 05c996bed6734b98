"""Q/DQ pairs as QOperator nodes: each form, what does not fit, and whole networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, context, exact_sums, normal, ops, reasons, skip_refused

from calib.data import InputSpec, open_data
from onnxc.check import coverage
from onnxc.compression import Plan, compress_model
from onnxc.core import Change, Context
from onnxc.graph import Model, load, opset, to_bytes
from onnxc.pipeline import Calibration, apply_pass
from onnxc.qoperator import FORMS
from onnxc.quantization import QuantizeSettings
from onnxc.runtime import Runtime, run, session
from onnxc.targets import Target, choose
from onnxc.tasks import QUANTIZE
from passes.to_qoperator import ToQOperator

STEP = np.float32(0.05)
WEIGHTS: dict[str, NDArray[Any]] = {
    "W": np.random.default_rng(0).integers(-127, 128, (6, 4, 3, 3)).astype(np.int8),
    "G": np.random.default_rng(1).integers(-127, 128, (5, 8)).astype(np.int8),
    "M": np.random.default_rng(2).integers(-127, 128, (8, 5)).astype(np.int8),
    "s6": np.linspace(0.001, 0.01, 6).astype(np.float32),
    "s5": np.linspace(0.001, 0.01, 5).astype(np.float32),
    "z6": np.zeros(6, np.int8),
    "z5": np.zeros(5, np.int8),
    "B": np.arange(-3000, 3000, 1000).astype(np.int32),
    "C": np.arange(-2500, 2500, 1000).astype(np.int32),
    "sB": STEP * np.linspace(0.001, 0.01, 6).astype(np.float32),
    "sC": STEP * np.linspace(0.001, 0.01, 5).astype(np.float32),
    "half": np.float32(0.5),
    "six": np.float32(6),
    "zero": np.float32(0),
    "n": np.float32(-1),
    "shape": np.array([2, -1]),
    "start": np.array([1]),
    "end": np.array([3]),
    "repeats": np.array([1, 2, 1, 1]),
    "wide": np.array([2, 4, 6, 6]),
    "last": np.array([4]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "scales": np.float32([1, 1, 2, 2]),
}


def between(
    body: str, shape: str, kind: str, out: str = "", **more: NDArray[Any]
) -> onnx.ModelProto:
    """x -> Q -> DQ -> d -> body -> c -> Q -> DQ -> y. out: scale of y, if not that of x."""
    zero = np.array(100 if kind == "uint8" else -28, kind)
    y = ("t", "u") if out else ("s", "z")
    text = f"""g (float[{shape}] x) => (float y) {{
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        {body}
        e = QuantizeLinear (c, {", ".join(y)})
        y = DequantizeLinear (e, {", ".join(y)}) }}"""
    other = {"t": np.float32(out), "u": np.array(30, kind)} if out else {}
    given = {**WEIGHTS, "s": STEP, "z": zero, **other, **more}
    words = set(re.findall(r"\w+", text))
    used = {name: array for name, array in given.items() if name in words}
    proto = bind(text, opset=17, **used)
    opened = session(proto.SerializeToString(), Runtime(level="none"))
    rank = run(opened, {"x": sample(shape)})["y"].ndim
    for _ in range(rank):
        proto.graph.output[0].type.tensor_type.shape.dim.add()
    return proto


def sample(shape: str) -> NDArray[np.float32]:
    return 2 * normal(*map(int, shape.split(",")))


def convert(
    proto: onnx.ModelProto, x: NDArray[np.float32], step: float = 0.05
) -> tuple[Model, Any]:
    """Rewrite with checks; the outputs stay within one quantization step at every level."""
    model = load(proto)
    done = apply_pass(model, ToQOperator(), context(model), {"x": x})
    skip_refused(done)
    assert not done.problems
    for level in ("none", "all"):
        before, after = (
            run(session(data, Runtime(level=level)), {"x": x})["y"]
            for data in (proto.SerializeToString(), to_bytes(model))
        )
        np.testing.assert_allclose(after, before, rtol=0, atol=1.001 * step)
        assert np.unique(before).size > 2
    return model, done


WEIGHT = "w = DequantizeLinear <axis: int = {axis}> ({w}, {s}, {z})"
CONV = WEIGHT.format(axis=0, w="W", s="s6", z="z6")
GEMM = WEIGHT.format(axis=0, w="G", s="s5", z="z5")
MATMUL = WEIGHT.format(axis=1, w="M", s="s5", z="z5")
BIAS = "b = DequantizeLinear <axis: int = 0> (B, sB)"
SECOND = "f = Neg (x) qf = QuantizeLinear (f, t, u) b = DequantizeLinear (qf, t, u)"

INTEGER = {
    "conv": (CONV + "c = Conv <strides: ints = [2, 2]> (d, w)", "2,4,6,6", "0.1", "QLinearConv"),
    "conv with bias": (
        CONV + BIAS + "c = Conv <pads: ints = [1,1,1,1]> (d, w, b)",
        "2,4,6,6",
        "0.1",
        "QLinearConv",
    ),
    "gemm": (
        GEMM + "b = DequantizeLinear <axis: int = 0> (C, sC) c = Gemm <transB: int = 1> (d, w, b)",
        "2,8",
        "0.1",
        "QGemm",
    ),
    "matmul": (MATMUL + "c = MatMul (d, w)", "2,3,8", "0.1", "QLinearMatMul"),
    "matmul of activations": (SECOND + "c = MatMul (d, b)", "2,3,3", "0.1", "QLinearMatMul"),
    "add": (SECOND + "c = Add (d, b)", "2,4,3,3", "0.04", "QLinearAdd"),
    "mul": (SECOND + "c = Mul (d, b)", "2,4,3,3", "0.1", "QLinearMul"),
    "concat": (SECOND + "c = Concat <axis: int = 1> (d, b)", "2,4,3,3", "0.1", "QLinearConcat"),
    "average pool": (
        "c = AveragePool <kernel_shape: ints = [2, 2], pads: ints = [1,1,0,0]> (d)",
        "2,4,6,6",
        "0.03",
        "QLinearAveragePool",
    ),
    "average pool 1-D": (
        "c = AveragePool <kernel_shape: ints = [3]> (d)",
        "2,4,6",
        "0.03",
        "QLinearAveragePool",
    ),
    "global average pool": (
        "c = GlobalAveragePool (d)",
        "2,4,6,6",
        "0.02",
        "QLinearGlobalAveragePool",
    ),
    "sigmoid": ("c = Sigmoid (d)", "2,4,6", "0.01", "QLinearSigmoid"),
    "leaky relu": ("c = LeakyRelu <alpha: float = 0.2> (d)", "2,4,6", "0.04", "QLinearLeakyRelu"),
}  # fmt: skip


def test_every_form_is_tried() -> None:
    made = {op for *_, op in INTEGER.values()}
    assert {form.op for form in FORMS.values()} <= made


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("case", INTEGER)
@exact_sums
def test_operators_of_integers(case: str, kind: str) -> None:
    body, shape, out, op = INTEGER[case]
    model, done = convert(between(body, shape, kind, out), sample(shape), float(out))
    assert op in ops(model)
    assert not done.skips
    assert ops(model)[0] == "QuantizeLinear"
    assert ops(model)[-1] == "DequantizeLinear"
    assert ops(model).count("DequantizeLinear") == 1
    assert all("DequantizeLinear" not in node.op for node in model.graph.nodes[:-1])


SAME = {
    "MaxPool": "c = MaxPool <kernel_shape: ints = [2, 2], pads: ints = [1,1,0,0]> (d)",
    "Reshape": "c = Reshape (d, shape)",
    "Transpose": "c = Transpose <perm: ints = [0, 2, 3, 1]> (d)",
    "Flatten": "c = Flatten (d)",
    "Squeeze": "c = Squeeze (d)",
    "Unsqueeze": "c = Unsqueeze (d, start)",
    "Slice": "c = Slice (d, start, end, last)",
    "Split": "c, k = Split <axis: int = 1> (d) v = QuantizeLinear (k, s, z)",
    "Expand": "c = Expand (d, wide)",
    "Tile": "c = Tile (d, repeats)",
    "DepthToSpace": "c = DepthToSpace <blocksize: int = 2> (d)",
    "Resize": "c = Resize <mode: string = \"nearest\"> (d, , scales)",
    "Pad": "c = Pad (d, pads)",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("op", SAME)
def test_operators_that_move_values_move_integers(op: str, kind: str) -> None:
    shape = "2,4,6,6"
    proto = between(SAME[op].replace("last)", "start)"), shape, kind)
    model, done = convert(proto, sample(shape))
    assert [change.node for change in done.changes]
    assert ops(model)[0] == "QuantizeLinear"
    assert ops(model)[1] == op
    assert ops(model)[-1] == "DequantizeLinear"


ACTIVATIONS = {
    "relu below the range": ("r = Relu (k)", "uint8", 0, True),
    "relu inside the range": ("r = Relu (k)", "uint8", 100, False),
    "relu of int8": ("r = Relu (k)", "int8", 0, False),
    "relu6 above the range": ("r = Clip (k, zero, six)", "uint8", 0, True),
    "relu6 inside the range": ("r = Clip (k, zero, half)", "uint8", 0, False),
    "two in a row": ("a = Clip (k, n, six) r = Clip (a, zero, )", "uint8", 0, True),
    "lower bound alone": ("r = Clip (k, n)", "int8", 10, False),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
@exact_sums
def test_activations_are_absorbed_or_clip_integers(case: str) -> None:
    text, kind, zero, is_absorbed = ACTIVATIONS[case]
    text = text.replace("r = ", "c = ").replace(", )", ")")
    body = CONV + "k = Conv (d, w)" + text
    proto = between(body, "2,4,6,6", kind, "0.02", u=np.array(zero, kind))
    model, _ = convert(proto, sample("2,4,6,6"), 0.02)
    expected = [
        "QuantizeLinear",
        "QLinearConv",
        *([] if is_absorbed else ["Clip"]),
        "DequantizeLinear",
    ]
    assert ops(model) == expected


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (
            GEMM
            + "b = DequantizeLinear <axis: int = 0> (C, sC) y = Gemm <transB: int = 1> (d, w, b)",
            "QGemm",
        ),
        (MATMUL + "y = MatMul (d, w)", "MatMulIntegerToFloat"),
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_a_float_output_needs_no_scale(body: str, op: str, kind: str) -> None:
    names = ("G", "s5", "z5", "C", "sC") if op == "QGemm" else ("M", "s5", "z5")
    zero = np.array(3, kind)
    proto = bind(
        f"""g (float[2,8] x) => (float[2,5] y) {{
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            {body} }}""",
        s=STEP,
        z=zero,
        **{name: WEIGHTS[name] for name in names},
    )
    model, done = convert(proto, sample("2,8"), 1e-4)
    assert ops(model) == ["QuantizeLinear", op]
    assert not done.skips


REFUSED = {
    "other scale": ("c = Flatten (d)", "another scale"),
    "no kernel": (
        "k = DequantizeLinear (V, half, z0) c = ConvTranspose (d, k)",
        "no ConvTranspose of integers",
    ),
    "bias of float": (CONV + "c = Conv (d, w, bias)", "bias is not int32"),
    "bias of another scale": (
        CONV + "b = DequantizeLinear <axis: int = 0> (B, s6) c = Conv (d, w, b)",
        "another scale than its products",
    ),
    "axis": (
        "w = DequantizeLinear <axis: int = 1> (W, s4, z4) c = Conv (d, w)",
        "along another axis",
    ),
    "read twice": (CONV + "c = Conv (d, w) k = Neg (c)", "read in float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_stays_with_a_reason(case: str) -> None:
    body, words = REFUSED[case]
    more = {
        "V": np.ones((4, 6, 1, 1), np.int8),
        "z0": np.int8(0),
        "bias": normal(6),
        "s4": WEIGHTS["s6"][:4],
        "z4": np.zeros(4, np.int8),
    }
    proto = between(body, "2,4,6,6", "uint8", "0.1", **more)
    if "k = Neg" in body:
        proto.graph.output.append(onnx.helper.make_tensor_value_info("k", 1, [2, 6, 4, 4]))
    model = load(proto)
    before = to_bytes(model)
    results = ToQOperator().apply(model.graph, context(model))
    assert words in reasons(results)
    assert not any(isinstance(result, Change) for result in results)
    assert to_bytes(model) == before


def test_an_excluded_node_stays() -> None:
    proto = between(CONV + "c = Conv (d, w)", "2,4,6,6", "uint8", "0.1")
    model = load(proto)
    name = next(node.name for node in model.graph.nodes if node.op == "Conv")
    results = ToQOperator().apply(model.graph, context(model, exclude=(name,)))
    assert reasons(results) == "excluded"
    assert "QLinearConv" not in ops(model)


@exact_sums
def test_sizes_are_read_of_integers() -> None:
    """A Shape behind a DQ would keep it alive, and the whole tensor with it."""
    proto = between(CONV + "c = Conv (d, w)", "2,4,6,6", "uint8", "0.1")
    proto.graph.node.append(onnx.helper.make_node("Shape", ["d"], ["size"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("size", 7, [4]))
    model, _ = convert(proto, sample("2,4,6,6"), 0.1)
    assert sorted(ops(model)) == ["DequantizeLinear", "QLinearConv", "QuantizeLinear", "Shape"]


def test_other_domains_and_16_bits_are_left_alone() -> None:
    proto = between("c = Flatten (d)", "2,4,6,6", "uint8")
    for tensor in proto.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.uint16(7), "z"))
    proto.opset_import[0].version = 21
    model = load(proto)
    results = ToQOperator().apply(model.graph, context(model))
    assert "uint16, and kernels take 8 bits" in reasons(results)


def test_a_network_keeps_its_outputs_and_its_coverage() -> None:
    """Made by Quantize: the same integer kernels, and the same outputs where they are fused."""
    proto = bind(
        """g (float[N,3,16,16] x, float[8,3,3,3] W, float[8] B, float[8,1,3,3] D, float[8,8,1,1] P,
             float[8] Q, float[8,5] M, float z, float s) => (float[N,5] y) {
            c = Conv <pads: ints = [1,1,1,1]> (x, W, B)
            a = Clip (c, z, s)
            d = Conv <pads: ints = [1,1,1,1], group: int = 8> (a, D, Q)
            r = Relu (d)
            e = Conv (r, P, Q)
            f = Add (e, a)
            m = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (f)
            k = Concat <axis: int = 1> (m, m)
            h, i = Split <axis: int = 1> (k)
            o = Conv (h, P, B)
            p = GlobalAveragePool (o)
            t = Flatten (p)
            y = MatMul (t, M) }""",
        W=normal(8, 3, 3, 3) / 3,
        B=normal(8),
        D=normal(8, 1, 3, 3) / 2,
        P=normal(8, 8, 1, 1) / 2,
        Q=normal(8, seed=2),
        M=normal(8, 5),
        z=np.float32(0),
        s=np.float32(6),
    )
    x = normal(16, 3, 16, 16)
    found = {}
    for form in ("qdq", "qoperator"):
        data = open_data({"x": x}, (InputSpec("x", np.dtype(np.float32), ("N", 3, 16, 16)),))
        settings = QuantizeSettings(format=form, ranges="minmax")  # type: ignore[arg-type]
        plan = Plan(QUANTIZE, settings, choose("x86-vnni"))
        found[form] = compress_model(plan, load(proto), Calibration(data), data)
    before, after = found["qdq"], found["qoperator"]
    assert (after.coverage.integer, after.coverage.total) == (5, 5)
    assert before.coverage.integer == after.coverage.integer
    expected, computed = (run(session(to_bytes(f.model)), {"x": x})["y"] for f in (before, after))
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-5)
    plain = run(session(to_bytes(after.model), Runtime(level="none")), {"x": x})["y"]
    np.testing.assert_allclose(plain, computed, rtol=0, atol=0.02 * np.abs(computed).max())
    left = [node.op for node in after.model.graph.nodes if node.op.endswith("quantizeLinear")]
    assert len(left) <= 1


PEERS = [
    "resnet20/ort_u8_minmax", "resnet20/inc", "squeezenet/ort_u8_minmax", "mobilenetv2/inc"
]  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_files_of_other_tools(shared: Path, peer: str) -> None:
    """Q/DQ files that others made: equal outputs where kernels are fused, and equal coverage."""
    model = load(shared / "peers" / f"{peer}.onnx")
    port = model.graph.inputs[0]
    sizes = [size if isinstance(size, int) else 1 for size in port.shape]
    before, feed = to_bytes(model), {port.name: normal(*sizes)}
    done = apply_pass(model, ToQOperator(), Context(opset(model.graph), Target("any")), feed)
    assert done.changes
    assert not done.problems
    after = to_bytes(model)
    assert coverage(after).integer == coverage(before).integer
    outputs = [run(session(data), feed) for data in (before, after)]
    for name, expected in outputs[0].items():
        np.testing.assert_allclose(outputs[1][name], expected, rtol=0, atol=1e-5)
