"""Weights on codewords in every kind of layer, and the nodes that the runtime computes at load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import Feed, apply, decibels, kernels
from test_clustering import LAYERS
from texts import bind, changed, context, normal, ops, outputs, reasons

from onnxc.core import Change
from onnxc.errors import OptionError
from onnxc.graph import Model, constant, load, nbytes, to_bytes, values
from onnxc.matrices import Layer, layers
from onnxc.numerics.subvectors import Vectors
from onnxc.numerics.vector_fit import Form
from onnxc.ops import knowledge
from onnxc.pipeline import prepare
from onnxc.storage.codewords import Codewords, overhead
from passes.cluster import Cluster
from passes.cluster_vectors import ClusterVectors
from passes.reconstruct import Reconstruct
from passes.sparsify import Sparsify
from passes.store_codebooks import StoreCodebooks

LINEAR = ["Conv", "grouped Conv", "ConvTranspose", "Gemm", "MatMul"]
FEW = ClusterVectors(rate=0, bits=3, length=2, smallest=0)


def upgraded(proto: onnx.ModelProto, opset: int = 18) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    copied.opset_import[0].version = opset
    return copied


def first_layer(model: Model) -> Layer:
    return layers(model.graph, context(model).only.names(model.graph), everything=True)[0]


def random_vectors(layer: Layer, bits: int, books: int, is_scaled: bool) -> Vectors:
    """Codewords of length 2 for a weight: integers, and scales of half precision."""
    groups, outputs_, d = layer.matrix.shape
    rng, K = np.random.default_rng(bits), 1 << bits
    codes = rng.integers(0, K, (books, groups, outputs_, d // 2))
    c = rng.integers(-127, 128, (books, K, 2)).astype(np.float64)
    scale = rng.uniform(0.01, 0.02, (groups, outputs_)) if is_scaled else np.full((1, 1), 0.3)
    scale = np.broadcast_to(scale.astype(np.float16).astype(np.float64), (groups, outputs_))
    return Vectors(c, codes, scale)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("bits", "books", "is_scaled"), [(8, 1, True), (3, 2, False), (2, 1, True)]
)
@pytest.mark.parametrize("opset", [18, 21])
def test_the_graph_makes_the_very_weight(
    kind: str, bits: int, books: int, is_scaled: bool, opset: int
) -> None:
    proto, samples = upgraded(LAYERS[kind][0], opset), LAYERS[kind][1]["x"]
    feed = {"x": samples if kind == "GRU" else samples[0]}
    written, plain = load(proto), load(proto)
    layer, other = first_layer(written), first_layer(plain)
    found = random_vectors(layer, bits, books, is_scaled)
    other.nodes[0].inputs[other.position] = constant("plain", other.shaped(found.weight))
    stored = Codewords(written.graph, opset).put(layer.weight, found, bits, layer.is_turned)
    assert stored >= found.codes.size * bits / 8 + found.books.size + 4
    for name, y in outputs(plain, feed).items():
        np.testing.assert_array_equal(outputs(written, feed)[name], y)
    assert kernels(written) == kernels(plain)


def test_half_precision_weights_are_made_too() -> None:
    proto = bind(
        "g (float16[1,16] x, float16[16,20] W) => (float16[1,20] y) { y = MatMul (x, W) }",
        18,
        W=normal(16, 20).astype(np.float16),
    )
    model, plain = load(proto), load(proto)
    layer, other = first_layer(model), first_layer(plain)
    found = random_vectors(layer, 2, 1, True)
    weight = other.shaped(found.weight)
    other.nodes[0].inputs[1] = constant("plain", weight)
    Codewords(model.graph, 18).put(layer.weight, found, 2, layer.is_turned)
    feed = {"x": normal(1, 16).astype(np.float16)}
    np.testing.assert_array_equal(outputs(model, feed)["y"], outputs(plain, feed)["y"])


def test_nodes_take_about_what_is_counted_for_them() -> None:
    for bits, books, is_scaled in ((8, 1, False), (2, 1, True), (5, 2, True)):
        proto, _ = LAYERS["MatMul"]
        model = load(proto)
        layer, before = first_layer(model), len(to_bytes(load(proto)))
        size = nbytes(layer.weight)
        found = random_vectors(layer, bits, books, is_scaled)
        stored = Codewords(model.graph, 18).put(layer.weight, found, bits, layer.is_turned)
        nodes = len(to_bytes(model)) - before + size - stored
        form = Form(2, 1 << bits, books, is_scaled)
        assert overhead(form, True, 18) == pytest.approx(nodes, rel=0.4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["pq", "rq"])
def test_every_kind_of_layer_shares_vectors(kind: str, method: Any) -> None:
    proto, feed = upgraded(LAYERS[kind][0]), LAYERS[kind][1]
    model, step = apply(proto, replace(FEW, method=method), feed)
    assert "layer" in [change.node for change in step.changes]
    assert "codewords" in step.changes[0].what
    assert len(step.skips) == (kind == "GRU")  # 3 states are not cut in twos
    assert kernels(model) == kernels(load(proto))
    assert decibels(proto, model, feed) > 3


@pytest.mark.parametrize("kind", LAYERS)
def test_single_values_are_stored_as_such(kind: str) -> None:
    proto, feed = upgraded(LAYERS[kind][0]), LAYERS[kind][1]
    asked = ClusterVectors(rate=0, length=1, bits=5, smallest=0)
    found = replace(asked, forms=("layer=1x32",))
    model, step = apply(proto, found, feed)
    assert "32 codewords of length 1," in step.changes[0].what
    assert "Mul" not in ops(model) or kind == "GRU"
    assert kernels(model) == kernels(load(proto))
    assert decibels(proto, model, feed) > 20


@pytest.mark.parametrize("kind", LINEAR)
def test_fitting_to_the_outputs_beats_the_weights_alone(kind: str) -> None:
    proto, feed = upgraded(LAYERS[kind][0]), LAYERS[kind][1]
    fitted, _ = apply(proto, FEW, feed)
    alone = load(proto)
    assert changed(FEW.apply(alone.graph, context(alone)))  # without statistics
    assert decibels(proto, fitted, feed) > decibels(proto, alone, feed)


def test_kernels_are_shared_whole_and_filters_too() -> None:
    book = normal(4, 3, 3)
    array = book[np.arange(24 * 8).reshape(24, 8) % 7 % 4]
    text = "g (float[1,8,9,9] x, float[24,8,3,3] W) => (float[1,24,7,7] y) { y = Conv (x, W) }"
    proto = bind(text, 18, W=array.astype(np.float32))
    feed = {"x": normal(20, 1, 8, 9, 9)}
    model, step = apply(proto, ClusterVectors("kernels", rate=0, bits=2, smallest=0), feed)
    assert "4 codewords of length 9" in step.changes[0].what
    assert decibels(proto, model, feed) > 40
    rows = normal(4, 8, 3, 3)[np.arange(24) % 4].astype(np.float32)
    proto = bind(text, 18, W=rows)
    model, step = apply(proto, ClusterVectors("filters", rate=0, bits=2, smallest=0), feed)
    assert "of length 72" in step.changes[0].what and decibels(proto, model, feed) > 40


def test_layers_without_kernels_are_cut_as_by_pq() -> None:
    proto, feed = upgraded(LAYERS["Gemm"][0]), LAYERS["Gemm"][1]
    found = [
        apply(proto, ClusterVectors(method, rate=2, smallest=0), feed)[1].changes[0].what
        for method in ("kernels", "pq")
    ]
    assert found[0] == found[1]


def test_forms_can_be_given() -> None:
    proto, feed = upgraded(LAYERS["Gemm"][0]), LAYERS["Gemm"][1]
    _, step = apply(proto, ClusterVectors(forms=("layer=4x5s",), smallest=0), feed)
    assert "5 codewords of length 4, rows scaled" in step.changes[0].what
    _, step = apply(proto, ClusterVectors(forms=("layer=5x5",), smallest=0), feed)
    assert not step.changes and "no room" in step.skips[0].reason
    old = LAYERS["Gemm"][0]  # of opset 13, which does not unpack 3 bits
    _, step = apply(old, ClusterVectors(forms=("layer=4x5",), rate=4, smallest=0), feed)
    assert "16 codewords" in step.changes[0].what or "4 codewords" in step.changes[0].what


def test_both_weights_of_a_recurrent_node_have_their_forms() -> None:
    proto, feed = upgraded(LAYERS["GRU"][0]), LAYERS["GRU"][1]
    forms = ("layer=4x8", "layer:2=3x6")
    _, step = apply(proto, ClusterVectors(forms=forms, smallest=0), feed)
    found = [change.what.split(",")[0] for change in step.changes]
    assert found == ["8 codewords of length 4", "6 codewords of length 3"]


def test_what_stays_is_told() -> None:
    proto = upgraded(LAYERS["MatMul"][0])
    model = load(proto)
    assert "fewer than 2048" in reasons(
        ClusterVectors(smallest=2048).apply(model.graph, context(model))
    )
    assert "no room for a codebook in 0.1 bits" in reasons(
        ClusterVectors(rate=0.1, smallest=0).apply(model.graph, context(model))
    )
    only = context(model, exclude=("layer",))
    assert "excluded" in reasons(FEW.apply(model.graph, only))
    results = FEW.apply(model.graph, context(model))
    assert any(isinstance(r, Change) and "if inputs are alike" in r.what for r in results)
    stored = to_bytes(model)
    for pass_ in (FEW, Cluster(smallest=0), Reconstruct(), StoreCodebooks()):
        assert not changed(pass_.apply(model.graph, context(model)))
    assert "not a constant" in reasons(Reconstruct().apply(model.graph, context(model)))
    assert "not a constant" in reasons(Sparsify().apply(model.graph, context(model)))
    assert to_bytes(model) == stored


def test_sparse_weights_are_left_to_values() -> None:
    proto = bind(
        "g (float[1,16] x, float[16,32] W) => (float[1,32] y) { y = MatMul (x, W) }",
        18,
        W=normal(16, 32) * (normal(16, 32, seed=1) > 0),
    )
    model = load(proto)
    assert "zeros would not stay" in reasons(FEW.apply(model.graph, context(model)))


def test_shared_weights_stay_shared() -> None:
    proto = bind(
        """g (float[1,16] x, float[16,16] W) => (float[1,16] y) {
        h = MatMul (x, W)
        r = Relu (h)
        y = MatMul (r, W) }""",
        18,
        W=normal(16, 16),
    )
    feed: Feed = {"x": normal(200, 1, 16)}
    model, step = apply(proto, FEW, feed)
    products = [n for n in model.graph.nodes if n.op == "MatMul"]
    assert products[0].inputs[1] is products[1].inputs[1] and len(step.changes) == 2


def test_preparation_makes_a_plain_model_of_it_again() -> None:
    proto, feed = upgraded(LAYERS["Gemm"][0]), LAYERS["Gemm"][1]
    model, _ = apply(proto, FEW, feed)
    again = load(to_bytes(model))
    prepare(again)
    assert [n.op for n in again.graph.nodes] == ["Gemm"]
    assert knowledge(again.graph.nodes[0]).weight == 1
    one = {"x": feed["x"][0]}
    np.testing.assert_array_equal(outputs(again, one)["y"], outputs(model, one)["y"])
    assert np.isfinite(values(again.graph.nodes[0].inputs[1])).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 0},
        {"bits": 9},
        {"rate": -1.0},
        {"length": -1},
        {"books": 1},
        {"method": "kernels", "length": 4},
        {"forms": ("layer=9",)},
    ],
)
def test_settings_that_mean_nothing_are_told(settings: Any) -> None:
    with pytest.raises(OptionError):
        ClusterVectors(**settings)


def test_a_real_model_runs_as_fast_as_it_did(shared: Path) -> None:
    model = load(shared / "models" / "resnet20.onnx")
    prepare(model)
    plain = kernels(model)
    ready = context(model)
    results = ClusterVectors("pq", rate=1, length=4).apply(model.graph, ready)
    assert len(changed(results)) == 19
    assert "no room" in reasons(results)  # the first one has 3 channels
    assert kernels(model) == plain
