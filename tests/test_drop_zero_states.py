"""DropZeroStates: zeros in every disguise go, others stay."""

from __future__ import annotations

import numpy as np
import pytest
from texts import bind, changed, context, normal, ops, reasons, step

from onnxc.graph import load, to_bytes
from passes.drop_zero_states import DropZeroStates

PORTS = (
    "float[T,N,8] x, float[1,16,8] W, float[1,16,4] R, int64[1] one, int64[1] zero, int64[1] four"
)
WEIGHTS = {
    "W": normal(1, 16, 8),
    "R": normal(1, 16, 4),
    **{name: np.array([n]) for name, n in (("zero", 0), ("one", 1), ("four", 4))},
}
SIZES = "s = Shape (x) n = Gather (s, one) k = Concat <axis: int = 0> (one, n, four)"
ZEROS = {
    "computed": f"{SIZES} h = ConstantOfShape (k)",
    "sliced": f"""{SIZES} e = ConstantOfShape <value = float[1] {{0}}> (k)
                 h = Slice (e, zero, one, zero)""",
    "expanded": f"{SIZES} h = Expand (o, k)",
}


def lstm(states: str, extra: str = "") -> str:
    return f"""g ({PORTS}{extra}) => (float[T,1,N,4] y) {{
        {states}
        y = LSTM <hidden_size: int = 4> (x, W, R, , , h, h) }}"""


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_go(name: str) -> None:
    zero = {"o": np.zeros((1, 1, 1), np.float32)} if name == "expanded" else {}
    proto = bind(lstm(ZEROS[name], ", float[1,1,1] o" if zero else ""), **WEIGHTS, **zero)
    model, done = step(proto, DropZeroStates(), {"x": normal(3, 2, 8)})
    assert not done.problems
    assert ops(model) == ["LSTM"]
    assert len(model.graph.nodes[0].inputs) == 3
    assert changed(DropZeroStates().apply(model.graph, context(model))) == []


def test_constant_zeros_go_and_the_other_state_stays() -> None:
    text = f"""g ({PORTS}, float[1,2,4] h, float[1,2,4] c) => (float[T,1,2,4] y) {{
        y = LSTM <hidden_size: int = 4> (x, W, R, , , h, c) }}"""
    states = {"h": np.zeros((1, 2, 4), np.float32), "c": normal(1, 2, 4)}
    model, done = step(bind(text, **WEIGHTS, **states), DropZeroStates(), {"x": normal(3, 2, 8)})
    assert done.changes[0].before == 32
    names = [tensor.name for tensor in model.graph.nodes[0].inputs]
    assert names == ["x", "W", "R", "", "", "", "c"]


@pytest.mark.parametrize(
    "states",
    [
        f"{SIZES} h = ConstantOfShape <value = float[1] {{1}}> (k)",
        f"{SIZES} z = ConstantOfShape (k) h = Cos (z)",
        f"{SIZES} v = ReduceSum <keepdims: int = 1> (x) h = Expand (v, k)",
    ],
)
def test_other_states_stay(states: str) -> None:
    model = load(bind(lstm(states), **WEIGHTS))
    before = to_bytes(model)
    results = DropZeroStates().apply(model.graph, context(model))
    assert changed(results) == []
    assert "not known to be zero" in reasons(results)
    assert to_bytes(model) == before


def test_excluded_nodes_stay() -> None:
    model = load(bind(lstm(ZEROS["computed"]), **WEIGHTS))
    results = DropZeroStates().apply(model.graph, context(model, exclude=("op:LSTM",)))
    assert reasons(results) == "excluded"
