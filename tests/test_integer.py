"""Which nodes compute in integers, on which grids and axes of scales, and the guard of biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantizing import apply
from texts import bind, normal, reasons

from onnxc.core import Context
from onnxc.graph import load, to_bytes, values
from onnxc.integer import (
    activation_grid,
    refusal,
    refused_nodes,
    round_weights,
    weight_axis,
    weight_grid,
    weighted_nodes,
)
from onnxc.numerics.affine import TINY, bias_guard, quantize, weight_scales
from onnxc.selectors import Selector
from onnxc.targets import TARGETS, choose
from passes.quantize import Quantize

VNNI = choose("x86-vnni")
EVERYTHING = replace(VNNI, static=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}))


def node_of(text: str, **weights: Any) -> Any:
    return load(bind(text, **weights)).graph.nodes[0]


@pytest.mark.parametrize("name", TARGETS)
def test_grids(name: str) -> None:
    target = TARGETS[name]
    weights, activations = weight_grid(target), activation_grid(target)
    assert weights.dtype == np.int8
    assert weights.high == -weights.low == (63 if target.reduce_range else 127)
    assert weight_grid(target, 16).high == 32767
    assert activations.dtype == np.dtype(target.activations)
    assert activations.high - activations.low == 255


CONV = "g (float[1,4,6,6] x, float[%s] W) => (float[A,B,C,D] y) { y = %s (x, W) }"
PRODUCT = "g (float[3,4] x, float[%s] W) => (float[3,5] y) { y = %s (x, W) }"


@pytest.mark.parametrize(
    ("text", "shape", "axis"),
    [
        (CONV % ("6,4,3,3", "Conv"), (6, 4, 3, 3), 0),
        (CONV % ("6,2,3,3", "Conv <group = 2>"), (6, 2, 3, 3), 0),
        (CONV % ("4,6,3,3", "ConvTranspose"), (4, 6, 3, 3), 1),
        (CONV % ("4,6,3,3", "ConvTranspose <group = 2>"), (4, 6, 3, 3), None),
        (PRODUCT % ("4,5", "Gemm"), (4, 5), 1),
        (PRODUCT % ("5,4", "Gemm <transB = 1>"), (5, 4), 0),
        (PRODUCT % ("4,5", "MatMul"), (4, 5), 1),
    ],
)
def test_the_axis_of_scales(text: str, shape: tuple[int, ...], axis: int | None) -> None:
    node = node_of(text, W=normal(*shape))
    assert weight_axis(node, Context(13, VNNI)) == axis
    assert weight_axis(node, Context(12, VNNI)) is None
    assert weight_axis(node, Context(13, replace(VNNI, per_channel=False))) is None


REFUSED = {
    "Exp has no integer kernel": "g (float[3,4] x) => (float[3,4] y) { y = Exp (x) }",
    "its weight is not a constant": PRODUCT % ("4,5", "MatMul"),
    "its input is a constant": "g (float[3,4] W) => (float[3,3] y) { V = Identity (W) "
    "y = Gemm <transB = 1> (W, W) }",
    "alpha or beta is not 1": PRODUCT % ("4,5", "Gemm <alpha = 0.5>"),
    "its input is transposed": "g (float[4,3] x, float[4,5] W) => (float[3,5] y) "
    "{ y = Gemm <transA = 1> (x, W) }",
    "its bias is computed": "g (float[3,4] x, float[4,5] W, float[5] b) => (float[3,5] y) "
    "{ y = Gemm (x, W, b) }",
    "its weight has 3 axes": "g (float[2,3,4] x, float[2,4,5] W) => (float[2,3,5] y) "
    "{ y = MatMul (x, W) }",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    text = REFUSED[reason]
    shapes = {"float[2,4,5] W": (2, 4, 5), "float[3,4] W": (3, 4), "float[4,5] W": (4, 5)}
    shape = next((shape for port, shape in shapes.items() if port in text), None)
    is_bound = shape is not None and reason != "its weight is not a constant"
    proto = bind(text, **({"W": normal(*shape)} if is_bound and shape else {}))
    node = next(n for n in load(proto).graph.nodes if n.op != "Identity")
    assert reason in refusal(node, VNNI)


def test_refusals_by_type_and_target() -> None:
    halves = "g (float16[3,4] x, float16[4,5] W) => (float16[3,5] y) { y = MatMul (x, W) }"
    assert (
        refusal(node_of(halves, W=normal(4, 5, dtype=np.float16)), VNNI) == "its weight is float16"
    )
    turned = node_of(CONV % ("4,6,3,3", "ConvTranspose"), W=normal(4, 6, 3, 3))
    assert "on target x86-vnni" in refusal(turned, VNNI)
    assert refusal(turned, EVERYTHING) == ""
    assert refusal(node_of(PRODUCT % ("4,5", "MatMul"), W=normal(4, 5)), VNNI) == ""


def test_nodes_asked_for() -> None:
    graph = load(
        bind(
            """g (float[3,4] x, float[4,4] W, float[4,4] V) => (float[3,4] y) {
                a = MatMul (x, W)
                b = Gemm (a, V)
                y = Exp (b) }""",
            W=normal(4, 4),
            V=normal(4, 4),
        )
    ).graph
    first, second, _ = (node.name for node in graph.nodes)
    context = Context(13, VNNI)
    assert [n.name for n in weighted_nodes(graph, context)] == [first, second]
    assert [n.name for n in weighted_nodes(graph, context, ("Gemm",))] == [second]
    assert list(weighted_nodes(graph, Context(9, VNNI))) == []
    assert reasons(list(refused_nodes(graph, context))) == ""
    assert reasons(list(refused_nodes(graph, context, ("Gemm",)))) == "MatMul is not asked for"
    assert "need opset 10" in reasons(list(refused_nodes(graph, Context(9, VNNI))))
    without = Context(13, VNNI, only=Selector(exclude=(first,)))
    assert [n.name for n in weighted_nodes(graph, without)] == [second]
    assert reasons(list(refused_nodes(graph, without))) == "excluded"


@pytest.mark.parametrize("target", ["x86-vnni", "x86"])
def test_rounded_weights_are_those_of_the_kernels(target: str) -> None:
    """Bias correction measures with `round_weights` what Quantize will do, to the last bit."""
    proto = bind(
        """g (float[1,4,6,6] x, float[6,4,3,3] W) => (float[1,6,4,4] y) { y = Conv (x, W) }""",
        W=normal(6, 4, 3, 3),
    )
    rounded = load(proto)
    round_weights(rounded.graph, Context(13, choose(target)))
    model, _ = apply(proto, Quantize(), {"x": normal(8, 1, 4, 6, 6)}, target)
    q, scale, _ = (values(t) for t in model.graph.nodes[0].inputs)
    expected = q.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(values(rounded.graph.nodes[0].inputs[1]), expected)


def test_shared_weights_are_rounded_once_and_originals_stay() -> None:
    proto = bind(
        """g (float[3,4] x, float[4,4] W) => (float[3,4] y) {
            a = MatMul (x, W)
            y = MatMul (a, W) }""",
        W=normal(4, 4),
    )
    model = load(proto)
    old = values(model.graph.nodes[0].inputs[1]).copy()
    round_weights(model.graph, Context(13, VNNI))
    first, second = (node.inputs[1] for node in model.graph.nodes)
    assert first is second
    assert not np.array_equal(values(first), old)
    np.testing.assert_allclose(values(first), old, rtol=0, atol=float(np.abs(old).max()) / 254)
    assert len(onnx.load_from_string(to_bytes(model)).graph.initializer) == 1


LIMIT = 2**31 - 1


def accumulated(
    w: NDArray[Any], bias: NDArray[Any], s_x: float, scale: NDArray[Any]
) -> NDArray[np.float64]:
    """Largest |Σ q_x q_w + q_b| that inputs of 8 bits can bring about, for each channel."""
    grid = weight_grid(VNNI)
    q = quantize(w, scale, 0, grid, 0).astype(np.float64)
    s_b = (np.float64(s_x) * scale.astype(np.float64)).astype(np.float32)
    return np.asarray(255 * np.abs(q).sum(1) + np.abs(np.rint(bias / s_b.astype(np.float64))))


sizes = st.floats(1e-37, 1e15)


@settings(max_examples=200, deadline=None)
@given(s_x=sizes, weight=sizes, bias=sizes, length=st.integers(1, 4096), seed=st.integers(0, 99))
def test_the_guard_keeps_every_sum_in_32_bits(
    s_x: float, weight: float, bias: float, length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = (weight * rng.standard_normal((4, length))).astype(np.float32)
    b = (bias * rng.standard_normal(4)).astype(np.float32)
    s_w = weight_scales(w, 0, weight_grid(VNNI))
    guarded = bias_guard(b, s_x, s_w)
    assert (guarded >= s_w).all()
    assert accumulated(w, b, s_x, guarded).max() <= LIMIT
    assert (np.float64(s_x) * guarded >= TINY * 0.99).all()


def test_without_the_guard_they_overflow() -> None:
    w, b = np.full((1, 16), 1e-6, np.float32), np.float32([1e6])
    s_w = weight_scales(w, 0, weight_grid(VNNI))
    assert accumulated(w, b, 0.01, s_w).max() > LIMIT
    assert accumulated(w, b, 0.01, bias_guard(b, 0.01, s_w)).max() <= LIMIT


def test_the_guard_leaves_common_scales_alone() -> None:
    w, b = normal(8, 64), normal(8)
    s_w = weight_scales(w, 0, weight_grid(VNNI))
    np.testing.assert_array_equal(bias_guard(b, 0.02, s_w), s_w)
