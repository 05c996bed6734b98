"""Weights of few values in every kind of layer, stored as codes that the runtime unpacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import VECTORS, named
from numpy.typing import NDArray
from quantizing import apply, dataset, decibels, kernels
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.core import Change
from onnxc.errors import OptionError
from onnxc.graph import Model, load, to_bytes, values
from onnxc.pipeline import apply_pass
from passes.cluster import Cluster
from passes.store_codebooks import StoreCodebooks

LAYERS = named(
    {
        "Gemm": (
            bind(
                """g (float[1,16] x, float[24,16] W, float[24] B) => (float[1,24] y) {
            y = Gemm <transB: int = 1> (x, W, B) }""",
                W=normal(24, 16),
                B=normal(24),
            ),
            VECTORS,
        ),
        "MatMul": (
            bind(
                "g (float[1,16] x, float[16,20] W) => (float[1,20] y) { y = MatMul (x, W) }",
                W=normal(16, 20),
            ),
            VECTORS,
        ),
        "Gather": (
            bind(
                "g (int64[1,5] x, float[40,8] W) => (float[1,5,8] y) { y = Gather (W, x) }",
                W=normal(40, 8),
            ),
            {"x": np.arange(40).reshape(8, 1, 5)},
        ),
    }
)


def weight(model: Model, position: int | None = None) -> NDArray[Any]:
    node = next(n for n in model.graph.nodes if n.name == "layer")
    index = position if position is not None else 0 if node.op == "Gather" else 1
    tensor = node.inputs[index]
    return values(tensor.inputs[0].inputs[0] if tensor.inputs else tensor)  # ahead of a gain


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_gets_few_values(kind: str) -> None:
    proto, feed = LAYERS[kind]
    model, step = apply(proto, Cluster(3, smallest=0), feed)
    assert "layer" in [change.node for change in step.changes]
    assert len(np.unique(weight(model))) <= 8
    if kind == "GRU":
        assert len(np.unique(weight(model, 2))) <= 8


@pytest.mark.parametrize("kind", ["Conv", "grouped Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_fitting_to_the_outputs_beats_the_weights_alone(kind: str) -> None:
    proto, feed = LAYERS[kind]
    found = [
        decibels(proto, apply(proto, Cluster(3, smallest=0, **settings), feed)[0], feed)
        for settings in ({}, {"method": "kmeans", "refine": False})
    ]
    assert found[0] > found[1] + 0.5


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_codes_of_every_width_are_unpacked_at_load(bits: int, opset: int) -> None:
    levels = normal(2**bits)
    array = levels[np.arange(64 * 83 * 3) % len(levels)].reshape(64, 83, 3, 1)
    proto = bind(
        "g (float[1,83,5,5] x, float[64,83,3,1] W) => (float[1,64,3,5] y) { y = Conv (x, W) }",
        opset,
        W=array,
    )
    model, feed = load(proto), {"x": normal(1, 83, 5, 5)}
    done = apply_pass(model, StoreCodebooks(), context(model), feed)
    if bits not in (1, 2, 4, 8) and opset < 18:
        assert not done.changes and "opset 18" in done.skips[0].reason
        return
    assert len(done.changes) == 1 and not done.problems
    np.testing.assert_array_equal(outputs(model, feed)["y"], outputs(proto, feed)["y"])
    assert kernels(model) == ["Conv"]
    assert len(to_bytes(model)) < array.size * bits / 8 + 4 * len(levels) + 1700
    if bits == 4 and opset == 21:
        assert ops(model) == ["Cast", "Gather", "Conv"]


def test_storing_twice_changes_nothing_and_plain_weights_stay() -> None:
    proto = bind(
        """g (float[1,64] x, float[64,64] V, float[64,64] W) => (float[1,64] y) {
        h = MatMul (x, V)
        y = MatMul (h, W) }""",
        18,
        V=np.round(normal(64, 64)),
        W=normal(64, 64),
    )
    model = load(proto)
    first = StoreCodebooks().apply(model.graph, context(model))
    assert changed(first) == [load(proto).graph.nodes[0].name]
    assert "too many distinct values" in reasons(first)
    stored = to_bytes(model)
    assert not changed(StoreCodebooks().apply(model.graph, context(model)))
    assert to_bytes(model) == stored


def test_float16_and_integers_are_stored_too() -> None:
    proto = bind(
        """g (float16[1,64] x, float16[64,64] V, int8[64,64] Q, float16 s) => (float16[1,64] y) {
        W = DequantizeLinear (Q, s)
        h = MatMul (x, V)
        y = MatMul (h, W) }""",
        19,
        V=np.round(normal(64, 64)).astype(np.float16),
        Q=np.round(2 * normal(64, 64)).astype(np.int8),
        s=np.array(0.5, np.float16),
    )
    model, feed = load(proto), {"x": normal(1, 64).astype(np.float16)}
    done = apply_pass(model, StoreCodebooks(), context(model), feed)
    assert len(done.changes) == 2 and not done.problems


def test_sparse_weights_stay_sparse_through_clustering_and_refitting() -> None:
    array = normal(24, 16) * (normal(24, 16, seed=1) > 0)
    proto = bind(
        """g (float[1,16] x, float[24,16] W, float[24] B) => (float[1,24] y) {
        y = Gemm <transB: int = 1> (x, W, B) }""",
        W=array.astype(np.float32),
        B=normal(24),
    )
    proto.graph.node[0].name = "layer"
    model, _ = apply(proto, Cluster(3, smallest=0), VECTORS)
    assert (weight(model)[array == 0] == 0).all()
    assert len(np.unique(weight(model))) <= 8


def test_a_grid_of_int8_is_kept() -> None:
    proto, feed = LAYERS["Conv"]
    model, _ = apply(proto, Cluster(3, grid="int8", smallest=0), feed)
    found = weight(model).astype(np.float64)
    steps = found / (np.abs(found).max() / 127)
    np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_gains_are_stored_in_front_of_a_codebook_and_folded(kind: str) -> None:
    proto, feed = LAYERS[kind]
    model, step = apply(proto, Cluster(4, smallest=0, gains="always"), feed)
    is_alike = kind == "ConvTranspose"  # of groups: its gains would be as many as its weights
    assert ("with gains" in " ".join(c.what for c in step.changes)) is not is_alike
    data = dataset(model, feed)
    first = next(iter(data.batches(1)))
    whole = outputs(model, first)["y"]
    done = apply_pass(model, StoreCodebooks(least=-10_000), context(model), first)
    assert done.changes and not done.problems
    assert ("Mul" in ops(model)) is not is_alike
    np.testing.assert_array_equal(outputs(model, first)["y"], whole)
    assert "Mul" not in kernels(model) and kernels(model).count("Gather") == (kind == "Gather")


def test_gains_are_given_where_outputs_differ_in_strength() -> None:
    strength = np.exp(np.random.default_rng(0).uniform(-1, 1, (1, 64))).astype(np.float32)
    text = "g (float[1,256] x, float[256,64] W) => (float[1,64] y) { y = MatMul (x, W) }"
    feed = {"x": normal(1000, 1, 256)}
    for factor, expected in ((strength, True), (np.ones_like(strength), False)):
        _, step = apply(bind(text, W=normal(256, 64) * factor), Cluster(4, smallest=0), feed)
        assert ("with gains" in step.changes[0].what) is expected


def test_without_moments_it_says_what_that_costs() -> None:
    model = load(LAYERS["MatMul"][0])
    results = Cluster(2, smallest=0).apply(model.graph, context(model))
    assert any(isinstance(r, Change) and "if inputs are alike" in r.what for r in results)


def test_small_and_clustered_and_excluded_weights_are_left() -> None:
    proto, _ = LAYERS["MatMul"]
    model = load(proto)
    assert "fewer than 2048" in reasons(Cluster(smallest=2048).apply(model.graph, context(model)))
    only = context(model, exclude=("layer",))
    assert "excluded" in reasons(Cluster(smallest=0).apply(model.graph, only))
    Cluster(2, smallest=0).apply(model.graph, context(model))
    again = Cluster(2, smallest=0).apply(model.graph, context(model))
    assert "4 values already" in reasons(again)


def test_shared_weights_stay_shared() -> None:
    proto = bind(
        """g (float[1,16] x, float[16,16] W) => (float[1,16] y) {
        h = MatMul (x, W)
        r = Relu (h)
        y = MatMul (r, W) }""",
        W=normal(16, 16),
    )
    model, step = apply(proto, Cluster(3, smallest=0), VECTORS)
    first, _, last = model.graph.nodes
    assert first.inputs[1] is last.inputs[1] and len(step.changes) == 2


@pytest.mark.parametrize("settings", [{"bits": 0}, {"bits": 9}, {"price": -1.0}])
def test_settings_that_mean_nothing_are_told(settings: Any) -> None:
    with pytest.raises(OptionError):
        Cluster(**settings)
