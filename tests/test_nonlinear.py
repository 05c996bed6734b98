"""Refit through an activation: compared with brute force, and never worse than least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.nonlinear import PENALTIES, Rows, alternate, bend, error, pull, through
from onnxc.numerics.refit import Sums, refit, solve

Array = NDArray[Any]
LONG = (*PENALTIES[:10] * 10, *(np.inf,) * 500)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def made(W: Array, b: Array, x: Array) -> Array:
    return np.asarray(np.einsum("god,gnd->gno", W, x) + b[:, None, :])


def rows(x: Array, t: Array, a: Array | None = None) -> Rows:
    arrays = (None if v is None else v.astype(np.float32) for v in (x, t, a))
    return Rows(*arrays)  # type: ignore[arg-type]


def folds(x: Array, t: Array) -> tuple[list[Sums], list[list[Rows]]]:
    parts = [slice(start, None, 2) for start in range(2)]
    sums = [Sums.of(x[:, part], t[:, part]) for part in parts]
    return sums, [[rows(x[:, part], t[:, part])] for part in parts]


def linear(x: Array, t: Array, W: Array, b: Array) -> tuple[Array, Array]:
    return solve(Sums.of(x, t).moments(True), W, b, W != 0, 1e-6)


def spoiled(t: Array, seed: int = 9) -> Array:
    """The same goals behind a ReLU, others in front of it."""
    return np.asarray(np.where(t < 0, 6 * t - np.abs(random(*t.shape, seed=seed)), t))


@pytest.mark.parametrize("high", [np.inf, 1.5])
@pytest.mark.parametrize("penalty", [0.01, 0.3, 1.0])
def test_z_is_the_best_of_a_grid(penalty: float, high: float) -> None:
    g = through(2 * random(300).astype(np.float32), high)
    u = 4 * random(300, seed=1).astype(np.float32)

    def cost(z: Array) -> Array:
        return np.asarray((g - np.clip(z, 0, high)) ** 2 + penalty * (z - u) ** 2)

    grid = np.linspace(-16, 16, 16001)[:, None]
    assert (cost(u + pull(g, u, penalty, high)) <= cost(grid).min(axis=0) + 1e-4).all()


@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    d=st.integers(1, 6),
    high=st.sampled_from([np.inf, 0.7]),
    is_biased=st.booleans(),
    has_sum=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_no_output_gets_worse_on_the_rows_that_it_is_fitted_to(
    groups: int, outputs: int, d: int, high: float, is_biased: bool, has_sum: bool, seed: int
) -> None:
    W, b = random(groups, outputs, d, seed=seed), random(groups, outputs, seed=seed)
    x, t = random(groups, 50, d, seed=seed + 1), random(groups, 50, outputs, seed=seed + 2)
    parts = [rows(x, t, random(groups, 50, outputs, seed=seed + 3) if has_sum else None)]
    found, c = alternate(parts, W, b, W > -0.5, 1e-2, is_biased, high)
    assert (error(parts, found, c, high) <= error(parts, W, b, high) * (1 + 1e-6)).all()
    np.testing.assert_array_equal(found[W <= -0.5], W[W <= -0.5])
    assert is_biased or (c == b).all()


def test_last_steps_lower_the_error_one_after_the_other() -> None:
    W, b = random(1, 3, 6), random(1, 3)
    x = random(1, 500, 6, seed=1)
    parts = [rows(x, spoiled(made(W, b, x)))]
    errors = [error(parts, W + 1, b, 0.9).sum()]
    for count in range(1, 6):
        taken = alternate(parts, W + 1, b, W != 0, 1e-6, True, 0.9, (np.inf,) * count)
        errors.append(error(parts, *taken, 0.9).sum())
    assert (np.diff(errors) < 0).all()


def test_error_is_that_behind_the_sum_and_the_activation() -> None:
    W, b, x = random(2, 3, 4), random(2, 3), random(2, 5000, 4, seed=1)
    t, a = random(2, 5000, 3, seed=2), random(2, 5000, 3, seed=3)
    wanted, found = (np.clip(v, 0, 0.9) for v in (t, made(W, b, x) + a))
    expected = ((wanted - found) ** 2).mean(axis=1)
    np.testing.assert_allclose(error([rows(x, t, a)], W, b, 0.9), expected, rtol=1e-5)


@pytest.mark.parametrize("has_sum", [False, True])
def test_weights_are_found_again_where_least_squares_do_not(has_sum: bool) -> None:
    W, b = random(2, 3, 6), random(2, 3)
    x = random(2, 2000, 6, seed=1)
    a = random(2, 2000, 3, seed=2) if has_sum else np.zeros((2, 2000, 3))
    t = spoiled(made(W, b, x) + a)
    start = linear(x, t - a, W + 0.1, b)
    parts = [rows(x, t, a if has_sum else None)]
    found, c = alternate(parts, *start, W != 0, 1e-6, penalties=LONG)
    assert np.abs(start[0] - W).max() > 1
    np.testing.assert_allclose(found, W, atol=0.02)
    np.testing.assert_allclose(c, b, atol=0.02)


@pytest.mark.parametrize("high", [np.inf, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_small_problems_are_solved_as_well_as_by_random_search(seed: int, high: float) -> None:
    x, W, b = random(1, 60, 2, seed=seed), random(1, 1, 2, seed=seed), np.zeros((1, 1))
    t = made(W, b, x) ** 3 + 0.5 * random(1, 60, 1, seed=seed)
    goal = np.clip(t[0, :, 0], 0, high)
    start = linear(x, t, W, b)
    found, c = alternate([rows(x, t)], *start, W != 0, 1e-6, high=high, penalties=LONG)
    (reached,) = error([rows(x, t)], found, c, high).ravel()
    (before,) = error([rows(x, t)], *start, high).ravel()
    for scale, limit in ((0.01, 1.03), (2.0, 1.3)):  # least of all near, and one of many minima
        some = np.concatenate([found[0, 0], c[0]]) + scale * random(20000, 3, seed=3)
        u = some[:, :2] @ x[0].T + some[:, 2:]
        least = ((goal - np.clip(u, 0, high)) ** 2).mean(axis=1).min()
        assert reached < limit * least
    assert reached < 0.97 * before


def test_held_out_rows_decide_for_each_output() -> None:
    W, b = random(1, 4, 8), random(1, 4) - 1
    x = random(1, 3000, 8, seed=1)
    t = made(W, b, x)
    t[..., :2] = spoiled(t)[..., :2]  # nothing is to gain for the others
    pruned = W.copy()
    pruned[0, 3] = 0
    sums, kept = folds(x, t)
    fit = refit(sums, pruned, b)
    bent = bend(sums, kept, pruned, b, fit)
    assert bent.better[0, :2].all() and not bent.better[0, 3]
    assert bent.after < 0.5 * bent.before
    same = ~bent.better
    np.testing.assert_array_equal(bent.W[same], fit.W[same])
    np.testing.assert_array_equal(bent.b[same], fit.b[same])
    fresh = random(1, 3000, 8, seed=5)
    parts = [rows(fresh, made(W, b, fresh))]
    assert error(parts, bent.W, bent.b)[0, :3].sum() < 0.5 * error(parts, fit.W, fit.b)[0, :3].sum()


def test_zeros_stay_and_what_they_did_is_made_up_for_behind_the_activation() -> None:
    W, b = random(1, 6, 10), random(1, 6) - 1.5
    x = np.maximum(random(1, 4000, 10, seed=1) @ random(10, 10, seed=2), 0)
    sparse = np.where(random(1, 6, 10, seed=3) > -0.3, W, 0)
    sums, kept = folds(x, made(W, b, x))
    fit = refit(sums, sparse, b)
    bent = bend(sums, kept, sparse, b, fit)
    assert not bent.W[sparse == 0].any()
    assert bent.better.any() and bent.after < 0.98 * bent.before


def test_fewer_rows_than_inputs_leave_the_linear_solution() -> None:
    W, b, x = random(1, 3, 20), random(1, 3), random(1, 30, 20, seed=1)
    sums, kept = folds(x, made(W, b, x))
    fit = refit(sums, 0.5 * W, b)
    bent = bend(sums, kept, 0.5 * W, b, fit)
    assert not bent.better.any()
    np.testing.assert_array_equal(bent.W, fit.W)
