"""ShareConstants: equal and transposed constants are stored once; values stay to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.graph import constants, load, to_bytes
from passes.share_constants import ShareConstants

TABLE = normal(40, 16)
TIED = """g (int64[N] t, float[40,16] E, float[16,40] F) => (float[N,40] y) {
    x = Gather (E, t)
    y = MatMul (x, F) }"""
TWICE = """g (float[N,16] x, float[16,16] A, float[16,16] B) => (float[N,16] y) {
    h = MatMul (x, A)
    y = MatMul (h, B) }"""
SQUARE = normal(16, 16)


def test_transposed_table_is_stored_once() -> None:
    proto = bind(TIED, E=TABLE, F=TABLE.T.copy())
    model = load(proto)
    [change] = ShareConstants().apply(model.graph, context(model))
    assert (change.before, change.after) == (4 * 40 * 16, 0)
    assert "F is E transposed" in change.what
    assert ops(model) == ["Transpose", "Gather", "MatMul"]
    assert len(constants(model.graph)) == 1
    feed = {"t": np.array([0, 7, 39])}
    np.testing.assert_allclose(
        outputs(model, feed)["y"], outputs(proto, feed)["y"], rtol=1e-6, atol=1e-6
    )
    assert changed(ShareConstants().apply(model.graph, context(model))) == []


@pytest.mark.parametrize("other", [SQUARE, SQUARE.T.copy()])
def test_equal_constants_are_stored_once(other: NDArray[Any]) -> None:
    proto = bind(TWICE, A=SQUARE, B=other)
    model = load(proto)
    ShareConstants().apply(model.graph, context(model))
    assert len(constants(model.graph)) == 1
    assert ("Transpose" in ops(model)) == (other is not SQUARE)
    feed = {"x": normal(3, 16)}
    np.testing.assert_allclose(
        outputs(model, feed)["y"], outputs(proto, feed)["y"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "other", [SQUARE + np.float32(1e-6), normal(16, 16, seed=1), SQUARE.reshape(1, 16, 16)]
)
def test_others_stay(other: NDArray[Any]) -> None:
    proto = bind(TWICE.replace("float[16,16] B", "float B"), A=SQUARE, B=other)
    model = load(proto)
    before = to_bytes(model)
    assert ShareConstants().apply(model.graph, context(model)) == []
    assert to_bytes(model) == before


def test_same_bytes_of_another_type_stay() -> None:
    text = """g (float[16,16] x, float[16,16] A, int32[16,16] B) => (float[16,16] y) {
        c = Cast <to: int = 1> (B)
        h = MatMul (x, A)
        y = Add (h, c) }"""
    model = load(bind(text, A=SQUARE, B=SQUARE.view(np.int32)))
    assert ShareConstants().apply(model.graph, context(model)) == []


def test_small_and_excluded_and_captured_stay() -> None:
    model = load(bind(TWICE, A=SQUARE, B=SQUARE))
    assert ShareConstants(smallest=2000).apply(model.graph, context(model)) == []
    last = model.graph.nodes[-1].name
    results = ShareConstants().apply(model.graph, context(model, exclude=(last,)))
    assert reasons(results) == "excluded"
    text = """g (float[N,16] x, bool c, float[16,16] A, float[16,16] B) => (float[N,16] y) {
        h = MatMul (x, A)
        i = MatMul (h, B)
        y = If (c) <then_branch = p () => (float[N,16] u) { u = MatMul (i, B) },
                    else_branch = q () => (float[N,16] v) { v = Neg (i) }> }"""
    model = load(bind(text, A=SQUARE, B=SQUARE))
    before = to_bytes(model)
    results = ShareConstants().apply(model.graph, context(model))
    assert "is read elsewhere too" in reasons(results)
    assert to_bytes(model) == before
