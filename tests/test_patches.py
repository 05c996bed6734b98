"""Rows of a layer's input: the weight times a row is the layer's output at one position."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from texts import normal

from onnxc.numerics.patches import Window, length, rows
from onnxc.numerics.sampling import spread, start, stride
from onnxc.runtime import run, session

Array = NDArray[Any]
ALL = 10**9  # positions: no sampling

CONVOLUTIONS = [  # spatial, channels, filters, and the window
    ((9,), 4, 6, Window((3,), (2,), (1,), (1, 0))),
    ((9, 8), 4, 6, Window((3, 2), (2, 1), (1, 2), (1, 0, 2, 1), groups=2)),
    ((9, 8), 4, 8, Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), groups=4)),
    ((9, 8), 4, 6, Window((3, 3), (2, 2), auto_pad="SAME_UPPER")),
    ((9, 8), 4, 6, Window((4, 3), (3, 2), auto_pad="SAME_LOWER")),
    ((9, 8), 4, 6, Window((4, 3), (3, 2), auto_pad="VALID")),
    ((5, 6, 7), 4, 6, Window((3, 2, 1), (2, 1, 1), (1, 1, 2), (1, 0, 1, 1, 1, 0), groups=2)),
    ((6, 7), 4, 6, Window((1, 1), groups=2)),
    ((6, 7), 4, 6, Window((1, 1), (2, 2))),
    ((6, 7), 4, 6, Window((1, 1), pads=(1, 1, 0, 1))),
]


def convolve(x: Array, w: Array, window: Window) -> Array:
    """What ONNX Runtime computes."""
    attributes: dict[str, Any] = {"group": window.groups, "auto_pad": window.auto_pad}
    lists = {"strides": window.strides, "dilations": window.dilations, "pads": window.pads}
    attributes |= {name: list(value) for name, value in lists.items() if value}
    ports = [make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xwy"]
    graph = make_graph(
        [make_node("Conv", ["x", "w"], ["y"], **attributes)], "g", ports[:2], ports[2:]
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 13)], ir_version=8)
    return run(session(model.SerializeToString()), {"x": x, "w": w})["y"]


@pytest.mark.parametrize(("spatial", "channels", "filters", "window"), CONVOLUTIONS)
def test_the_weight_times_the_rows_is_the_convolution(
    spatial: tuple[int, ...], channels: int, filters: int, window: Window
) -> None:
    x = normal(3, channels, *spatial)
    w = normal(filters, channels // window.groups, *window.kernel, seed=1)
    y = convolve(x, w, window)
    found, available = rows(x, 1, window, ALL)
    positions = int(np.prod(y.shape[2:]))
    assert available == 3 * positions
    assert found.shape == (window.groups, available, length(x.shape, 1, window))
    grouped = w.reshape(window.groups, filters // window.groups, -1)
    product = np.einsum("grd,gmd->gmr", found, grouped).reshape(filters, 3, positions)
    np.testing.assert_allclose(product.transpose(1, 0, 2).reshape(y.shape), y, atol=1e-4)


def test_rows_of_a_product_are_slices_along_the_axis_that_is_summed_over() -> None:
    x = normal(2, 5, 7)
    found, available = rows(x, -1, Window(), ALL)
    np.testing.assert_array_equal(np.sort(found[0], axis=0), np.sort(x.reshape(10, 7), axis=0))
    assert available == 10
    transposed, _ = rows(x[0].T, 0, Window(), ALL)
    np.testing.assert_array_equal(np.sort(transposed[0], axis=0), np.sort(x[0], axis=0))


def test_a_recurrent_layer_counts_samples_on_its_second_axis() -> None:
    x = normal(50, 3, 4)  # steps, batch, features
    whole, available = rows(x, -1, Window(samples=1), 7, 3)
    assert available == 150
    alone = [rows(x[:, i : i + 1], -1, Window(samples=1), 7, 1)[0] for i in range(3)]
    together = {row.tobytes() for row in whole[0]}
    assert together == {row.tobytes() for part in alone for row in part[0]}


@pytest.mark.parametrize("window", [Window((3, 3), pads=(1, 1, 1, 1)), Window((1, 1)), Window()])
def test_a_sample_gives_the_same_rows_whatever_the_batch(window: Window) -> None:
    x = normal(5, 4, 12, 13)
    together = {row.tobytes() for row in rows(x, 1, window, 11, 5)[0][0]}
    alone = [rows(x[i : i + 1], 1, window, 11, 1)[0][0] for i in range(5)]
    assert together == {row.tobytes() for part in alone for row in part}
    assert all(len(part) <= 11 for part in alone)


def test_positions_are_spread_and_all_different() -> None:
    for count in (1, 2, 49, 196, 12544, 1000):
        for wanted in (1, 8, 33, 20000):
            step = stride(count, wanted)
            found = spread(count, step, 5 % step)
            assert len(set(found)) == len(found) <= max(wanted, 1)
            assert found.min() >= 0 and found.max() < count
            assert count > wanted or len(found) == count


def test_the_start_follows_the_values_and_not_the_place() -> None:
    images = normal(200, 3, 8, 8)
    starts = [start(image, 17) for image in images]
    assert starts == [start(image.copy(), 17) for image in images]
    assert len(set(starts)) == 17  # every phase is visited
    assert start(images[0], 1) == 0
