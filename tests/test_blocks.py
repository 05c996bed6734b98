"""Block-wise weights: error bounds, shapes, packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import normal

from onnxc.numerics.blocks import (
    decibels,
    dequantize_blocks,
    known_blocks,
    pack_columns,
    quantize_blocks,
)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("shape", [(1, 70, 5), (6, 33, 1), (3, 32, 4), (2, 7, 1)])
def test_error_and_shapes(bits: int, block: int, shape: tuple[int, int, int]) -> None:
    weight = normal(*shape)
    blocks = quantize_blocks(weight, bits, block)
    outer, count, size, inner = blocks.codes.shape
    assert (outer, inner) == (shape[0], shape[2])
    assert size == min(block or shape[1], shape[1])
    assert count == -(-shape[1] // size)
    assert blocks.is_filled == bool(shape[1] % size)
    assert blocks.unfilled().shape == shape
    assert dequantize_blocks(blocks).shape == shape
    assert decibels(weight, blocks) > (38 if bits == 8 else 15)


def test_eight_bits_are_within_half_a_step() -> None:
    weight = normal(4, 64, 3)
    blocks = quantize_blocks(weight, 8, 16)
    error = np.abs(dequantize_blocks(blocks) - weight).reshape(blocks.codes.shape)
    assert (error <= 0.5001 * blocks.scales).all()
    assert np.abs(blocks.codes).max() == 127


def test_reduced_range_keeps_to_seven_bits() -> None:
    blocks = quantize_blocks(normal(1, 64, 8), 8, reduced=True)
    assert np.abs(blocks.codes).max() == 63


@given(st.integers(0, 1000), st.sampled_from([16, 32, 64]))
def test_searched_ranges_beat_the_plain_one(seed: int, block: int) -> None:
    weight = normal(2, 64, 3, seed=seed)
    blocks = quantize_blocks(weight, 4, block)
    tiles = weight.reshape(blocks.codes.shape)
    step = np.abs(tiles).max(2, keepdims=True) / 7
    plain = np.clip(np.rint(tiles / step), -8, 7) * step
    ours = dequantize_blocks(blocks).reshape(tiles.shape)
    assert np.square(ours - tiles).sum() < np.square(plain - tiles).sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_denormals_stay_finite(bits: int) -> None:
    weight = np.zeros((2, 32, 2), np.float32)
    weight[1] = 1e-42
    blocks = quantize_blocks(weight, bits, 16)
    assert np.isfinite(blocks.scales).all()
    assert (blocks.scales != 0).all()
    np.testing.assert_allclose(dequantize_blocks(blocks), weight, atol=1e-38)


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_the_same_from_both_layouts(bits: int) -> None:
    columns = normal(48, 6)
    from_columns = pack_columns(quantize_blocks(columns[None], bits, 16))
    from_rows = pack_columns(quantize_blocks(columns.T[:, :, None].copy(), bits, 16))
    np.testing.assert_array_equal(from_columns, from_rows)
    assert from_columns.shape == (6, 3, 16 * bits // 8)


def test_low_half_of_a_byte_comes_first() -> None:
    weight = np.tile(np.float32([-8, 7]), 8).reshape(1, 16, 1)
    packed = pack_columns(quantize_blocks(weight, 4, 16))
    assert (packed == 0xF0).all()


def test_four_bits_are_stored_as_int4() -> None:
    stored = quantize_blocks(normal(1, 32, 2), 4, 16).stored()
    assert stored.dtype.name == "int4"


def test_large_weights_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [normal(1, 40, 30), normal(30, 40, 1), normal(3, 40, 5)]
    whole = [quantize_blocks(weight, 4, 16) for weight in weights]
    monkeypatch.setattr("onnxc.numerics.blocks.CHUNK", 100)
    for weight, expected in zip(weights, whole, strict=True):
        pieces = quantize_blocks(weight, 4, 16)
        np.testing.assert_array_equal(pieces.codes, expected.codes)
        np.testing.assert_allclose(pieces.scales, expected.scales, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 70, 5), (6, 33, 1), (3, 32, 4)])
def test_what_was_rounded_before_keeps_its_codes(bits: int, shape: tuple[int, int, int]) -> None:
    weight = normal(*shape)
    assert known_blocks(weight, bits, 16) is None
    made = dequantize_blocks(quantize_blocks(weight, bits, 16))
    found = known_blocks(made, bits, 16)
    assert found is not None and found.bits == bits
    np.testing.assert_array_equal(dequantize_blocks(found), made)
