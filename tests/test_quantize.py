"""Q/DQ pairs: where they go, what ONNX Runtime makes of them, and how exact the result is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from quantizing import BORDERS, Feed, apply, dataset, decibels, inside, kernels
from texts import bind, changed, exact_sums, normal, ops, outputs, reasons

from onnxc.check import coverage
from onnxc.core import Context, Skip
from onnxc.graph import Model, load, opset, to_bytes, to_proto, values
from onnxc.ops import knowledge
from onnxc.pipeline import Calibration, compress, prepare
from onnxc.targets import choose
from passes.drop_identity import DropIdentity
from passes.quantize import Quantize

BOUND = 25.0  # dB that one or two layers of random weights keep in 8 bits
IMAGE = {"x": normal(8, 1, 4, 8, 8)}
EXACT = ("minmax", "percentile", "mse", "output")  # ranges that cut little off


def integers(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def scalar(number: float) -> NDArray[np.float32]:
    return np.array(number, np.float32)


@dataclass(frozen=True)
class Between:
    """Operators from c, made by a convolution, to d, read by another one, and their kernels."""

    nodes: str
    kernels: list[str]
    declared: str = ""
    weights: dict[str, Any] = field(default_factory=dict)
    second: tuple[int, ...] = (4, 4, 1, 1)

    @property
    def model(self) -> onnx.ModelProto:
        shape = ",".join(map(str, self.second))
        given = f", {self.declared}" if self.declared else ""
        text = f"""g (float[1,4,8,8] x, float[4,4,3,3] W, float[{shape}] V{given})
            => (float[A,B,C,D] y) {{ c = Conv (x, W) {self.nodes} y = Conv (d, V) }}"""
        weights = {"W": normal(4, 4, 3, 3), "V": normal(*self.second), **self.weights}
        return bind(text, opset=17, **weights)


OTHER = "float[4,4,3,3] U"
TWO = {"U": normal(4, 4, 3, 3, seed=3)}
SIZES = "float[4] s"
DOUBLE = {"s": np.array([1, 1, 2, 2], np.float32)}
BOUNDS = "float l, float h"

BETWEEN = {
    "relu": Between("d = Relu (c)", []),
    "clip": Between("d = Clip (c, l, h)", [], BOUNDS, {"l": scalar(0), "h": scalar(2)}),
    "relu, then clip": Between(
        "r = Relu (c) d = Clip (r, l, h)", [], BOUNDS, {"l": scalar(0), "h": scalar(2)}
    ),
    "add": Between("e = Conv (x, U) d = Add (c, e)", ["QLinearConv", "QLinearAdd"], OTHER, TWO),
    "add, then relu": Between(
        "e = Conv (x, U) a = Add (c, e) d = Relu (a)", ["QLinearConv", "QLinearAdd"], OTHER, TWO
    ),
    "added to itself": Between("d = Add (c, c)", ["QLinearAdd"]),
    "mul": Between("e = Conv (x, U) d = Mul (c, e)", ["QLinearConv", "QLinearMul"], OTHER, TWO),
    "swish": Between("s = Sigmoid (c) d = Mul (c, s)", ["QLinearSigmoid", "QLinearMul"]),
    "concat": Between(
        "e = Conv (x, U) d = Concat <axis = 1> (c, e)",
        ["QLinearConv", "QLinearConcat"],
        OTHER,
        TWO,
        second=(4, 8, 1, 1),
    ),
    "leaky relu": Between("d = LeakyRelu <alpha = 0.2> (c)", ["QLinearLeakyRelu"]),
    "max pool": Between("d = MaxPool <kernel_shape = [2, 2]> (c)", ["MaxPool"]),
    "relu, then max pool": Between(
        "r = Relu (c) d = MaxPool <kernel_shape = [2, 2]> (r)", ["MaxPool"]
    ),
    "average pool": Between(
        "d = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)", ["QLinearAveragePool"]
    ),
    "global average pool": Between("d = GlobalAveragePool (c)", ["QLinearGlobalAveragePool"]),
    "resize, nearest": Between('d = Resize <mode = "nearest"> (c, , s)', ["Resize"], SIZES, DOUBLE),
    "reshape": Between(
        "d = Reshape (c, t)", ["Reshape"], "int64[4] t", {"t": integers(1, 4, 4, 9)}
    ),
    "transpose": Between("d = Transpose <perm = [0, 1, 3, 2]> (c)", ["Transpose"]),
    "squeeze and unsqueeze": Between(
        "s = Squeeze (c, a) d = Unsqueeze (s, a)",
        ["Squeeze", "Unsqueeze"],
        "int64[1] a",
        {"a": integers(0)},
    ),
    "slice": Between(
        "d = Slice (c, a, b, e)",
        ["Slice"],
        "int64[1] a, int64[1] b, int64[1] e",
        {"a": integers(1), "b": integers(4), "e": integers(2)},
    ),
    "expand": Between("d = Expand (c, t)", ["Expand"], "int64[4] t", {"t": integers(2, 4, 6, 6)}),
    "tile": Between("d = Tile (c, t)", ["Tile"], "int64[4] t", {"t": integers(1, 1, 2, 1)}),
    "depth to space": Between(
        "d = DepthToSpace <blocksize = 2> (c)", ["DepthToSpace"], second=(4, 1, 1, 1)
    ),
    "shuffled by a gather": Between(
        "d = Gather <axis = 1> (c, t)", ["Gather"], "int64[4] t", {"t": integers(2, 0, 3, 1)}
    ),
    "softmax": Between("d = Softmax <axis = 1> (c)", ["QLinearSoftmax"]),
    "split": Between(
        "a, b = Split <axis = 1> (c) d = Concat <axis = 1> (b, a)", ["Split", "QLinearConcat"]
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
@exact_sums
def test_what_lies_between_computes_in_integers(name: str) -> None:
    case = BETWEEN[name]
    model, step = apply(case.model, Quantize(), IMAGE)
    assert inside(model) == ["QLinearConv", *case.kernels, "QLinearConv"]
    assert sum(op in BORDERS for op in kernels(model)) == 2
    assert decibels(case.model, model, IMAGE) > BOUND
    assert {n.name for n in model.graph.nodes if n.op == "Conv"} <= set(changed(list(step.changes)))


FLOATS = {
    "resize, linear": Between('d = Resize <mode = "linear"> (c, , s)', ["Resize"], SIZES, DOUBLE),
    "clip below zero": Between(
        "d = Clip (c, l, h)", ["Clip"], BOUNDS, {"l": scalar(-1), "h": scalar(1)}
    ),
    "clip above zero": Between(
        "d = Clip (c, l, h)", ["Clip"], BOUNDS, {"l": scalar(0.5), "h": scalar(1)}
    ),
    "an unknown operator": Between("d = Tanh (c)", ["Tanh"]),
    "a constant summand": Between(
        "d = Add (c, k)", ["Add"], "float[4,1,1] k", {"k": normal(4, 1, 1)}
    ),
    "max pool with places": Between(
        "d, i = MaxPool <kernel_shape = [2, 2]> (c) j = Cast <to = 1> (i) z = ReduceMax (j)",
        ["MaxPool", "Cast", "ReduceMax"],
    ),
}


@pytest.mark.parametrize("name", FLOATS)
def test_what_has_no_kernel_stays_float_between_integer_convolutions(name: str) -> None:
    proto = FLOATS[name].model
    if "z = " in FLOATS[name].nodes:
        proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
        proto.graph.output[-1].type.tensor_type.shape.SetInParent()
        for _ in range(4):
            proto.graph.output[-1].type.tensor_type.shape.dim.add().dim_value = 1
    model, _ = apply(proto, Quantize(), IMAGE)
    found = coverage(model)
    assert (found.integer, found.total) == (2, 2)
    assert set(FLOATS[name].kernels) <= set(inside(model))
    assert sum(op in BORDERS for op in kernels(model)) >= 4
    assert decibels(proto, model, IMAGE) > BOUND - 5


JOINED = """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] U, float[4,8,1,1] V%s)
    => (float[1,4,6,6] y%s) {
    a = Conv (x, W)
    b = Conv (x, U)
    %s
    k = Concat <axis = 1> (c, d)
    y = Conv (k, V) %s }"""


def joined(nodes: str, declared: str = "", port: str = "", more: str = "") -> onnx.ModelProto:
    weights = {
        "W": normal(4, 4, 3, 3),
        "U": 5 * normal(4, 4, 3, 3, seed=3),
        "V": normal(4, 8, 1, 1),
    }
    limits = {"l": 0, "h": 2, "m": 6}
    weights |= {name: scalar(limit) for name, limit in limits.items() if f" {name}" in declared}
    return bind(JOINED % (declared, port, nodes, more), opset=17, **weights)


@pytest.mark.parametrize(
    ("proto", "scales"),
    [
        (joined("c = Relu (a) d = Relu (b)"), 1),
        (joined("c = Identity (a) d = Identity (b)"), 1),
        (joined("c = Relu (a) d = Identity (b)"), 2),
        (
            joined("c = Clip (a, l, h) d = Clip (b, l, m)", ", float l, float h, float m"),
            2,
        ),
        (
            joined("c = Relu (a) d = Relu (b)", "", ", float[1,4,6,6] z", "z = Neg (c)"),
            2,
        ),
    ],
    ids=["relu", "signed", "mixed", "bounds", "read elsewhere"],
)
@exact_sums
def test_tensors_that_a_concat_alone_reads_share_its_scale(
    proto: onnx.ModelProto, scales: int
) -> None:
    """A clamped tensor only beside others with its bounds: its kernel must absorb the clamp."""
    model = load(proto)
    feed = dict(IMAGE)
    first = {name: array[0] for name, array in feed.items()}
    (step,) = prepare(model, first, [DropIdentity()])
    assert not step.problems
    model, _ = apply(model, Quantize(), feed)
    found = coverage(model)
    assert (found.integer, found.total) == (3, 3)
    pairs = [node for node in model.graph.nodes if node.op == "QuantizeLinear"]
    around = [n for n in pairs if n.outputs[0].name not in ("x_quantized", "y_quantized")]
    assert len({float(values(n.inputs[1])) for n in around}) == scales
    assert decibels(proto, model, feed) > BOUND


CONVOLUTIONS = {
    "grouped": ("float[1,4,8,8] x, float[6,2,3,3] W", (6, 2, 3, 3), {"group": 2}, (4, 8, 8)),
    "depthwise": ("float[1,4,8,8] x, float[8,1,3,3] W", (8, 1, 3, 3), {"group": 4}, (4, 8, 8)),
    "1-D": ("float[1,4,16] x, float[6,4,3] W", (6, 4, 3), {"pads": [1, 1]}, (4, 16)),
    "3-D": ("float[1,2,5,6,7] x, float[4,2,3,3,3] W", (4, 2, 3, 3, 3), {}, (2, 5, 6, 7)),
    "strided": ("float[1,4,9,9] x, float[6,4,3,3] W", (6, 4, 3, 3), {"strides": [2, 2]}, (4, 9, 9)),
    "dilated": (
        "float[1,4,9,9] x, float[6,4,3,3] W",
        (6, 4, 3, 3),
        {"dilations": [2, 2]},
        (4, 9, 9),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
@exact_sums
def test_convolutions(name: str, bias: bool) -> None:
    ports, weight, attributes, sample = CONVOLUTIONS[name]
    text = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    free = ",".join("ABCDE"[: len(weight)])
    extra = f", float[{weight[0]}] B" if bias else ""
    proto = bind(
        f"""g ({ports}{extra}) => (float[{free}] y) {{
            c = Conv <{text}> (x, W{", B" if bias else ""}) y = Relu (c) }}""".replace("<>", ""),
        opset=17,
        W=normal(*weight),
        **({"B": normal(weight[0])} if bias else {}),
    )
    feed = {"x": normal(8, 1, *sample)}
    model, _ = apply(proto, Quantize(), feed)
    assert inside(model) == ["QLinearConv"]
    assert decibels(proto, model, feed) > BOUND + 5


def gemm(attributes: str, weight: tuple[int, int], bias: str = "float[5] B") -> onnx.ModelProto:
    dims = tuple(int(d) for d in bias.split("[")[1].split("]")[0].split(","))
    return bind(
        f"""g (float[N,6] x, float[{weight[0]},{weight[1]}] W, {bias}) => (float[N,5] y) {{
            y = Gemm <{attributes}> (x, W, B) }}""".replace("<>", ""),
        W=normal(*weight),
        B=normal(*dims),
    )


ROWS = {"x": normal(16, 6)}


@pytest.mark.parametrize("attributes", ["", "transB = 1", "alpha = 1.0, beta = 1.0"])
def test_gemm(attributes: str) -> None:
    proto = gemm(attributes, (5, 6) if "transB" in attributes else (6, 5))
    model, _ = apply(proto, Quantize(), ROWS)
    assert inside(model) == ["QGemm"]
    assert decibels(proto, model, ROWS) > BOUND + 5


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (gemm("alpha = 0.5", (6, 5)), "alpha or beta is not 1"),
        (gemm("beta = 2.0", (6, 5)), "alpha or beta is not 1"),
        (gemm("", (6, 5), "float[1,1] B"), "its bias has another shape than the channels"),
    ],
)
def test_gemm_that_no_kernel_computes(proto: onnx.ModelProto, reason: str) -> None:
    model, step = apply(proto, Quantize(), ROWS)
    assert [skip.reason for skip in step.skips] == [reason]
    assert ops(model) == ["Gemm"]


def test_a_bias_for_each_row_is_not_taken_for_one_of_channels() -> None:
    """As many rows as channels: its size is that of a bias, its shape is not."""
    proto = bind(
        """g (float[5,6] x, float[6,5] W, float[5,1] B) => (float[5,5] y) {
            y = Gemm (x, W, B) }""",
        W=normal(6, 5),
        B=normal(5, 1),
    )
    model, step = apply(proto, Quantize(), {"x": normal(10, 6)})
    assert [skip.reason for skip in step.skips] == ["its bias has another shape than the channels"]
    assert ops(model) == ["Gemm"]


def test_gemm_with_a_transposed_input_stays_float() -> None:
    proto = bind(
        """g (float[6,8] x, float[6,5] W) => (float[8,5] y) { y = Gemm <transA = 1> (x, W) }""",
        W=normal(6, 5),
    )
    _, step = apply(proto, Quantize(), {"x": normal(4, 6, 8)})
    assert "its input is transposed" in reasons(list(step.skips))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
@exact_sums
def test_matmul_returns_float(shape: tuple[int, ...]) -> None:
    free = ",".join("ABC"[: len(shape) - 1])
    proto = bind(
        f"g (float[{free},6] x, float[6,5] W) => (float[{free},5] y) {{ y = MatMul (x, W) }}",
        W=normal(6, 5),
    )
    feed = {"x": normal(4, *shape)}
    model, _ = apply(proto, Quantize(), feed)
    assert inside(model) == ["MatMulIntegerToFloat"]
    assert decibels(proto, model, feed) > BOUND + 5


@exact_sums
def test_the_bias_behind_a_batch_of_products_is_added_in_float() -> None:
    """ONNX Runtime would merge a vector and the product into a Gemm, and leave that float."""
    proto = bind(
        """g (float[2,3,6] x, float[6,5] W, float[5] B, float[5,4] V) => (float[2,3,4] y) {
            m = MatMul (x, W)
            a = Add (m, B)
            t = Tanh (a)
            y = MatMul (t, V) }""",
        W=normal(6, 5),
        B=normal(5),
        V=normal(5, 4),
    )
    feed = {"x": normal(8, 2, 3, 6)}
    model, _ = apply(proto, Quantize(), feed)
    assert inside(model) == ["MatMulIntegerToFloat", "Add", "Tanh", "MatMulIntegerToFloat"]
    assert decibels(proto, model, feed) > BOUND


def test_two_products_hand_on_integers() -> None:
    proto = bind(
        """g (float[N,6] x, float[6,5] W, float[5,4] V) => (float[N,4] y) {
            m = MatMul (x, W)
            r = Relu (m)
            y = MatMul (r, V) }""",
        W=normal(6, 5),
        V=normal(5, 4),
    )
    model, _ = apply(proto, Quantize(), ROWS)
    assert inside(model) == ["QLinearMatMul", "MatMulIntegerToFloat"]


def test_a_tensor_that_integer_and_float_nodes_read() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] V)
            => (float[1,4,4,4] y, float[1,4,6,6] z) {
            c = Conv (x, W)
            r = Relu (c)
            y = Conv (r, V)
            z = Exp (r) }""",
        W=normal(4, 4, 3, 3) / 8,
        V=normal(4, 4, 3, 3, seed=1),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert sorted(inside(model)) == ["Exp", "QLinearConv", "QLinearConv"]
    assert decibels(proto, model, IMAGE) > BOUND


def test_float_readers_of_a_float_tensor_read_it_unrounded() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W) => (float[1,4,6,6] y, float[1,4,8,8] z) {
            t = Tanh (x)
            y = Conv (t, W)
            z = Neg (t) }""",
        W=normal(4, 4, 3, 3),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    feed = {"x": IMAGE["x"][0]}
    np.testing.assert_array_equal(outputs(model, feed)["z"], outputs(proto, feed)["z"])


def test_a_convolution_whose_output_is_a_graph_output_too() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] V)
            => (float[1,4,6,6] c, float[1,4,4,4] y) {
            c = Conv (x, W)
            y = Conv (c, V) }""",
        W=normal(4, 4, 3, 3),
        V=normal(4, 4, 3, 3, seed=1),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert [t.name for t in model.graph.outputs] == ["c", "y"]
    assert inside(model) == ["QLinearConv", "QLinearConv"]
    assert decibels(proto, model, IMAGE) > BOUND


def test_an_activation_behind_a_graph_output_is_not_absorbed() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] V)
            => (float[1,4,6,6] c, float[1,4,4,4] y) {
            c = Conv (x, W)
            r = Relu (c)
            y = Conv (r, V) }""",
        W=normal(4, 4, 3, 3),
        V=normal(4, 4, 3, 3, seed=1),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert coverage(model).integer == 2
    assert decibels(proto, model, IMAGE) > BOUND
    assert outputs(model, {"x": IMAGE["x"][0]})["c"].min() < 0


def test_a_graph_input_read_twice_gets_one_pair() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] V)
            => (float[1,4,6,6] y, float[1,4,6,6] z) {
            y = Conv (x, W)
            z = Conv (x, V) }""",
        W=normal(4, 4, 3, 3),
        V=normal(4, 4, 3, 3, seed=1),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert kernels(model).count("QuantizeLinear") == 1
    assert inside(model) == ["QLinearConv", "QLinearConv"]


@exact_sums
def test_shared_weights_keep_one_copy_where_their_scales_agree() -> None:
    text = """g (float[1,4,8,8] x, float[1,4,8,8] z, float[4,4,3,3] W, float[4] B)
        => (float[1,4,6,6] y, float[1,4,6,6] u) {
        s = Tanh (z)
        y = Conv (x, W%s)
        u = Conv (s, W%s) }"""
    feed = {"x": 30 * normal(8, 1, 4, 8, 8), "z": normal(8, 1, 4, 8, 8, seed=1)}
    weights = {"W": normal(4, 4, 3, 3), "B": normal(4)}
    proto = bind(text % ("", ""), **weights)
    model, _ = apply(proto, Quantize(), feed)
    assert sum(w.dtype == np.int8 and w.shape == (4, 4, 3, 3) for w in _constants(model)) == 1
    assert decibels(proto, model, feed) > BOUND
    weights["B"] = np.array([1e9, 0, 1, 2], np.float32)  # its guard depends on the input's scale
    apart = bind(text % (", B", ", B"), **weights)
    model, _ = apply(apart, Quantize(), feed)
    assert sum(w.dtype == np.int8 and w.shape == (4, 4, 3, 3) for w in _constants(model)) == 2


def _constants(model: Model) -> list[NDArray[Any]]:
    return [onnx.numpy_helper.to_array(t) for t in to_proto(model).graph.initializer]


def test_a_convolution_that_reads_what_a_body_captures() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, bool b, float[4,4,3,3] W, float[4,4,3,3] V)
            => (float[1,4,4,4] y, float[1,4,6,6] z) {
            c = Conv (x, W)
            r = Relu (c)
            y = Conv (r, V)
            z = If (b) <then_branch = p () => (float[1,4,6,6] u) { u = Neg (r) },
                        else_branch = q () => (float[1,4,6,6] v) { v = Identity (c) }> }""",
        opset=17,
        W=normal(4, 4, 3, 3),
        V=normal(4, 4, 3, 3, seed=1),
    )
    for flag in (True, False):
        feed: Feed = {**IMAGE, "b": np.full(8, flag)}
        model, _ = apply(proto, Quantize(), feed)
        assert coverage(model).integer == 2
        assert decibels(proto, model, feed) > BOUND


def test_dead_zero_and_denormal_channels() -> None:
    weight = normal(6, 4, 3, 3)
    weight[0], weight[1], weight[2] = 0, 1e-42, 1e-30
    proto = bind(
        """g (float[1,4,8,8] x, float[6,4,3,3] W, float[6] B) => (float[1,6,6,6] y) {
            y = Conv (x, W, B) }""",
        W=weight,
        B=np.array([0.5, -0.25, 1, 0, 2, 3], np.float32),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert decibels(proto, model, IMAGE) > BOUND
    found = outputs(model, {"x": IMAGE["x"][0]})["y"][0]
    expected = np.array([0.5, -0.25, 1])
    np.testing.assert_allclose(
        found[:3], np.broadcast_to(expected[:, None, None], (3, 6, 6)), atol=0.2
    )


def test_weights_of_zeros() -> None:
    proto = bind(
        "g (float[1,4,8,8] x, float[4,4,3,3] W) => (float[1,4,6,6] y) { y = Conv (x, W) }",
        W=np.zeros((4, 4, 3, 3), np.float32),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert not outputs(model, {"x": IMAGE["x"][0]})["y"].any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e25])
def test_tiny_and_huge_inputs(magnitude: float) -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4] B) => (float[1,4,6,6] y) {
            y = Conv (x, W, B) }""",
        W=normal(4, 4, 3, 3),
        B=(magnitude * normal(4)).astype(np.float32),
    )
    feed = {"x": (magnitude * normal(8, 1, 4, 8, 8)).astype(np.float32)}
    model, _ = apply(proto, Quantize(), feed)
    assert decibels(proto, model, feed) > BOUND


def test_an_input_that_is_always_zero() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4] B) => (float[1,4,6,6] y) {
            y = Conv (x, W, B) }""",
        W=normal(4, 4, 3, 3),
        B=normal(4),
    )
    feed = {"x": np.zeros((8, 1, 4, 8, 8), np.float32)}
    model, _ = apply(proto, Quantize(), feed)
    assert decibels(proto, model, feed) > BOUND


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("target", ["x86-vnni", "tensorrt"])
def test_a_bias_far_above_its_weights_does_not_overflow(size: float, target: str) -> None:
    """At scale s_x s_w such a bias needs more than 32 bits: the guard raises s_w."""
    weight = normal(4, 4, 3, 3)
    weight[0] *= 1e-6
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4] B) => (float[1,4,6,6] y) {
            y = Conv (x, W, B) }""",
        W=weight,
        B=np.array([size, -size, 1, -1], np.float32),
    )
    model, _ = apply(proto, Quantize(), IMAGE, target)
    feed = {"x": IMAGE["x"][0]}
    made, expected = outputs(model, feed)["y"][0], outputs(proto, feed)["y"][0]
    limit = 0.02 * size + 0.5
    np.testing.assert_allclose(made, expected, rtol=0, atol=limit)


def test_values_that_are_not_finite_keep_their_nodes_float() -> None:
    """The first convolution overflows to infinity, of which the sigmoid makes 1."""
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4,4,3,3] V) => (float[1,4,4,4] y) {
            c = Conv (x, W)
            s = Sigmoid (c)
            y = Conv (s, V) }""",
        W=np.full((4, 4, 3, 3), 3e38, np.float32),
        V=normal(4, 4, 3, 3),
    )
    model, step = apply(proto, Quantize(), {"x": np.abs(IMAGE["x"]) + 1})
    assert "the range of c is not known" in reasons(list(step.skips))
    assert inside(model) == ["FusedConv", "QLinearConv"]


def test_nothing_to_do() -> None:
    empty = bind("g (float[N,4] x) => (float[N,4] y) { y = Tanh (x) }")
    model, step = apply(empty, Quantize(), {"x": normal(4, 4)})
    assert not step.changes
    assert to_bytes(model) == to_bytes(load(empty))
    single = bind("g (float x) => (float y) { y = Exp (x) }")
    assert not apply(single, Quantize(), {"x": normal(4)})[1].changes


def test_scalars_beside_convolutions() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float k) => (float[1,4,6,6] y) {
            m = Mul (x, k)
            c = Conv (m, W)
            y = Mul (c, k) }""",
        W=normal(4, 4, 3, 3),
        k=scalar(0.5),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert inside(model) == ["Mul", "QLinearConv", "Mul"]


def residual() -> onnx.ModelProto:
    return bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4] B, float[4,4,3,3] V, float[4,5] F,
            float[5] G) => (float[1,5] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W, B)
            r = Relu (c)
            d = Conv <pads = [1, 1, 1, 1]> (r, V)
            a = Add (r, d)
            s = Relu (a)
            p = GlobalAveragePool (s)
            f = Flatten (p)
            y = Gemm (f, F, G) }""",
        W=normal(4, 4, 3, 3),
        B=normal(4),
        V=normal(4, 4, 3, 3, seed=1),
        F=normal(4, 5),
        G=normal(5),
    )


@pytest.mark.parametrize(
    "ranges", ["minmax", "percentile", "entropy", "mse", "aciq", "hwgq", "output"]
)
@exact_sums
def test_a_residual_network(ranges: Any) -> None:
    model, _ = apply(residual(), Quantize(ranges=ranges), IMAGE)
    assert inside(model) == [
        *("QLinearConv", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool"),
        *("Flatten", "QGemm"),
    ]
    assert decibels(residual(), model, IMAGE) > (BOUND - 5 if ranges in EXACT else 12)


def test_ranges_of_outputs_look_at_the_layers_that_read_a_tensor() -> None:
    strength = np.float32(2.0 ** np.arange(-4, 4)).reshape(1, 8, 1, 1)
    proto = bind(
        """g (float[N,8,6,6] x, float[4,8,3,3] W) => (float[N,4,4,4] y) { y = Conv (x, W) }""",
        W=normal(4, 8, 3, 3) / strength**2,
    )
    feed = {"x": np.abs(normal(40, 8, 6, 6)) * strength}
    made = {rule: apply(proto, Quantize(ranges=rule), feed)[0] for rule in ("mse", "output")}  # type: ignore[arg-type]
    highs = [
        float(values(node.inputs[1])) * 255
        for model in made.values()
        for node in model.graph.nodes
        if node.op == "QuantizeLinear" and node.inputs[0].name == "x"
    ]
    assert highs[1] < 0.8 * highs[0]
    assert decibels(proto, made["output"], feed) > decibels(proto, made["mse"], feed) + 1


@exact_sums
def test_targets() -> None:
    zero_points: dict[str, set[int]] = {}
    for target in ("x86-vnni", "x86", "tensorrt"):
        model, _ = apply(residual(), Quantize(), IMAGE, target)
        constants = {
            t.name: values(t) for n in model.graph.nodes for t in n.inputs if hasattr(t, "values")
        }
        kinds = {
            a.dtype.name
            for k, a in constants.items()
            if k.endswith(("x_zero_point", "s_zero_point"))
        }
        assert kinds == {"int8" if target == "tensorrt" else "uint8"}
        weights = [a for k, a in constants.items() if a.dtype == np.int8 and a.ndim == 4]
        assert max(np.abs(w).max() for w in weights) == (63 if target == "x86" else 127)
        zero_points[target] = {int(a.max()) for k, a in constants.items() if k == "x_zero_point"}
        assert decibels(residual(), model, IMAGE) > BOUND - 10
    assert zero_points["tensorrt"] == {0}
    assert 100 < min(zero_points["x86-vnni"]) < 156


def test_per_tensor_scales_for_a_target_that_has_no_others() -> None:
    model = load(residual())
    context = Context(opset(model.graph), replace(choose("x86-vnni"), per_channel=False))
    data = dataset(model, IMAGE)
    (step,) = compress(model, [Quantize()], context, Calibration(data), next(iter(data.batches(1))))
    assert not step.problems
    assert all(v.size == 1 for k, v in _scales(model).items())
    assert coverage(model).integer == 3


def _scales(model: Model) -> dict[str, NDArray[Any]]:
    nodes = (n for n in model.graph.nodes if n.op in BORDERS)
    return {n.inputs[1].name: values(n.inputs[1]) for n in nodes}


@pytest.mark.parametrize(("version", "sizes"), [(9, None), (11, {1}), (12, {1}), (13, {1, 4, 5})])
def test_old_operator_sets(version: int, sizes: set[int] | None) -> None:
    """No Q/DQ before opset 10, and none with a scale for each channel before opset 13."""
    proto = residual()
    proto.opset_import[0].version = version
    model, step = apply(proto, Quantize(), IMAGE)
    if sizes is None:
        assert f"need opset 10, and the model has {version}" in reasons(list(step.skips))
        assert not step.changes
        return
    assert {v.size for v in _scales(model).values()} == sizes
    assert decibels(residual(), model, IMAGE) > BOUND - 10


def test_names_are_unique_and_derive_from_the_old_ones() -> None:
    proto = residual()
    proto.graph.node[2].output[0] = proto.graph.node[3].input[1] = "r_quantized"  # taken
    model, _ = apply(proto, Quantize(), IMAGE)
    made = [name for node in to_proto(model).graph.node for name in node.output]
    names = [node.name for node in model.graph.nodes]
    assert len(set(made)) == len(made)
    assert len(set(names)) == len(names)
    assert "r_quantized_1" in made
    onnx.checker.check_model(to_proto(model), full_check=True)


def test_second_run_leaves_everything_alone() -> None:
    model, _ = apply(residual(), Quantize(), IMAGE)
    before = to_bytes(model)
    context = Context(opset(model.graph), choose("x86-vnni"))
    results = Quantize().apply(model.graph, context)
    assert all(isinstance(result, Skip) for result in results)
    assert len(results) == 3
    assert to_bytes(model) == before


def test_excluded_nodes_and_named_operators() -> None:
    model = load(residual())
    names = {n.op: n.name for n in model.graph.nodes}
    excluded, step = apply(model, Quantize(), IMAGE, exclude=(names["Gemm"],))
    assert Skip(names["Gemm"], "excluded") in step.skips
    assert inside(excluded)[-1] == "Gemm"
    _, step = apply(residual(), Quantize(ops=("Gemm",)), IMAGE)
    assert [c.node for c in step.changes if "weights" in c.what] == [names["Gemm"]]
    assert "Conv is not asked for" in reasons(list(step.skips))
    left, step = apply(residual(), Quantize(leave=(names["Gemm"],)), IMAGE)
    assert "cost more than its kernel gains" in reasons(list(step.skips))
    assert inside(left)[-1] == "Gemm"


def test_without_spread_only_heavy_nodes_compute_in_integers() -> None:
    model, step = apply(residual(), Quantize(spread=False), IMAGE)
    assert all("weights" in change.what for change in step.changes)
    assert {"Add", "GlobalAveragePool"} <= set(inside(model))


def test_every_heavy_node_is_in_a_change_or_a_skip() -> None:
    proto = residual()
    _, step = apply(proto, Quantize(), IMAGE)
    heavy = {n.name for n in load(proto).graph.nodes if knowledge(n).role == "weighted"}
    assert heavy <= {r.node for r in (*step.changes, *step.skips)}
    sizes = {c.node: (c.before, c.after) for c in step.changes if "weights" in c.what}
    assert sizes["Gemm_7"] == (4 * 5 * 4, 4 * 5 + 4 * 5)


def test_a_range_of_any_bound_absorbs_its_clip() -> None:
    """ONNX Runtime drops a Clip only where the integers end at or within its bounds."""
    for high in (0.1, 0.7, 1 / 3, 1.1, 6.0, 5.9):
        case = Between("d = Clip (c, l, h)", [], BOUNDS, {"l": scalar(0), "h": scalar(high)})
        for ranges in ("minmax", "mse"):
            model, _ = apply(case.model, Quantize(ranges=ranges), IMAGE)
            assert inside(model) == ["QLinearConv", "QLinearConv"], (high, ranges)


def test_recurrent_layers_stay_float_with_a_reason() -> None:
    proto = bind(
        """g (float[T,1,4] x, float[1,12,4] W, float[1,12,3] R) => (float[T,1,1,3] y) {
            y = LSTM <hidden_size = 3> (x, W, R) }""",
        W=normal(1, 12, 4),
        R=normal(1, 12, 3),
    )
    _, step = apply(proto, Quantize(), {"x": normal(8, 5, 1, 4)})
    assert "LSTM has no integer kernel between Q/DQ" in reasons(list(step.skips))


def test_reasons_of_weights() -> None:
    proto = bind(
        """g (float[N,4] x, float[4,4] z, float[4,4] W, float[2,4,4] S, float[4] B)
            => (float[N,4] y, float[N,4] u, float[2,N,4] v, float[N,4] w) {
            a = Tanh (W)
            y = MatMul (x, a)
            u = MatMul (x, z)
            v = MatMul (x, S)
            b = Tanh (B)
            w = Gemm (x, W, b) }""",
        W=normal(4, 4),
        S=normal(2, 4, 4),
        B=normal(4),
    )
    _, step = apply(proto, Quantize(), {"x": normal(4, 4), "z": normal(4, 4, 4)})
    found = [skip.reason for skip in step.skips]
    assert found == [
        "its weight is not a constant",
        "its weight is not a constant",
        "its weight has 3 axes; kernels take 2",
        "its bias is computed",
    ]


GOLDEN = """\
DequantizeLinear(W_quantized int8[4,4,3,3], W_scale float32[4], W_zero_point int8[4]) W_dequantized
DequantizeLinear(B_quantized int32[4], B_scale float32[4]) B_dequantized
QuantizeLinear(x, x_scale float32[], x_zero_point uint8[]) x_quantized
DequantizeLinear(x_quantized, x_scale float32[], x_zero_point uint8[]) x_dequantized
Conv(x_dequantized, W_dequantized, B_dequantized) c
Relu(c) r
QuantizeLinear(r, r_scale float32[], r_zero_point uint8[]) r_quantized
DequantizeLinear(r_quantized, r_scale float32[], r_zero_point uint8[]) r_dequantized
MaxPool(r_dequantized) y"""


def test_golden_text_of_a_small_graph() -> None:
    proto = bind(
        """g (float[1,4,8,8] x, float[4,4,3,3] W, float[4] B) => (float[1,4,5,5] y) {
            c = Conv (x, W, B)
            r = Relu (c)
            y = MaxPool <kernel_shape = [2, 2]> (r) }""",
        W=normal(4, 4, 3, 3),
        B=normal(4),
    )
    model, _ = apply(proto, Quantize(), IMAGE)
    assert text(model) == GOLDEN


def text(model: Model) -> str:
    """Nodes in order, constants by type and shape."""
    written = to_proto(model).graph
    known = {t.name: onnx.numpy_helper.to_array(t) for t in written.initializer}

    def shown(name: str) -> str:
        if name not in known:
            return name
        return f"{name} {known[name].dtype}[{','.join(map(str, known[name].shape))}]"

    return "\n".join(
        f"{n.op_type}({', '.join(map(shown, n.input))}) {', '.join(n.output)}" for n in written.node
    )
