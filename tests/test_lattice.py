"""Integers of a weight that was rounded before are found again, and no others."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxc.numerics.affine import Grid, dequantize, quantize
from onnxc.numerics.lattice import block_scales, lattice_scales


@given(st.integers(2, 8), st.integers(0, 10_000), st.sampled_from([63, 127]))
@settings(max_examples=60, deadline=None)
def test_values_and_codes_come_back_exactly(bits: int, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    half = min(2 ** (bits - 1), most)
    codes = rng.integers(-half, half, (5, 3, 3, 2))
    scale = np.exp(rng.normal(-4, 2, 5)).astype(np.float32)
    weight = codes.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    found = lattice_scales(weight, 0, most)
    assert found is not None and found.dtype == np.float32
    grid = Grid(8, narrow=True, reduced=most == 63)
    q = quantize(weight, found, 0, grid, 0)
    np.testing.assert_array_equal(dequantize(q, found, 0, 0), weight)
    factor = scale / found
    np.testing.assert_allclose(q, codes * factor.reshape(-1, 1, 1, 1), rtol=1e-5)
    assert len(np.unique(q)) <= 2 * half
    assert np.abs(q).max() > most / 2  # as fine as the grid goes, for the bias


def test_plain_weights_lie_on_none() -> None:
    rng = np.random.default_rng(0)
    for shape in ((8, 3, 3, 3), (8, 1, 3, 3), (100, 4)):
        assert lattice_scales(rng.standard_normal(shape).astype(np.float32), 0, 127) is None
    half = rng.integers(-8, 8, (2, 50)).astype(np.float32)
    half[1] += rng.standard_normal(50).astype(np.float32)
    assert lattice_scales(half, 0, 127) is None


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_along_any_axis(axis: int | None) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-8, 8, (6, 4, 5)).astype(np.float32)
    scale = np.float32(0.3)
    weight = codes * scale
    found = lattice_scales(weight, axis, 127)
    assert found is not None
    assert found.shape == (() if axis is None else (weight.shape[axis],))
    q = quantize(weight, found, 0, Grid(8, narrow=True), axis)
    np.testing.assert_array_equal(dequantize(q, found, 0, axis), weight)


def test_channels_of_zeros_get_scale_one_and_tiny_ones_none() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[0] = [1, -2, 4, 0]
    found = lattice_scales(weight, 0, 4)
    assert found is not None
    np.testing.assert_array_equal(found, [1, 1, 1])
    assert lattice_scales(weight * np.float32(1e-40), 0, 127) is None
    assert lattice_scales(np.zeros((0, 3), np.float32), 0, 127) is None


def test_a_plain_weight_costs_no_time() -> None:
    weight = np.random.default_rng(2).standard_normal((4096, 1024)).astype(np.float32)
    start = time.process_time()
    assert lattice_scales(weight, 0, 127) is None
    assert time.process_time() - start < 0.5


@given(st.integers(2, 8), st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_scales_of_blocks_come_back(bits: int, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(low, high + 1, (40, size))
    signs = rng.choice([-1, 1], 40)
    scale = (signs * np.exp(rng.normal(-4, 2, 40))).astype(np.float32)
    weight = codes.astype(np.float32) * scale[:, None]
    found = block_scales(weight, low, high)
    assert found is not None and found.dtype == np.float32
    q = np.rint(weight / found[:, None])
    assert q.min() >= low and q.max() <= high
    np.testing.assert_allclose(q.astype(np.float32) * found[:, None], weight, rtol=2.0**-22)


def test_blocks_that_lie_on_no_such_integers_have_no_scales() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (50, 32)).astype(np.float32)
    assert block_scales(codes, -8, 7) is not None
    for row, values in ((40, rng.standard_normal(32)), (0, rng.standard_normal(32))):
        spoilt = codes.copy()
        spoilt[row] = values
        assert block_scales(spoilt, -8, 7) is None
    codes[3, :3] = [8, -8, 1]  # one more on both sides
    assert block_scales(codes, -8, 7) is None
    assert block_scales(np.full((2, 4), 1e-41, np.float32), -8, 7) is None
    np.testing.assert_array_equal(block_scales(np.zeros((2, 4)), -8, 7), [1, 1])


def test_a_plain_weight_in_blocks_costs_no_time() -> None:
    weight = np.random.default_rng(2).standard_normal((131072, 32)).astype(np.float32)
    start = time.process_time()
    assert block_scales(weight, -127, 127) is None
    assert time.process_time() - start < 0.5
