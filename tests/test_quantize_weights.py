"""QuantizeWeights: every operator and form stays close, is folded or fused, and the hazards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, changed, context, normal, ops, outputs, reasons, skip_refused

from calib.data import InputSpec, open_data
from onnxc.check import compare
from onnxc.core import Change
from onnxc.errors import OptionError
from onnxc.graph import Model, constants, load, nbytes, to_bytes, values
from onnxc.pipeline import apply_pass
from onnxc.runtime import Runtime, session
from passes.quantize_weights import QuantizeWeights

Weights = dict[str, NDArray[Any]]

X = normal(3, 64)
IMAGE = normal(1, 16, 8, 8)
STEPS = normal(5, 2, 24)
TOKENS = np.array([[0, 3, 1], [39, 2, 2]])

CASES: dict[str, tuple[str, Weights, dict[str, Any]]] = {
    "MatMul": (
        "g (float[N,64] x, float[64,40] W) => (float[N,40] y) { y = MatMul (x, W) }",
        {"W": normal(64, 40)},
        {"x": X},
    ),
    "weight first": (
        "g (float[64,N] x, float[40,64] W) => (float[40,N] y) { y = MatMul (W, x) }",
        {"W": normal(40, 64)},
        {"x": X.T.copy()},
    ),
    "batched": (
        "g (float[2,3,64] x, float[2,64,40] W) => (float[2,3,40] y) { y = MatMul (x, W) }",
        {"W": normal(2, 64, 40)},
        {"x": normal(2, 3, 64)},
    ),
    "Gemm": (
        """g (float[N,64] x, float[64,40] W, float[40] B) => (float[N,40] y) {
            y = Gemm (x, W, B) }""",
        {"W": normal(64, 40), "B": normal(40)},
        {"x": X},
    ),
    "Gemm turned": (
        """g (float[N,64] x, float[40,64] W, float[40] B) => (float[N,40] y) {
            y = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (x, W, B) }""",
        {"W": normal(40, 64), "B": normal(40)},
        {"x": X},
    ),
    "not a multiple": (
        "g (float[N,50] x, float[50,40] W) => (float[N,40] y) { y = MatMul (x, W) }",
        {"W": normal(50, 40)},
        {"x": normal(3, 50)},
    ),
    "Conv": (
        "g (float[N,16,8,8] x, float[12,16,3,3] W) => (float[N,12,6,6] y) { y = Conv (x, W) }",
        {"W": normal(12, 16, 3, 3)},
        {"x": IMAGE},
    ),
    "depthwise": (
        """g (float[N,16,8,8] x, float[16,1,5,5] W) => (float[N,16,4,4] y) {
            y = Conv <group: int = 16> (x, W) }""",
        {"W": normal(16, 1, 5, 5)},
        {"x": IMAGE},
    ),
    "ConvTranspose": (
        """g (float[N,16,8,8] x, float[16,6,3,3] W) => (float[N,12,10,10] y) {
            y = ConvTranspose <group: int = 2> (x, W) }""",
        {"W": normal(16, 6, 3, 3)},
        {"x": IMAGE},
    ),
    "LSTM": (
        """g (float[T,2,24] x, float[2,64,24] W, float[2,64,16] R) => (float[T,2,2,16] y) {
            y = LSTM <hidden_size: int = 16, direction: string = "bidirectional"> (x, W, R) }""",
        {"W": normal(2, 64, 24) / 5, "R": normal(2, 64, 16) / 5},
        {"x": STEPS},
    ),
    "GRU": (
        """g (float[T,2,24] x, float[1,48,24] W, float[1,48,16] R) => (float[T,1,2,16] y) {
            y = GRU <hidden_size: int = 16> (x, W, R) }""",
        {"W": normal(1, 48, 24) / 5, "R": normal(1, 48, 16) / 5},
        {"x": STEPS},
    ),
    "Gather": (
        "g (int64[N,T] t, float[40,32] E) => (float[N,T,32] y) { y = Gather (E, t) }",
        {"E": normal(40, 32)},
        {"t": TOKENS},
    ),
    "Gather along 1": (
        """g (int64[N,T] t, float[32,40] E) => (float[32,N,T] y) {
            y = Gather <axis: int = 1> (E, t) }""",
        {"E": normal(32, 40)},
        {"t": TOKENS},
    ),
    "half precision": (
        "g (float16[N,64] x, float16[64,40] W) => (float16[N,40] y) { y = MatMul (x, W) }",
        {"W": normal(64, 40).astype(np.float16)},
        {"x": X.astype(np.float16)},
    ),
}
WAYS = {
    "int8 fold": QuantizeWeights(smallest=0),
    "int8 fold by 32": QuantizeWeights(block=32, smallest=0),
    "int8 dq": QuantizeWeights(form="dq", smallest=0),
    "int8 dq by 32": QuantizeWeights(form="dq", block=32, smallest=0),
    "int8 nbits": QuantizeWeights(form="matmulnbits", block=32, smallest=0),
    "int4 fold": QuantizeWeights(bits=4, smallest=0),
    "int4 fold by 16": QuantizeWeights(bits=4, block=16, smallest=0),
    "int4 dq by 16": QuantizeWeights(bits=4, form="dq", block=16, smallest=0),
    "int4 nbits": QuantizeWeights(bits=4, form="matmulnbits", block=32, smallest=0),
}


def case(name: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    text, weights, feed = CASES[name]
    return bind(text, opset=21, **weights), feed


def noise(proto: onnx.ModelProto, model: Model, feed: dict[str, Any]) -> float:
    """Decibels of the output against the original's."""
    before, after = (outputs(m, feed)["y"].astype(np.float64) for m in (proto, model))
    return float(10 * np.log10(np.square(before).sum() / np.square(before - after).sum()))


def optimized(model: Model, folder: Path) -> list[str]:
    """Operators that remain once ONNX Runtime has folded and fused what it can."""
    session(to_bytes(model), Runtime(), folder / "optimized.onnx")
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_close_and_bytes_go_down(name: str, way: str) -> None:
    proto, feed = case(name)
    model = load(proto)
    done = apply_pass(model, WAYS[way], context(model), feed)
    assert not done.problems
    assert done.changes
    assert noise(proto, model, feed) > (34 if WAYS[way].bits == 8 else 14)
    before, after = (sum(map(nbytes, constants(m.graph))) for m in (load(proto), model))
    stored = sum(change.after for change in done.changes)
    assert stored < sum(change.before for change in done.changes)
    assert abs((before - after) - sum(c.before - c.after for c in done.changes)) <= 128
    again = WAYS[way].apply(model.graph, context(model))
    assert changed(again) == []


@pytest.mark.parametrize("way", ["int8 fold", "int8 fold by 32", "int4 fold by 16"])
@pytest.mark.parametrize("name", CASES)
def test_folded_at_load(name: str, way: str, tmp_path: Path) -> None:
    proto, _ = case(name)
    model = load(proto)
    before = optimized(model, tmp_path)
    WAYS[way].apply(model.graph, context(model))
    assert optimized(model, tmp_path) == before


@pytest.mark.parametrize("name", ["MatMul", "Gemm", "not a multiple"])
def test_products_become_nbits(name: str) -> None:
    proto, _ = case(name)
    model = load(proto)
    WAYS["int4 nbits"].apply(model.graph, context(model))
    node = next(node for node in model.graph.nodes if node.op == "MatMulNBits")
    assert node.domain == "com.microsoft"
    assert node.attrs["accuracy_level"] == 4
    assert (node.attrs["K"], node.attrs["N"]) == (50 if name == "not a multiple" else 64, 40)
    assert ("Add" in ops(model)) == (name == "Gemm")


def test_only_the_rows_that_are_picked_are_dequantized() -> None:
    proto, _ = case("Gather")
    model = load(proto)
    WAYS["int8 dq"].apply(model.graph, context(model))
    assert ops(model) == ["Gather", "Gather", "Cast", "Mul"]
    table = model.graph.nodes[0].inputs[0]
    assert values(table).dtype == np.int8


def test_what_a_change_says() -> None:
    proto, _ = case("MatMul")
    model = load(proto)
    [change] = QuantizeWeights(bits=4, block=32).apply(model.graph, context(model))
    assert isinstance(change, Change)
    assert change.what.startswith("W int4 in blocks of 32, 2")
    assert change.what.endswith(" dB")
    assert (change.before, change.after) == (4 * 64 * 40, 64 * 40 // 2 + 4 * 2 * 40)


TIED = """g (int64[N] t, float[40,32] E) => (float[N,40] y) {
    x = Gather (E, t)
    w = Transpose <perm: ints = [1, 0]> (E)
    y = MatMul (x, w) }"""


@pytest.mark.parametrize("way", WAYS)
def test_tied_table_is_stored_once(way: str) -> None:
    proto = bind(TIED, opset=21, E=normal(40, 32))
    feed = {"t": np.array([1, 5, 39])}
    model = load(proto)
    done = apply_pass(model, WAYS[way], context(model), feed)
    skip_refused(done)
    assert not done.problems
    assert [change.after > 0 for change in done.changes] == [True, False]
    assert "shares E with" in done.changes[1].what
    low_bit = [c for c in constants(model.graph) if values(c).dtype.name in ("int8", "int4")]
    assert len(low_bit) == 1
    assert noise(proto, model, feed) > (34 if WAYS[way].bits == 8 else 14)


@pytest.mark.parametrize("way", WAYS)
def test_weight_read_along_both_axes(way: str) -> None:
    proto = bind(
        """g (float[N,64] x, float[64,64] W) => (float[N,64] y) {
            h = MatMul (x, W)
            y = Gemm <transB: int = 1> (h, W) }""",
        opset=21,
        W=normal(64, 64),
    )
    model = load(proto)
    done = apply_pass(model, WAYS[way], context(model), {"x": X})
    assert not done.problems
    assert len(done.changes) == 2
    assert noise(proto, model, {"x": X}) > (31 if WAYS[way].bits == 8 else 11)


def test_weight_of_a_nested_body(tmp_path: Path) -> None:
    proto = bind(
        """g (float[N,64] x, bool c) => (float[N,40] y) {
            y = If (c) <then_branch = p () => (float[N,40] u) { u = MatMul (x, A) },
                        else_branch = q () => (float[N,40] v) { v = MatMul (x, B) }> }"""
    )
    for branch, name in zip(proto.graph.node[0].attribute, "AB", strict=True):
        branch.g.initializer.append(onnx.numpy_helper.from_array(normal(64, 40), name))
    feed = {"x": X, "c": np.array(True)}
    model = load(proto)
    done = apply_pass(model, QuantizeWeights(), context(model), feed)
    assert not done.problems
    assert len(done.changes) == 2
    assert noise(proto, model, feed) > 34
    session(to_bytes(model), Runtime(), tmp_path / "o.onnx")
    branches = onnx.load(tmp_path / "o.onnx").graph.node[0].attribute
    assert [[node.op_type for node in b.g.node] for b in branches] == [["MatMul"], ["MatMul"]]


@pytest.mark.parametrize("way", WAYS)
def test_transposed_outside_of_the_body_that_reads_it(way: str) -> None:
    proto = bind(
        """g (float[N,64] x, bool c, float[40,64] W, float[40] B) => (float[N,40] y) {
            w = Transpose <perm: ints = [1, 0]> (W)
            y = If (c) <then_branch = p () => (float[N,40] u) { u = Gemm (x, w, B) },
                        else_branch = q () => (float[N,40] v) { v = MatMul (x, w) }> }""",
        opset=21,
        W=normal(40, 64),
        B=normal(40),
    )
    feed = {"x": X, "c": np.array(True)}
    model = load(proto)
    done = apply_pass(model, WAYS[way], context(model), feed)
    skip_refused(done)
    assert not done.problems
    assert len(done.changes) == 2
    assert noise(proto, model, feed) > (34 if WAYS[way].bits == 8 else 14)


SHARED = """g (float[N,64] x, bool c, float[64,64] W) => (float[N,64] y) {
    a = MatMul (x, W)
    y = If (c) <then_branch = p () => (float[N,64] u) { u = MatMul (a, W) },
                else_branch = q () => (float[N,64] v) { v = Neg (a) }> }"""
PLAIN = "g (float[N,64] x, float[64,64] W) => (float[N,64] y) { y = MatMul (x, W) }"
TWICE = (
    "g (float[N,64] x, float[64,64] W) => (float[N,64] y) { h = MatMul (x, W) y = MatMul (h, W) }"
)
OUTPUT = """g (float[N,64] x, float[64,64] W) => (float[N,64] y, float[64,64] W) {
    y = MatMul (x, W) }"""
DATA = """g (float[N,64] x, float[64,64] W) => (float[N,64] y) {
    h = MatMul (x, W)
    s = ReduceSum (W)
    y = Add (h, s) }"""
LOST = normal(64, 64)
LOST[3, 3] = np.nan
HAZARDS: dict[str, tuple[str, QuantizeWeights, int, str]] = {
    "small": (PLAIN, QuantizeWeights(smallest=20000), 13, "has 16384 bytes, fewer than 20000"),
    "body": (SHARED, QuantizeWeights(), 13, "a nested body shares its weight"),
    "output": (OUTPUT, QuantizeWeights(), 13, "is an output of the graph"),
    "data": (DATA, QuantizeWeights(), 13, "reads its weight as data"),
    "int4": (PLAIN, QuantizeWeights(bits=4), 13, "needs opset 21, and the model has 13"),
    "blocked": (PLAIN, QuantizeWeights(form="dq", block=32), 13, "needs opset 21"),
    "per axis": (PLAIN, QuantizeWeights(form="dq"), 11, "needs opset 13"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_leave_the_bytes_alone(name: str) -> None:
    text, pass_, opset, reason = HAZARDS[name]
    model = load(bind(text, opset=opset, W=normal(64, 64)))
    before = to_bytes(model)
    results = pass_.apply(model.graph, context(model))
    assert changed(results) == []
    assert reason in reasons(results)
    assert to_bytes(model) == before


def test_weight_that_is_not_finite() -> None:
    model = load(bind(PLAIN, W=LOST))
    assert "not finite" in reasons(QuantizeWeights().apply(model.graph, context(model)))


def test_weight_shared_with_an_excluded_node() -> None:
    model = load(bind(TWICE, W=normal(64, 64)))
    before = to_bytes(model)
    last = model.graph.nodes[-1].name
    results = QuantizeWeights().apply(model.graph, context(model, exclude=(last,)))
    assert len(results) == 2
    assert f"shares its weight with {last}, which is excluded" in reasons(results)
    assert to_bytes(model) == before


def test_products_of_two_activations_say_so() -> None:
    model = load(bind("g (float[4,4] x) => (float[4,4] y) { y = MatMul (x, x) }"))
    results = QuantizeWeights().apply(model.graph, context(model))
    assert reasons(results) == "multiplies two activations"


def test_blocks_are_needed_for_nbits() -> None:
    with pytest.raises(OptionError, match="set block to 32"):
        QuantizeWeights(form="matmulnbits")


@pytest.mark.parametrize(("name", "decibels"), [("sst2", 45), ("agnews", 45), ("stories260k", 38)])
def test_real_models(shared: Path, name: str, decibels: float) -> None:
    source = shared / "models" / f"{name}.onnx"
    model = load(source)
    data = open_data(
        {"input_ids": np.load(shared / "data" / name / "calib.npz")["input_ids"][:10]},
        [InputSpec("input_ids", np.dtype(np.int64), ("batch", "length"))],
    )
    apply_pass(model, QuantizeWeights(), context(model))
    assert compare(source, model, data, Runtime()).sqnr > decibels
    assert len(to_bytes(model)) < 0.32 * source.stat().st_size
