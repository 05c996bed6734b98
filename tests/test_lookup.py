"""Tables that put codes on few of them: zero stays, and what is frequent is met."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxc.numerics.lookup import counted, few, lost, table, wrapped

RNG = np.random.default_rng(0)


def counts_of(codes: np.ndarray, low: int = 0) -> np.ndarray:
    return np.bincount(codes.astype(int) - low, minlength=256).astype(float)


def test_numbers_are_counted_by_code() -> None:
    x = np.array([-10.0, -0.5, 0.0, 0.26, 0.5, 200.0])
    n = np.arange(1.0, 7.0)
    found = counted(x, n, 0.5, 3, 0, 255)
    expected = np.zeros(256)
    expected[[0, 2, 3, 4, 255]] = [1, 2, 3, 4 + 5, 6]
    np.testing.assert_array_equal(found, expected)
    signed = counted(x, n, 0.5, 0, -128, 127)
    assert signed[128] == 3 and signed[127] == 2


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_zero_stays_and_no_code_is_nearer(seed: int, bits: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    counts = counts_of(np.clip(rng.normal(zero, 30, 2000).round(), 0, 255))
    kept = few(counts, zero, 0, bits)
    made = table(kept, 0, 255)
    assert len(kept) <= 2**bits and zero in kept
    assert made[zero] == zero
    codes = np.arange(256)
    assert (np.abs(made - codes) == np.abs(kept[:, None] - codes).min(axis=0)).all()
    np.testing.assert_array_equal(made[made], made)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_half_a_gauss_beat_a_uniform_grid(bits: int) -> None:
    counts = counts_of(np.minimum(np.abs(RNG.normal(0, 50, 50_000)).round(), 255))
    made = table(few(counts, 0, 0, bits), 0, 255)
    uniform = table(np.rint(np.linspace(0, 255, 2**bits)).astype(np.int64), 0, 255)
    assert lost(counts, made, 0) < 0.7 * lost(counts, uniform, 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", [0, 100])
def test_levels_beat_the_best_clipped_grid(bits: int, zero: int) -> None:
    """Of which the family holds each, on one side or both."""
    x = RNG.laplace(0, 12, 50_000)
    x = np.abs(x) if not zero else x
    counts = counts_of(np.clip(x.round() + zero, 0, 255))
    ends = [
        (a * zero, b * (255 - zero)) for a in np.linspace(0.1, 1, 7) for b in np.linspace(0.1, 1, 7)
    ]
    grids = []
    for below, above in ends:
        step = (below + above) / (2**bits - 1)
        codes = zero + (np.arange(2**bits) - np.rint(below / step)) * step
        grids.append(table(np.unique(np.clip(np.rint(codes), 0, 255)).astype(np.int64), 0, 255))
    best = min(lost(counts, made, 0) for made in grids)
    assert lost(counts, table(few(counts, zero, 0, bits), 0, 255), 0) <= 1.02 * best


def test_enough_levels_lose_nothing() -> None:
    counts = counts_of(RNG.integers(40, 44, 500))
    made = table(few(counts, 40, 0, 2), 0, 255)
    assert lost(counts, made, 0) == 0.0
    assert lost(np.zeros(256), made, 0) == 0.0


def test_nothing_seen_leaves_zero() -> None:
    np.testing.assert_array_equal(few(np.zeros(256), 7, 0, 4), [7])


def test_negative_codes_are_counted_from_the_end() -> None:
    made = table(np.array([-128, -3, 0, 90]), -128, 127)
    found = wrapped(made, -128, np.int8)
    for code in (-128, -4, -1, 0, 5, 127):
        assert found[code] == made[code + 128]
    plain = table(np.array([0, 90]), 0, 255)
    np.testing.assert_array_equal(wrapped(plain, 0, np.uint8), plain)
