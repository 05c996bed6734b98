"""Which weights become zero, against hand-made cases, brute force and least squares."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxc.numerics.sparse import (
    GRID,
    Quadratic,
    allocate,
    curve,
    largest,
    largest_in_rows,
    n_of_m,
    quadratic,
    refit,
    scores,
    solve,
    sparse,
)

Array = NDArray[Any]


def problem(outputs: int, d: int, groups: int = 1, seed: int = 0) -> tuple[Array, Array, Array]:
    """W, rows x and their mean; inputs that hang together, so that one can stand in for others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, d, d)) / np.sqrt(d) + np.eye(d)
    x = rng.standard_normal((groups, 40 * d, d)) @ mixed + rng.standard_normal((groups, 1, d))
    return rng.standard_normal((groups, outputs, d)), x, x.mean(axis=1)


def moments(x: Array) -> Array:
    return np.asarray(x.swapaxes(1, 2) @ x / x.shape[1])


def test_the_error_is_that_of_the_outputs_with_the_bias_fitted() -> None:
    W, x, mu = problem(3, 6, groups=2)
    found = W + np.random.default_rng(1).standard_normal(W.shape)
    E = quadratic([moments(x)], mu, least=0)
    moved = (W - found) @ x.swapaxes(1, 2)
    assert E.error(W - found) == pytest.approx(moved.var(axis=2).sum(), rel=1e-9)
    plain = quadratic([moments(x)], least=0)
    assert plain.error(W - found) == pytest.approx((moved**2).mean(axis=2).sum(), rel=1e-9)


def test_moments_of_few_rows_are_trusted_less() -> None:
    _, x, _ = problem(1, 12)
    H = moments(x)
    power = np.diagonal(H[0]).mean()
    shares = []
    for count in (10**9, 480, 12):
        (C,) = quadratic([H], count=count, least=0).blocks
        assert np.trace(C[0]) == pytest.approx(np.trace(H[0]), rel=1e-9)
        shares.append(1 - C[0, 0, 1] / H[0, 0, 1])
        wanted = (1 - shares[-1]) * H[0] + shares[-1] * power * np.eye(12)
        np.testing.assert_allclose(C[0], wanted, rtol=0, atol=1e-9)
    assert 0 <= shares[0] < 1e-6 < shares[1] < 0.1 < shares[2] <= 1


def test_shrinkage_brings_moments_nearer_to_the_true_ones() -> None:
    rng = np.random.default_rng(0)
    axes = rng.standard_normal((20, 20)) * np.linspace(0.1, 2, 20)
    true, x = axes @ axes.T, rng.standard_normal((1, 25, 20)) @ axes.T
    (C,) = quadratic([moments(x)], count=25, least=0).blocks
    assert np.linalg.norm(C[0] - true) < np.linalg.norm(moments(x)[0] - true)


def test_refit_is_least_squares_on_the_support() -> None:
    W, x, _ = problem(4, 8, groups=2)
    support = np.random.default_rng(2).random(W.shape) < 0.5
    support[0, 0] = False
    found = refit(W, quadratic([moments(x)], least=0), support)
    for group, row in np.ndindex(W.shape[:2]):
        used = support[group, row]
        wanted = np.linalg.lstsq(x[group][:, used], x[group] @ W[group, row], rcond=None)[0]
        np.testing.assert_allclose(found[group, row, used], wanted, rtol=0, atol=1e-6)
        assert not found[group, row, ~used].any()


def test_refit_after_one_removal_is_the_update_of_obs() -> None:
    W, x, mu = problem(1, 6)
    E = quadratic([moments(x)], mu)
    inverse = np.linalg.inv(E.blocks[0][0])
    for j in range(6):
        support = np.ones(W.shape, bool)
        support[..., j] = False
        wanted = W[0, 0] - W[0, 0, j] / inverse[j, j] * inverse[j]
        found = refit(W, E, support)
        np.testing.assert_allclose(found[0, 0], wanted, rtol=0, atol=1e-6)
        saliency = scores(W, E, "obs")[0, 0, j]
        assert E.error(W - found) == pytest.approx(saliency, rel=1e-6)


def test_scores_by_hand() -> None:
    W = np.array([[[3.0, -1.0]]])
    E = Quadratic((np.diag([1.0, 16.0])[None],))
    np.testing.assert_allclose(scores(W, E, "magnitude"), [[[9, 1]]], rtol=0, atol=1e-12)
    for criterion in ("obd", "wanda", "obs"):  # of inputs that do not hang together, the same
        np.testing.assert_allclose(scores(W, E, criterion), [[[9, 16]]], rtol=0, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_solving_comes_near_the_best_of_all_supports(seed: int) -> None:
    W, x, mu = problem(1, 9, seed=seed)
    E = quadratic([moments(x)], mu)
    best = np.inf
    for kept in combinations(range(9), 4):
        support = np.zeros(W.shape, bool)
        support[..., kept] = True
        best = min(best, E.error(W - refit(W, E, support)))
    found = sparse(W, E, "obs", largest(4))
    assert np.count_nonzero(found) == 4
    assert E.error(W - found) <= 1.25 * best


def test_solving_beats_what_is_chosen_weight_by_weight() -> None:
    W, x, mu = problem(16, 48)
    E = quadratic([moments(x)], mu)
    lost = {}
    for criterion in ("obs", "magnitude", "wanda", "obd"):
        found = sparse(W, E, criterion, largest(W.size // 4))  # type: ignore[arg-type]
        lost[criterion] = E.error(W - found)
    fitted = min(
        E.error(W - refit(W, E, largest(W.size // 4)(scores(W, E, criterion))))
        for criterion in ("obs", "magnitude", "obd")  # type: ignore[arg-type]
    )
    assert lost["obs"] < fitted < min(lost["magnitude"], lost["wanda"], lost["obd"])


def test_solving_in_blocks_is_solving_each() -> None:
    W, x, _ = problem(4, 12)
    H = moments(x)
    parts = [H[:, :6, :6], H[:, 6:, 6:]]
    pattern = n_of_m(1, 2)
    whole = sparse(W, quadratic(parts, least=0), "obs", pattern)
    whole_H = np.zeros_like(H)
    whole_H[:, :6, :6], whole_H[:, 6:, 6:] = parts
    np.testing.assert_allclose(
        whole, sparse(W, quadratic([whole_H], least=0), "obs", pattern), rtol=0, atol=1e-4
    )


def test_a_layer_that_gets_no_input_keeps_its_numbers_finite() -> None:
    W, _, _ = problem(2, 4)
    E = quadratic([np.zeros((1, 4, 4))], np.zeros((1, 4)))
    assert np.isfinite(sparse(W, E, "obs", largest(4))).all()


def test_nothing_known_of_the_input_leaves_the_magnitude() -> None:
    W, _, _ = problem(2, 6)
    found = sparse(W, Quadratic(), "magnitude", largest(5))
    kept = np.sort(np.abs(W).ravel())[-5:]
    np.testing.assert_array_equal(np.sort(np.abs(found[found != 0])), kept)


def test_patterns_keep_what_they_say() -> None:
    values = np.array([[[4.0, 1, 3, 2], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(largest(3)(values), [[[1, 0, 1, 1], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(largest_in_rows(5)(values), [[[1, 0, 1, 0], [1, 1, 0, 0]]])
    assert largest(8)(values).all() and not largest(0)(values).any()


def test_n_of_m_counts_consecutive_channels_at_each_offset() -> None:
    channels, offsets = 4, 3
    values = np.random.default_rng(0).random((2, 5, channels * offsets))
    kept = n_of_m(2, 4, offsets)(values).reshape(2, 5, channels, offsets)
    assert (kept.sum(axis=2) == 2).all()
    ordered = np.sort(values.reshape(2, 5, channels, offsets), axis=2)
    np.testing.assert_array_equal(kept, values.reshape(kept.shape) >= ordered[:, :, 2:3])


def test_a_curve_rises_to_all_of_the_output() -> None:
    W, x, mu = problem(8, 16)
    found = curve(W, quadratic([moments(x)], mu), "obs")
    assert (np.diff(found) > 0).all() and found[0] > 0 and found[-1] < 1


def test_shares_add_up_and_go_where_they_cost_least() -> None:
    grid = np.array(GRID)
    cheap, dear = 0.1 * grid**4, grid**1.5
    first, second = allocate([cheap, dear], [100, 100], 0.5)
    assert first > second
    assert 0.5 <= (first + second) / 2 < 0.52
    assert allocate([cheap, cheap], [100, 100], 0.6) == pytest.approx([0.6, 0.6], abs=0.01)


def test_no_other_split_on_the_grid_costs_less() -> None:
    grid = np.array(GRID)
    curves = [0.3 * grid**3, 0.05 * grid + 0.2 * grid**6]
    shares = allocate(curves, [200, 100], 0.7)

    def cost(pair: tuple[float, float]) -> float:
        return sum(
            float(np.exp(np.interp(np.log(s), np.log([*grid, 1]), [*np.log(c), 0])))
            for s, c in zip(pair, curves, strict=True)
        )

    total = (2 * shares[0] + shares[1]) / 3
    others = [(s, 3 * total - 2 * s) for s in np.linspace(0.55, 0.99, 200)]
    feasible = [pair for pair in others if 0.1 <= pair[1] <= 1]
    assert cost((shares[0], shares[1])) <= min(map(cost, feasible)) + 0.002


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    W, x, mu = problem(8, 24)
    E = quadratic([moments(x)], mu)
    first, second = (solve(W, E, largest(60)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
