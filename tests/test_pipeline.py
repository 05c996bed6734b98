"""The pipeline: a pass that fails in any way leaves the model byte for byte, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from texts import bind, context, normal, ops, outputs, positive

import calib.walk
import onnxc.pipeline
from calib.data import InputSpec, open_data
from onnxc.check import problems
from onnxc.core import Change, Context, Key, Pass, Skip
from onnxc.errors import ModelError, OptionError
from onnxc.graph import Model, constant, fresh, load, opset, to_bytes
from onnxc.pipeline import Calibration, Step, apply_pass, compress, prepare
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


@dataclass(frozen=True)
class Measure:
    """A step that writes down the mean of a tensor, then doubles the weight of its reader."""

    tensor: str
    seen: dict[str, float]
    name: ClassVar[str] = "measure"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return (Key(self.tensor, "mean"),)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        self.seen[self.tensor] = float(context.stats[Key(self.tensor, "mean")].mean)
        node = next(n for n in graph.nodes if n.inputs[0].name == self.tensor)
        doubled = node.inputs[1].values * np.float32(2)
        node.inputs[1] = constant(fresh(graph, "doubled"), doubled)
        return [Change(node.name, "doubled")]


@dataclass(frozen=True)
class MeasureAll:
    """A sequential pass over the inputs of all layers."""

    tensors: tuple[str, ...]
    seen: dict[str, float]
    name: ClassVar[str] = "measure-all"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return [Skip(graph.nodes[0].name, "no data")]

    def steps(self, graph: gs.Graph, context: Context) -> Iterable[Pass]:
        return (Measure(name, self.seen) for name in self.tensors)


CHAIN = """g (float[N,4] x, float[4,4] A, float[4,4] B, float[4,4] C) => (float[N,4] y) {
    a = MatMul (x, A)
    r = Relu (a)
    b = MatMul (r, B)
    s = Relu (b)
    t = Add (s, r)
    y = MatMul (t, C) }"""


def chain() -> Model:
    weights = {name: positive(4, 4, seed=i) for i, name in enumerate("ABC")}
    return load(bind(CHAIN, **weights))


def chained(model: Model, max_memory: int | None = None) -> tuple[Step, dict[str, float]]:
    data = {"x": positive(40, 4)}
    inputs = [InputSpec("x", np.dtype(np.float32), ("N", 4))]
    calibration = Calibration(open_data(data, inputs), max_memory, original=chain())
    seen: dict[str, float] = {}
    pass_ = MeasureAll(("x", "r", "t"), seen)
    (step,) = compress(model, [pass_], context(model), calibration, {"x": positive(3, 4)})
    return step, seen


def test_each_step_sees_what_the_steps_before_it_left() -> None:
    step, seen = chained(model := chain())
    assert step.name == "measure-all" and not step.problems
    assert [change.what for change in step.changes] == ["doubled"] * 3
    x = positive(40, 4)
    r = x @ (2 * positive(4, 4))
    t = r @ (2 * positive(4, 4, seed=1)) + r
    np.testing.assert_allclose(seen["r"], r.mean(), rtol=1e-5)
    np.testing.assert_allclose(seen["t"], t.mean(), rtol=1e-5)
    last = t @ (2 * positive(4, 4, seed=2))
    np.testing.assert_allclose(outputs(model, {"x": x})["y"], last, rtol=1e-4)


def test_nodes_run_once_however_many_steps_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    whole = calib.walk.Walk._cut

    def counted(self: Any, proto: Any, part: Any, made: Any) -> Any:
        ran.extend(node.name for node in part)
        return whole(self, proto, part, made)

    monkeypatch.setattr(calib.walk.Walk, "_cut", counted)
    chained(chain())
    assert len(ran) == len(set(ran)) == 5  # all but the last product, whose output nobody wants


def test_a_step_that_fails_undoes_the_whole_pass() -> None:
    model = chain()
    before = to_bytes(model)
    calibration = Calibration(
        open_data({"x": positive(8, 4)}, [InputSpec("x", np.dtype(np.float32), ("N", 4))]),
        original=chain(),
    )
    pass_ = MeasureAll(("x", "nowhere"), {})
    (step,) = compress(model, [pass_], context(model), calibration)
    assert "'nowhere' is not in the model" in step.problems[0]
    assert to_bytes(model) == before


def test_what_the_walk_keeps_goes_to_disk_where_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    _, near = chained(chain())
    monkeypatch.setattr("onnxc.boundary.IN_MEMORY", 0)
    _, far = chained(chain(), max_memory=1 << 20)
    assert near == pytest.approx(far, rel=1e-6)
