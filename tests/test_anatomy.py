"""Where the bytes of files are: every byte counted once."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest

from onnxc import api
from onnxc.anatomy import anatomy, layer_bytes
from onnxc.cost import file_bytes
from onnxc.graph import load

MODELS = Path(__file__).resolve().parents[1] / "models"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
<int8[4, 4] q = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float s = {0.5},
 float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] b = {1, 2, 3, 4}>
{
  d = DequantizeLinear(q, s)
  [first] a = MatMul(x, d)
  [second] c = MatMul(a, w)
  [third] e = MatMul(c, w)
  [last] y = Add(e, b)
}
"""


def test_a_constant_belongs_to_the_first_node_that_computes_with_it() -> None:
    found = layer_bytes(load(onnx.parser.parse_model(TEXT)))
    assert dict(found) == {"first": 16 + 4, "second": 64, "last": 16}


def test_parts_of_a_layer_go_to_it_and_all_adds_up() -> None:
    model = load(onnx.parser.parse_model(TEXT))
    text = TEXT.replace("[third] e = MatMul(c, w)", "[second_factor1] e = MatMul(c, v)")
    factor = "float[4, 4] v = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] b"
    other = load(onnx.parser.parse_model(text.replace("float[4] b", factor)))
    found = anatomy((model, other), (500, 450))
    rows = {layer.node: (layer.before, layer.after) for layer in found.layers}
    assert rows == {"first": (20, 20), "second": (64, 128), "last": (16, 16)}
    assert found.rest == (400, 286) and found.saved == (0, 0) and found.files == (500, 450)
    assert found.types == {"float32": (84, 148), "int8": (16, 16)}


@pytest.mark.parametrize("suffix", ["onnx", "onnxz"])
def test_of_a_real_result_layers_and_rest_are_the_file(tmp_path: Path, suffix: str) -> None:
    path, output = MODELS / "digits_cnn.onnx", tmp_path / f"small.{suffix}"
    report = api.quantize(path, format="weight-only", output=output)
    found = report.anatomy
    assert found is not None
    assert found.files == (file_bytes(path), file_bytes(output))
    assert (found.saved[1] > 0) == (suffix == "onnxz") and found.saved[0] == 0
    gemm = next(layer for layer in found.layers if layer.node == "/1/1.2/1.2.0/Conv")
    assert gemm.op == "Conv" and 3.5 < gemm.before / gemm.after < 4
    assert min(found.rest) > 0
