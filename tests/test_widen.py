"""Widen: float16 at the ports, float32 inside, equal to half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.graph import Model, constants, load, to_proto, walk
from onnxc.pipeline import apply_pass
from passes.widen import Widen


def half(*shape: int, seed: int = 0) -> Any:
    return normal(*shape, seed=seed, dtype=np.float16)


def widened(proto: onnx.ModelProto, feed: dict[str, Any], **only: tuple[str, ...]) -> Model:
    """Load and widen with checks; outputs equal to 2e-3 of the largest, and of the same type."""
    model = load(proto)
    done = apply_pass(model, Widen(), context(model, **only), feed)
    assert not done.problems
    before, after = outputs(proto, feed), outputs(model, feed)
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        limit = 2e-3 * max(1.0, float(np.abs(expected.astype(np.float32)).max(initial=0)))
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=limit)
    return model


def kinds(model: Model) -> set[str]:
    """Element types of everything but the ports of the main graph."""
    ports = {id(t) for t in (*model.graph.inputs, *model.graph.outputs)}
    tensors = [t for g in walk(model.graph) for t in g.tensors().values() if id(t) not in ports]
    return {np.dtype(t.dtype).name for t in tensors if t.dtype is not None}


CONV = bind(
    """g (float16[N,3,6,6] x, float16[4,3,3,3] W, float16[4] B) => (float16[N,4,4,4] y) {
        c = Conv (x, W, B)
        y = Relu (c) }""",
    W=half(4, 3, 3, 3),
    B=half(4),
)


def test_computes_in_float32_between_casts() -> None:
    model = widened(CONV, {"x": half(2, 3, 6, 6)})
    assert ops(model) == ["Cast", "Conv", "Relu", "Cast"]
    assert kinds(model) == {"float32"}
    assert [t.dtype for t in (*model.graph.inputs, *model.graph.outputs)] == [np.float16] * 2


def test_an_output_that_is_read_inside_stays_exact() -> None:
    proto = bind(
        """g (float16[N,4] x, float16[4,4] W) => (float16[N,4] h, float16[N,4] y) {
            h = MatMul (x, W)
            y = Exp (h) }""",
        W=half(4, 4),
    )
    model = widened(proto, {"x": half(2, 4)})
    assert ops(model) == ["Cast", "MatMul", "Exp", "Cast", "Cast"]


def test_attributes_that_name_the_type() -> None:
    proto = bind(
        """g (float16[2,4] x, float16[4,4] W) => (float16[2,4] y) {
            m = MatMul (x, W)
            f = Cast <to: int = 1> (m)
            e = Exp (f)
            h = Cast <to: int = 10> (e)
            s = Shape (h)
            k = ConstantOfShape <value: tensor = float16[1] {2}> (s)
            i = EyeLike <dtype: int = 10> (h)
            a = Mul (k, h)
            y = Add (a, i) }""",
        W=half(4, 4),
    )
    assert "float16" not in kinds(widened(proto, {"x": half(2, 4) / 4}))


def test_nested_bodies_are_widened_with_the_graph() -> None:
    proto = bind(
        """g (float16[N,4] x, bool c, float16[4,4] W, float16[4] B) => (float16[N,4] y) {
            m = MatMul (x, W)
            y = If (c) <then_branch = p () => (float16[N,4] u) { u = Add (m, B) },
                        else_branch = q () => (float16[N,4] w) {
                            k = MatMul (m, W)
                            w = Neg (k) }> }""",
        W=half(4, 4),
        B=half(4),
    )
    for flag in (True, False):
        model = widened(proto, {"x": half(2, 4), "c": np.array(flag)})
        assert "float16" not in kinds(model)


def test_loop_state_is_widened() -> None:
    proto = bind(
        """g (float16[2,2] x, float16[2,2] W, int64 n, bool t) => (float16[2,2] y) {
            y = Loop (n, t, x) <body = b (int64 i, bool go, float16[2,2] s)
                    => (bool on, float16[2,2] r) {
                on = Identity (go)
                r = MatMul (s, W) }> }""",
        W=half(2, 2),
        n=np.array(3),
        t=np.array(True),
    )
    assert "float16" not in kinds(widened(proto, {"x": half(2, 2) / 4}))


def test_large_tables_stay_small() -> None:
    proto = bind(
        """g (int64[N] t, float16[64,16] E, float16[16,4] W) => (float16[N,4] y) {
            e = Gather (E, t)
            z = Gather (E, t)
            a = Add (e, z)
            y = MatMul (a, W) }""",
        E=half(64, 16),
        W=half(16, 4),
    )
    model = widened(proto, {"t": np.arange(3)})
    sizes = {c.name: np.dtype(c.dtype).name for c in constants(model.graph)}
    assert sizes["E"] == "float16"
    assert sorted(sizes.values()) == ["float16", "float32"]
    assert ops(model).count("Cast") == 2


def test_only_where_there_is_something_to_quantize() -> None:
    plain = load(bind("g (float16[N] x) => (float16[N] y) { y = Exp (x) }"))
    assert Widen().apply(plain.graph, context(plain)) == []
    single = load(
        bind(
            "g (float[N,4] x, float[4,4] W) => (float[N,4] y) { y = MatMul (x, W) }", W=normal(4, 4)
        )
    )
    assert Widen().apply(single.graph, context(single)) == []


def test_reasons() -> None:
    model = load(CONV)
    name = model.graph.nodes[0].name
    assert reasons(Widen().apply(model.graph, context(model, exclude=(name,)))) == "excluded"
    old = bind(
        "g (float16[2,4] x, float16[4,4] W) => (float16[2,4] y) { y = MatMul (x, W) }",
        opset=5,
        W=half(4, 4),
    )
    model = load(old)
    assert "opset 5" in reasons(Widen().apply(model.graph, context(model)))


def test_second_run_changes_nothing() -> None:
    model = widened(CONV, {"x": half(2, 3, 6, 6)})
    before = to_proto(model)
    assert changed(Widen().apply(model.graph, context(model))) == []
    assert to_proto(model) == before


@pytest.mark.parametrize("value", [65504.0, -np.inf])
def test_extreme_constants_survive(value: float) -> None:
    proto = bind(
        """g (float16[2,4] x, float16[4,4] W, float16[4] M) => (float16[2,4] y) {
            m = MatMul (x, W)
            a = Add (m, M)
            y = Softmax (a) }""",
        W=half(4, 4),
        M=np.array([0, 0, value, 0], np.float16),
    )
    widened(proto, {"x": half(2, 4)})
