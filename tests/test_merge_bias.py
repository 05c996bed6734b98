"""MergeBias: one Gemm for a product and its bias, one for a Gemm with factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, normal, ops, reasons, step

from onnxc.graph import load, values
from passes.merge_bias import MergeBias


def dense(bias: Any, rows: str = "N") -> onnx.ModelProto:
    dims = ",".join(map(str, bias.shape))
    kind = f"float[{dims}]" if dims else "float"
    return bind(
        f"""g (float[{rows},6] x, float[6,4] W, {kind} B) => (float[{rows},4] y) {{
            m = MatMul (x, W)
            a = Add (m, B)
            y = Relu (a) }}""",
        W=normal(6, 4),
        B=bias,
    )


@pytest.mark.parametrize("bias", [normal(4), normal(1, 4), normal(1), np.array(0.5, np.float32)])
def test_a_bias_of_any_shape_becomes_a_row(bias: Any) -> None:
    model, done = step(dense(bias), MergeBias(), {"x": normal(3, 6)})
    assert done.changes
    assert ops(model) == ["Gemm", "Relu"]
    assert values(model.graph.nodes[0].inputs[2]).shape == (4,)


def test_the_constant_may_come_first() -> None:
    proto = dense(normal(4))
    proto.graph.node[1].input[:] = ["B", "m"]
    model, _ = step(proto, MergeBias(), {"x": normal(3, 6)})
    assert ops(model) == ["Gemm", "Relu"]


def test_a_graph_output_keeps_its_name() -> None:
    proto = bind(
        """g (float[N,6] x, float[6,4] W, float[4] B) => (float[N,4] y) {
            m = MatMul (x, W)
            y = Add (m, B) }""",
        W=normal(6, 4),
        B=normal(4),
    )
    model, _ = step(proto, MergeBias(), {"x": normal(3, 6)})
    assert ops(model) == ["Gemm"]


@pytest.mark.parametrize("factors", ["alpha: float = 0.5", "beta: float = 2.0, alpha: float = 3.0"])
@pytest.mark.parametrize("turned", [0, 1])
def test_factors_go_into_constants(factors: str, turned: int) -> None:
    proto = bind(
        f"""g (float[N,6] x, float[{"4,6" if turned else "6,4"}] W, float[4] B) => (float[N,4] y) {{
            y = Gemm <{factors}, transB: int = {turned}> (x, W, B) }}""",
        W=normal(*((4, 6) if turned else (6, 4))),
        B=normal(4),
    )
    model, done = step(proto, MergeBias(), {"x": normal(3, 6)})
    assert len(done.changes) == 1
    assert set(model.graph.nodes[0].attrs) <= {"transB"}


def test_factors_of_shared_weights() -> None:
    proto = bind(
        """g (float[N,6] x, float[6,6] W) => (float[N,6] y) {
            m = Gemm <alpha: float = 0.5> (x, W)
            y = Gemm (m, W) }""",
        W=normal(6, 6),
    )
    model, _ = step(proto, MergeBias(), {"x": normal(3, 6)})
    weights = [values(node.inputs[1]) for node in model.graph.nodes]
    np.testing.assert_allclose(weights[0], weights[1] / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4)])
def test_a_bias_that_is_no_row_stays(shape: tuple[int, int]) -> None:
    model, done = step(dense(normal(*shape)), MergeBias(), {"x": normal(3, 6)})
    assert ops(model) == ["MatMul", "Add", "Relu"]
    assert "not one value a column" in reasons(list(done.skips))


def test_only_matrices_are_considered() -> None:
    model, done = step(dense(normal(4), rows="N,T"), MergeBias(), {"x": normal(2, 3, 6)})
    assert ops(model) == ["MatMul", "Add", "Relu"]
    assert not done.skips


def test_a_product_that_is_an_output_stays() -> None:
    proto = dense(normal(4))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("m", 1, ["N", 4]))
    model, done = step(proto, MergeBias(), {"x": normal(3, 6)})
    assert ops(model) == ["MatMul", "Add", "Relu"]
    assert "something else reads m" in reasons(list(done.skips))


def test_excluded_and_second_run() -> None:
    model, _ = step(dense(normal(4)), MergeBias(), {"x": normal(3, 6)})
    assert changed(MergeBias().apply(model.graph, context(model))) == []
    fresh = load(dense(normal(4)))
    name = fresh.graph.nodes[1].name
    found = MergeBias().apply(fresh.graph, context(fresh, exclude=(name,)))
    assert reasons(found) == "excluded"
    assert ops(fresh) == ["MatMul", "Add", "Relu"]
