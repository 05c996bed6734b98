"""Layers on few levels of a scheme, one after the other, and the files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calls import report_of
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import named
from numpy.typing import NDArray
from quantizing import Feed, dataset, decibels
from texts import bind, normal

from calib.collect import collect
from onnxc.core import Context, Pass
from onnxc.errors import OptionError
from onnxc.graph import Model, copy, load, opset, set_opset, to_bytes, values
from onnxc.matrices import Layer, error, layers
from onnxc.numerics.discrete import SCHEMES, discrete
from onnxc.numerics.levels import Levels
from onnxc.numerics.sparse import Quadratic
from onnxc.pipeline import Calibration, Step, compress
from onnxc.quantization import QuantizeSettings
from onnxc.recipe import loads
from onnxc.runtime import session
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.storage.row_levels import RowLevels
from onnxc.targets import choose
from passes.quantize import Quantize
from passes.quantize_constants import QuantizeConstants
from passes.quantize_levels import QuantizeLevels, why_no_integers
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

Array = NDArray[Any]

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CNN_DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
SCHEMES_BITS = [("pow2", 3), ("ternary", 2), ("binary", 2), ("admm", 3), ("levels", 3)]
CASES = [*SCHEMES_BITS, ("pow2", 4), ("binary", 1), ("binary", 3), ("levels", 1), ("levels", 4)]
every_scheme = pytest.mark.parametrize(("scheme", "bits"), SCHEMES_BITS)

VECTORS: Feed = {"x": normal(200, 16) @ normal(16, 16) + np.float32(1)}
STEPS: Feed = {"x": normal(6, 40, 24) @ normal(24, 24, seed=1) / 5}
RECURRENT = """g (float[6,N,24] x, float[1,{n},24] W, float[1,{n},24] R) => (float[6,1,N,24] y) {{
    y = {op} <hidden_size: int = 24> (x, W, R) }}"""
LAYERS = named(
    {
        "MatMul": (
            bind(
                "g (float[N,16] x, float[16,24] W) => (float[N,24] y) { y = MatMul (x, W) }",
                W=normal(16, 24),
            ),
            VECTORS,
        ),
        "Gemm": (
            bind(
                """g (float[N,16] x, float[24,16] W, float[24] b) => (float[N,24] y) {
                    y = Gemm <transB: int = 1> (x, W, b) }""",
                W=normal(24, 16),
                b=normal(24),
            ),
            VECTORS,
        ),
        "Gather": (
            bind(
                "g (int64[N] x, float[40,24] W) => (float[N,24] y) { y = Gather (W, x) }",
                W=normal(40, 24),
            ),
            {"x": np.arange(40)},
        ),
        **{
            op: (
                bind(
                    RECURRENT.format(op=op, n=24 * gates),
                    W=normal(1, 24 * gates, 24) / 4,
                    R=normal(1, 24 * gates, 24, seed=2) / 5,
                ),
                STEPS,
            )
            for op, gates in (("LSTM", 4), ("GRU", 3))
        },
    }
)


def done(
    passes: list[Pass], source: onnx.ModelProto | Path, feed: Feed, **only: tuple[str, ...]
) -> tuple[Model, list[Step]]:
    """Passes with the statistics of a feed, each checked: valid, finite, the same interface."""
    model, origin = load(source), load(source)
    data = dataset(model, feed)
    first = next(iter(data.batches(4)))
    infer(model, first)
    infer(origin, first)
    context = Context(opset(model.graph), choose("x86-vnni"), only=Selector(**only))
    calibration = Calibration(data, original=origin)
    steps = compress(model, passes, context, calibration, first)
    assert not [problem for step in steps for problem in step.problems]
    return model, steps


def stored(scheme: Any, bits: int, **fields: Any) -> list[Pass]:
    levels = QuantizeLevels(scheme, bits, **{"keep_ends": False, "smallest": 0, **fields})
    return [UpgradeOpset(21), levels, StoreCodebooks()]


def weight(model: Model, position: int = 1) -> Array:
    """What a node reads as its weight, as the runtime makes it; what is around it is lost."""
    graph = model.graph
    node = next(node for node in graph.nodes if node.name == "layer")
    tensor = node.inputs[position]
    if not tensor.inputs:
        return values(tensor)
    graph.nodes = [other for other in graph.nodes if other is not node]
    graph.inputs, graph.outputs = [], [tensor]
    return np.asarray(session(to_bytes(model)).run([tensor.name], {})[0])


@given(st.sampled_from(CASES), st.integers(2, 20), st.integers(20, 40), st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_no_layer_loses_more_than_on_its_nearest_levels(
    case: tuple[Any, int], outputs: int, d: int, seed: int
) -> None:
    text = f"g (float[N,{d}] x, float[{d},{outputs}] W) => (float[N,{outputs}] y) {{"
    proto = bind(text + "y = MatMul (x, W) }", W=normal(d, outputs, seed=seed))
    proto.graph.node[0].name = "layer"
    feed = {"x": normal(8 * d, d, seed=seed + 1) @ normal(d, d, seed=seed + 2)}
    pass_ = QuantizeLevels(*case, keep_ends=False, reconstruct=False, smallest=0)
    after, steps = done([UpgradeOpset(21), pass_], proto, feed)
    if not steps[1].changes:
        assert "saves none" in steps[1].skips[0].reason
        return
    (layer,) = layers(load(proto).graph, frozenset({"layer"}))
    W, E, row = layer.matrix, metric(proto, feed, layer), SCHEMES[pass_.solver]
    nearest = next(row.starts(W, E, Levels(pass_.pattern, row.is_free))).weight
    found = weight(after).T[None].astype(np.float64)
    assert E.error(W - found) <= E.error(W - nearest) + 1e-6 * E.error(W)  # float32


def metric(proto: onnx.ModelProto, feed: Feed, layer: Layer) -> Quadratic:
    model = load(proto)
    stats = collect(model, layer.keys, dataset(model, feed)).stats
    return error(layer, Context(opset(model.graph), choose("x86-vnni"), stats=stats))


@pytest.mark.parametrize("name", sorted(LAYERS))
@every_scheme
def test_layers_of_every_kind(name: str, scheme: Any, bits: int) -> None:
    """Gaussian weights of two bits have 7 dB at most where inputs say nothing."""
    proto, feed = LAYERS[name]
    model, (_, step, _) = done(stored(scheme, bits), proto, feed)
    assert all("saves none" in s.reason or "few levels already" in s.reason for s in step.skips)
    if step.changes:
        assert decibels(proto, model, feed) > {"ternary": 6, "binary": 8}.get(scheme, 11)
        assert len(to_bytes(model)) < proto.ByteSize()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@every_scheme
def test_recurrent_layers_have_both_weights_on_levels(name: str, scheme: Any, bits: int) -> None:
    proto, feed = LAYERS[name]
    model, (_, step, _) = done(stored(scheme, bits), proto, feed)
    assert ["inputs are alike" in c.what for c in step.changes] == [False, True]
    for position in (1, 2):
        rows = weight(copy(model), position)[0]
        most = max(len(np.unique(row)) for row in rows)
        assert most <= len(QuantizeLevels(scheme, bits).pattern)
    assert len(to_bytes(model)) < proto.ByteSize() / (1.7 if scheme == "levels" else 3)
    kept, (_, step, _) = done(stored(scheme, bits, keep_ends=True), proto, feed)
    assert [change.what.split(",")[0] for change in step.changes] == ["8 bits", "8 bits"]
    assert decibels(proto, kept, feed) > 35


@every_scheme
def test_the_graph_makes_the_weight_that_was_found(scheme: Any, bits: int) -> None:
    """In half precision too, and with rows that lie across the axes of the weight."""
    for name in ("ConvTranspose", "MatMul", "grouped Conv"):
        proto = LAYERS[name][0]
        layer = layers(load(proto).graph, frozenset({"layer"}))[0]
        found = discrete(layer.matrix, Quadratic(), QuantizeLevels(scheme, bits).solver, bits)
        for dtype in (np.float32, np.float16):
            model = load(proto)
            set_opset(model.graph, 18)
            tensor = model.graph.nodes[0].inputs[1]
            tensor.values = tensor.values.astype(dtype)
            RowLevels(model.graph, 18).put(tensor, found, layer.is_turned)
            made = weight(model)
            rounding = {"rtol": 2e-6 if dtype == np.float32 else 1e-3, "atol": 1e-6}
            np.testing.assert_allclose(made, layer.shaped(found.weight), **rounding)


@every_scheme
def test_digits(scheme: Any, bits: int) -> None:
    """Layers that are chosen by name are stored small, too, and their file is a proven one."""
    feed = {"image": np.load(CNN_DATA)["image"][:8].astype(np.float32)}
    passes: list[Pass] = [UpgradeOpset(18), QuantizeLevels(scheme, bits), StoreCodebooks()]
    chosen = ("/0/0.2/0.2.4/*", "/1/1.0/narrow/*", "op:Gemm")
    model, (_, step, _) = done(passes, CNN, feed, include=chosen)
    told = [change.what.split(",")[0] for change in step.changes]
    assert told == [QuantizeLevels(scheme, bits).summary] * 2 + ["8 bits"]
    saved = CNN.stat().st_size - len(to_bytes(model))
    assert saved > sum(c.before for c in step.changes[:2]) * (1 - bits / 32) - 6000
    assert decibels(onnx.load(CNN), model, feed) > (15 if bits == 2 else 25)


@pytest.mark.parametrize(("scheme", "bits"), [("pow2", 3), ("ternary", 2)])
def test_kernels_compute_in_the_integers_that_levels_are(scheme: Any, bits: int) -> None:
    feed = {"image": np.load(CNN_DATA)["image"][:8].astype(np.float32)}
    levels = QuantizeLevels(scheme, bits, scales="inside")
    passes: list[Pass] = [Quantize(weights=False), levels, QuantizeConstants()]
    model, steps = done(passes, CNN, feed, include=("/1/1.0/narrow/*", "/1/1.1/*", "op:Gemm"))
    assert [c.what.split(",")[0] for c in steps[1].changes] == [levels.summary, "8 bits"]
    stored = [values(t) for n in model.graph.nodes for t in n.inputs if is_int8(t)]
    least = min(len(np.unique(q)) for q in stored if q.size > 1000)
    assert least <= 2**bits


def is_int8(tensor: Any) -> bool:
    return not tensor.inputs and tensor.dtype == np.int8 and hasattr(tensor, "values")


def test_levels_that_are_no_integers_of_a_target() -> None:
    levels = QuantizeLevels("pow2", 4)
    assert why_no_integers(levels, choose("x86-vnni")) == ""
    assert "up to 64" in why_no_integers(levels, choose("x86"))
    assert "levels of its own" in why_no_integers(QuantizeLevels("binary", 2), choose("x86-vnni"))
    assert why_no_integers(QuantizeLevels("ternary"), choose("x86")) == ""


def test_zeros_of_a_sparse_weight_stay() -> None:
    proto, feed = LAYERS["Conv"]
    sparse = onnx.ModelProto()
    sparse.CopyFrom(proto)
    array = onnx.numpy_helper.to_array(sparse.graph.initializer[0]).copy()
    array[np.abs(array) < 0.7] = 0
    sparse.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "W"))
    model, _ = done(stored("ternary", 2), sparse, feed)
    assert not weight(model)[array == 0].any()


def test_a_second_time_there_is_nothing_to_do() -> None:
    proto, feed = LAYERS["Conv"]
    again: list[Pass] = [*stored("pow2", 3)[:2], QuantizeLevels("pow2", 3, False, smallest=0)]
    _, (_, first, second) = done(again, proto, feed)
    assert first.changes and not second.changes
    assert [skip.reason for skip in second.skips] == ["not quantized: it has few levels already"]


CLASHES = {
    "rounding": ({"scheme": "pow2", "rounding": "gptq"}, "no --rounding"),
    "bits of ternary": ({"scheme": "ternary", "bits": 3}, "no --bits"),
    "few": ({"scheme": "pow2", "bits": 1}, "bits of pow2 are 2 to 5, not 1"),
    "many": ({"scheme": "binary", "bits": 8}, "bits of binary are 1 to 4, not 8"),
    "format": ({"scheme": "levels", "format": "dynamic"}, "not dynamic"),
    "float": ({"scheme": "admm", "format": "qdq", "activations": "float"}, "not --format qdq"),
    "integers": ({"scheme": "admm", "format": "weight-only", "activations": 8}, "weight-only"),
    "one bit": ({"bits": 1}, "--scheme binary or levels"),
}


@pytest.mark.parametrize("name", CLASHES)
def test_settings_that_do_not_go_together(name: str) -> None:
    given_settings, sentence = CLASHES[name]
    with pytest.raises(OptionError, match=sentence):
        QuantizeSettings(**given_settings)  # type: ignore[arg-type]


def test_the_command_and_its_recipe(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (
        "quantize",
        CNN,
        "--data",
        CNN_DATA,
        "--samples",
        10,
        "--include",
        "/1/1.0/narrow/*",
    )
    found = report_of(capsys, *arguments, "--scheme", "ternary", "-o", "1.onnx")
    assert (found["way"], found["coverage"]["integer"]) == ("ternary, in float", 0)
    assert found["count"] == 1 and found["after"]["bytes"] < found["before"]["bytes"] - 6000
    Path("r.toml").write_text(found["recipe"])
    assert [p.name for p in loads(found["recipe"]).passes][-2] == "quantize-levels"
    report_of(capsys, "quantize", CNN, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
