"""Bits of layers under one average, against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.bits import best, closed_form, greedy, strength

Array = NDArray[Any]

BITS = np.array([2.0, 3, 4, 6, 8])


def layers(count: int, seed: int) -> tuple[list[Array], Array]:
    """Noise at each width, falling about fourfold a bit, and sizes."""
    rng = np.random.default_rng(seed)
    falls = rng.uniform(0.5, 1.5, (count, 4)) * np.diff(BITS)
    steps = np.concatenate([np.zeros((count, 1)), falls.cumsum(axis=1)], axis=1)
    noise = rng.lognormal(0, 2, (count, 1)) * 4.0**-steps
    return list(noise), rng.integers(1, 50, count).astype(float)


def brute(noise: list[Array], sizes: Array, average: float) -> float:
    every = np.array(list(product(range(len(BITS)), repeat=len(sizes))))
    fits = BITS[every] @ sizes <= average * sizes.sum() * (1 + 1e-9)
    total = sum(n[every[:, layer]] for layer, n in enumerate(noise))
    return float(total[fits].min())


def total(noise: list[Array], found: list[int]) -> float:
    return float(sum(n[np.searchsorted(BITS, b)] for n, b in zip(noise, found, strict=True)))


@given(st.integers(1, 5), st.floats(2, 8), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_best_bits_are_those_of_brute_force(count: int, average: float, seed: int) -> None:
    noise, sizes = layers(count, seed)
    found = best(noise, list(sizes), BITS, average)
    assert np.dot(found, sizes) <= average * sizes.sum() * (1 + 1e-9)
    assert total(noise, found) == pytest.approx(brute(noise, sizes, average), rel=1e-9)


@given(st.integers(1, 5), st.floats(2, 8), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_greedy_bits_fit_and_are_the_best_of_what_they_use(
    count: int, average: float, seed: int
) -> None:
    noise, sizes = layers(count, seed)
    found = greedy(noise, list(sizes), BITS, average)
    assert np.dot(found, sizes) <= average * sizes.sum() * (1 + 1e-9)
    assert total(noise, found) >= brute(noise, sizes, average) * (1 - 1e-9)
    assert total(noise, found) <= total(noise, [2] * count)


def test_greedy_is_exact_where_noise_is_convex_and_layers_are_alike() -> None:
    widths = np.arange(2.0, 7)
    rng = np.random.default_rng(0)
    for average in (2.5, 3.25, 5.0):
        a = rng.lognormal(0, 3, 4)
        noise = [x * 4.0**-widths for x in a]
        found = greedy(noise, [1.0] * 4, widths, average)
        every = [b for b in product(range(2, 7), repeat=4) if sum(b) <= 4 * average]
        least = min(sum(a * 4.0 ** -np.array(b)) for b in every)
        assert sum(a * 4.0 ** -np.array(found)) == pytest.approx(least, rel=1e-12)


def test_the_closed_form_is_the_optimum() -> None:
    rng = np.random.default_rng(1)
    a, sizes = rng.lognormal(0, 2, 6), rng.integers(1, 50, 6).astype(float)
    b = closed_form(a, sizes, 4.0)
    assert np.average(b, weights=sizes) == pytest.approx(4, abs=1e-9)
    slopes = a * 4.0**-b / sizes  # of the noise for a bit of all weights of a layer
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-9)
    i, j = 0, 1  # Lin 2016: layers differ by half the binary log of what they weigh
    assert b[i] - b[j] == pytest.approx(np.log2(a[i] * sizes[j] / (a[j] * sizes[i])) / 2)


def test_limits_are_kept_and_the_rest_is_shared() -> None:
    a, sizes = np.array([1e6, 1.0, 1e-6]), np.ones(3)
    b = closed_form(a, sizes, 4.0, low=2, high=8)
    assert b[0] == 8 and b[2] == 2
    assert b.mean() == pytest.approx(4, abs=1e-9)
    np.testing.assert_allclose(closed_form(a, sizes, 1.0, 2, 8), 2)
    np.testing.assert_allclose(closed_form(a, sizes, 9.0, 2, 8), 8)
    np.testing.assert_allclose(closed_form(np.zeros(2), np.ones(2), 3.0, 2, 8), 3, atol=1e-9)


def test_strength_is_what_the_rule_of_six_decibels_takes() -> None:
    bits, a = np.array([3.0, 4, 5]), np.array([0.5, 2.0])
    np.testing.assert_allclose(strength(a[:, None] * 4.0**-bits, bits), a, rtol=1e-12)
