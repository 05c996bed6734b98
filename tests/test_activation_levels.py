"""Ranges and levels for activations, against numbers drawn from what the formulas are made for."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxc.numerics import activation_levels as levels
from onnxc.numerics.kmeans import Points, exact

Array = NDArray[Any]

DRAWN = {
    "laplace": np.random.default_rng(0).laplace(0, 1, 400_000),
    "gauss": np.random.default_rng(0).standard_normal(400_000),
}


def lost(x: Array, alpha: float, bits: int, one_side: bool) -> float:
    """Squared error of a range that ends at α, with 2^b levels in the middle of as many parts."""
    low = 0.0 if one_side else -alpha
    width = (alpha - low) / 2**bits
    places = np.clip(np.floor((x - low) / width), 0, 2**bits - 1)
    return float(np.mean((x - low - (places + 0.5) * width) ** 2))


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("one_side", [False, True])
@pytest.mark.parametrize("kind", DRAWN)
def test_the_range_of_aciq_loses_little_more_than_the_best_range(
    kind: str, one_side: bool, bits: int
) -> None:
    x = np.abs(DRAWN[kind]) if one_side else DRAWN[kind]
    alpha = getattr(levels, kind)(1.0, bits, one_side)
    near = min(np.linspace(1, 16, 16), key=lambda a: lost(x, a, bits, one_side))
    best = min(lost(x, a, bits, one_side) for a in near + np.linspace(-1, 1, 17) if a > 0)
    assert lost(x, alpha, bits, one_side) < 1.05 * best


def test_ranges_of_aciq_as_published() -> None:
    found = [levels.laplace(1, bits) for bits in (2, 3, 4)]
    np.testing.assert_allclose(found, [2.83, 3.89, 5.03], rtol=0, atol=0.01)
    found = [levels.gauss(1, bits) for bits in (2, 3, 4)]
    np.testing.assert_allclose(found, [1.71, 2.15, 2.55], rtol=0, atol=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_step_of_half_a_gauss_is_the_best_one(bits: int) -> None:
    x = np.abs(DRAWN["gauss"])
    s = levels.half_wave_step(bits)

    def error(step: float) -> float:
        return float(np.mean((x - step * np.clip(np.rint(x / step), 0, 2**bits - 1)) ** 2))

    assert levels.half_wave_error(s, bits) == pytest.approx(error(s), rel=0.02)
    assert error(s) < 1.002 * min(error(f * s) for f in (0.9, 0.95, 1.05, 1.1))


def test_the_range_of_half_a_gauss_grows_with_the_numbers() -> None:
    x = 3 * np.maximum(DRAWN["gauss"], 0)
    alpha = levels.half_wave(Points.of(x, bins=x.size), 2)
    assert alpha == pytest.approx(3 * 3 * levels.half_wave_step(2), rel=0.01)
    assert levels.half_wave(Points.of(np.zeros(3)), 2) == 0


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_basis_is_between_a_uniform_grid_and_free_levels(bits: int) -> None:
    points = Points.of(np.maximum(DRAWN["gauss"][:20_000], 0))
    v = levels.basis(points, bits)
    made = np.sort([float(np.dot(e, v)) for e in product((0, 1), repeat=bits)])
    uniform = np.linspace(0, points.x.max(), 2**bits)
    assert points.error(made) < points.error(uniform)
    assert points.error(made) >= points.error(exact(points, 2**bits)) * (1 - 1e-9)


def test_nothing_but_zeros_has_a_basis() -> None:
    np.testing.assert_array_equal(levels.basis(Points.of(np.zeros(4)), 2), [0, 0])
