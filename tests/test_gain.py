"""Gains in front of a codebook."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxc.numerics import codebook, gain
from onnxc.numerics.codebook import Codebook
from onnxc.numerics.kmeans import Points, exact
from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]
RNG = np.random.default_rng(0)


def metric(d: int) -> Quadratic:
    x = RNG.standard_normal((4 * d, d)) @ RNG.standard_normal((d, d))
    return Quadratic(((x.T @ x / len(x))[None],))


def solver(E: Quadratic, count: int) -> Callable[[Floats, Codebook | None], Codebook]:
    def solve(W: Floats, start: Codebook | None) -> Codebook:
        levels = exact(Points.of(W), count) if start is None else start.levels
        return codebook.fit(W, E, codebook.feed_forward(W, E, codebook.plain(W, levels)))

    return solve


def test_planted_gains_and_levels_come_back() -> None:
    levels, E = np.array([-1.0, -0.2, 0.4, 1.0]), metric(24)
    g = np.exp(RNG.uniform(-3, 3, (1, 10, 1)))
    W = g * levels[RNG.integers(0, 4, (1, 10, 24))]
    book, found = gain.fit(W, E, solver(E, 4))
    assert E.error(W - found * book.weight) < 1e-9 * E.error(W)


def test_a_better_gain_is_that_of_least_squares() -> None:
    E, W = metric(12), RNG.standard_normal((1, 5, 12))
    made = np.round(2 * W) / 2
    found = gain._better(W, E, made)
    L = np.linalg.cholesky(E.blocks[0][0])
    for o in range(5):
        expected = np.linalg.lstsq((made[0, o] @ L)[:, None], W[0, o] @ L, rcond=None)[0]
        assert found[0, o, 0] == pytest.approx(np.clip(expected[0], 0.5, 2), rel=1e-9)


def test_gains_are_worth_it_where_outputs_differ_in_strength() -> None:
    W, ones = RNG.standard_normal((1, 16, 256)), np.ones((1, 256))
    loud = W * np.exp(RNG.uniform(-1, 1, (1, 16, 1)))

    def levels(W: Floats) -> Floats:
        return exact(Points.of(W), 16)

    assert gain.is_worth_it(loud, ones, levels)
    assert not gain.is_worth_it(W, ones, levels)
    assert not gain.is_worth_it(loud[..., :16], ones[:, :16], levels)  # 2 bits for each weight


def test_outputs_of_nothing_stay_nothing() -> None:
    W, E = np.zeros((1, 3, 8)), metric(8)
    W[0, 1] = RNG.standard_normal(8)
    book, found = gain.fit(W, E, solver(E, 4))
    made = found * book.weight
    assert np.isfinite(made).all() and np.isfinite(found).all()
