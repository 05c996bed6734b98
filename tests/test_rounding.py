"""Weights on grids of integers, against brute force and least squares."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from problems import problem

from onnxc.numerics import coded
from onnxc.numerics.affine import Grid
from onnxc.numerics.blocks import dequantize_blocks, quantize_blocks
from onnxc.numerics.coded import Coded, solved
from onnxc.numerics.columns import forward, sweep, triangles, upright
from onnxc.numerics.fixed import power_of_two
from onnxc.numerics.rounding import METHODS, Integers, Wish, ranges, rounded, shifts
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]

GRIDS = {
    "signed": Grid(3),
    "narrow": Grid(3, narrow=True),
    "unsigned": Grid(3, signed=False),
    "two bits": Grid(2),
    "eight bits": Grid(8),
}


def lost(W: Array, E: Quadratic, wish: Wish, method: str = "descent") -> float:
    return E.error(W - rounded(W, E, wish, method).weight)  # type: ignore[arg-type]


def family(W: Array, E: Quadratic, wish: Wish) -> tuple[Integers, Array]:
    block = wish.block or W.shape[2]
    scales, zeros = ranges(W, E, wish, block)
    return Integers(wish, zeros, block), scales


def test_codes_are_near_the_best_of_all() -> None:
    found = least = plain = 0.0
    for seed in range(12):
        W, E = problem(1, 6, seed=seed)
        result = rounded(W, E, Wish(Grid(2)))
        every = np.array(list(product(range(-2, 2), repeat=6)))
        D = W[0] - result.scales[0, 0, 0] * every
        best = float(np.einsum("nd,de,ne->n", D, E.blocks[0][0], D).min())
        error = E.error(W - result.weight)
        assert best <= error * (1 + 1e-12)
        found, least = found + error, least + best
        plain += lost(W, E, Wish(Grid(2)), "nearest")
    assert found - least < 0.25 * (plain - least)


def test_no_change_of_one_code_helps_after_descent() -> None:
    W, E = problem(3, 70, groups=2)  # wider than what is multiplied out together
    integers, scales = family(W, E, Wish(Grid(3)))
    codes, weight = (upright(part) for part in integers.nearest(W, scales))
    R = upright(E.times(W - weight))
    for _ in range(30):
        sweep(E, codes, weight, R, integers.choose(scales))
    np.testing.assert_allclose(R, E.times(W - weight), rtol=0, atol=1e-10)
    least, rng = E.error(W - weight), np.random.default_rng(1)
    for _ in range(200):
        place = tuple(rng.integers(0, n) for n in W.shape)
        tried = weight.copy()
        tried[place] = scales[place[0], place[1], 0] * rng.integers(-4, 4)
        assert E.error(W - tried) >= least * (1 - 1e-9)


def test_feeding_forward_is_rounding_column_by_column() -> None:
    W, E = problem(2, 7)
    integers, scales = family(W, E, Wish(Grid(3)))
    _, found = forward(W, triangles(E), integers.choose(scales))
    C = E.blocks[0][0]
    order, left = np.argsort(-np.diagonal(C)), W.copy()
    for k, j in enumerate(order):  # GPTQ: the rest of each row takes up what the column missed
        value = scales[..., 0] * np.clip(np.rint(left[..., j] / scales[..., 0]), -4, 3)
        rest = order[k + 1 :]
        pull = np.linalg.solve(C[np.ix_(rest, rest)], C[rest, j])
        left[..., rest] += (left[..., j] - value)[..., None] * pull
        left[..., j] = value
    np.testing.assert_allclose(found, left, rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("block", [0, 8])
def test_methods_lose_less_and_less(grid: Grid, block: int) -> None:
    W, E = problem(6, 24, groups=2)
    nearest, gptq, descent, admm = (lost(W, E, Wish(grid, block), method) for method in METHODS)
    assert descent < gptq < nearest
    assert admm < 1.05 * descent  # another start, which may end elsewhere
    result = rounded(W, E, Wish(grid, block))
    assert result.codes.min() >= grid.low and result.codes.max() <= grid.high
    assert (result.scales > 0).all()
    assert result.scales.shape == (2, 6, 3 if block else 1)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_no_output_is_worse_than_nearest(outputs: int, d: int, bits: int, seed: int) -> None:
    W, E = problem(outputs, d, seed=seed)
    for error, signed in product((E, Quadratic()), (True, False)):
        wish = Wish(Grid(bits, signed), is_mirrored=bool(seed % 2))
        plain, found = (rounded(W, error, wish, m).weight for m in ("nearest", "descent"))  # type: ignore[arg-type]
        rows = [np.sum(error.times(W - X) * (W - X), axis=2) for X in (plain, found)]
        assert (rows[1] <= rows[0] * (1 + 1e-6)).all()


@pytest.mark.parametrize("block", [0, 5])
def test_scales_are_those_of_least_squares(block: int) -> None:
    W, E = problem(3, 14, groups=2)
    integers, scales = family(W, E, Wish(Grid(3), block))
    codes, weight = integers.nearest(W, scales)
    now, R = Coded(scales, codes, weight), E.times(W - weight)
    for _ in range(20 if block else 1):  # one scale is found at once
        now, R = solved(W, E, integers, now, R)
    for g, o in np.ndindex(W.shape[:2]):
        L = np.linalg.cholesky(E.blocks[0][g])
        parts = np.arange(14) // (block or 14) == np.arange(scales.shape[2])[:, None]
        A = (parts * codes[g, o]) @ L
        wanted = np.linalg.lstsq(A.T, L.T @ W[g, o], rcond=None)[0]
        np.testing.assert_allclose(now.t[g, o], wanted, rtol=1e-4)
    np.testing.assert_allclose(R, E.times(W - now.weight), rtol=0, atol=1e-5)


def test_groups_together_are_groups_one_by_one() -> None:
    W, E = problem(3, 9, groups=5)
    order = np.argsort(-np.diagonal(E.blocks[0].mean(axis=0)))
    scale = np.sqrt(np.linspace(2, 1, 9)[np.argsort(order)])  # the same order in each group
    C = E.blocks[0] / np.sqrt(np.einsum("gii,gjj->gij", E.blocks[0], E.blocks[0]))
    C = C * scale * scale[:, None]
    family_of, starts = Wish(Grid(3)), []
    whole = rounded(W, Quadratic((C,)), family_of, "gptq").weight
    for g in range(5):
        starts.append(rounded(W[g : g + 1], Quadratic((C[g : g + 1],)), family_of, "gptq").weight)
    np.testing.assert_allclose(whole, np.concatenate(starts), rtol=0, atol=1e-12)


def test_blocks_of_moments_count_by_themselves() -> None:
    W, E = problem(4, 16)
    (C,) = E.blocks
    zero = np.zeros((1, 8, 8))
    halves = Quadratic((C[:, :8, :8], C[:, 8:, 8:]))
    whole = Quadratic((np.block([[C[:, :8, :8], zero], [zero, C[:, 8:, 8:]]]),))
    assert lost(W, halves, Wish(Grid(3))) == pytest.approx(lost(W, whole, Wish(Grid(3))), rel=0.1)


def test_zeros_stay() -> None:
    W, E = problem(6, 24)
    W[:, :, ::2] = 0
    for grid in (Grid(3), Grid(3, signed=False)):
        for method in METHODS:
            found = rounded(W, E, Wish(grid, keeps_zeros=True), method)  # type: ignore[arg-type]
            assert (found.weight[W == 0] == 0).all()


def test_scales_may_be_powers_of_two() -> None:
    W, E = problem(6, 24)
    found = rounded(W, E, Wish(Grid(3), snap=power_of_two), "admm")
    np.testing.assert_array_equal(found.scales, power_of_two(found.scales))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_output_takes_the_best_power_of_two(bits: int) -> None:
    W, E = problem(6, 24, seed=bits)
    found = rounded(W, E, shifts(Grid(bits)))
    np.testing.assert_array_equal(found.scales, power_of_two(found.scales))
    least = np.full(W.shape[:2], np.inf)
    for n in range(-4, 12):
        codes = np.clip(np.rint(W * 2.0**n), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        D = W - codes * 2.0**-n
        least = np.minimum(least, np.sum(E.times(D) * D, axis=2))
    D = W - found.weight
    assert (np.sum(E.times(D) * D, axis=2) <= least * (1 + 1e-9)).all()
    plain = rounded(W, Quadratic(), shifts(Grid(bits)), "nearest").weight
    assert np.square(W - plain).sum() <= np.square(W - found.weight).sum() * (1 + 1e-9)


@pytest.mark.parametrize("make", [shifts, lambda grid, seed: Wish(grid, seed=seed)])
def test_rounding_by_chance_keeps_the_mean(make: Any) -> None:
    W, E = problem(3, 12, seed=1)
    draws = [rounded(W, E, make(Grid(3), seed=seed), "stochastic") for seed in range(400)]
    mean = np.mean([draw.weight for draw in draws], axis=0)
    deviation = draws[0].scales / 2 / np.sqrt(len(draws))  # at most, of the mean
    assert (np.abs(mean - W) < 4.5 * deviation).all()
    assert all((np.abs(d.weight - W) < d.scales * (1 + 1e-6)).all() for d in draws)
    again = rounded(W, E, make(Grid(3), seed=7), "stochastic")
    np.testing.assert_array_equal(again.codes, draws[7].codes)
    assert (again.codes != draws[8].codes).any()


def test_mirrored_scales_lose_less_at_two_bits() -> None:
    W, E = problem(40, 24)
    assert lost(W, E, Wish(Grid(2), is_mirrored=True)) < 0.95 * lost(W, E, Wish(Grid(2)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_any_size_is_rounded_alike(method: str, size: float) -> None:
    W, E = problem(4, 12)
    wish = Wish(Grid(4))
    plain, found = (rounded(X, E, wish, method).weight for X in (W, size * W))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, size * plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_say_nothing_do_no_harm(method: str) -> None:
    W, E = problem(3, 8)
    C = E.blocks[0].copy()
    C[:, 2], C[:, :, 2] = 0, 0
    W[:, 1] = 0
    for blocks in ((C,), (0 * C,)):
        found = rounded(W, Quadratic(blocks), Wish(Grid(4)), method)  # type: ignore[arg-type]
        assert np.isfinite(found.weight).all() and not found.weight[:, 1].any()
        gap = np.abs(found.weight - W)[..., 2]
        assert (gap <= 0.51 * found.scales[..., 0]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 1), (1, 5, 1), (3, 1, 9)])
def test_small_shapes(shape: tuple[int, int, int]) -> None:
    W, E = problem(shape[1], shape[2], shape[0])
    for error, block in product((E, Quadratic()), (0, 4)):
        found = rounded(W, error, Wish(Grid(8), block)).weight
        np.testing.assert_allclose(found, W, rtol=0, atol=0.05)


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    W, E = problem(8, 24)
    first, second = (rounded(W, E, Wish(Grid(3)), "admm").weight for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_each_output_takes_its_best_start() -> None:
    W, E = problem(3, 6)
    integers, scales = family(W, E, Wish(Grid(3)))
    tried = [Coded(s, *integers.nearest(W, s)) for s in (scales, 0.5 * scales, 2 * scales)]
    best, R, least = coded.best_of(W, E, tried)
    rows = [np.sum(E.times(W - c.weight) * (W - c.weight), axis=2) for c in tried]
    np.testing.assert_allclose(least, np.min(rows, axis=0), rtol=1e-12)
    np.testing.assert_allclose(R, E.times(W - best.weight), rtol=0, atol=1e-12)


@given(st.integers(2, 4), st.integers(0, 1000), st.sampled_from([8, 16, 32]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_no_weight_in_blocks_is_worse_than_nearest(
    bits: int, seed: int, block: int, is_mirrored: bool
) -> None:
    W, E = problem(4, 40, seed=seed)
    wish = Wish(Grid(bits), block, is_mirrored)
    nearest, gptq, descent = (lost(W, E, wish, name) for name in ("nearest", "gptq", "descent"))
    assert descent <= gptq * (1 + 1e-9)
    assert gptq <= nearest * (1 + 1e-9)
    plain = dequantize_blocks(quantize_blocks(W[0][..., None], bits, block))[..., 0]
    if is_mirrored:  # as those are
        assert descent < E.error(W - plain)
