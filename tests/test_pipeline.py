"""The pipeline: a pass that fails in any way leaves the model byte for byte, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from texts import bind, context, normal, ops

import onnxc.pipeline
from onnxc.check import problems
from onnxc.core import Change, Context, Key, Skip
from onnxc.errors import ModelError, OptionError
from onnxc.graph import constant, fresh, load, opset, to_bytes
from onnxc.pipeline import apply_pass, prepare
from onnxc.runtime import dtype_of, run, session

TEXT = """g (float[N,4] x, float[4,4] W) => (float[N,4] y) {
    a = MatMul (x, W)
    b = Identity (a)
    y = Relu (b) }"""
FEED = {"x": normal(3, 4)}
PROTO = bind(TEXT, W=normal(4, 4))


@dataclass(frozen=True)
class Edit:
    """A pass that does what a test tells it to."""

    edit: Callable[[gs.Graph], None]
    name: ClassVar[str] = "edit"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        self.edit(graph)
        return [Change("MatMul_0", "edited")]


@dataclass(frozen=True)
class LossyEdit(Edit):
    lossless: ClassVar[bool] = False


def scale(graph: gs.Graph, factor: float = 1.5) -> None:
    node = graph.nodes[0]
    node.inputs[1] = constant(fresh(graph, "W2"), node.inputs[1].values * np.float32(factor))


def rename_output(graph: gs.Graph) -> None:
    graph.outputs[0].name = "z"


def break_node(graph: gs.Graph) -> None:
    graph.nodes[-1].op = "NoSuchOperator"


def cut(graph: gs.Graph) -> None:
    graph.nodes.clear()


def make_nan(graph: gs.Graph) -> None:
    scale(graph, float("nan"))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (scale, "SQNR"),
        (rename_output, "lost output 'y'"),
        (break_node, "NoSuchOperator"),
        (cut, "output"),
        (make_nan, "finite"),
    ],
)
def test_rolled_back_byte_for_byte(edit: Callable[[gs.Graph], None], problem: str) -> None:
    model = load(PROTO)
    before = to_bytes(model)
    step = apply_pass(model, Edit(edit), context(model), FEED)
    assert problem in "\n".join(step.problems)
    assert step.changes == ()
    assert to_bytes(model) == before


@pytest.mark.parametrize(
    "error",
    [
        OptionError("bits must be 4 or 8"),
        ValueError("bad shape"),
        KeyError("W"),
        IndexError("3"),
        TypeError("no"),
        AttributeError("no"),
        ZeroDivisionError("no"),
        AssertionError("no"),
        RuntimeError("no"),
    ],
)
def test_a_pass_that_raises_half_way_is_undone(error: Exception) -> None:
    def fail(graph: gs.Graph) -> None:
        scale(graph)
        raise error

    model = load(PROTO)
    before = to_bytes(model)
    step = apply_pass(model, Edit(fail), context(model), FEED)
    assert str(error) in step.problems[0]
    assert to_bytes(model) == before


def test_interruption_is_not_swallowed() -> None:
    def interrupt(graph: gs.Graph) -> None:
        raise KeyboardInterrupt

    model = load(PROTO)
    with pytest.raises(KeyboardInterrupt):
        apply_pass(model, Edit(interrupt), context(model), FEED)


def test_lossy_pass_may_change_the_numbers_but_not_to_nan() -> None:
    model = load(PROTO)
    assert apply_pass(model, LossyEdit(scale), context(model), FEED).problems == ()
    assert model.graph.nodes[0].inputs[1].name == "W2"
    step = apply_pass(model, LossyEdit(make_nan), context(model), FEED)
    assert "12 values that are NaN" in step.problems[0]


def test_steps_chain_without_running_the_reference_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original = onnxc.pipeline.snapshot
    monkeypatch.setattr(
        onnxc.pipeline, "snapshot", lambda *given: runs.append(1) or original(*given)
    )
    model = load(PROTO)
    first = apply_pass(model, LossyEdit(scale), context(model), FEED)
    second = apply_pass(model, LossyEdit(scale), context(model), FEED, first.after)
    assert len(runs) == 3
    assert second.after is not None
    assert second.after.outputs is not None


def test_prepare_runs_every_pass_and_keeps_the_numbers() -> None:
    text = """g (float[N,4] x, float[4,3] W, float[3] s, float[3] v) => (float[N,3] y) {
        t = Transpose (W)
        i = Identity (x)
        a = Gemm <transB = 1> (i, t)
        n = BatchNormalization (a, s, s, s, v)
        y = Softmax <axis = 1> (n) }"""
    weights = {"W": normal(4, 3), "s": normal(3), "v": np.ones(3, np.float32)}
    model = load(bind(text, 11, **weights))
    seen: list[str] = []
    steps = prepare(model, FEED, progress=seen.append)
    assert [step.name for step in steps] == seen
    assert [step.problems for step in steps] == [()] * len(steps)
    changed = {step.name for step in steps if step.changes}
    assert changed == {"upgrade-opset", "fold-constants", "drop-identity", "fold-norm"}
    assert ops(model) == ["Gemm", "Softmax"]


def test_prepare_without_data_still_checks_validity() -> None:
    model = load(PROTO)
    steps = prepare(model)
    assert ops(model) == ["MatMul", "Relu"]
    assert not any(step.problems for step in steps)


def zoo_feed(path: Path, opened: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Made-up input in the shapes of the manifest."""
    manifest = json.loads((path.parent / "manifest.json").read_text())
    shapes = next(row for row in manifest if row["name"] == path.stem).get("test_input_shapes", {})
    random = np.random.default_rng(0)
    feed = {}
    for port in opened.get_inputs():
        kind = dtype_of(port.type)
        if kind is None:
            raise ModelError(f"input {port.name} is not a tensor")
        shape = shapes.get(port.name) or [d if isinstance(d, int) else 1 for d in port.shape]
        whole = random.integers(0, 2, shape)
        feed[port.name] = (random.standard_normal(shape) if kind.kind == "f" else whole).astype(
            kind
        )
    return feed


def check_zoo_model(path: Path) -> None:
    """Prepared, a model runs, keeps its interface, and computes the same as the original file."""
    try:
        opened = session(path)
        feed = zoo_feed(path, opened)
        run(opened, feed)
        model = load(path)
    except ModelError:
        pytest.skip("ONNX Runtime does not run this model, or it holds a map")
    steps = prepare(model, feed)
    assert [step.problems for step in steps] == [()] * len(steps)
    assert problems(load(path), model, feed, lossless=True) == []
    assert opset(model.graph) >= 13 or path.stem == "mlnet_pipeline"


@pytest.mark.parametrize(
    "name", ["winml_mnist", "ten_vad", "yunet_120x160", "selfie_seg_landscape"]
)
def test_small_real_models(shared: Path, name: str) -> None:
    check_zoo_model(shared / "models" / "zoo" / f"{name}.onnx")


@pytest.mark.slow
def test_all_real_models(shared: Path, subtests: pytest.Subtests) -> None:
    for path in sorted((shared / "models" / "zoo").glob("*.onnx")):
        with subtests.test(path.stem):
            check_zoo_model(path)


@pytest.mark.slow
def test_preparation_takes_under_a_second(shared: Path) -> None:
    model = load(shared / "models" / "mobilenetv2.onnx")
    feed = {model.graph.inputs[0].name: normal(1, 3, 224, 224)}
    started = perf_counter()
    prepare(model, feed)
    assert perf_counter() - started < 1.0
