"""The weight of a layer as it multiplies the rows of its input, and the mean that comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import dataset
from texts import bind, normal, outputs

from calib.collect import collect
from onnxc.core import Key
from onnxc.graph import load, values
from onnxc.moments import matrix, mean_output, moments_key
from onnxc.numerics.patches import Window, rows

IMAGES = {"x": normal(24, 1, 4, 9, 9) + np.float32(1)}
VECTORS = {"x": normal(24, 1, 30) + np.float32(1)}
LAYERS: dict[str, tuple[onnx.ModelProto, dict[str, Any]]] = {
    "Conv": (
        bind(
            """g (float[1,4,9,9] x, float[6,2,3,2] W) => (float[1,6,4,8] y) {
            y = Conv <group: int = 2, strides: ints = [2,1]> (x, W) }""",
            W=normal(6, 2, 3, 2),
        ),
        IMAGES,
    ),
    "Conv with padding": (
        bind(
            """g (float[1,4,9,9] x, float[6,4,3,3] W) => (float[1,6,9,9] y) {
            y = Conv <pads: ints = [1,1,1,1]> (x, W) }""",
            W=normal(6, 4, 3, 3),
        ),
        IMAGES,
    ),
    "ConvTranspose": (
        bind(
            """g (float[1,4,9,9] x, float[4,3,2,2] W) => (float[1,6,18,18] y) {
            y = ConvTranspose <group: int = 2, strides: ints = [2,2]> (x, W) }""",
            W=normal(4, 3, 2, 2),
        ),
        IMAGES,
    ),
    "ConvTranspose with gaps": (
        bind(
            """g (float[1,4,9,9] x, float[4,5,1,2] W) => (float[1,5,27,18] y) {
            y = ConvTranspose <strides: ints = [3,2], output_padding: ints = [2,0]> (x, W) }""",
            W=normal(4, 5, 1, 2),
        ),
        IMAGES,
    ),
    "Gemm": (
        bind(
            "g (float[1,30] x, float[30,5] W) => (float[1,5] y) { y = Gemm (x, W) }",
            W=normal(30, 5),
        ),
        VECTORS,
    ),
    "Gemm transposed": (
        bind(
            """g (float[1,30] x, float[5,30] W) => (float[1,5] y)
            { y = Gemm <transB: int = 1> (x, W) }""",
            W=normal(5, 30),
        ),
        VECTORS,
    ),
    "MatMul": (
        bind(
            "g (float[1,30] x, float[30,5] W) => (float[1,5] y) { y = MatMul (x, W) }",
            W=normal(30, 5),
        ),
        VECTORS,
    ),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_mean_of_an_output_is_made_of_the_mean_of_the_rows(name: str) -> None:
    proto, feed = LAYERS[name]
    model = load(proto)
    node = model.graph.nodes[0]
    key = moments_key(node)
    assert key is not None and key.window is not None and key.axis is not None
    taken, available = rows(feed["x"][:, 0], key.axis, key.window, 10**6)
    assert taken.shape[1] == available  # all of them
    mean = taken.mean(axis=1, dtype=np.float64)
    observed: Any = collect(model, [Key("y", "mean", 1)], dataset(model, feed), batch=1).stats
    made = mean_output(node, values(node.inputs[1]).astype(np.float64), mean)
    np.testing.assert_allclose(made, observed[Key("y", "mean", 1)].mean, rtol=1e-4, atol=1e-4)


def test_a_matrix_has_the_columns_of_the_rows() -> None:
    for name, shape in (
        ("Conv", (2, 3, 12)),
        ("ConvTranspose", (2, 12, 2)),
        ("Gemm", (1, 5, 30)),
        ("MatMul", (1, 5, 30)),
    ):
        node = load(LAYERS[name][0]).graph.nodes[0]
        assert matrix(node, values(node.inputs[1])).shape == shape


def test_a_product_of_rows_is_the_output() -> None:
    proto, feed = LAYERS["Conv"]
    node = load(proto).graph.nodes[0]
    window = Window((3, 2), (2, 1), (), (), groups=2)
    taken, _ = rows(feed["x"][:1, 0], 1, window, 10**6)
    made = np.einsum("god,gnd->gon", matrix(node, values(node.inputs[1])), taken)
    wanted = outputs(proto, {"x": feed["x"][0]})["y"]
    np.testing.assert_allclose(made.reshape(6, -1), wanted.reshape(6, -1), rtol=1e-4, atol=1e-5)
