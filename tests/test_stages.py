"""Runs in stages are runs of the whole, and nothing is left behind."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from big import SMALL, generate
from conftest import Parse
from quantizing import dataset

from calib.twin import drift
from onnxc import cuts, graph, stages, weights
from onnxc.boundary import Boundary
from onnxc.graph import Model, load
from onnxc.runtime import Runtime
from onnxc.stages import Source, Staged

W = (np.random.default_rng(0).standard_normal((256, 256)) / 16).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
PLAIN = Runtime(level="none")  # fusions that a cut goes through would round in another order


def in_stages(model: Model, room: int, feed: dict[str, Any], runtime: Runtime = PLAIN) -> Staged:
    """Stages of `room` bytes of weights, whatever the libraries take."""
    source = Source(*graph.as_declared(model))
    names = [value.name for value in source.proto.graph.output]
    facts = cuts.Facts(source.proto, names, feed)
    memory = cuts.BASE + cuts.SPARE + int(cuts.ARENA * facts.live()) + room
    return Staged(source, facts, cuts.plan(facts, memory), runtime)


def whole(model: Model, feed: dict[str, Any], runtime: Runtime = PLAIN) -> dict[str, Any]:
    staged = stages.open_stages(model, feed, runtime)
    assert staged.is_whole
    return staged.once(feed)


@pytest.fixture(autouse=True)
def heavy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every weight counts, and temporary files are looked for at the end."""
    monkeypatch.setattr(cuts, "LIGHT", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith("onnxc-")]


TEXTS = {
    "residual": """g (float[N, 256] x) => (float[N, 256] y) {
        a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) d = Add(c, a) e = MatMul(d, u) f = Add(e, b)
        y = Add(f, x) }""",
    "tied": """g (float[N, 256] x) => (float[N, 256] y) {
        a = MatMul(x, w) b = MatMul(a, v) c = MatMul(b, w) y = MatMul(c, u) }""",
    "integers": """g (float[N, 256] x) => (float[N, 256] y, int64[N] i) {
        a = MatMul(x, w) i = ArgMax <axis = 1, keepdims = 0> (a) m = Greater(a, x)
        b = MatMul(a, v) c = Where(m, b, x) d = MatMul(c, u) r = Gather(u, i) y = Add(d, r) }""",
    "body": """g (float[N, 256] x, bool c) => (float[N, 256] y) {
        a = MatMul(x, w) b = MatMul(a, v)
        d = If (c) <then_branch = t () => (float[N, 256] p) { p = MatMul(a, u) },
                   else_branch = e () => (float[N, 256] q) { q = Add(a, b) }>
        y = Add(d, x) }""",
    "folded": """g (float[N, 256] x) => (float[N, 256] y) {
        s = Transpose <perm = [1, 0]> (w) h = Mul(s, s) a = MatMul(x, h) b = MatMul(a, v)
        c = MatMul(b, h) y = MatMul(c, u) }""",
    "output_inside": """g (float[N, 256] x)
        => (float[N, 256] a, float[256, 256] s, float[N, 256] y) {
        s = Neg(w) a = MatMul(x, s) b = MatMul(a, v) y = MatMul(b, u) }""",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("runtime", [PLAIN, Runtime()], ids=["plain", "optimized"])
def test_stages_compute_what_the_whole_does(parse: Parse, text: str, runtime: Runtime) -> None:
    names = [n for n in "wvu" if f" {n})" in text or f"({n}" in text]
    model = load(parse(text, **{n: W.T.copy() if n == "v" else W for n in names}))
    feed = {"x": X, "c": np.array(True)} if "bool c" in text else {"x": X}
    expected = whole(model, feed, runtime)
    for room in (0, W.nbytes, 2 * W.nbytes):
        staged = in_stages(model, room, feed, runtime)
        assert len(staged.stages) > 1
        found = staged.once(feed)
        assert list(found) and found.keys() == expected.keys()
        for name, value in expected.items():
            close = 0 if runtime is PLAIN else 1e-4  # what is not folded is not packed
            np.testing.assert_allclose(found[name], value, rtol=close, atol=close)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_without_a_bound_one_stage_has_all_that_is_needed(text: str, parse: Parse) -> None:
    names = [n for n in "wvu" if f" {n})" in text or f"({n}" in text]
    proto = graph.as_declared(load(parse(text, **dict.fromkeys(names, W))))[0]
    facts = cuts.Facts(proto, [value.name for value in proto.graph.output], {"x": X})
    (cut,) = facts.stages(())
    assert facts.everything() == replace(cut, bytes=0)


def test_a_weight_that_is_too_large_is_a_stage_of_its_own(parse: Parse) -> None:
    model = load(parse(TEXTS["residual"], w=W, v=W, u=W))
    staged = in_stages(model, 0, {"x": X})
    assert [stage.bytes for stage in staged.stages] == [W.nbytes] * 3
    assert [stage.gives for stage in staged.stages] == [("a",), ("b", "d"), ()]


def test_a_sequence_is_not_cut(parse: Parse) -> None:
    text = """g (float[2, 256] x) => (float[2, 256] y) {
        s = SequenceConstruct(x, x) a = MatMul(x, w) p = MatMul(a, v)
        z = Constant <value_int = 0> () b = SequenceAt(s, z) c = Add(b, p) y = MatMul(c, u) }"""
    model = load(parse(text, w=W, v=W, u=W))
    staged = in_stages(model, 0, {"x": X})
    assert [len(stage.gives) for stage in staged.stages] == [1, 0]
    np.testing.assert_array_equal(staged.once({"x": X})["y"], whole(model, {"x": X})["y"])


def test_each_stage_sees_all_batches_before_the_next(parse: Parse) -> None:
    model = load(parse(TEXTS["residual"], w=W, v=W, u=W))
    staged = in_stages(model, 0, {"x": X})
    feeds = [{"x": X[:1]}, {"x": X[1:]}]
    order = [(stage, batch) for stage, batch, _ in staged.run(lambda: feeds)]
    assert order == [(stage, batch) for stage in range(3) for batch in range(2)]


def test_what_crosses_goes_to_disk_and_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxc.boundary.IN_MEMORY", 100)
    arrays = [np.arange(20, dtype=np.int64), X, np.array([[True, False]])]
    with Boundary() as boundary:
        for index, array in enumerate(arrays):
            boundary.put(index, "a/b", array)
        folder = Path(boundary.folder.name)
        assert len(list(folder.iterdir())) == 1
        for index, array in enumerate(arrays):
            found = boundary.get(index, "a/b")
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        boundary.drop(["a/b"])
        assert not list(folder.iterdir())
    assert not folder.exists()


def test_a_run_that_is_left_early_leaves_nothing(parse: Parse) -> None:
    model = load(parse(TEXTS["residual"], w=W, v=W, u=W))
    running = in_stages(model, 0, {"x": X}).run(lambda: [{"x": X}])
    next(running)
    running.close()


def test_new_weights_of_a_bounded_model_lie_on_disk_as_long_as_they_live(parse: Parse) -> None:
    model = load(parse(TEXTS["residual"], w=W, v=W, u=W))
    model.scratch = weights.Scratch()
    graph.spill(model.graph, model.scratch)
    folder = Path(model.scratch.folder.name)
    kept = graph.store(model.graph, "new", W)
    small = graph.store(model.graph, "small", W[:1])
    assert isinstance(kept._values, weights.ExternalValues)
    assert isinstance(small._values, np.ndarray)
    np.testing.assert_array_equal(graph.values(kept), W)
    assert len(list(folder.iterdir())) == 1
    del kept
    gc.collect()
    assert not list(folder.iterdir())
    del model, small
    gc.collect()
    assert not folder.exists()


def test_a_generated_model_in_stages(tmp_path: Path) -> None:
    model = load(generate(tmp_path, SMALL))
    feed = {"ids": np.random.default_rng(2).integers(0, SMALL.vocabulary, (2, 8))}
    expected = whole(model, feed)["logits"]
    staged = in_stages(model, 50_000, feed)
    assert len(staged.stages) > 5
    np.testing.assert_array_equal(staged.once(feed)["logits"], expected)


REAL = {
    "mobilenetv2": {"float": (1, 3, 224, 224)},
    "stories260k": {},
    "sst2": {},
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_in_stages(shared: Path, name: str) -> None:
    model = load(shared / "models" / f"{name}.onnx")
    feed = fed(model)
    expected = whole(model, feed)
    staged = in_stages(model, 300_000, feed)
    assert len(staged.stages) > 2
    found = staged.once(feed)
    for output, value in expected.items():
        np.testing.assert_array_equal(found[output], value)


def fed(model: Model) -> dict[str, Any]:
    """Values of the declared types and shapes; 2 samples and 6 positions where sizes are free."""
    rng, feed = np.random.default_rng(3), {}
    for tensor in model.graph.inputs:
        shape = [d if isinstance(d, int) else (6 if i else 2) for i, d in enumerate(tensor.shape)]
        whole = np.dtype(tensor.dtype).kind in "iu"
        drawn = rng.integers(1, 50, shape) if whole else rng.standard_normal(shape)
        feed[tensor.name] = drawn.astype(tensor.dtype)
    return feed


def test_an_outline_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(generate(tmp_path, SMALL))
    one = tmp_path / "one.onnx"
    graph.save(model, one)
    assert one.read_bytes() == graph.to_bytes(model)  # written piece by piece
    monkeypatch.setattr(graph, "OUTLINED", 0)
    again = load(one)
    held = [t._values for t in graph.constants(again.graph) if graph.nbytes(t) > 1024]
    assert held and all(isinstance(v, weights.ExternalValues) for v in held)
    assert graph.to_bytes(again) == one.read_bytes()
    one.write_bytes(one.read_bytes()[:-100])
    with pytest.raises(graph.ModelError, match="not an ONNX model, or a truncated one"):
        load(one)


GEMMS = """g (float[N, 256] x) => (float[N, 256] y) {
    a = Gemm(x, w, b) c = Relu(a) d = Gemm(c, v, b) e = Relu(d) y = Gemm(e, u, b) }"""


def test_drift_in_stages_is_that_of_the_whole(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "SMALL", 0)
    b = np.linspace(-1, 1, 256, dtype=np.float32)
    original = load(parse(GEMMS, w=W, v=W, u=W, b=b))
    rounded = np.round(W * 32) / 32
    current = load(parse(GEMMS, w=rounded, v=rounded, u=rounded, b=b))
    data = dataset(original, {"x": X})
    expected = drift(original, current, ["a", "d", "y"], data)
    first, second = (graph.bound(model, cuts.BASE) for model in (original, current))
    assert len(stages.open_stages(second, {"x": X}).stages) == 3
    found = drift(first, second, ["a", "d", "y"], data, max_memory=cuts.BASE)
    for name, values in expected.items():
        assert np.abs(values).max() > 0
        np.testing.assert_array_equal(found[name], values)
