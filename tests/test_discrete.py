"""Few levels for each output, against brute force, least squares and the papers' own formulas."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from problems import problem

from onnxc.numerics import coded, ternary
from onnxc.numerics.admm import admm
from onnxc.numerics.coded import Coded, solved
from onnxc.numerics.discrete import SCHEMES, discrete, exact_levels, factors
from onnxc.numerics.kmeans import Points, exact
from onnxc.numerics.levels import ASYMMETRIC, TERNARY, Ladder, Levels, powers, signs
from onnxc.numerics.powers import incremental, window, windows
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]

CASES = [
    (name, bits) for name, row in SCHEMES.items() for bits in {row.bits[0], min(row.bits[1], 3)}
]
FREE = [(name, bits) for name, bits in CASES if SCHEMES[name].is_free]


def levels_of(scheme: str, bits: int) -> Levels:
    row = SCHEMES[scheme]
    return Levels(row.pattern(bits), row.is_free)


def rows(W: Array, E: Quadratic, found: Array) -> Array:
    """E of each output."""
    return np.asarray(np.sum(E.times(W - found) * (W - found), axis=2))


def plain(W: Array, E: Quadratic, scheme: str, bits: int) -> Coded:
    """Each weight on the nearest of the levels that the scheme starts from."""
    return next(SCHEMES[scheme].starts(W, E, levels_of(scheme, bits)))


@pytest.mark.parametrize(("scheme", "bits"), FREE)
def test_codes_are_near_the_best_of_all(scheme: str, bits: int) -> None:
    found = least = nearest = 0.0
    for seed in range(8):
        W, E = problem(1, 5, seed=seed)
        result = discrete(W, E, scheme, bits)
        c = result.levels[0, 0]
        D = W[0] - c[np.array(list(product(range(len(c)), repeat=5)))]
        best = float(np.einsum("nd,de,ne->n", D, E.blocks[0][0], D).min())
        error = E.error(W - result.weight)
        assert best <= error + 1e-12
        found, least = found + error, least + best
        nearest += E.error(W - plain(W, E, scheme, bits).weight)
    assert found - least <= 0.25 * (nearest - least) + 1e-9


@given(
    st.sampled_from(CASES), st.integers(1, 3), st.integers(2, 9), st.booleans(), st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_no_output_is_worse_than_nearest(
    case: tuple[str, int], outputs: int, d: int, is_known: bool, seed: int
) -> None:
    W, E = problem(outputs, d, seed=seed)
    E = E if is_known else Quadratic()
    before, after = plain(W, E, *case), discrete(W, E, *case)
    worst = rows(W, E, before.weight) + 1e-6 * rows(W, E, 0 * W)
    assert (rows(W, E, after.weight) <= worst).all()


@pytest.mark.parametrize(("scheme", "bits"), CASES)
def test_weights_are_on_their_levels(scheme: str, bits: int) -> None:
    W, E = problem(4, 12, groups=2)
    found = discrete(W, E, scheme, bits)
    assert found.levels.shape == (2, 4, len(SCHEMES[scheme].pattern(bits)))
    assert len(found.pattern) <= 2**bits
    for g, o in np.ndindex(2, 4):
        assert set(found.weight[g, o]) <= set(found.levels[g, o])
    start = plain(W, E, scheme, bits)
    assert (
        E.error(W - found.weight)
        < (1 if scheme == "codebook" else 0.9) * E.error(W - start.weight) + 1e-9
    )


@pytest.mark.parametrize("pattern", [TERNARY, ASYMMETRIC, signs(3), powers(3), np.eye(4)])
def test_numbers_are_those_of_least_squares(pattern: Array) -> None:
    W, E = problem(3, 40, groups=2)
    levels, t = Levels(pattern), np.full((2, 3, pattern.shape[1]), 0.5)
    t = t + np.arange(pattern.shape[1])
    now = Coded(t, *levels.nearest(W, t))
    R = E.times(W - now.weight)
    for _ in range(8):
        now, R = solved(W, E, levels, now, R)
    for g, o in np.ndindex(2, 3):
        L = np.linalg.cholesky(E.blocks[0][g])
        A = L.T @ pattern[now.codes[g, o]]
        wanted = A @ np.linalg.lstsq(A, L.T @ W[g, o], rcond=None)[0]
        np.testing.assert_allclose(L.T @ now.weight[g, o], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_nearest_level_is_found_by_halving(bits: int) -> None:
    rng = np.random.default_rng(0)
    levels, X = rng.standard_normal((2, 3, 2**bits)), rng.standard_normal((2, 3, 50))
    codes, values = Ladder.of(levels).nearest(X)
    gaps = np.abs(X[..., None] - levels[:, :, None])
    np.testing.assert_array_equal(codes, np.argmin(gaps, axis=3))
    np.testing.assert_array_equal(values, np.take_along_axis(levels, codes, axis=2))
    few, _ = Ladder.of(levels[..., :-1]).nearest(X)
    np.testing.assert_array_equal(few, np.argmin(gaps[..., :-1], axis=3))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("scheme", "bits"), [c for c in FREE if c[0] != "codebook"])
def test_groups_together_are_groups_one_by_one(scheme: str, bits: int, known: bool) -> None:
    W, E = problem(2, 8, groups=4)
    E = Quadratic((np.broadcast_to(E.blocks[0][:1], (4, 8, 8)),)) if known else Quadratic()
    levels = levels_of(scheme, bits)
    whole = plain(W, E, scheme, bits)
    for g in range(4):
        part = slice(g, g + 1)
        alone = plain(W[part], Quadratic(tuple(b[part] for b in E.blocks)), scheme, bits)
        np.testing.assert_allclose(whole.weight[part], alone.weight, rtol=1e-6, atol=1e-9)
    fitted = coded.fit(W, E, levels, coded.starts(W, E, levels, [whole.t]))
    assert E.error(W - fitted.weight) <= E.error(W - whole.weight)


def test_thresholds_of_ternary_by_hand() -> None:
    W = np.array([[[-1.0, -0.1, 0.1, 0.5, 2.0]]])
    np.testing.assert_allclose(ternary.twn(W), [[[1.5, 1.5]]], rtol=1e-12)  # 0.7 · 0.74 = 0.518
    np.testing.assert_allclose(ternary.ttq(W), [[[1.0, 1.25]]], rtol=1e-12)  # 0.05 · 2, and above


def test_a_gaussian_is_cut_where_its_error_is_least() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 200_000))
    a, b = ternary.tga(x)[0, 0]
    assert a == pytest.approx(1.224, abs=0.01) and b == pytest.approx(1.224, abs=0.01)
    a, b = ternary.tga(x + 0.5)[0, 0]
    best = exact_ternary(x[0, 0] + 0.5)
    assert (a, b) == pytest.approx(best, abs=0.03)


def exact_ternary(x: Array) -> tuple[float, float]:
    """Sizes on either side, each twice its own threshold."""
    a = b = 1.0
    for _ in range(60):
        a, b = -x[x < -a / 2].mean(), x[x > b / 2].mean()
    return float(a), float(b)


def test_one_base_without_moments_is_that_of_xnor_net() -> None:
    W, _ = problem(5, 20)
    found = discrete(W, Quadratic(), "bases", 1)
    np.testing.assert_allclose(found.weight, np.sign(W) * np.abs(W).mean(2)[..., None], rtol=1e-6)


def test_more_bases_lose_less() -> None:
    W, E = problem(8, 32)
    lost = [E.error(W - discrete(W, E, "bases", bits).weight) for bits in (1, 2, 3, 4)]
    assert all(b < 0.5 * a for a, b in pairwise(lost))


def test_powers_fill_the_codes() -> None:
    np.testing.assert_array_equal(powers(2)[:, 0], [-1, 0, 1])
    np.testing.assert_array_equal(powers(3)[:, 0], [-4, -2, -1, 0, 1, 2, 4])


def test_windows_of_powers_are_one_for_the_layer() -> None:
    W, E = problem(6, 24)
    found = discrete(W, E, "pow2", 3)
    mantissa, exponent = np.frexp(np.abs(found.weight[found.weight != 0]))
    assert (mantissa == 0.5).all() and exponent.max() - exponent.min() <= 2
    assert len(np.unique(found.t)) == 1
    levels = levels_of("pow2", 3)
    first = next(windows(W, levels))[0, 0, 0] * levels.pattern.max()
    assert 2 / 3 * np.abs(W).max() < first <= 4 / 3 * np.abs(W).max()
    lost = [E.error(W - levels.nearest(W, t)[1]) for t in windows(W, levels)]
    best = levels.nearest(W, window(W, E, levels))[1]
    assert E.error(W - best) == pytest.approx(min(lost))


def test_quantizing_by_and_by_beats_all_at_once() -> None:
    W, E = problem(12, 48)
    levels = levels_of("pow2", 4)
    t = window(W, E, levels)
    at_once = E.error(W - levels.nearest(W, t)[1])
    found = incremental(W, E, levels, t)
    assert E.error(W - found.weight) < 0.8 * at_once
    np.testing.assert_array_equal(found.weight, levels.spread(t, found.codes))


def test_admm_beats_the_nearest_levels() -> None:
    W, E = problem(12, 48)
    levels = Levels(powers(2))
    t = factors(W, E, levels)
    found = admm(W, E, levels, t)
    assert E.error(W - found.weight) < 0.6 * E.error(W - levels.nearest(W, t)[1])


def test_levels_of_an_output_are_exact() -> None:
    W, E = problem(3, 10, groups=2)
    for count in (1, 3, 4):
        found = exact_levels(W, E, count)
        for g, o in np.ndindex(2, 3):
            wanted = exact(Points.of(W[g, o], np.diagonal(E.blocks[0][g])), count)
            np.testing.assert_allclose(found[g, o], wanted, rtol=1e-9)
    assert E.error(W - discrete(W, E, "levels", 4).weight) < 1e-9  # more levels than weights


def test_levels_of_many_numbers_cost_little_more_than_exact_ones() -> None:
    W, _ = problem(3, 900)
    found = exact_levels(W, Quadratic(), 8)
    for o in range(3):
        points = Points.of(W[0, o])
        assert points.error(found[0, o]) < 1.01 * points.error(exact(points, 8))


def test_levels_of_a_layer_are_the_same_for_all() -> None:
    W, E = problem(4, 16)
    found = discrete(W, E, "codebook", 2)
    assert len(np.unique(found.weight)) <= 4
    assert E.error(W - discrete(W, E, "levels", 2).weight) < E.error(W - found.weight)


@pytest.mark.parametrize("scheme", ["ternary", "pow2", "admm"])
def test_zeros_stay(scheme: str) -> None:
    W, E = problem(6, 24)
    W[:, :, ::2] = 0
    found = discrete(W, E, scheme, 2, keeps_zeros=True).weight
    assert (found[W == 0] == 0).all() and found.any()


@pytest.mark.parametrize(("scheme", "bits"), CASES)
def test_odd_weights_do_no_harm(scheme: str, bits: int) -> None:
    W, E = problem(4, 12)
    base = discrete(W, E, scheme, bits)
    for size in (2.0**-66, 2.0**66):
        found = discrete(size * W, E, scheme, bits)
        error = E.error(W - found.weight / size)
        assert error == pytest.approx(E.error(W - base.weight), rel=1e-3)
    W[:, 1] = 0
    C = E.blocks[0].copy()
    C[:, 2], C[:, :, 2] = 0, 0
    for error_of in (Quadratic(), E, Quadratic((C,)), Quadratic((0 * C,))):
        for X in (W, W[:, :1], W[:, 1:2]):
            found = discrete(X, error_of, scheme, bits)
            assert np.isfinite(found.weight).all()
            if scheme not in ("codebook", "pow2"):  # whose levels are those of all outputs
                assert np.abs(found.weight[~X.any(axis=2)]).max(initial=0) < 1e-12


@pytest.mark.parametrize(("scheme", "bits"), CASES)
def test_one_weight_alone(scheme: str, bits: int) -> None:
    W, E = np.array([[[0.7]]]), Quadratic((np.array([[[2.0]]]),))
    for error in (E, Quadratic()):
        found = discrete(W, error, scheme, bits).weight
        np.testing.assert_allclose(found, W, rtol=0, atol=0.21)


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    W, E = problem(8, 24)
    for scheme, bits in CASES:
        first, second = (discrete(W, E, scheme, bits).weight for _ in range(2))
        np.testing.assert_array_equal(first, second)
