"""ExpandBroadcasts: one Expand for several readers, the same values, and only where it pays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.graph import Model, load, to_bytes, values
from onnxc.shapes import infer
from passes.expand_broadcasts import ExpandBroadcasts


def graph(operand: str, other: str) -> str:
    return f"""g (float[{operand}] c, float[{other}] x) => (float[a,b,e,f] y) {{
        p = Mul (x, c)
        q = Sub (c, p)
        y = Add (q, c) }}"""


def inferred(proto: onnx.ModelProto) -> Model:
    model = load(proto)
    infer(model)
    return model


@pytest.mark.parametrize(
    ("operand", "sizes", "shape"),
    [
        ("1,T,1,4", [1, 1, 8, 1], (1, 5, 1, 4)),
        ("T,1,4", [1, 1, 8, 1], (5, 1, 4)),
        ("B,T,1,4", [1, 1, 8, 1], (2, 5, 1, 4)),
        ("1,T,1,K", [1, 1, 8, 1], (1, 5, 1, 4)),
        ("1,T,1,K", [1, 1, 8, 1], (1, 5, 1, 1)),
    ],
)
def test_expanded_once(operand: str, sizes: list[int], shape: tuple[int, ...]) -> None:
    proto = bind(graph(operand, "B,T,8,4"))
    model = inferred(proto)
    results = ExpandBroadcasts().apply(model.graph, context(model))
    assert len(changed(results)) == 3
    assert ops(model) == ["Expand", "Mul", "Sub", "Add"]
    assert values(model.graph.nodes[0].inputs[1]).tolist() == sizes
    feed = {"c": normal(*shape), "x": normal(2, 5, 8, 4)}
    np.testing.assert_array_equal(outputs(model, feed)["y"], outputs(proto, feed)["y"])
    infer(model)
    assert changed(ExpandBroadcasts().apply(model.graph, context(model))) == []


@pytest.mark.parametrize(
    ("operand", "other"),
    [
        ("1,1,8,4", "B,T,8,4"),  # repeats along leading axes: long runs
        ("1,T,1,1", "B,T,8,4"),  # one value a run: a fast path
        ("1,T,1,128", "B,T,8,128"),  # long runs
        ("1,T,1,4", "B,T,H,4"),  # an unknown size
        ("B,T,8,4", "B,T,8,4"),
    ],
)
def test_fast_broadcasts_stay(operand: str, other: str) -> None:
    model = inferred(bind(graph(operand, other)))
    before = to_bytes(model)
    assert ExpandBroadcasts().apply(model.graph, context(model)) == []
    assert to_bytes(model) == before


def test_single_reader_stays() -> None:
    text = "g (float[1,T,1,4] c, float[B,T,8,4] x) => (float[B,T,8,4] y) { y = Mul (x, c) }"
    model = inferred(bind(text))
    results = ExpandBroadcasts().apply(model.graph, context(model))
    assert "fewer than 2 nodes" in reasons(results)
    assert ops(model) == ["Mul"]


def test_excluded_nodes_stay() -> None:
    model = inferred(bind(graph("1,T,1,4", "B,T,8,4")))
    results = ExpandBroadcasts().apply(model.graph, context(model, exclude=("op:Sub", "op:Add")))
    assert "excluded" in reasons(results)
    assert changed(results) == []
    assert "Expand" not in ops(model)
