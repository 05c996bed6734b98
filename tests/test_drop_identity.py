"""DropIdentity: what provably returns its input goes, what only might stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, reasons, step

from onnxc.graph import load, to_bytes
from passes.drop_identity import DropIdentity

I64 = np.int64


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, I64)


GONE = {
    "Identity (x)": {},
    "Dropout (x)": {},
    "Dropout (x, half, off)": {"half": np.float32(0.5).reshape(()), "off": np.array(False)},
    "Cast <to: int = 1> (x)": {},
    "Reshape (x, k)": {"k": ints(2, 3, 4)},
    "Reshape (x, k) ": {"k": ints(0, -1, 4)},
    "Transpose <perm: ints = [0, 1, 2]> (x)": {},
    "Pad (x, k)": {"k": ints(0, 0, 0, 0, 0, 0)},
    "Concat <axis: int = 1> (x)": {},
    "Max (x)": {},
    "Slice (x, k, e)": {"k": ints(0, 0, 0), "e": ints(2, 3, 4)},
    "Slice (x, k, e, a, o)": {"k": ints(0), "e": ints(2**63 - 1), "a": ints(-1), "o": ints(1)},
    "Expand (x, k)": {"k": ints(1, 1)},
    "Tile (x, k)": {"k": ints(1, 1, 1)},
    "Mul (x, f)": {"f": np.ones((1, 1), np.float32)},
    "Sub (x, f)": {"f": np.zeros((), np.float32)},
}
STAYS = {
    "Cast <to: int = 10> (x)": {},
    "Reshape (x, k)": {"k": ints(3, 2, 4)},
    "Reshape (x, k) ": {"k": ints(2, -1)},
    "Transpose (x)": {},
    "Pad (x, k)": {"k": ints(0, 0, 0, 0, 0, 1)},
    "Slice (x, k, e)": {"k": ints(0, 0, 0), "e": ints(2, 2, 4)},
    "Slice (x, k, e, a, o)": {"k": ints(0), "e": ints(2**63 - 1), "a": ints(1), "o": ints(2)},
    "Expand (x, k)": {"k": ints(1, 1, 1, 1)},
    "Tile (x, k)": {"k": ints(1, 2, 1)},
    "Mul (x, f)": {"f": np.ones((1, 1, 1, 1), np.float32)},
    "Add (x, f)": {"f": np.full((), 1e-3, np.float32)},
    "Flatten (x)": {},
}
TYPES = {"float32": "float", "int64": "int64", "bool": "bool"}


def between(node: str, weights: dict[str, np.ndarray]) -> str:
    """A graph x -> Abs -> node -> Neg -> y around one node."""
    ports = "".join(f", {TYPES[w.dtype.name]}[n] {name}" for name, w in weights.items())
    core = node.strip().replace("(x", "(h")
    return f"""g (float[2,3,4] x{ports}) => (float y) {{
        h = Abs (x)
        t = {core}
        u = Cast <to: int = 1> (t)
        y = Neg (u) }}"""


@pytest.mark.parametrize("node", GONE)
def test_no_ops_go(node: str) -> None:
    proto = bind(between(node, GONE[node]), **GONE[node])
    _declare(proto)
    model, done = step(proto, DropIdentity(), {"x": normal(2, 3, 4)})
    assert not done.problems
    assert ops(model) == ["Abs", "Neg"]


@pytest.mark.parametrize("node", STAYS)
def test_others_stay(node: str) -> None:
    proto = bind(between(node, STAYS[node]), **STAYS[node])
    _declare(proto)
    model, done = step(proto, DropIdentity(), {"x": normal(2, 3, 4)})
    assert not done.problems
    assert node.split()[0] in ops(model)


def _declare(proto: onnx.ModelProto) -> None:
    """Give the inner tensors and the output the shapes that inference finds."""
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.CopyFrom(onnx.shape_inference.infer_shapes(proto))


def test_graph_outputs_keep_their_names() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z) {
        a = Abs (x)
        y = Identity (a)
        z = Neg (a) }"""
    model, done = step(bind(text), DropIdentity(), {"x": normal(2)})
    assert [tensor.name for tensor in model.graph.outputs] == ["y", "z"]
    assert sorted(ops(model)) == ["Abs", "Neg"]
    assert not done.problems


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2] x) => (float[2] y) { y = Identity (x) }",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Abs (x) z = Identity (y) }",
    ],
)
def test_identity_that_names_an_output_stays(text: str) -> None:
    model, done = step(bind(text), DropIdentity(), {"x": normal(2)})
    assert "Identity" in ops(model)
    assert "gives the graph output" in done.skips[0].reason


def test_dropout_with_a_used_mask_stays() -> None:
    text = """g (float[2] x) => (float[2] y, bool[2] k) {
        a = Abs (x)
        d, k = Dropout (a)
        y = Neg (d) }"""
    model, done = step(bind(text), DropIdentity(), {"x": normal(2)})
    assert "Dropout" in ops(model)
    assert "second output is used" in done.skips[0].reason


def test_unknown_dimension_is_not_assumed() -> None:
    text = """g (float[N,M,4] x, int64[3] k) => (float[a,b,c] y) {
        a = Abs (x)
        r = Reshape (a, k)
        y = Neg (r) }"""
    proto = bind(text, k=ints(-1, 3, 4))
    model, done = step(proto, DropIdentity(), {"x": normal(2, 3, 4)})
    assert ops(model) == ["Abs", "Reshape", "Neg"]
    assert not done.changes


def test_captured_tensors_stay() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Abs (x)
        i = Identity (a)
        y = If (c) <then_branch = p () => (float[2] u) { u = Neg (i) },
                    else_branch = q () => (float[2] w) { w = Identity (a) }> }"""
    model = load(bind(text))
    before = to_bytes(model)
    results = DropIdentity().apply(model.graph, context(model))
    assert "a nested body reads i" in reasons(results)
    assert to_bytes(model) == before


def test_excluded_nodes_stay() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Identity (x) y = Neg (a) }"
    model = load(bind(text))
    results = DropIdentity().apply(model.graph, context(model, exclude=("op:Identity",)))
    assert changed(results) == []
    assert "excluded" in reasons(results)
