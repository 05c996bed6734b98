"""SmoothQuant's factors fold into whatever makes a tensor, and the function stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from quantizing import Feed, apply, decibels
from test_equalize import unchanged
from texts import bind, normal, ops, reasons

from onnxc.graph import load
from onnxc.scalable import channel_groups
from onnxc.shapes import infer
from passes.equalize import Equalize
from passes.quantize import Quantize

X: Feed = {"x": normal(24, 1, 7, 16) + normal(24, 1, 1, 16)}
LARGE = [3, 11]  # channels that are much larger than the others


def outliers(count: int, factor: float = 60) -> NDArray[np.float32]:
    gain = np.float32(1) + np.float32(0.1) * normal(count)
    gain[LARGE] *= factor
    return gain


NORMS = {
    "layer norm": "h = LayerNormalization (x, G, S)",
    "layer norm without a bias": "h = LayerNormalization (x, G)",
    "RMS norm": """m = Mul (x, x) r = ReduceMean <axes = [-1]> (m) e = Sqrt (r) d = Div (x, e)
                   h = Mul (d, G)""",
    "norm in parts": """r = ReduceMean <axes = [-1]> (x) d = Sub (x, r) m = Mul (d, d)
                   v = ReduceMean <axes = [-1]> (m) e = Sqrt (v) n = Div (d, e)
                   g = Mul (G, n) h = Add (g, S)""",
    "norm times a number": """u = LayerNormalization (x, G, S) h = Mul (u, k)""",
    "layer": "h = MatMul (x, P)",
    "layer with a bias": "u = MatMul (x, P) h = Add (S, u)",
    "layer and Relu": "u = MatMul (x, P) v = Add (u, S) h = Relu (v)",
    "gated": "u = MatMul (x, P) w = MatMul (x, Q) g = Sigmoid (w) i = Mul (w, g) h = Mul (i, u)",
    "gated with biases": """a = MatMul (x, P) u = Add (a, S) w = MatMul (x, Q) g = Tanh (w)
                   h = Mul (g, u)""",
    "sum": "u = MatMul (x, P) w = MatMul (x, Q) h = Add (u, w)",
}


def network(made: str, *, read: str = "y = MatMul (h, W) z = MatMul (h, V)") -> onnx.ModelProto:
    large = outliers(16)
    return bind(
        f"""g (float[1,7,16] x, float[16] G, float[16] S, float[16,16] P, float[16,16] Q, float k,
              float[16,20] W, float[16,12] V) => (float[1,7,20] y, float[1,7,12] z) {{
            {made} {read} }}""",
        opset=17,
        G=large,
        S=large * normal(16, seed=1),
        P=normal(16, 16) * large,
        Q=normal(16, 16, seed=2) / 4,
        k=np.float32(0.5),
        W=normal(16, 20, seed=3),
        V=normal(16, 12, seed=4),
    )


@pytest.mark.parametrize("name", NORMS)
def test_the_function_is_unchanged(name: str) -> None:
    proto = network(NORMS[name])
    model, step = apply(proto, Equalize(), X)
    assert len(step.changes) == 1
    unchanged(proto, model, X, 2e-6)
    assert ops(model) == ops(load(proto))


@pytest.mark.parametrize("name", ["layer norm", "gated"])
def test_integers_gain(name: str) -> None:
    proto = network(NORMS[name])
    plain, _ = apply(proto, Quantize(ranges="minmax"), X)
    model, _ = apply(proto, Equalize(), X)
    both, _ = apply(model, Quantize(ranges="minmax"), X)
    assert decibels(proto, both, X) > decibels(proto, plain, X) + 2


@pytest.mark.parametrize("name", ["layer norm", "gated"])
def test_a_second_run_changes_nothing(name: str) -> None:
    model, _ = apply(network(NORMS[name]), Equalize(), X)
    _, again = apply(model, Equalize(), X)
    assert not again.changes
    assert "already share one scale" in reasons(list(again.skips))


OBSTACLES = {
    "(Tanh) reads it": ("h = LayerNormalization (x, G, S)", "y = MatMul (h, W) z = Tanh (h)"),
    "(Mul) makes a part of it": (
        "u = MatMul (x, P) g = Sigmoid (u) i = Mul (u, g) j = MatMul (x, Q) h = Add (i, j)",
        "y = MatMul (h, W) z = MatMul (h, V)",
    ),
    "adds one number to all channels": (
        "u = MatMul (x, P) h = Add (u, k)",
        "y = MatMul (h, W) z = MatMul (h, V)",
    ),
    "is an input or output of the graph": ("h = MatMul (x, P)", "y = MatMul (h, W) z = Tanh (y)"),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_stands_in_the_way_is_told(reason: str) -> None:
    made, read = OBSTACLES[reason]
    proto = network(made, read=read)
    _, step = apply(proto, Equalize(), X)
    assert reason in reasons(list(step.skips))


def test_norms_are_excluded_by_name() -> None:
    proto = network(NORMS["layer norm"])
    name = load(proto).graph.nodes[0].name
    _, step = apply(proto, Equalize(), X, exclude=(name,))
    assert not step.changes and f"{name} is excluded" in reasons(list(step.skips))


def test_a_factor_read_elsewhere_takes_no_scale() -> None:
    model = load(network(NORMS["gated"]))
    infer(model)
    names = frozenset(node.name for node in model.graph.nodes)
    groups = [g for g in channel_groups(model.graph, names) if not g.obstacle]
    assert [{t.name for t in group.tensors} for group in groups] == [{"u", "h"}]
    assert [place.node.outputs[0].name for place in groups[0].divided] == ["u"]
    assert [place.node.outputs[0].name for place in groups[0].multiplied] == ["y", "z"]


def test_constants_that_have_no_number_a_channel() -> None:
    proto = bind(
        """g (float[4,8] x, float[8,8] P, float c, float[8,5] W, float a, float b)
            => (float[4,5] y, float z) {
            u = Gemm (x, P, c)
            v = Relu (u)
            y = MatMul (v, W)
            z = Mul (a, b) }""",
        P=normal(8, 8),
        c=normal() * 0 + 1,
        W=normal(8, 5),
        a=normal() * 0 + 1,
        b=normal() * 0 + 2,
    )
    model = load(proto)
    infer(model)
    names = frozenset(node.name for node in model.graph.nodes)
    first = channel_groups(model.graph, names)[0]
    assert "has not one number a channel" in first.obstacle


def test_a_norm_over_two_axes_has_its_channels_on_the_last() -> None:
    proto = bind(
        """g (float[1,16,16] x, float[16,16] G, float[16,20] W) => (float[1,16,20] y) {
            h = LayerNormalization <axis = -2> (x, G)
            y = MatMul (h, W) }""",
        opset=17,
        G=np.broadcast_to(outliers(16), (16, 16)).copy(),
        W=normal(16, 20),
    )
    feed: Feed = {"x": normal(24, 1, 16, 16)}
    model, step = apply(proto, Equalize(), feed)
    assert len(step.changes) == 1
    unchanged(proto, model, feed, 2e-6)
