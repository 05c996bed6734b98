"""FoldNorm: every layer kind it folds into, and every hazard that must stop it."""

from __future__ import annotations

import numpy as np
import pytest
from texts import bind, context, normal, ops, outputs, positive, reasons, step

from onnxc.core import Change, Skip
from onnxc.graph import load, to_bytes
from passes.fold_norm import FoldNorm


def norm(channels: int) -> dict[str, np.ndarray]:
    rows = {key: normal(channels, seed=i) for i, key in enumerate("sbm")}
    return {**rows, "v": positive(channels)}


PORTS = "float[c] s, float[c] b, float[c] m, float[c] v"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(groups: int, bias: bool) -> None:
    given, used = ("float[c] B,", ", B") if bias else ("", "")
    proto = bind(
        f"""g (float[1,4,6,6] x, float[c,d,3,3] W, {given} {PORTS}) => (float[1,6,4,4] y) {{
            z = Conv <group: int = {groups}> (x, W{used})
            y = BatchNormalization <epsilon: float = 0.01> (z, s, b, m, v) }}""",
        W=normal(6, 4 // groups, 3, 3),
        **({"B": normal(6)} if bias else {}),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(1, 4, 6, 6)})
    assert ops(model) == ["Conv"]
    assert not done.problems
    assert len(done.changes) == 1
    assert done.changes[0].before > done.changes[0].after


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    proto = bind(
        f"""g (float[1,4,5,5] x, float[c,d,3,3] W, {PORTS}) => (float[1,6,7,7] y) {{
            z = ConvTranspose <group: int = {groups}> (x, W)
            y = BatchNormalization (z, s, b, m, v) }}""",
        W=normal(4, 6 // groups, 3, 3),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(1, 4, 5, 5)})
    assert ops(model) == ["ConvTranspose"]
    assert not done.problems


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [(6,), (1, 6), (), None])
def test_gemm_with_alpha_and_beta(transposed: int, bias: tuple[int, ...] | None) -> None:
    given, used = ("float B,", ", B") if bias is not None else ("", "")
    proto = bind(
        f"""g (float[3,4] x, float[a,b] W, {given} {PORTS}) => (float[3,6] y) {{
            z = Gemm <transB: int = {transposed}, alpha: float = 0.5, beta: float = 2.0>
                (x, W{used})
            y = BatchNormalization (z, s, b, m, v) }}""",
        W=normal(6, 4) if transposed else normal(4, 6),
        **({"B": normal(*bias)} if bias is not None else {}),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(3, 4)})
    assert ops(model) == ["Gemm"]
    assert not done.problems


def test_matmul_with_its_add() -> None:
    proto = bind(
        f"""g (float[3,4] x, float[4,6] W, float[1,6] B, {PORTS}) => (float[3,6] y) {{
            z = MatMul (x, W)
            a = Add (B, z)
            y = BatchNormalization (a, s, b, m, v) }}""",
        W=normal(4, 6),
        B=normal(1, 6),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(3, 4)})
    assert ops(model) == ["MatMul", "Add"]
    assert not done.problems


def test_bare_matmul_turns_the_norm_into_an_add() -> None:
    proto = bind(
        f"""g (float[3,4] x, float[4,6] W, {PORTS}) => (float[3,6] y) {{
            z = MatMul (x, W)
            y = BatchNormalization (z, s, b, m, v) }}""",
        W=normal(4, 6),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(3, 4)})
    assert ops(model) == ["MatMul", "Add"]
    assert not done.problems


def test_norm_over_time_is_not_the_output_axis_of_a_matmul() -> None:
    proto = bind(
        f"""g (float[2,6,4] x, float[4,6] W, {PORTS}) => (float[2,6,6] y) {{
            z = MatMul (x, W)
            y = BatchNormalization (z, s, b, m, v) }}""",
        W=normal(4, 6),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(2, 6, 4)})
    assert ops(model) == ["MatMul", "BatchNormalization"]
    assert "not the output axis" in done.skips[0].reason


def test_chain_of_norm_and_arithmetic() -> None:
    proto = bind(
        f"""g (float[1,2,4,4] x, float[c,d,1,1] W, {PORTS}, float[6,1,1] k, float[1,6,1,1] c,
              float e) => (float[1,6,4,4] y) {{
            z = Conv (x, W)
            n = BatchNormalization (z, s, b, m, v)
            p = Mul (k, n)
            q = Add (p, c)
            r = Div (q, e)
            y = Sub (c, r) }}""",
        W=normal(6, 2, 1, 1),
        k=normal(6, 1, 1),
        c=normal(1, 6, 1, 1),
        e=np.array(3.0, np.float32),
        **norm(6),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(1, 2, 4, 4)})
    assert ops(model) == ["Conv"]
    assert len(done.changes) == 5
    assert not done.problems


@pytest.mark.parametrize("shape", [(6,), (2, 6, 1, 1), (1, 1, 4, 4), (1, 1, 6, 1, 1)])
def test_constant_that_is_not_per_channel_stays(shape: tuple[int, ...]) -> None:
    proto = bind(
        """g (float[2,2,6,6] x, float[6,2,1,1] W, float k) => (float[a,b,c,d] y) {
            z = Conv (x, W)
            y = Mul (z, k) }""",
        W=normal(6, 2, 1, 1),
        k=normal(*shape) if shape != (1, 1, 4, 4) else normal(1, 1, 6, 6),
    )
    if len(shape) == 5:
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "e"
    model, done = step(proto, FoldNorm(), {"x": normal(2, 2, 6, 6)})
    assert ops(model) == ["Conv", "Mul"]
    assert len(done.skips) == 1


HAZARDS = {
    "read twice": (
        "z = Conv (x, W) y = BatchNormalization (z, s, b, m, v) t = Relu (z)",
        "something else reads",
    ),
    "is an output": (
        "t = Conv (x, W) y = BatchNormalization (t, s, b, m, v)",
        "something else reads",
    ),
    "no layer": ("z = Relu (x) y = BatchNormalization (z, s, b, m, v) t = Relu (x)", "no weights"),
    "input": ("y = BatchNormalization (x, s, b, m, v) t = Relu (x)", "input of the model"),
    "weight computed": (
        "w = Relu (d) z = Conv (x, w) y = BatchNormalization (z, s, b, m, v) t = Relu (x)",
        "not a constant",
    ),
    "parameters computed": (
        "p = Relu (e) z = Conv (x, W) y = BatchNormalization (z, s, p, m, v) t = Relu (x)",
        "parameters that are not constants",
    ),
    "captured": (
        """z = Conv (x, W) y = BatchNormalization (z, s, b, m, v)
           t = If (c) <then_branch = a () => (float[1,4,4,4] u) { u = Relu (z) },
                       else_branch = f () => (float[1,4,4,4] w) { w = Neg (z) }>""",
        "something else reads",
    ),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_leave_the_bytes_alone(name: str) -> None:
    body, reason = HAZARDS[name]
    text = f"""g (float[1,4,4,4] x, float[4,4,1,1] d, float[4] e, bool c, float[4,4,1,1] W, {PORTS})
        => (float[1,4,4,4] y, float[1,4,4,4] t) {{ {body} }}"""
    model = load(bind(text, W=normal(4, 4, 1, 1), **norm(4)))
    before = to_bytes(model)
    results = FoldNorm().apply(model.graph, context(model))
    assert not any(isinstance(result, Change) for result in results)
    assert reason in reasons(results)
    assert to_bytes(model) == before


def test_training_mode_stays() -> None:
    text = f"""g (float[1,4,4,4] x, float[4,4,1,1] W, {PORTS}) => (float[1,4,4,4] y) {{
        z = Conv (x, W)
        y, i, j = BatchNormalization <training_mode: int = 1> (z, s, b, m, v) }}"""
    model = load(bind(text, opset=15, W=normal(4, 4, 1, 1), **norm(4)))
    results = FoldNorm().apply(model.graph, context(model))
    assert "training mode" in reasons(results)
    assert ops(model) == ["Conv", "BatchNormalization"]


def test_shared_weight_is_copied() -> None:
    proto = bind(
        f"""g (float[1,4,4,4] x, float[4,4,1,1] W, {PORTS})
            => (float[1,4,4,4] y, float[1,4,4,4] t) {{
            z = Conv (x, W)
            y = BatchNormalization (z, s, b, m, v)
            t = Conv (x, W) }}""",
        W=normal(4, 4, 1, 1),
        **norm(4),
    )
    model, done = step(proto, FoldNorm(), {"x": normal(1, 4, 4, 4)})
    assert ops(model) == ["Conv", "Conv"]
    assert not done.problems
    weights = {node.inputs[1].name for node in model.graph.nodes}
    assert len(weights) == 2
    assert "W" in weights


def test_overflow_in_half_precision_is_refused() -> None:
    text = """g (float16[1,1,2,2] x, float16[1,1,1,1] W, float16 k) => (float16[1,1,2,2] y) {
        z = Conv (x, W)
        y = Mul (z, k) }"""
    big = np.array(60000, np.float16)
    model = load(bind(text, W=big.reshape(1, 1, 1, 1), k=big))
    results = FoldNorm().apply(model.graph, context(model))
    assert "not be finite" in reasons(results)


def test_excluded_nodes_are_untouched() -> None:
    text = f"""g (float[1,4,4,4] x, float[4,4,1,1] W, {PORTS}) => (float[1,4,4,4] y) {{
        z = Conv (x, W)
        y = BatchNormalization (z, s, b, m, v) }}"""
    model = load(bind(text, W=normal(4, 4, 1, 1), **norm(4)))
    before = to_bytes(model)
    results = FoldNorm().apply(model.graph, context(model, exclude=("op:BatchNormalization",)))
    assert "excluded" in reasons(results)
    assert to_bytes(model) == before


def test_second_run_only_skips() -> None:
    proto = bind(
        f"""g (float[1,4,4,4] x, float[4,4,1,1] W, {PORTS}) => (float[1,4,4,4] y) {{
            z = Conv (x, W)
            y = BatchNormalization (z, s, b, m, v) }}""",
        W=normal(4, 4, 1, 1),
        **norm(4),
    )
    model = load(proto)
    FoldNorm().apply(model.graph, context(model))
    folded = to_bytes(model)
    assert all(isinstance(r, Skip) for r in FoldNorm().apply(model.graph, context(model)))
    assert to_bytes(model) == folded
    assert outputs(model, {"x": normal(1, 4, 4, 4)})["y"].shape == (1, 4, 4, 4)
