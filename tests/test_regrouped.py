"""Tensor trains in place of products: exact at full rank, whatever the axes and the bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, changed, context, normal, ops, outputs, reasons

from calib.collect import collect
from calib.data import InputSpec, open_data
from onnxc.core import Context
from onnxc.errors import OptionError
from onnxc.graph import Model, copy, load
from onnxc.lowrank.layers import find_layers
from onnxc.numerics.lowrank import ranks
from onnxc.pipeline import Calibration, apply_pass, compress
from onnxc.shapes import infer
from passes.factorize import Factorize
from passes.quantize import Quantize

Array = NDArray[Any]


def gemm(
    attributes: str = "transB: int = 0", bias: str = "", b: Array | None = None
) -> onnx.ModelProto:
    """12 inputs, 8 outputs; `bias` is the type of the third input."""
    is_turned, is_across = "transB: int = 1" in attributes, "transA" in attributes
    W, x = ("8,12" if is_turned else "12,8"), ("12,N" if is_across else "N,12")
    third = "" if b is None else f", {bias} b"
    proto = bind(
        f"""g (float[{x}] x, float[{W}] W{third}) => (float[N,8] y) {{
            y = Gemm <{attributes}> (x, W{"" if b is None else ", b"}) }}""",
        W=normal(*map(int, W.split(","))),
        **({} if b is None else {"b": b}),
    )
    proto.graph.node[0].name = "F"
    return proto


def matmul(*leading: int | str) -> onnx.ModelProto:
    axes = ",".join(map(str, leading))
    proto = bind(
        f"g (float[{axes},12] x, float[12,8] W) => (float[{axes},8] y) {{ y = MatMul (x, W) }}",
        W=normal(12, 8),
    )
    proto.graph.node[0].name = "F"
    return proto


PRODUCTS = {
    "Gemm": (gemm(), (5, 12)),
    "Gemm with a bias": (gemm(bias="float[8]", b=normal(8)), (5, 12)),
    "Gemm with a row": (gemm("transB: int = 1", "float[1,8]", normal(1, 8)), (5, 12)),
    "Gemm with a number": (gemm("transB: int = 1", "float", np.float32(3)), (5, 12)),
    "Gemm turned": (gemm("transB: int = 1", "float[8]", normal(8)), (5, 12)),
    "Gemm across": (gemm("transA: int = 1", "float[8]", normal(8)), (12, 5)),
    "Gemm across, turned": (gemm("transA: int = 1, transB: int = 1"), (12, 5)),
    "MatMul": (matmul("N"), (5, 12)),
    "MatMul 3-D": (matmul("N", 3), (2, 3, 12)),
    "MatMul 3-D, free inside": (matmul(2, "N"), (2, 3, 12)),
    "MatMul 4-D": (matmul(2, "N", 3), (2, 4, 3, 12)),
    "MatMul of known axes": (matmul(2, 3, 2), (2, 3, 2, 12)),
}
every_product = pytest.mark.parametrize("name", PRODUCTS)
FULL = ranks("tt", (1, 8, 12))[-1][0]


def train(rank: int = FULL) -> Factorize:
    return Factorize(macs=0.0, ranks=(f"F=tt:{rank}",))


@every_product
def test_all_ranks_change_nothing(name: str) -> None:
    proto, size = PRODUCTS[name]
    model, feed = load(proto), {"x": normal(*size)}
    done = apply_pass(model, train(), context(model), feed)
    assert done.problems == () and changed(list(done.changes)) == ["F"]
    before, after = outputs(proto, feed)["y"], outputs(model, feed)["y"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(np.abs(before).max()))


@every_product
def test_no_step_is_a_transposition_but_of_transposed_rows(name: str) -> None:
    model = load(PRODUCTS[name][0])
    train(2).apply(model.graph, context(model))
    product = name.split()[0]
    expected = ["Reshape", product, "Reshape", "Conv", "Reshape"]
    expected = [*(["Transpose"] if "across" in name else []), *expected]
    assert ops(model) == [
        *expected,
        *(["Add"] if len(PRODUCTS[name][0].graph.initializer) > 1 else []),
    ]


def test_names_come_from_the_original() -> None:
    model = load(gemm(bias="float[8]", b=normal(8)))
    train(2).apply(model.graph, context(model))
    nodes = {node.name: node for node in model.graph.nodes}
    parts = ["samples1", "factor1", "samples2", "F", "joined", "biased"]
    assert list(nodes) == [part if part == "F" else f"F_{part}" for part in parts]
    assert [t.name for n in nodes.values() for t in n.outputs] == [
        *("y_samples1", "y_factor1", "y_samples2", "y_factor2", "y_joined", "y")
    ]
    assert nodes["F"].inputs[1].name == "W_factor2" and len(nodes["F"].inputs) == 2


def test_known_ranks_come_back_exactly() -> None:
    W = sum(np.kron(normal(4, 3, seed=i), normal(2, 4, seed=i)) for i in range(2))
    proto = gemm("transB: int = 1")
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(W, "W"))
    model, feed = load(proto), {"x": normal(5, 12)}
    assert apply_pass(model, train(2), context(model), feed).problems == ()
    np.testing.assert_allclose(outputs(model, feed)["y"], outputs(proto, feed)["y"], atol=1e-4)


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (gemm("alpha: float = 0.5"), "by a factor"),
        (matmul("N", "T"), "leading axes"),
        (
            bind(
                "g (float[N,12,4] x, float[8,12,1] W) => (float[N,8,4] y) { y = Conv (x, W) }",
                W=normal(8, 12, 1),
            ),
            "Conv reads cannot be taken apart",
        ),
        (
            bind(
                """g (float[5,N,12] x, float[1,18,12] W, float[1,18,6] R) => (float[5,1,N,6] y) {
                    y = GRU <hidden_size: int = 6> (x, W, R) }""",
                W=normal(1, 18, 12),
                R=normal(1, 18, 6),
            ),
            "GRU reads cannot be taken apart",
        ),
        (
            bind(
                "g (float[N,11] x, float[11,8] W) => (float[N,8] y) { y = MatMul (x, W) }",
                W=normal(11, 8),
            ),
            "11 is a prime",
        ),
    ],
)
def test_where_there_is_none_it_is_told(proto: onnx.ModelProto, words: str) -> None:
    model = load(proto)
    infer(model)
    results = Factorize("tt").apply(model.graph, context(model))
    assert changed(results) == [] and words in reasons(results)
    name = model.graph.nodes[0].name
    with pytest.raises(OptionError, match=words):
        Factorize(macs=0.0, ranks=(f"{name}=tt:2",)).apply(model.graph, context(model))


def test_trains_are_not_factorized_again() -> None:
    model = load(gemm(bias="float[8]", b=normal(8)))
    assert changed(Factorize("tt").apply(model.graph, context(model))) == ["F"]
    again = Factorize("svd").apply(model.graph, context(model))
    assert changed(again) == []
    assert {r.node for r in again} == {"F", "F_factor1"}
    assert reasons(again).count("a factor already") == 2


def test_a_product_with_a_bias_in_front_of_a_convolution_is_no_factor() -> None:
    proto = bind(
        """g (float[N,12] x, float[12,8] W, float[8] b, int64[3] s, float[6,4,1] V)
            => (float[N,6,2] y) {
            h = Gemm (x, W, b)
            r = Reshape (h, s)
            y = Conv (r, V) }""",
        W=normal(12, 8),
        b=normal(8),
        s=np.array([-1, 4, 2]),
        V=normal(6, 4, 1),
    )
    model = load(proto)
    assert [layer.obstacle for layer in find_layers(model.graph, context(model))] == ["", ""]


def test_shared_weights_have_the_same_train() -> None:
    proto = bind(
        """g (float[N,12] x, float[12,12] W, float[12] b) => (float[N,12] y) {
            h = Gemm (x, W, b)
            r = Relu (h)
            y = Gemm (r, W, b) }""",
        W=normal(12, 12),
        b=normal(12),
    )
    model = load(proto)
    assert len(changed(Factorize("tt").apply(model.graph, context(model)))) == 2
    for op in ("Gemm", "Conv"):
        one, two = (node for node in model.graph.nodes if node.op == op)
        assert one.inputs[1] is two.inputs[1]
    np.testing.assert_array_equal(outputs(model, {"x": normal(1, 12)})["y"].shape, (1, 12))


NETWORK = bind(
    """g (float[N,24] x, float[36,24] V, float[36] a, float[20,36] W, float[20] b)
        => (float[N,20] y) {
        c = Gemm <transB: int = 1> (x, V, a)
        r = Relu (c)
        y = Gemm <transB: int = 1> (r, W, b) }""",
    V=normal(36, 24),
    a=normal(36),
    W=normal(20, 36),
    b=normal(20),
)
for node, name in zip(NETWORK.graph.node, ("A", "r", "B"), strict=True):
    node.name = name
MIXED = np.linalg.qr(normal(24, 24))[0] * np.geomspace(1, 0.05, 24, dtype=np.float32)


def rows(count: int, seed: int = 0) -> Array:
    """Rows that hang together, and are far from zero on average."""
    return np.asarray(normal(count, 24, seed=seed) @ MIXED.T + 1)


def prepared(model: Model, pass_: Factorize) -> Context:
    infer(model)
    data = open_data({"x": rows(400)}, [InputSpec("x", np.dtype(np.float32), ("N", 24))])
    keys = list(pass_.wants(model.graph, context(model)))
    return replace(context(model), stats=dict(collect(model, keys, data, threads=1).stats))


def damage(model: Model) -> float:
    feed = {"x": rows(200, seed=1)}
    y, z = outputs(NETWORK, feed)["y"], outputs(model, feed)["y"]
    return float(np.mean((y - z) ** 2) / np.var(y))


def test_data_keeps_outputs_nearer() -> None:
    pass_ = Factorize(macs=0.0, ranks=("A=tt:3", "B=tt:3"))
    blind, seeing = load(NETWORK), load(NETWORK)
    pass_.apply(blind.graph, context(blind))
    pass_.apply(seeing.graph, prepared(seeing, pass_))
    assert damage(seeing) < 0.5 * damage(blind)


def test_means_of_outputs_stay() -> None:
    pass_ = Factorize(macs=0.0, ranks=("A=tt:1",))
    model = load(NETWORK)
    pass_.apply(model.graph, prepared(model, pass_))
    original = load(NETWORK)
    for m in (model, original):
        m.graph.outputs = [next(t for n in m.graph.nodes for t in n.outputs if t.name == "c")]
        m.graph.outputs[0].dtype, m.graph.outputs[0].shape = np.float32, ["N", 36]
    feed = {"x": rows(400)}
    made, kept = outputs(model, feed)["c"], outputs(original, feed)["c"]
    assert float(np.abs((made - kept).mean(axis=0)).max()) < 1e-4 * float(kept.std())


def test_the_result_quantizes_with_every_heavy_node_in_integers() -> None:
    model = load(NETWORK)
    original = copy(model)
    data = open_data({"x": rows(64)}, [InputSpec("x", np.dtype(np.float32), ("N", 24))])
    calibration = Calibration(data, original=original)
    passes = (Factorize(macs=0.0, ranks=("A=tt:12", "B=tt:12")), Quantize())
    steps = compress(model, passes, context(model), calibration, {"x": rows(2)})
    assert all(step.problems == () for step in steps)
    heavy = [n for n in model.graph.nodes if n.op in ("Conv", "Gemm")]
    assert [n.op for n in heavy] == ["Gemm", "Conv"] * 2
    assert all(n.inputs[0].inputs[0].op == "DequantizeLinear" for n in heavy)
    assert all(n.inputs[1].inputs[0].op == "DequantizeLinear" for n in heavy)
