"""Refit weights: the answer is known where the goal is linear in what the layer gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxc.numerics.refit import Sums, refit, solve

Array = NDArray[Any]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def sums(x: Array, t: Array) -> tuple[Sums, Sums]:
    """Two folds of rows (groups, n, d) and goals (groups, n, outputs)."""
    return Sums.of(x[:, 0::2], t[:, 0::2]), Sums.of(x[:, 1::2], t[:, 1::2])


def goals(W: Array, b: Array, x: Array) -> Array:
    return np.asarray(np.einsum("god,gnd->gno", W, x) + b[:, None, :])


W, B = random(2, 5, 8), random(2, 5)
ROWS = random(2, 400, 8, seed=1) + 0.5


def test_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    t = goals(W, B, ROWS)
    whole, parts = Sums.of(ROWS, t), sum(sums(ROWS, t), Sums())
    assert parts.count == whole.count == 400
    for name in ("x", "t", "xx", "tx", "tt"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)


def test_error_is_that_of_the_rows() -> None:
    t = goals(W, B, ROWS) + random(2, 400, 5, seed=2)
    found = Sums.of(ROWS, t).error(0.5 * W, B)
    expected = ((t - goals(0.5 * W, B, ROWS)) ** 2).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_linear_goal_is_met() -> None:
    fit = refit(sums(ROWS, goals(W, B, ROWS)), W + random(2, 5, 8, seed=3), np.zeros((2, 5)))
    np.testing.assert_allclose(fit.W, W, atol=1e-3)
    np.testing.assert_allclose(fit.b, B, atol=1e-3)
    assert fit.after < 1e-6 * fit.before


def test_an_input_that_hardly_ever_comes_in_keeps_modest_weights() -> None:
    """Sums say nothing of what such an input does once it comes in."""
    x = ROWS.copy()
    x[..., 7] = 1e-5 * random(2, 400, seed=4)
    fit = refit(sums(x, goals(W, B, x) + random(2, 400, 5, seed=5)), 0.9 * W, B)
    assert fit.after < fit.before
    assert np.abs(fit.W[..., 7]).max() < 3 * np.abs(W).max()


def test_a_lost_column_that_others_tell_is_made_up_for() -> None:
    x = ROWS.copy()
    x[..., 7] = x[..., 0] - 2 * x[..., 3]
    pruned = W.copy()
    pruned[..., 7] = 0
    fit = refit(sums(x, goals(W, B, x)), pruned, B)
    assert not fit.W[..., 7].any()
    np.testing.assert_allclose(goals(fit.W, fit.b, x), goals(W, B, x), atol=1e-3)


def test_zeros_of_each_row_stay_and_the_rest_is_the_best() -> None:
    kept = random(2, 5, 8, seed=4) > -0.3
    sparse = np.where(kept, W, 0)
    x = ROWS @ random(8, 8, seed=5)
    t = goals(W, B, x)
    found, b = solve(Sums.of(x, t).moments(True), sparse, B, kept, 1e-5)
    assert not found[~kept].any()
    centred, wanted = x - x.mean(axis=1, keepdims=True), t - t.mean(axis=1, keepdims=True)
    error = ((t - goals(found, b, x)) ** 2).mean(axis=1)
    for g, o in np.ndindex(2, 5):
        S = kept[g, o]
        best = np.linalg.lstsq(centred[g][:, S], wanted[g, :, o], rcond=None)[0]
        least = ((wanted[g, :, o] - centred[g][:, S] @ best) ** 2).mean()
        assert error[g, o] <= 1.01 * least + 1e-6


def test_a_row_of_zeros_learns_its_bias_alone() -> None:
    pruned = W.copy()
    pruned[0, 2] = 0
    t = goals(W, B, ROWS)
    fit = refit(sums(ROWS, t), pruned, B)
    assert not fit.W[0, 2].any()
    np.testing.assert_allclose(fit.b[0, 2], t[0, :, 2].mean(), atol=1e-9)
    np.testing.assert_allclose(fit.W[0, 1], W[0, 1], atol=1e-3)


def test_without_a_bias_it_stays_as_it_is() -> None:
    t = goals(W, B, ROWS)
    fit = refit(sums(ROWS, t), 0.5 * W, B, is_biased=False)
    np.testing.assert_array_equal(fit.b, B)
    np.testing.assert_allclose(fit.W, W, atol=1e-3)


@pytest.mark.parametrize("count", [4, 12, 40])
def test_few_noisy_rows_do_little_harm(count: int) -> None:
    x = random(1, count, 30, seed=6)
    weight, b = random(1, 3, 30), np.zeros((1, 3))
    t = goals(weight, b, x) + 3 * random(1, count, 3, seed=7)
    fit = refit(sums(x, t), weight, b)
    fresh = random(1, 4000, 30, seed=8)
    error = ((goals(fit.W, fit.b, fresh) - goals(weight, b, fresh)) ** 2).mean()
    assert fit.after >= fit.before or error < 0.5 * (goals(weight, b, fresh) ** 2).mean()


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = ROWS.copy()
    x[..., 2] = 0
    fit = refit(sums(x, goals(W, B, x)), 0.9 * W, B)
    assert np.isfinite(fit.W).all()
    np.testing.assert_allclose(goals(fit.W, fit.b, x), goals(W, B, x), atol=1e-3)
    np.testing.assert_allclose(fit.W[..., 2], 0.9 * W[..., 2])
