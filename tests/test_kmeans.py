"""Levels on a line, against brute force; codes that are packed come back as they were."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.kmeans import INITS, Points, exact, lloyd, nearest, start
from onnxc.numerics.packing import bits_for, layout, pack, unpack
from onnxc.numerics.sharing import METHODS, Wish, share

Floats = NDArray[np.float64]


def brute(x: Floats, w: Floats, count: int) -> float:
    """The least cost of sorted numbers in `count` intervals."""
    best = np.inf
    for cuts in combinations(range(1, len(x)), count - 1):
        parts = [slice(a, b) for a, b in pairwise((0, *cuts, len(x)))]
        means = [np.average(x[p], weights=w[p]) for p in parts]
        errors = [w[p] @ (x[p] - m) ** 2 for p, m in zip(parts, means, strict=True)]
        best = min(best, float(sum(errors)))
    return best


@given(st.integers(5, 10), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_exact_levels_cost_what_brute_force_finds(size: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = np.sort(rng.standard_normal(size)), rng.random(size) + 0.01
    points = Points.of(x, w)
    levels = exact(points, count)
    assert len(levels) == count
    assert points.error(levels) == pytest.approx(brute(x, w, count), rel=1e-9, abs=1e-12)


def test_few_numbers_are_their_own_levels() -> None:
    levels = exact(Points.of(np.array([3.0, 1.0, 3.0])), 8)
    assert levels.tolist() == [1.0, 3.0]


def test_many_numbers_in_bins_cost_little_more() -> None:
    x = np.random.default_rng(0).standard_normal(20_000)
    whole, binned = Points.of(x, bins=30_000), Points.of(x)
    assert len(whole.x) == len(x) and len(binned.x) <= 4096
    assert binned.n.sum() == len(x) and binned.w @ binned.x == pytest.approx(x.sum(), abs=1e-8)
    found = whole.error(exact(binned, 8))
    assert found == pytest.approx(whole.error(exact(whole, 8)), rel=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_lloyd_improves_every_start_and_ends_at_means(init: str) -> None:
    points = Points.of(np.random.default_rng(1).standard_normal(2000))
    first = start(points, 8, init)  # type: ignore[arg-type]
    levels = lloyd(points, first)
    assert points.error(exact(points, 8)) <= points.error(levels) <= points.error(first)
    code = nearest(points.x, levels)
    means = [np.average(points.x[code == k], weights=points.w[code == k]) for k in range(8)]
    np.testing.assert_allclose(levels, means, rtol=0, atol=1e-5)


def test_a_pinned_level_stays() -> None:
    points = Points.of(np.random.default_rng(2).standard_normal(500) + 1)
    levels = lloyd(points, np.array([-1.0, 0.0, 2.0]), pinned=1)
    assert 0.0 in levels


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_separate_clusters(method: str) -> None:
    rng = np.random.default_rng(3)
    middles = np.array([-3.0, -1.0, 1.0, 3.0])
    x = (middles[:, None] + 0.01 * rng.standard_normal((4, 200))).reshape(-1)
    found = share(x, np.ones(x.size), method, Wish(4))
    np.testing.assert_allclose(found, middles, rtol=0, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_zero_in(method: str) -> None:
    x = np.random.default_rng(4).standard_normal(400)
    x[::2] = 0
    found = share(x, None, method, Wish(8), has_zero=True)
    assert 0.0 in found and len(found) <= 8
    assert share(np.zeros(5), None, method, Wish(4), has_zero=True).tolist() == [0.0]


def test_weights_draw_levels() -> None:
    x = np.linspace(0, 1, 101)
    heavy = np.where(x > 0.9, 100.0, 1.0)
    points = Points.of(x, heavy)
    plain, drawn, best = (
        points.error(share(x, heavy, method, Wish(4))) for method in ("kmeans", "hessian", "dp")
    )
    assert best <= drawn < 0.8 * plain


def test_a_price_shortens_codes() -> None:
    x = np.random.default_rng(5).standard_normal(3000)

    def entropy(price: float) -> float:
        levels = share(x, None, "ecsq", Wish(16, price=price))
        p = np.bincount(nearest(x, levels)) / len(x)
        return float(-(p[p > 0] @ np.log2(p[p > 0])))

    assert entropy(4.0) < entropy(1.0) < entropy(0.0)


@given(st.integers(1, 7), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_packed_codes_come_back(bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size)
    packed = pack(codes, bits)
    assert packed.shape[1] == layout(bits).size
    assert packed.size <= -(-size * bits // 8) + layout(bits).size
    np.testing.assert_array_equal(unpack(packed, bits, size), codes)


def test_bits_that_tell_values_apart() -> None:
    assert [bits_for(n) for n in (1, 2, 3, 4, 5, 16, 17, 256)] == [1, 1, 2, 2, 3, 4, 5, 8]
