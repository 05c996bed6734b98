"""SimplifyShapes: shape chains go where symbols allow it, and results are the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.graph import Model, load, to_bytes, values
from onnxc.shapes import infer
from passes.simplify_shapes import SimplifyShapes


def ints(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


INDICES = {"zero": ints(0), "one": ints(1), "eight": ints(8), "all": ints(-1)}
HEADS = """g (float[B,T,64] x, int64[1] zero, int64[1] one, int64[1] eight, int64[1] all)
    => (float[B,8,T,8] y) {
    s = Shape (x)
    b = Gather (s, zero)
    t = Gather (s, one)
    k = Concat <axis: int = 0> (b, t, eight, eight)
    r = Reshape (x, k)
    y = Transpose <perm: ints = [0, 2, 1, 3]> (r) }"""
MERGED = """g (float[B,2,4,T] x, int64[1] zero, int64[1] one, int64[1] eight, int64[1] all)
    => (float[B,8,T] y) {
    s = Shape (x)
    b = Gather (s, zero)
    k = Concat <axis: int = 0> (b, eight, all)
    y = Reshape (x, k) }"""
REPEATED = """g (float[B,4,1,T] x, int64[1] zero, int64[2] four, int64[1] three)
    => (float[B,4,8,T] y) {
    s = Shape (x)
    b = Gather (s, zero)
    t = Gather (s, three)
    k = Concat <axis: int = 0> (b, four, t)
    y = Expand (x, k) }"""
CASES: dict[str, tuple[str, dict[str, Any], list[str], list[int], tuple[int, ...]]] = {
    "heads": (HEADS, INDICES, ["Reshape", "Transpose"], [0, 0, 8, 8], (3, 5, 64)),
    "merged": (MERGED, INDICES, ["Reshape"], [0, 8, -1], (3, 2, 4, 5)),
    "repeated": (
        REPEATED,
        {"zero": ints(0), "four": ints(4, 8), "three": ints(3)},
        ["Expand"],
        [1, 1, 8, 1],
        (2, 4, 1, 5),
    ),
}


def inferred(proto: onnx.ModelProto) -> Model:
    model = load(proto)
    infer(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_chains_go(name: str) -> None:
    text, weights, left, sizes, shape = CASES[name]
    proto = bind(text, opset=14, **weights)
    model = inferred(proto)
    results = SimplifyShapes().apply(model.graph, context(model))
    assert len(changed(results)) == 1
    assert ops(model) == left
    assert values(model.graph.nodes[0].inputs[1]).tolist() == sizes
    for feed in (
        {"x": normal(*shape)},
        {"x": normal(*(2 * d if d in (3, 5) else d for d in shape))},
    ):
        np.testing.assert_array_equal(outputs(model, feed)["y"], outputs(proto, feed)["y"])
    assert changed(SimplifyShapes().apply(model.graph, context(model))) == []


STAYS = {
    "two unknown": """g (float[B,T] x, float[H,W] z) => (float[h,w] y) {
        k = Shape (z) y = Reshape (x, k) }""",
    "size from values": """g (float[B,T] x, int64[2] k) => (float[h,w] y) {
        y = Reshape (x, k) }""",
    "grows by a symbol": """g (float[1,T] x, float[B,T] z) => (float[b,t] y) {
        k = Shape (z) y = Expand (x, k) }""",
    "zero means zero": """g (float[B,T] x) => (float[b,t] y) {
        k = Shape (x) n = Neg (x) y = Reshape <allowzero: int = 1> (n, k) }""",
}


@pytest.mark.parametrize("name", STAYS)
def test_unknown_sizes_stay(name: str) -> None:
    model = inferred(bind(STAYS[name], opset=14))
    before = to_bytes(model)
    results = SimplifyShapes().apply(model.graph, context(model))
    assert changed(results) == []
    assert "not known well enough" in reasons(results)
    assert to_bytes(model) == before


def test_excluded_nodes_stay() -> None:
    model = inferred(bind(HEADS, opset=14, **INDICES))
    results = SimplifyShapes().apply(model.graph, context(model, exclude=("op:Reshape",)))
    assert reasons(results) == "excluded"
    assert "Concat" in ops(model)
