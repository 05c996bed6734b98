"""Uniform quantization: what must hold for every range, weight and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from onnxc.numerics.affine import (
    TINY,
    Grid,
    along,
    bias_guard,
    dequantize,
    parameters,
    quantize,
    weight_scales,
)

LARGEST = float(np.finfo(np.float32).max)
GRIDS = [Grid(bits, signed) for bits in (8, 16) for signed in (False, True)]
grids = st.sampled_from([*GRIDS, Grid(narrow=True), Grid(narrow=True, reduced=True)])
values = st.floats(-LARGEST, LARGEST, width=32)
moderate = st.floats(-(2.0**20), 2.0**20, width=32)
weights = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=4, max_side=4),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),
)


def is_normal(scale: Any) -> bool:
    return bool(np.all(np.isfinite(scale)) and np.all(np.asarray(scale, np.float32) >= TINY))


@pytest.mark.parametrize(
    ("grid", "low", "high", "kind"),
    [
        (Grid(), -128, 127, "int8"),
        (Grid(narrow=True), -127, 127, "int8"),
        (Grid(narrow=True, reduced=True), -63, 63, "int8"),
        (Grid(signed=False), 0, 255, "uint8"),
        (Grid(16), -32768, 32767, "int16"),
        (Grid(16, signed=False), 0, 65535, "uint16"),
        (Grid(4, narrow=True), -7, 7, "int8"),
    ],
)
def test_grids(grid: Grid, low: int, high: int, kind: str) -> None:
    assert (grid.low, grid.high, grid.dtype) == (low, high, np.dtype(kind))


@given(low=values, high=values, grid=grids, symmetric=st.booleans())
def test_zero_is_exact_and_scales_are_normal(
    low: float, high: float, grid: Grid, symmetric: bool
) -> None:
    scale, zero = parameters(min(low, high), max(low, high), grid, symmetric=symmetric)
    assert is_normal(scale)
    assert zero.dtype == grid.dtype
    assert grid.low <= int(zero) <= grid.high
    q = quantize(np.zeros(1, np.float32), np.asarray(scale), zero, grid)
    assert dequantize(q, np.asarray(scale), zero).item() == 0.0


@given(low=moderate, high=moderate, grid=grids, symmetric=st.booleans(), at=st.floats(0, 1))
def test_rounding_inside_the_range_errs_by_half_a_step(
    low: float, high: float, grid: Grid, symmetric: bool, at: float
) -> None:
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    assume(high - low > 1e-20)
    scale, zero = parameters(low, high, grid, symmetric=symmetric)
    x = np.float32([low + at * (high - low)])
    error = np.abs(dequantize(quantize(x, scale, zero, grid), scale, zero).astype(float) - x)
    levels = (grid.high - grid.low) * np.finfo(np.float32).eps  # x / s is a float32
    assert error.item() <= float(scale) * (0.5 + 2 * levels)


@given(low=moderate, high=moderate, grid=grids)
def test_symmetric_zero_lies_in_the_middle(low: float, high: float, grid: Grid) -> None:
    low, high = min(low, high), max(low, high)
    _, zero = parameters(low, high, grid, symmetric=True)
    is_one_sided = low >= 0
    assert int(zero) == (0 if grid.signed or is_one_sided else (grid.high + 1) // 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("end", [0.0, 1e-45, 1e-38, LARGEST])
def test_ranges_at_the_ends_of_float32(grid: Grid, symmetric: bool, end: float) -> None:
    for low, high in ((0.0, end), (-end, 0.0), (-end, end)):
        scale, zero = parameters(low, high, grid, symmetric=symmetric)
        assert is_normal(scale)
        assert grid.low <= int(zero) <= grid.high
    assert parameters(0.0, 0.0, grid, symmetric=symmetric)[0] == 1.0


@given(weight=weights, grid=grids.filter(lambda grid: grid.signed), data=st.data())
def test_weights_fit_their_scales(
    weight: NDArray[np.float32], grid: Grid, data: st.DataObject
) -> None:
    axis = data.draw(st.one_of(st.none(), st.integers(-weight.ndim, weight.ndim - 1)))
    scale = weight_scales(weight, axis, grid)
    assert is_normal(scale)
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    q = quantize(weight, scale, 0, grid, axis)
    assert np.abs(q.astype(int)).max() <= grid.high
    error = np.abs(dequantize(q, scale, 0, axis).astype(np.float64) - weight)
    assert np.all(error <= 0.505 * along(scale.astype(np.float64), axis, weight.ndim))


def test_a_dead_channel_has_scale_one_and_a_denormal_one_a_normal_scale() -> None:
    weight = np.float32([[0, 0], [1e-42, 0], [127, -1]])
    scale = weight_scales(weight, 0, Grid(narrow=True))
    np.testing.assert_array_equal(scale, np.float32([1, TINY, 1]))


def test_a_channel_has_its_own_scale() -> None:
    weight = np.float32([[127, 1], [254, -3]])
    np.testing.assert_array_equal(weight_scales(weight, 0, Grid(narrow=True)), [1, 2])
    np.testing.assert_array_equal(weight_scales(weight, None, Grid(narrow=True)), 2)


positive = st.floats(TINY, 2.0**20, width=32)


@given(bias=values, s_x=positive, s_w=positive)
def test_guarded_biases_fit_with_room_for_the_products(bias: float, s_x: float, s_w: float) -> None:
    assume(abs(bias) / s_x < 1e38)
    guarded = bias_guard(np.float32([bias]), s_x, np.float32([s_w]))
    assert guarded.item() >= np.float32(s_w)
    product = (np.float64(s_x) * guarded.astype(np.float64)).astype(np.float32)
    assert is_normal(product * (1 + 1e-6))
    assert np.abs(np.rint(bias / product.astype(np.float64))).item() <= 2.0**30 * (1 + 1e-6)


def test_the_guard_leaves_ordinary_scales_alone() -> None:
    s_w = np.float32([0.01, 0.02])
    np.testing.assert_array_equal(bias_guard(np.float32([1.0, -3.0]), 0.05, s_w), s_w)
