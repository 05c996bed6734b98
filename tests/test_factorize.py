"""Factorize: with all ranks nothing changes, with fewer the outputs stay near on what is seen."""

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
from calib.observers import observer_of
from onnxc.core import Change, Context, Skip
from onnxc.errors import OptionError
from onnxc.graph import Model, copy, load
from onnxc.lowrank.layers import Layer, find_layers
from onnxc.pipeline import Calibration, apply_pass, compress
from onnxc.shapes import infer
from passes.factorize import Choice, Factorize
from passes.quantize import Quantize
from passes.reconstruct import Reconstruct

Array = NDArray[Any]
Feed = dict[str, Array]


def conv(attributes: str, weight: Array, *spatial: int, groups: int = 1) -> onnx.ModelProto:
    o, c, *kernel = weight.shape
    shape = ",".join(map(str, (o, c, *kernel)))
    size = ",".join(map(str, (c * groups, *spatial)))
    free = ",".join(["N", str(o), *(f"s{i}" for i in range(len(spatial)))])
    return bind(
        f"""g (float[N,{size}] x, float[{shape}] W, float[{o}] b) => (float[{free}] y) {{
            y = Conv <{attributes}> (x, W, b) }}""",
        W=weight,
        b=normal(o),
    )


CONVOLUTIONS = {
    "padded": (conv("pads: ints = [1,2,0,1]", normal(8, 6, 3, 3), 9, 8), (6, 9, 8)),
    "strided": (conv("strides: ints = [2,3]", normal(8, 6, 3, 3), 9, 11), (6, 9, 11)),
    "dilated": (conv("dilations: ints = [2,1]", normal(8, 6, 3, 2), 9, 8), (6, 9, 8)),
    "same": (
        conv('auto_pad = "SAME_LOWER", strides: ints = [2,1]', normal(8, 6, 4, 3), 9, 8),
        (6, 9, 8),
    ),
    "valid": (conv('auto_pad = "VALID"', normal(8, 6, 3, 3), 9, 8), (6, 9, 8)),
    "grouped": (conv("group: int = 2", normal(8, 6, 3, 3), 9, 8, groups=2), (12, 9, 8)),
    "1-D": (conv("pads: ints = [1,1]", normal(8, 6, 3), 9), (6, 9)),
    "3-D": (conv("strides: ints = [1,2,1]", normal(8, 6, 3, 2, 3), 5, 6, 4), (6, 5, 6, 4)),
    "flat": (conv("pads: ints = [0,1,0,1]", normal(8, 6, 1, 3), 5, 6), (6, 5, 6)),
}
every_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def first(model: Model) -> Layer:
    return find_layers(model.graph, context(model))[0]


def whole(layer: Layer, method: str) -> str:
    """The choice of all ranks of a structure."""
    from onnxc.numerics.lowrank import ranks

    return f"{layer.name}={Choice(method, ranks(method, layer.shape)[-1])}"


def close(a: dict[str, Array], b: dict[str, Array], tolerance: float = 1e-4) -> None:
    for name, expected in a.items():
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(b[name], expected, rtol=0, atol=limit)


@every_convolution
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "depthwise"])
def test_all_ranks_change_nothing(name: str, method: str) -> None:
    proto, size = CONVOLUTIONS[name]
    model, feed = load(proto), {"x": normal(3, *size)}
    layer = first(model)
    if method not in Factorize().methods(layer):
        pytest.skip(f"{method} is not for it")
    before = outputs(model, feed)
    done = apply_pass(
        model, Factorize(macs=0.0, ranks=(whole(layer, method),)), context(model), feed
    )
    assert done.problems == () and changed(list(done.changes)) == [layer.name]
    assert len(model.graph.nodes) == {"tucker": 3}.get(method, 2)
    close(before, outputs(model, feed))


@every_convolution
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp", "depthwise", "grouped"])
def test_every_structure_takes_its_share(name: str, method: str) -> None:
    proto, size = CONVOLUTIONS[name]
    model, feed = load(proto), {"x": normal(3, *size)}
    done = apply_pass(model, Factorize(method, macs=0.6), context(model), feed)  # type: ignore[arg-type]
    assert done.problems == ()
    assert len(done.changes) + len(done.skips) == 1
    for change in done.changes:
        assert change.after < change.before and "without data" in change.what


PRODUCTS = {
    "Gemm": bind(
        """g (float[N,12] x, float[12,10] W, float[10] b) => (float[N,10] y) {
            y = Gemm (x, W, b) }""",
        W=normal(12, 10),
        b=normal(10),
    ),
    "transposed Gemm": bind(
        """g (float[12,N] x, float[10,12] W, float[10] b) => (float[N,10] y) {
            y = Gemm <transA: int = 1, transB: int = 1, alpha: float = 0.5, beta: float = 2.0>
                (x, W, b) }""",
        W=normal(10, 12),
        b=normal(10),
    ),
    "MatMul": bind(
        "g (float[N,3,12] x, float[12,10] W) => (float[N,3,10] y) { y = MatMul (x, W) }",
        W=normal(12, 10),
    ),
    "Conv": bind(
        """g (float[N,12,4,4] x, float[10,12,1,1] W) => (float[N,10,2,2] y) {
            y = Conv <strides: ints = [2,2]> (x, W) }""",
        W=normal(10, 12, 1, 1),
    ),
    "LSTM": bind(
        """g (float[5,N,12] x, float[2,24,12] W, float[2,24,6] R, float[2,48] b)
            => (float[5,2,N,6] y) { y = LSTM <hidden_size: int = 6, direction = "bidirectional">
                (x, W, R, b) }""",
        W=normal(2, 24, 12),
        R=normal(2, 24, 6),
        b=normal(2, 48),
    ),
    "GRU": bind(
        """g (float[5,N,12] x, float[1,18,12] W, float[1,18,6] R) => (float[5,1,N,6] y) {
            y = GRU <hidden_size: int = 6> (x, W, R) }""",
        W=normal(1, 18, 12),
        R=normal(1, 18, 6),
    ),
}
FEEDS = {
    "Gemm": (3, 12),
    "transposed Gemm": (12, 3),
    "MatMul": (2, 3, 12),
    "Conv": (2, 12, 4, 4),
    "LSTM": (5, 2, 12),
    "GRU": (5, 2, 12),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_all_ranks_change_nothing(name: str) -> None:
    model, feed = load(PRODUCTS[name]), {"x": normal(*FEEDS[name])}
    before = outputs(model, feed)
    full = Factorize(macs=0.0, ranks=(whole(first(model), "svd"),))
    done = apply_pass(model, full, context(model), feed)
    assert done.problems == () and len(done.changes) == 1
    assert len(model.graph.nodes) == 2
    close(before, outputs(model, feed))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_known_rank_comes_back_exactly(name: str) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(PRODUCTS[name])
    old = proto.graph.initializer[0]
    shape = tuple(old.dims)
    is_recurrent = name in ("LSTM", "GRU")
    rows, columns = (shape[0] * shape[1], shape[2]) if is_recurrent else shape[:2]
    W = (normal(rows, 3) @ normal(3, columns)).reshape(shape)
    old.CopyFrom(onnx.numpy_helper.from_array(W, old.name))
    model, feed = load(proto), {"x": normal(*FEEDS[name])}
    before = outputs(model, feed)
    exact = Factorize(macs=0.0, ranks=(f"{first(model).name}=svd:3",))
    assert apply_pass(model, exact, context(model), feed).problems == ()
    close(before, outputs(model, feed), 1e-5)


NETWORK = bind(
    """g (float[N,8,10,10] x, float[12,8,3,3] V, float[12] a, float[16,12,3,3] W, float[16] b,
          float[10,16] F, float[10] f) => (float[N,10] y) {
        c = Conv <pads: ints = [1,1,1,1]> (x, V, a)
        r = Relu (c)
        d = Conv <strides: ints = [2,2]> (r, W, b)
        s = Relu (d)
        p = GlobalAveragePool (s)
        q = Flatten (p)
        y = Gemm <transB: int = 1> (q, F, f) }""",
    V=normal(12, 8, 3, 3),
    a=normal(12),
    W=normal(16, 12, 3, 3),
    b=normal(16),
    F=normal(10, 16),
    f=normal(10),
)
for node, name in zip(NETWORK.graph.node, ("A", "r", "B", "s", "p", "q", "F"), strict=True):
    node.name = name
MIXED = np.linalg.qr(normal(8, 8))[0] * np.geomspace(1, 0.05, 8, dtype=np.float32)


def images(count: int, seed: int = 0) -> Array:
    """Channels that hang together, and are far from zero on average."""
    return np.asarray(np.einsum("oc,nchw->nohw", MIXED, normal(count, 8, 10, 10, seed=seed)) + 1)


def prepared(model: Model, pass_: Factorize, **only: tuple[str, ...]) -> Context:
    infer(model)
    bare = context(model, **only)
    data = open_data({"x": images(48)}, [InputSpec("x", np.dtype(np.float32), ("N", 8, 10, 10))])
    keys = list(pass_.wants(model.graph, bare))
    return replace(bare, stats=dict(collect(model, keys, data, threads=1).stats))


def damage(model: Model) -> float:
    feed = {"x": images(32, seed=1)}
    y, z = outputs(NETWORK, feed)["y"], outputs(model, feed)["y"]
    return float(np.mean((y - z) ** 2) / np.var(y))


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp", "depthwise", "grouped"])
def test_data_keeps_outputs_nearer(method: str) -> None:
    pass_ = Factorize(method, macs=0.5)  # type: ignore[arg-type]
    blind, seeing = load(NETWORK), load(NETWORK)
    pass_.apply(blind.graph, context(blind))
    results = pass_.apply(seeing.graph, prepared(seeing, pass_))
    assert {"A", "B"} <= set(changed(results))
    assert damage(seeing) < damage(blind)


def test_the_best_structure_is_taken() -> None:
    model, errors = load(NETWORK), {}
    every = ("channel", "spatial", "tucker", "cp", "depthwise", "grouped")
    for method in (*every, "auto"):
        other, pass_ = copy(model), Factorize(method, macs=0.5)  # type: ignore[arg-type]
        results = pass_.apply(other.graph, prepared(other, pass_))
        what = next(r.what for r in results if isinstance(r, Change) and r.node == "B")
        errors[method] = float(what.rpartition("error ")[2].rstrip("%"))
    assert errors["auto"] == min(errors[method] for method in every)


def test_means_of_outputs_stay() -> None:
    model, pass_ = load(NETWORK), Factorize("channel", macs=0.3)
    ready = prepared(model, pass_, include=("A",))
    pass_.apply(model.graph, ready)
    model.graph.outputs = [model.graph.nodes[1].outputs[0]]
    original = load(NETWORK)
    original.graph.outputs = [original.graph.nodes[0].outputs[0]]
    for m in (model, original):
        m.graph.outputs[0].dtype = np.float32
        m.graph.outputs[0].shape = ["N", 12, 10, 10]
    feed = {"x": images(48)}
    made, kept = outputs(model, feed)["c"], outputs(original, feed)["c"]
    assert float(np.abs((made - kept).mean(axis=(0, 2, 3))).max()) < 0.05 * float(kept.std())


def test_names_come_from_the_original() -> None:
    model = load(NETWORK)
    Factorize("tucker", macs=0.5).apply(model.graph, context(model, include=("B",)))
    names = [node.name for node in model.graph.nodes if node.op == "Conv"]
    assert names == ["A", "B_factor1", "B_factor2", "B"]
    assert [n.inputs[1].name for n in model.graph.nodes[2:5]] == [
        "W_factor1",
        "W_factor2",
        "W_factor3",
    ]
    assert ops(model)[5] == "Relu"


def test_factors_are_not_factorized_again() -> None:
    model, pass_ = load(NETWORK), Factorize("tucker", macs=0.5)
    assert "B" in changed(pass_.apply(model.graph, context(model, include=("B",))))
    again = pass_.apply(model.graph, context(model, include=("B*",)))
    assert changed(again) == [] and "a factor already" in reasons(again)


def test_ranks_are_followed_and_the_rest_stays() -> None:
    model = load(NETWORK)
    results = Factorize(macs=0.0, ranks=("B=tucker:4x6",)).apply(model.graph, context(model))
    assert changed(results) == ["B"] and "no ranks are given" in reasons(results)
    middle = next(node for node in model.graph.nodes if node.name == "B_factor2")
    assert tuple(middle.inputs[1].shape) == (6, 4, 3, 3)
    assert middle.attrs["strides"] == [2, 2]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ("B=channel", "METHOD:RANK"),
        ("B=other:3", "METHOD:RANK"),
        ("B=tucker:3x", "METHOD:RANK"),
    ],
)
def test_ranks_that_cannot_be_read_are_refused(ranks: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Factorize(ranks=(ranks,))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ("C=channel:3", "no such layer"),
        ("B=svd:3", "has a kernel"),
        ("B=channel:300", "no such ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: str, words: str) -> None:
    model = load(NETWORK)
    with pytest.raises(OptionError, match=words):
        Factorize(ranks=(ranks,)).apply(model.graph, context(model))


def test_shared_weights_are_factorized_once() -> None:
    proto = bind(
        """g (float[N,12] x, float[12,12] W, float[12] b) => (float[N,12] y) {
            h = Gemm (x, W, b)
            r = Relu (h)
            y = Gemm (r, W, b) }""",
        W=normal(12, 12),
        b=normal(12),
    )
    model = load(proto)
    results = Factorize("svd", macs=0.6).apply(model.graph, context(model))
    assert len(changed(results)) == 2
    assert [r.after for r in results if isinstance(r, Change)][1] == 0
    gemms = [node for node in model.graph.nodes if node.op == "Gemm"]
    assert len(gemms) == 4
    assert gemms[0].inputs[1] is gemms[2].inputs[1] and gemms[1].inputs[1] is gemms[3].inputs[1]


def test_a_weight_that_is_excluded_elsewhere_stays() -> None:
    proto = bind(
        """g (float[N,12] x, float[12,12] W) => (float[N,12] y, float[N,12] z) {
            y = MatMul (x, W)
            z = MatMul (x, W) }""",
        W=normal(12, 12),
    )
    proto.graph.node[0].name, proto.graph.node[1].name = "one", "two"
    model = load(proto)
    results = Factorize(macs=0.5).apply(model.graph, context(model, exclude=("two",)))
    assert changed(results) == [] and "shared with two" in reasons(results)


def test_what_has_no_chain_is_told() -> None:
    proto = bind(
        """g (float[1,4,5,5] x, float[4,6,3,3] W, float[6,1,3,3] D) => (float[1,6,5,5] y) {
            c = ConvTranspose (x, W)
            r = Relu (c)
            y = Conv <group: int = 6, pads: ints = [0,0,0,0], strides: ints = [1,1]> (r, D) }""",
        W=normal(4, 6, 3, 3),
        D=normal(6, 1, 3, 3),
    )
    model = load(proto)
    results = Factorize().apply(model.graph, context(model))
    assert all(isinstance(result, Skip) for result in results) and len(results) == 2
    assert "ConvTranspose" in reasons(results) and "one output of each group" in reasons(results)


def test_the_result_quantizes_with_every_heavy_node_in_integers() -> None:
    model = load(NETWORK)
    original = copy(model)
    data = open_data({"x": images(32)}, [InputSpec("x", np.dtype(np.float32), ("N", 8, 10, 10))])
    calibration = Calibration(data, original=original)
    passes = (Factorize("spatial", macs=0.6), Reconstruct(), Quantize())
    steps = compress(model, passes, context(model), calibration, {"x": images(2)})
    assert all(step.problems == () for step in steps)
    heavy = [n for n in model.graph.nodes if n.op in ("Conv", "Gemm")]
    assert len(heavy) == 5
    assert all(n.inputs[0].inputs[0].op == "DequantizeLinear" for n in heavy)
    assert damage(model) < 0.05


def test_refitting_the_last_factor_helps() -> None:
    plain, refit = load(NETWORK), load(NETWORK)
    data = open_data({"x": images(64)}, [InputSpec("x", np.dtype(np.float32), ("N", 8, 10, 10))])
    calibration = Calibration(data, original=load(NETWORK))
    pass_ = Factorize("channel", macs=0.4)
    compress(plain, (pass_,), context(plain), calibration)
    compress(refit, (pass_, Reconstruct()), context(refit), calibration)
    assert damage(refit) < damage(plain)


def test_few_samples_do_not_mislead() -> None:
    """Three samples tell little of 72 inputs: what they leave out counts too."""
    pass_, model = Factorize("channel", macs=0.5), load(NETWORK)
    infer(model)
    data = open_data({"x": images(3)}, [InputSpec("x", np.dtype(np.float32), ("N", 8, 10, 10))])
    keys = list(pass_.wants(model.graph, context(model)))
    stats = dict(collect(model, keys, data, threads=1).stats)
    blind = load(NETWORK)
    pass_.apply(blind.graph, context(blind))
    pass_.apply(model.graph, replace(context(model), stats=stats))
    assert damage(model) < damage(blind)


def in_turn(pass_: Factorize, count: int = 64) -> Model:
    """The network as the pipeline leaves it: layers one after the other."""
    model = load(NETWORK)
    data = open_data({"x": images(count)}, [InputSpec("x", np.dtype(np.float32), ("N", 8, 10, 10))])
    compress(model, (pass_,), context(model), Calibration(data, original=load(NETWORK)))
    return model


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "grouped"])
def test_layers_make_good_what_those_before_lost(method: str) -> None:
    pass_, apart = Factorize(method, macs=0.4), load(NETWORK)  # type: ignore[arg-type]
    pass_.apply(apart.graph, prepared(apart, pass_))
    assert damage(in_turn(pass_)) < damage(apart)


@pytest.mark.parametrize("dims", ["3,12", "3,1", "1,12", "1"])
def test_a_bias_of_any_shape_stays_what_it_is(dims: str) -> None:
    shape = tuple(map(int, dims.split(",")))
    proto = bind(
        f"""g (float[3,12] x, float[12,12] W, float[{dims}] B) => (float[3,12] y) {{
            y = Gemm (x, W, B) }}""",
        W=normal(12, 12),
        B=normal(*shape),
    )
    model, feed = load(proto), {"x": normal(3, 12)}
    data = open_data({"x": normal(60, 12)}, [InputSpec("x", np.dtype(np.float32), (3, 12))])
    full = Factorize("svd", macs=0.0, ranks=(whole(first(model), "svd"),))
    (done,) = compress(model, [full], context(model), Calibration(data, original=load(proto)), feed)
    assert done.problems == () and len(done.changes) == 1
    close(outputs(proto, feed), outputs(model, feed))


def test_a_recurrent_layer_is_fitted_to_its_input() -> None:
    """Inputs of rank 4 need no more of the weight, whatever its own rank."""
    model, source = load(PRODUCTS["LSTM"]), np.random.default_rng(0)
    x = source.standard_normal((5, 64, 4)) @ source.standard_normal((4, 12))
    feed = {"x": x.astype(np.float32)}
    pass_ = Factorize("svd", macs=0.0, ranks=(f"{first(model).name}=svd:4",))
    (key,) = pass_.wants(model.graph, context(model))
    seen, before = observer_of(key), outputs(model, feed)
    seen.update(feed["x"])
    seen.settle()
    blind = copy(model)
    pass_.apply(model.graph, replace(context(model), stats={key: seen}))
    pass_.apply(blind.graph, context(blind))
    errors = [float(np.abs(before["y"] - outputs(m, feed)["y"]).max()) for m in (model, blind)]
    assert errors[0] < errors[1] / 4


def test_layers_that_stay_say_why() -> None:
    model = load(NETWORK)
    told = Factorize(macs=0.0, ranks=("B=channel:4",), whole=("A=no gain = none",))
    results = told.apply(model.graph, context(model))
    assert Skip("A", "no gain = none") in results


@pytest.mark.parametrize("method", ["auto", "channel"])
@pytest.mark.parametrize("rule", ["energy:0.8", "sqnr:8", "vbmf"])
def test_rules_choose_ranks(rule: str, method: str) -> None:
    model, pass_ = load(NETWORK), Factorize(method, rank=rule)  # type: ignore[arg-type]
    results = pass_.apply(model.graph, prepared(model, pass_))
    assert len(results) == 3
    for result in results:
        if isinstance(result, Change) and rule != "vbmf":
            limit = {"energy:0.8": 20, "sqnr:8": 15.9}[rule]
            assert float(result.what.rpartition("error ")[2].rstrip("%")) <= limit


def test_a_rule_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(OptionError, match="energy:SHARE"):
        Factorize(rank="energy:7")
