"""Codes and levels fitted to the second moments, against brute force and least squares."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from problems import problem

from onnxc.numerics import codebook
from onnxc.numerics.aim import Aim
from onnxc.numerics.codebook import Codebook, feed_forward, fit, plain, snap, solve_levels
from onnxc.numerics.refit import Sums
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]

LEVELS = np.array([-1.2, -0.3, 0.4, 1.3])


def test_codes_are_near_the_best_of_all() -> None:
    levels, found, least, nearest = np.array([-0.8, 0.1, 0.9]), 0.0, 0.0, 0.0
    for seed in range(12):
        W, E = problem(1, 6, seed=seed)
        every = (levels[np.array(a)].reshape(W.shape) for a in product(range(3), repeat=6))
        best = min(E.error(W - X) for X in every)
        book = feed_forward(W, E, plain(W, levels))
        kept = np.zeros(W.shape, bool)
        for _ in range(10):
            book = replace(book, codes=codebook.descend(W, E, book, kept))
        assert best <= E.error(W - book.weight) * (1 + 1e-12)
        found, least = found + E.error(W - book.weight), least + best
        nearest += E.error(W - plain(W, levels).weight)
    assert found - least < 0.4 * (nearest - least)


def test_no_change_of_one_code_helps_after_descent() -> None:
    W, E = problem(3, 70, groups=2)  # wider than a block of columns
    book, kept = plain(W, LEVELS), np.zeros(W.shape, bool)
    for _ in range(30):
        book = replace(book, codes=codebook.descend(W, E, book, kept))
    least = E.error(W - book.weight)
    rng = np.random.default_rng(1)
    for _ in range(200):
        place = tuple(rng.integers(0, n) for n in W.shape)
        codes = book.codes.copy()
        codes[place] = rng.integers(0, len(LEVELS))
        assert E.error(W - LEVELS[codes]) >= least - 1e-9 * least


def test_levels_are_those_of_least_squares() -> None:
    W, E = problem(4, 12, groups=2)
    book = plain(W, LEVELS)
    found = solve_levels(W, E, book)
    A = np.stack([(book.codes == k).astype(float) for k in range(4)])
    M = np.array([[np.sum(E.times(a) * b) for b in A] for a in A])
    expected = np.linalg.solve(M, [np.sum(E.times(W) * a) for a in A])
    np.testing.assert_allclose(found.levels, np.sort(expected), rtol=0, atol=1e-3)
    assert E.error(W - found.weight) <= E.error(W - book.weight)


@pytest.mark.parametrize("groups", [1, 3])
def test_fitting_beats_the_nearest_level_and_feeding_forward(groups: int) -> None:
    W, E = problem(6, 24, groups)
    book = plain(W, LEVELS)
    forward = feed_forward(W, E, book)
    found = fit(W, E, forward)
    errors = [E.error(W - b.weight) for b in (found, forward, book)]
    assert errors == sorted(errors)
    assert len(np.unique(found.weight)) <= 4


def test_blocks_count_by_themselves() -> None:
    W, E = problem(4, 16)
    (C,) = E.blocks
    halves = Quadratic((C[:, :8, :8], C[:, 8:, 8:]))
    whole = fit(W, halves, feed_forward(W, halves, plain(W, LEVELS)))
    assert halves.error(W - whole.weight) < halves.error(W - plain(W, LEVELS).weight)


def test_zeros_stay_and_their_level_too() -> None:
    W, E = problem(6, 24)
    W[:, :, ::2] = 0
    book = plain(W, np.array([-1.0, 0.0, 1.0]), pinned=1)
    found = fit(W, E, feed_forward(W, E, book))
    assert (found.weight[W == 0] == 0).all()
    assert found.pinned is not None and found.levels[found.pinned] == 0


def test_a_price_lowers_the_entropy() -> None:
    W, E = problem(8, 32)
    book = plain(W, np.linspace(-2, 2, 16))
    free, priced = (fit(W, E, book, price).entropy for price in (0.0, 0.2))
    assert priced < free - 0.2


def test_levels_snap_to_a_grid_of_integers() -> None:
    W, E = problem(6, 24)
    found = fit(W, E, plain(W, snap(LEVELS)), snap=snap)
    scale = np.abs(found.levels).max() / 127
    np.testing.assert_allclose(
        found.levels / scale, np.rint(found.levels / scale), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_fitting_to_an_aim_is_fitting_to_the_goals_of_rows(seed: int) -> None:
    """Of two weights the one that is nearer to the aim is nearer to the goals, by as much."""
    rng = np.random.default_rng(seed)
    W, b = rng.standard_normal((1, 5, 12)), rng.standard_normal((1, 5))
    x = rng.standard_normal((1, 6000, 12)) @ rng.standard_normal((12, 12)) + 1
    noisy = x + 0.3 * rng.standard_normal(x.shape)  # what the layers before now give
    t = x @ W.swapaxes(1, 2) + b[:, None]
    aim = Aim.of([Sums.of(noisy[:, f::2], t[:, f::2]) for f in range(2)], W, b, is_biased=True)

    def error(weight: Array) -> float:
        made = noisy @ weight.swapaxes(1, 2) + aim.bias(weight)[:, None]
        return float(np.mean((t - made) ** 2) * 5)

    assert error(aim.W) < error(W)
    coarse, fine = (fit(aim.W, aim.E, plain(aim.W, np.linspace(-2, 2, k))).weight for k in (4, 32))
    lost = aim.E.error(aim.W - coarse) - aim.E.error(aim.W - fine)
    assert error(coarse) - error(fine) == pytest.approx(lost, rel=0.02)
    mean = t.mean(axis=1) - np.einsum("god,gd->go", fine, noisy.mean(axis=1))
    np.testing.assert_allclose(aim.bias(fine), mean, rtol=0, atol=1e-9)


def test_the_codebook_knows_its_shares() -> None:
    book = Codebook(np.array([0.0, 1.0]), np.array([[[0, 1, 1, 1]]]))
    assert book.shares.tolist() == [0.25, 0.75]
    assert book.entropy == pytest.approx(0.8113, abs=1e-4)
