"""Weights become zero where the outputs feel it least, in every kind of layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from layers import IMAGES, VECTORS, named
from numpy.typing import NDArray
from quantizing import apply, decibels
from texts import bind, context, normal, outputs

from onnxc.core import Change, Skip
from onnxc.errors import OptionError
from onnxc.graph import Model, load, to_bytes, values
from onnxc.ops import weight_of
from passes.sparsify import Sparsify

LAYERS = named(
    {
        "Conv without bias": (
            bind(
                "g (float[1,8,9,9] x, float[6,8,3,3] W) => (float[1,6,7,7] y) { y = Conv (x, W) }",
                W=normal(6, 8, 3, 3),
            ),
            IMAGES,
        ),
        "depthwise Conv": (
            bind(
                """g (float[1,8,9,9] x, float[8,1,3,3] W) => (float[1,8,7,7] y) {
            y = Conv <group: int = 8> (x, W) }""",
                W=normal(8, 1, 3, 3),
            ),
            IMAGES,
        ),
        "Gemm": (
            bind(
                """g (float[1,16] x, float[16,5] W, float[5] B) => (float[1,5] y) {
            y = Gemm (x, W, B) }""",
                W=normal(16, 5),
                B=normal(5),
            ),
            VECTORS,
        ),
        "transposed Gemm with factors": (
            bind(
                """g (float[1,16] x, float[5,16] W, float[5] B) => (float[1,5] y) {
            y = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (x, W, B) }""",
                W=normal(5, 16),
                B=normal(5),
            ),
            VECTORS,
        ),
        "MatMul": (
            bind(
                "g (float[1,16] x, float[16,5] W) => (float[1,5] y) { y = MatMul (x, W) }",
                W=normal(16, 5),
            ),
            VECTORS,
        ),
    }
)


def zeros(model: Model) -> float:
    """Share of the weights that are zero."""
    arrays = [values(w) for n in model.graph.nodes if (w := weight_of(n)) is not None]
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_gets_its_zeros_and_beats_magnitude(kind: str) -> None:
    proto, feed = LAYERS[kind]
    found = {}
    for criterion in ("obs", "magnitude"):
        model, step = apply(proto, Sparsify(0.6, criterion=criterion), feed)  # type: ignore[arg-type]
        assert [change.node for change in step.changes] == ["layer"]
        assert 0.6 <= zeros(model) < 0.65
        found[criterion] = decibels(proto, model, feed)
    assert found["obs"] > found["magnitude"]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obd", "obs"])
def test_means_of_the_outputs_stay(criterion: Any) -> None:
    proto, feed = LAYERS["Conv"]
    model, _ = apply(proto, Sparsify(0.5, criterion=criterion), feed)
    sums = [
        sum(outputs(m, {"x": x})["y"].astype(np.float64).mean(axis=(0, 2, 3)) for x in feed["x"])
        for m in (proto, model)
    ]
    lost = np.abs(sums[0] - sums[1]).max() / np.abs(sums[0]).max()
    assert lost < 0.05  # rows are a sample of the positions


def test_n_of_m_is_kept_along_the_input_channels() -> None:
    proto, feed = LAYERS["Conv"]
    model, _ = apply(proto, Sparsify(nm="2:4"), feed)
    weight = values(model.graph.nodes[0].inputs[1])
    kept = (weight != 0).reshape(6, 2, 4, 9).sum(axis=2)
    assert (kept == 2).all()
    again, second = apply(model, Sparsify(nm="2:4"), feed)
    assert not second.changes and "that sparse already" in second.skips[0].reason
    assert to_bytes(again) == to_bytes(model)


def test_channels_that_m_does_not_divide_are_left() -> None:
    proto, feed = LAYERS["depthwise Conv"]
    _, step = apply(proto, Sparsify(nm="2:4"), feed)
    assert [skip.reason for skip in step.skips] == [
        "not sparse: its 1 input channels are no multiple of 4"
    ]


TWO = """g (float[1,16] x, float[16,32] W, float[32,8] V) => (float[1,8] y) {
    h = MatMul (x, W)
    y = MatMul (h, V) }"""


def two(**weights: NDArray[Any]) -> onnx.ModelProto:
    proto = bind(TWO, **{"W": normal(16, 32), "V": normal(32, 8), **weights})
    for node, name in zip(proto.graph.node, ("first", "second"), strict=True):
        node.name = name
    return proto


def test_uniform_gives_each_layer_the_same_share_and_global_the_sum() -> None:
    weight = normal(16, 32) * (np.arange(32) < 8)  # three quarters of it are worth little
    proto = two(W=weight + np.float32(1e-3) * normal(16, 32, seed=1))
    shares = {}
    for allocation in ("uniform", "global"):
        model, _ = apply(proto, Sparsify(0.5, allocation=allocation), VECTORS)  # type: ignore[arg-type]
        assert zeros(model) == pytest.approx(0.5, abs=0.01)
        shares[allocation] = [float((values(n.inputs[1]) == 0).mean()) for n in model.graph.nodes]
    assert shares["uniform"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares["global"][0] > shares["global"][1]


def test_without_moments_it_goes_by_magnitude_and_says_so() -> None:
    model = load(two())
    results = Sparsify(0.5, allocation="uniform").apply(model.graph, context(model))
    assert all("by magnitude" in r.what for r in results if isinstance(r, Change))
    weight = values(model.graph.nodes[0].inputs[1])
    assert np.abs(normal(16, 32)[weight == 0]).max() <= np.abs(weight[weight != 0]).min()


def test_shared_weights_stay_shared() -> None:
    proto = bind(
        """g (float[1,16] x, float[16,16] W) => (float[1,16] y) {
        h = MatMul (x, W)
        r = Relu (h)
        y = MatMul (r, W) }""",
        W=normal(16, 16),
    )
    model, step = apply(proto, Sparsify(0.5), VECTORS)
    first, _, last = model.graph.nodes
    assert first.inputs[1] is last.inputs[1]
    assert len(step.changes) == 2
    _, step = apply(proto, Sparsify(0.5), VECTORS, exclude=(last.name,))
    assert not step.changes and "is excluded" in step.skips[0].reason


def test_a_weight_that_something_else_reads_stays() -> None:
    proto = bind(
        """g (float[1,16] x, float[16,16] W) => (float[1,16] y) {
        h = MatMul (x, W)
        s = ReduceSum <keepdims: int = 0> (W)
        y = Add (h, s) }""",
        W=normal(16, 16),
    )
    proto.graph.node[1].name = "sum"
    _, step = apply(proto, Sparsify(0.5), VECTORS)
    assert [skip.reason for skip in step.skips] == ["not sparse: sum reads its weight too"]


def test_half_floats_stay_half() -> None:
    proto = bind(
        """g (float16[1,16] x, float16[5,16] W) => (float16[1,5] y) {
        y = Gemm <transB: int = 1> (x, W) }""",
        W=normal(5, 16, dtype=np.float16),
    )
    model, step = apply(proto, Sparsify(0.5), {"x": VECTORS["x"].astype(np.float16)})
    assert len(step.changes) == 1
    assert all(values(t).dtype == np.float16 for t in model.graph.nodes[0].inputs[1:])


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0}, {"sparsity": 1.0}, {"nm": "4:2"}, {"nm": "half"}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"sparsity is a share|nm is N:M"):
        Sparsify(**settings)


def test_every_heavy_node_is_told() -> None:
    proto = bind(
        """g (float[1,16] x, float[16,16] W) => (float[1,1] y) {
        h = MatMul (x, W)
        t = Transpose <perm: ints = [1, 0]> (h)
        y = MatMul (h, t) }""",
        W=normal(16, 16),
    )
    model = load(proto)
    names = {n.name for n in model.graph.nodes if n.op == "MatMul"}
    results = Sparsify(0.5).apply(model.graph, context(model))
    assert {r.node for r in results} == names
    assert sum(isinstance(r, Skip) for r in results) == 1
