"""Bytes, parameters and MACs against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxc.cost import (
    bytes_by_type,
    external_files,
    file_bytes,
    heavy_nodes,
    inspect,
    quantized_as,
)
from onnxc.errors import ModelError
from onnxc.graph import constants, load
from onnxc.shapes import infer

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'

#   op, text of the graph, MACs by hand
CASES = {
    "Conv 1-D": (
        "g (float[1, 3, 20] x) => (float[1, 4, 18] y) <float[4, 3, 3] w> { y = Conv(x, w) }",
        18 * 4 * 3 * 3,
    ),
    "Conv 2-D with groups": (
        "g (float[1, 8, 10, 10] x) => (float[1, 8, 10, 10] y) <float[8, 2, 3, 3] w>"
        "{ y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w) }",
        8 * 100 * 2 * 9,
    ),
    "Conv 3-D": (
        "g (float[1, 2, 5, 5, 5] x) => (float[1, 3, 3, 3, 3] y) <float[3, 2, 3, 3, 3] w>"
        "{ y = Conv (x, w) }",
        3 * 27 * 2 * 27,
    ),
    "Conv of a free batch": (
        "g (float[N, 3, 4, 4] x) => (float[N, 5, 4, 4] y) <float[5, 3, 1, 1] w> { y = Conv(x, w) }",
        5 * 16 * 3,
    ),
    "ConvTranspose": (
        "g (float[1, 6, 4, 4] x) => (float[1, 2, 9, 9] y) <float[6, 2, 3, 3] w>"
        "{ y = ConvTranspose <strides = [2, 2]> (x, w) }",
        6 * 16 * 2 * 9,
    ),
    "Gemm": (
        "g (float[7, 11] x) => (float[7, 13] y) <float[13, 11] w>{ y = Gemm <transB = 1> (x, w) }",
        7 * 11 * 13,
    ),
    "Gemm with transA": (
        "g (float[11, 7] x) => (float[7, 13] y) <float[11, 13] w>{ y = Gemm <transA = 1> (x, w) }",
        7 * 11 * 13,
    ),
    "MatMul of two activations": (
        "g (float[2, 4, 5, 6] a, float[2, 4, 6, 7] b) => (float[2, 4, 5, 7] y){ y = MatMul(a, b) }",
        2 * 4 * 5 * 6 * 7,
    ),
    "LSTM": (
        "g (float[9, 2, 5] x) => (float[9, 1, 2, 3] y) <float[1, 12, 5] w, float[1, 12, 3] r>"
        "{ y = LSTM <hidden_size = 3> (x, w, r) }",
        9 * 2 * (12 * 5 + 12 * 3),
    ),
    "GRU in two directions": (
        "g (float[9, 2, 5] x) => (float[9, 2, 2, 3] y) <float[2, 9, 5] w, float[2, 9, 3] r>"
        '{ y = GRU <hidden_size = 3, direction = "bidirectional"> (x, w, r) }',
        9 * 2 * (2 * 9 * 5 + 2 * 9 * 3),
    ),
}


def model(text: str) -> onnx.ModelProto:
    """A model from text; an initializer `<float[4, 3] w>` without values is filled with ones."""
    proto = onnx.parser.parse_model(HEADER + text)
    for info in list(proto.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        filled = onnx.numpy_helper.from_array(np.ones(shape, kind), info.name)
        proto.graph.initializer.append(filled)
    del proto.graph.value_info[:]
    return proto


@pytest.mark.parametrize("name", CASES)
def test_macs(name: str) -> None:
    text, expected = CASES[name]
    assert inspect(model(text)).macs == expected


def test_unknown_shapes_are_not_zero() -> None:
    text = """g (float[N, 4] x, int64[2] s) => (float[a, b] y) <float[4, 4] w>
    { t = Reshape(x, s)  y = MatMul(t, w) }"""  # no run can tell: the shape is an input
    found = inspect(model(text))
    assert found.macs is None
    assert any("1 node" in note for note in found.notes)


def test_shapes_that_inference_does_not_find_are_observed() -> None:
    text = """g (float[N, 6] x) => (float[a, b] y) <float[3, 5] w, int64[2] s = {-1, 3}>
    { n = NonZero(s)  c = Cast <to = 7> (s)  r = Abs(c)  q = Sub(r, r)  p = Add(q, c)
      t = Reshape(x, p)  y = MatMul(t, w) }"""
    found = inspect(model(text))
    assert found.macs == 2 * 3 * 5
    assert any("free dimension as 1: N" in note for note in found.notes)


def test_inspection_leaves_a_loaded_model_alone() -> None:
    loaded = load(model(CASES["Conv of a free batch"][0]))
    inspect(loaded)
    assert list(loaded.graph.inputs[0].shape) == ["N", 3, 4, 4]


def test_shared_weights_count_once() -> None:
    text = """g (float[1, 4] x) => (float[1, 4] y) <float[4, 4] w>
    { t = MatMul(x, w)  y = MatMul(t, w) }"""
    graph = load(model(text)).graph
    assert len(constants(graph)) == 1
    assert bytes_by_type(graph) == {"float32": 64}


def test_bytes_by_type_count_nested_bodies_the_largest_first() -> None:
    text = """g (float[2] x, bool flag) => (float[2] y) <int64[1] axis = {0}> {
      t = Unsqueeze(x, axis)
      u = If (flag) <
        then_branch = yes () => (float[1, 2] v) <float[1, 2] k = {1, 2}> { v = Add(t, k) },
        else_branch = no () => (float[1, 2] w) <double[1, 2] d = {1, 2}>
          { c = Cast <to = 1> (d)  w = Mul(t, c) }
      >
      y = Squeeze(u, axis)
    }"""
    graph = load(model(text)).graph
    assert bytes_by_type(graph) == {"float64": 16, "float32": 8, "int64": 8}
    assert next(iter(bytes_by_type(graph))) == "float64"


def test_inspection_tells_the_interface_and_the_ops() -> None:
    text, _ = CASES["Conv of a free batch"]
    found = inspect(model(text))
    assert found.opset == 17
    assert found.ops == {"Conv": 1}
    assert found.parameters == 15
    assert [(p.name, p.dtype, p.shape) for p in found.inputs] == [("x", "float32", ("N", 3, 4, 4))]
    assert [p.name for p in found.outputs] == ["y"]
    assert found.quantized is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            """g (float[2] x) => (float[2] y) <float s = {0.1}, uint8 z = {3}>
            { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }""",
            "qdq",
        ),
        (
            """g (float[2, 2] x) => (float[2, 2] y) <int8[2, 2] w = {1, 2, 3, 4}, float s = {0.1}>
            { v = DequantizeLinear(w, s)  y = MatMul(x, v) }""",
            "weight-only",
        ),
        (
            """g (float[2, 2] x) => (int32[2, 2] y) <int8[2, 2] w = {1, 2, 3, 4}>
            { q, s, z = DynamicQuantizeLinear(x)  y = MatMulInteger(q, w, z) }""",
            "dynamic",
        ),
    ],
)
def test_quantized_models_are_recognized(text: str, kind: str) -> None:
    graph = load(model(text)).graph
    assert quantized_as(graph) == kind
    assert not any(node.can for node in heavy_nodes(graph))


def test_heavy_nodes_say_how_or_why_not() -> None:
    text = """g (float[1, 4] x, float[4, 4] m) => (float[1, 4] y) <float[4, 4] w>
    { a = MatMul(x, w)  b = MatMul(a, m)  n = Neg(m)  c = Gemm(b, n)
      v = Neg(w)  y = Gemm(c, v) }"""
    loaded = load(model(text))
    infer(loaded)
    constant, activations, computed, folded = heavy_nodes(loaded.graph)
    assert constant.can and constant.weight == 64 and constant.shape == (4, 4)
    assert not activations.can and "two activations" in activations.reason
    assert not computed.can and "computed" in computed.reason
    assert folded.can and "folded" in folded.reason


def test_file_bytes_count_external_data_once(tmp_path: Path) -> None:
    proto = model("g (float[1, 64] x) => (float[1, 64] y) <float[64, 64] w> { y = MatMul(x, w) }")
    whole, split = tmp_path / "whole.onnx", tmp_path / "split.onnx"
    onnx.save(proto, whole)
    onnx.save(proto, split, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert file_bytes(whole) == whole.stat().st_size
    assert external_files(split) == [tmp_path / "w.bin"]
    assert file_bytes(split) == split.stat().st_size + 64 * 64 * 4


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"m\.onnx"):
        file_bytes(path)
