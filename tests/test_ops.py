"""The operator table: each row against ONNX's schemas and against what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, normal, outputs

from onnxc.graph import load
from onnxc.ops import (
    OPS,
    bounds,
    data_inputs,
    groups,
    is_absorbed,
    is_depthwise,
    knowledge,
    weight_of,
)

IMAGE = normal(2, 4, 6, 6)


def first(proto: onnx.ModelProto) -> Any:
    return load(proto).graph.nodes[0]


@pytest.mark.parametrize("op", OPS)
def test_positions_are_those_of_the_schema(op: str) -> None:
    row, schema = OPS[op], onnx.defs.get_schema(op, 23)
    names = [port.name for port in schema.inputs]
    is_variadic = schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    assert bool(row.data) != is_variadic or row.role == "opaque"
    assert all(position < len(names) for position in (*row.data, *row.bounds))
    if row.weight is not None:
        assert names[row.weight] in ("W", "B", "data")
    if row.bias is not None:
        assert names[row.bias] in ("B", "C")
    if row.gains:
        assert [names[position].lower() for position in row.gains] == ["scale", "b"][
            : len(row.gains)
        ]
    if row.bounds:
        assert [names[position] for position in row.bounds] == ["min", "max"]


WEIGHTED = {
    "Conv": ("float[2,4,6,6] x, float[5,4,3,3] W", "Conv (x, W)", (5, 4, 3, 3)),
    "Conv in groups": (
        "float[2,4,6,6] x, float[6,2,3,3] W",
        "Conv <group = 2> (x, W)",
        (6, 2, 3, 3),
    ),
    "ConvTranspose": ("float[2,4,6,6] x, float[4,5,3,3] W", "ConvTranspose (x, W)", (4, 5, 3, 3)),
    "Gemm": ("float[3,4] x, float[4,5] W", "Gemm (x, W)", (4, 5)),
    "Gemm turned": ("float[3,4] x, float[5,4] W", "Gemm <transB = 1> (x, W)", (5, 4)),
    "MatMul": ("float[2,3,4] x, float[4,5] W", "MatMul (x, W)", (4, 5)),
    "MatMul in batches": ("float[2,3,4] x, float[2,4,5] W", "MatMul (x, W)", (2, 4, 5)),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_channel_axes(name: str) -> None:
    """Doubling the weights of a channel doubles that output, or acts like doubling that input."""
    ports, call, shape = WEIGHTED[name]
    weight, x = normal(*shape), normal(*_input_shape(ports))
    node = first(_calling(ports, call, weight))
    row = knowledge(node)
    assert row.out_axis is not None
    assert row.in_axis is not None
    plain = outputs(_calling(ports, call, weight), {"x": x})["y"]
    more = outputs(_calling(ports, call, _doubled(weight, row.out_axis(node))), {"x": x})["y"]
    np.testing.assert_allclose(more, _doubled(plain, row.y_axis), rtol=0, atol=1e-4)
    if groups(node) == 1:
        given = outputs(_calling(ports, call, _doubled(weight, row.in_axis(node))), {"x": x})["y"]
        doubled = outputs(_calling(ports, call, weight), {"x": _doubled(x, row.y_axis)})["y"]
        np.testing.assert_allclose(given, doubled, rtol=0, atol=1e-4)


def _input_shape(ports: str) -> tuple[int, ...]:
    return tuple(int(d) for d in ports.split("[")[1].split("]")[0].split(","))


def _calling(ports: str, call: str, weight: NDArray[Any]) -> onnx.ModelProto:
    free = "A,B,C,D" if weight.ndim == 4 else "A,B" if "Gemm" in call else "A,B,C"
    return bind(f"g ({ports}) => (float[{free}] y) {{ y = {call} }}", W=weight)


def _doubled(array: NDArray[Any], axis: int) -> NDArray[Any]:
    scaled = array.copy()
    scaled[(slice(None),) * (axis % array.ndim) + (1,)] *= 2
    return scaled


SINGLE = {
    "MaxPool": "MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (x)",
    "AveragePool": "AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (x)",
    "GlobalAveragePool": "GlobalAveragePool (x)",
    "LeakyRelu": "LeakyRelu <alpha = 0.3> (x)",
    "Relu": "Relu (x)",
    "Add": "Add (x, x)",
    "Reshape": "Reshape (x, t)",
    "Transpose": "Transpose <perm = [1, 0, 3, 2]> (x)",
    "Flatten": "Flatten (x)",
    "Squeeze": "Squeeze (x, a)",
    "Unsqueeze": "Unsqueeze (x, a)",
    "Slice": "Slice (x, a, b)",
    "Split": "Split <axis = 1> (x)",
    "Expand": "Expand (x, t)",
    "Tile": "Tile (x, r)",
    "DepthToSpace": "DepthToSpace <blocksize = 2> (x)",
    "Resize": 'Resize <mode = "nearest"> (x, , s)',
    "Gather": "Gather <axis = 1> (x, a)",
}
CONSTANTS = {
    "t": np.array([2, 4, 6, 6]),
    "r": np.array([1, 2, 1, 1]),
    "a": np.array([0]),
    "b": np.array([1]),
    "s": np.array([1, 1, 2, 2], np.float32),
}


def _single(op: str) -> onnx.ModelProto:
    ports = "int64[4] t, int64[4] r, int64[1] a, int64[1] b, float[4] s"
    results = "y, z" if op == "Split" else "y"
    proto = bind(
        f"g (float[2,4,6,6] x, {ports}) => (float[A,B] y) {{ {results} = {SINGLE[op]} }}",
        **CONSTANTS,
    )
    read = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    inferred = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(
            onnx.helper.make_graph(proto.graph.node, "g", proto.graph.input, [], kept),
            opset_imports=proto.opset_import,
        )
    )
    found = next(v for v in inferred.graph.value_info if v.name == "y")
    proto.graph.output[0].CopyFrom(found)
    return proto


def _run(op: str, x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = outputs(_single(op), {"x": x})["y"]
    return result


@pytest.mark.parametrize("op", [op for op in SINGLE if op != "Squeeze" and OPS[op].homogeneous])
def test_homogeneous(op: str) -> None:
    """f(s x) = s f(x) for a positive factor of each channel."""
    s = np.float32([0.1, 1, 3, 20]).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(_run(op, s * IMAGE), s * _run(op, IMAGE), rtol=1e-5, atol=1e-6)


def test_all_homogeneous_operators_are_tried() -> None:
    assert {op for op, row in OPS.items() if row.homogeneous} <= SINGLE.keys()
    same = {op for op, row in OPS.items() if "same" in (row.role, row.bare and row.bare.role)}
    assert same <= SINGLE.keys()


@pytest.mark.parametrize("op", [op for op in SINGLE if OPS[op].role == "same" or OPS[op].bare])
def test_same_moves_values_without_changing_them(op: str) -> None:
    if op == "Squeeze":
        proto = bind(
            "g (float[1,4,6,6] x, int64[1] a) => (float[4,6,6] y) { y = Squeeze (x, a) }",
            a=np.array([0]),
        )
        made = outputs(proto, {"x": IMAGE[:1]})["y"]
    else:
        made = _run(op, IMAGE)
    assert np.isin(made, IMAGE).all()


def test_bounds() -> None:
    def clip(given: str, **limits: float) -> tuple[float, float]:
        ports = "".join(f", float {name}" for name in limits)
        weights = {name: np.array(value, np.float32) for name, value in limits.items()}
        node = first(
            bind(f"g (float[4] x{ports}) => (float[4] y) {{ y = Clip (x{given}) }}", **weights)
        )
        return bounds(node)

    assert clip(", l, h", l=0, h=6) == (0, 6)
    assert clip(", l", l=0) == (0, np.inf)
    assert clip(", , h", h=6) == (-np.inf, 6)
    assert clip("") == (-np.inf, np.inf)
    assert bounds(first(bind("g (float[4] x) => (float[4] y) { y = Relu (x) }"))) == (0, np.inf)
    computed = bind("g (float[4] x, float l) => (float[4] y) { y = Clip (x, l) }")
    assert np.isnan(bounds(first(computed))[0])


@pytest.mark.parametrize(
    ("call", "is_taken"),
    [
        ("Relu (x)", True),
        ("Clip (x, z, s)", True),
        ("Clip (x, z)", True),
        ("Clip (x, , s)", False),
        ("Clip (x, m, s)", False),
        ("Clip (x, s, t)", False),
        ("Clip (x, u)", False),
        ("Tanh (x)", False),
    ],
)
def test_absorbed(call: str, is_taken: bool) -> None:
    numbers = {"z": 0, "s": 6, "t": 7, "m": -1}
    weights = {
        name: np.array(value, np.float32) for name, value in numbers.items() if f" {name}" in call
    }
    ports = "".join(f", float {name}" for name in weights) + (", float u" if "u)" in call else "")
    node = first(bind(f"g (float[4] x{ports}) => (float[4] y) {{ y = {call} }}", **weights))
    assert is_absorbed(node) == is_taken


def test_knowledge() -> None:
    table = first(
        bind("g (int64[2] i, float[4,3] T) => (float[2,3] y) { y = Gather (T, i) }", T=normal(4, 3))
    )
    moved = first(bind("g (float[4,3] x, int64[2] i) => (float[2,3] y) { y = Gather (x, i) }"))
    assert knowledge(table).role == "lookup"
    assert weight_of(table) is not None
    assert knowledge(moved).role == "same"
    assert [t.name for t in data_inputs(moved)] == ["x"]
    odd = first(bind("g (float[4] x) => (float[4] y) { y = Exp (x) }"))
    assert knowledge(odd).role == "opaque"
    odd.op, odd.domain = "Conv", "com.example"
    assert knowledge(odd).role == "opaque"


def test_inputs_and_weights() -> None:
    node = first(
        bind("g (float[1,2] x, float[1,2] z) => (float[1,4] y) { y = Concat <axis = 1> (x, z) }")
    )
    assert [t.name for t in data_inputs(node)] == ["x", "z"]
    conv = (
        "g (float[1,4,6,6] x, float[%s] W) => (float[1,A,4,4] y) { y = Conv <group = %d> (x, W) }"
    )
    depthwise = first(bind(conv % ("8,1,3,3", 4), W=normal(8, 1, 3, 3)))
    grouped = first(bind(conv % ("8,2,3,3", 2), W=normal(8, 2, 3, 3)))
    assert is_depthwise(depthwise)
    assert not is_depthwise(grouped)
    computed = first(bind("g (float[1,4] x, float[4,2] W) => (float[1,2] y) { y = MatMul (x, W) }"))
    assert weight_of(computed) is None
    vector = first(
        bind("g (float[1,4] x, float[4] W) => (float[1] y) { y = MatMul (x, W) }", W=normal(4))
    )
    assert weight_of(vector) is None
    double = bind(
        "g (double[1,4] x, double[4,2] W) => (double[1,2] y) { y = MatMul (x, W) }",
        W=normal(4, 2, dtype=np.float64),
    )
    assert weight_of(first(double)) is None
