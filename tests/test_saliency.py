"""Which channels go: what is left is the best there is, and the budget is spent well."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxc.numerics import criteria
from onnxc.numerics.allocation import Cost, Curve, allocate, through, uniform, uniform_under
from onnxc.numerics.saliency import Consumer, grouped, remove

Array = NDArray[Any]


def blocks(classes: int, width: int) -> list[Array]:
    """Neighbouring columns, `width` of each class."""
    return list(np.arange(classes * width).reshape(classes, width))


def moments(x: Array) -> tuple[Array, Array]:
    return x.T @ x / len(x), x.mean(axis=0)


def rows(n: int, d: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def consumer(
    classes: int, width: int = 1, outputs: int = 4, seed: int = 0
) -> tuple[Consumer, Array]:
    x = rows(400, classes * width, seed)
    W = np.random.default_rng(seed + 1).normal(size=(outputs, classes * width))
    return Consumer(W, *moments(x), blocks(classes, width)), x


def best_without(part: Consumer, x: Array, gone: list[int]) -> tuple[Array, Array, float]:
    """W, bias and error of least squares on the columns that stay."""
    columns = np.concatenate([part.columns[c] for c in gone]).astype(int)
    stay = np.setdiff1d(np.arange(x.shape[1]), columns)
    y, design = x @ part.W.T, np.hstack([x[:, stay], np.ones((len(x), 1))])
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    W = np.zeros_like(part.W)
    W[:, stay] = found[:-1].T
    return W, found[-1], float(np.square(y - design @ found).sum() / len(x))


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_left_is_the_constrained_least_squares(width: int) -> None:
    part, x = consumer(6, width)
    found = remove([part], 3, damping=1e-12)
    for steps in (1, 2, 3):
        W, bias, error = best_without(part, x, list(found.order[:steps]))
        assert found.damage[steps] * part.variance == pytest.approx(error, rel=1e-6)
    np.testing.assert_allclose(found.W[0], W, atol=1e-6)
    np.testing.assert_allclose(found.shift[0], bias, atol=1e-6)


def test_each_step_is_the_least_of_all() -> None:
    part, x = consumer(6, 2, seed=5)
    found = remove([part], 2, damping=1e-12)
    first, second = int(found.order[0]), int(found.order[1])
    alone = [best_without(part, x, [c])[2] for c in range(6)]
    assert first == int(np.argmin(alone))
    pairs = {c: best_without(part, x, [first, c])[2] for c in range(6) if c != first}
    assert second == min(pairs, key=lambda c: pairs[c])


def test_a_copy_costs_nothing_and_hands_its_weights_over() -> None:
    x = rows(300, 4)
    x = np.hstack([x, 2 * x[:, :1] + 1])  # a scaled and shifted copy of the first channel
    part = Consumer(np.random.default_rng(1).normal(size=(3, 5)), *moments(x), blocks(5, 1))
    found = remove([part], 1, order=[4], damping=1e-12)
    assert found.losses[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(found.W[0][:, 0], part.W[:, 0] + 2 * part.W[:, 4], atol=1e-5)
    np.testing.assert_allclose(found.shift[0], part.W[:, 4], atol=1e-5)
    assert remove([part], 1, damping=1e-12).order[0] in (0, 4)


def test_without_a_mean_the_bias_stays() -> None:
    part, x = consumer(5)
    found = remove([Consumer(part.W, part.H, None, part.columns)], 1, order=[2], damping=1e-12)
    stay = [0, 1, 3, 4]
    best = np.linalg.lstsq(x[:, stay], x @ part.W.T, rcond=None)[0]
    np.testing.assert_allclose(found.W[0][:, stay], best.T, atol=1e-6)
    assert not found.shift[0].any()


def test_losses_of_consumers_are_relative_and_added() -> None:
    one, _ = consumer(5, 2, seed=1)
    two, _ = consumer(5, 1, seed=2)
    loud = Consumer(1000 * two.W, two.H, two.mu, two.columns)
    order = [3, 1]
    each = [remove([part], 2, order).losses for part in (one, two)]
    np.testing.assert_allclose(remove([one, loud], 2, order).losses, sum(each), rtol=1e-9)


def test_a_class_that_a_consumer_does_not_read_costs_it_nothing() -> None:
    part, _ = consumer(4, 1)
    partly = Consumer(part.W, part.H, part.mu, [*part.columns[:3], np.zeros(0, int)])
    found = remove([partly], 1)
    assert found.order[0] == 3
    assert found.losses[0] == 0
    np.testing.assert_array_equal(found.W[0], part.W)


def test_groups_of_a_convolution_share_their_energy() -> None:
    x = np.stack([rows(200, 4, 1), rows(200, 4, 2)])
    H, mu = np.stack([moments(g)[0] for g in x]), np.stack([moments(g)[1] for g in x])
    W = np.random.default_rng(0).normal(size=(2, 3, 4))
    parts = grouped(W, [H], mu, blocks(4, 2))
    found = remove(parts, 4)
    assert [list(map(len, part.columns)) for part in parts] == [[2, 2, 0, 0], [0, 0, 2, 2]]
    assert found.damage[-1] == pytest.approx(1, rel=0.05)  # damping aside: all of the variance


def test_moments_in_blocks_are_those_of_independent_columns() -> None:
    """What blocks leave out is zero here; a class lies across their edge, one in a single block."""
    x, y = rows(300, 5, 1), rows(300, 7, 2)
    (H, mu), (K, nu) = moments(x), moments(y)
    whole, means = np.outer(np.append(mu, nu), np.append(mu, nu)), np.append(mu, nu)[None]
    whole[:5, :5], whole[5:, 5:] = H, K
    W, columns = np.random.default_rng(0).normal(size=(1, 3, 12)), blocks(6, 2)
    apart = remove(grouped(W, [H[None], K[None]], means, columns), 4, damping=1e-12)
    together = remove(grouped(W, [whole[None]], means, columns), 4, damping=1e-12)
    np.testing.assert_array_equal(apart.order, together.order)
    np.testing.assert_allclose(apart.losses, together.losses, rtol=1e-5)
    np.testing.assert_allclose(np.hstack(apart.W), together.W[0], atol=1e-6)
    np.testing.assert_allclose(np.sum(apart.shift, axis=0), together.shift[0], atol=1e-6)


def test_long_runs_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplying F out every few columns or never gives the same."""
    part, _ = consumer(12, 2, outputs=6)
    whole = remove([part], 11)
    monkeypatch.setattr("onnxc.numerics.saliency.RANK", 3)
    often = remove([part], 11)
    np.testing.assert_array_equal(whole.order, often.order)
    np.testing.assert_allclose(whole.losses, often.losses, rtol=1e-6)
    np.testing.assert_allclose(whole.W[0], often.W[0], atol=1e-8)


def test_dead_inputs_go_first() -> None:
    x = rows(200, 4)
    x[:, 2] = 0.5  # constant: the bias takes it up
    part = Consumer(np.ones((2, 4)), *moments(x), blocks(4, 1))
    found = remove([part], 1)
    assert found.order[0] == 2
    np.testing.assert_allclose(found.shift[0], 0.5, atol=1e-9)


def test_criteria_on_weights() -> None:
    w = np.array([[3.0, 0], [1, 1], [0, 2], [0.9, 1.1]])
    np.testing.assert_allclose(criteria.l1([w]) * np.mean([3, 2, 2, 2]), [3, 2, 2, 2])
    assert np.argsort(criteria.l2([w]))[0] == 1
    assert np.argmin(criteria.fpgm([w])) in (1, 3)
    np.testing.assert_allclose(criteria.bn([np.array([-2.0, 1, 0])]), [2, 1, 0])
    both = criteria.l1([w, 100 * w[::-1]])
    np.testing.assert_allclose(both, criteria.l1([w]) + criteria.l1([w[::-1]]))


def test_criteria_on_activations() -> None:
    np.testing.assert_allclose(criteria.apoz([np.array([0.9, 0.2])]), [0.1, 0.8])
    np.testing.assert_allclose(criteria.activation([np.array([-1.0, 3])]), [0.5, 1.5])
    assert sorted(criteria.random(5, seed=3)) == [0, 1, 2, 3, 4]


def test_thinet_is_greedy_on_the_error_of_dropping() -> None:
    part, x = consumer(5, 2, seed=3)
    places = criteria.thinet([part])
    centred = x - x.mean(axis=0)
    gone: list[int] = []
    for _ in range(3):
        errors = {}
        for c in set(range(5)) - set(gone):
            columns = np.concatenate([part.columns[j] for j in (*gone, c)])
            errors[c] = float(np.square(centred[:, columns] @ part.W[:, columns].T).sum())
        gone.append(min(errors, key=lambda c: errors[c]))
    assert list(np.argsort(places)[:3]) == gone


def test_lasso_of_uncorrelated_classes_is_a_threshold() -> None:
    """With K diagonal, β_c = max(1 − λ / K_cc, 0): the least K_cc leaves first."""
    part = Consumer(np.diag([3.0, 1, 2, 0.5]), np.eye(4), None, blocks(4, 1))
    assert list(np.argsort(criteria.lasso([part]))) == [3, 1, 2, 0]


def test_lasso_drops_one_of_two_copies_before_what_is_alone() -> None:
    x = np.random.default_rng(0).normal(size=(500, 3))
    x = np.hstack([x, 0.1 * x[:, :1]])
    part = Consumer(np.ones((1, 4)), *moments(x), blocks(4, 1))
    assert np.argmin(criteria.lasso([part])) == 3


def test_lasso_leaves_where_its_minimum_does() -> None:
    """Beside proximal gradients, which solve each λ by itself, on classes that are correlated."""
    part, _ = consumer(8, 2, seed=4)
    K = criteria.products([part])
    step, top = 1 / np.linalg.eigvalsh(K)[-1], np.abs(K.sum(axis=1)).max()
    leaves = np.zeros(8)
    for strength in np.geomspace(1e-4 * top, top, criteria.PATH):
        beta = np.ones(8)
        for _ in range(2000):
            toward = beta + step * (K @ (1 - beta))
            beta = np.sign(toward) * np.maximum(np.abs(toward) - step * strength, 0)
        leaves[beta != 0] = strength
    assert len(set(leaves)) > 3
    rung = 1e4 ** (
        1 / (criteria.PATH - 1)
    )  # of the ladder of λ; on the last one β goes on shrinking
    away = np.log(criteria.lasso([part]) / leaves) / np.log(rung)
    assert np.abs(away).max() < 1.1


def chain(seed: int, groups: int, classes: int) -> tuple[list[Curve], Cost]:
    """Convex curves of a chain of layers, whose costs are products of neighbours' shares."""
    rng = np.random.default_rng(seed)
    damage = [np.cumsum([0, *np.sort(rng.exponential(size=classes - 1))]) for _ in range(groups)]
    work = rng.uniform(1, 10, groups + 1)

    def cost(counts: Array) -> Array:
        kept = np.pad(1 - counts / classes, ((0, 0), (1, 1)), constant_values=1.0)
        return np.asarray((kept[:, :-1] * kept[:, 1:]) @ work + 2)

    return [Curve(d, classes, least=0.2) for d in damage], cost


def exhaustive(curves: list[Curve], cost: Cost, budget: float) -> float:
    """The least damage of all counts within the budget."""
    counts = np.array(list(itertools.product(*(map(int, c.counts) for c in curves))))
    fits = counts[cost(counts) <= budget * cost(0 * counts[:1])[0] * (1 + 1e-9)]
    return min(done(curves, row) for row in fits)


def done(curves: list[Curve], counts: Any) -> float:
    return float(sum(c.damage[k] for c, k in zip(curves, counts, strict=True)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.8, 0.6])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_allocation_is_near_exhaustive_search(seed: int, budget: float, groups: int) -> None:
    """Two groups and exchanges between them are exact; three at once may find a little more."""
    curves, cost = chain(seed, groups, classes=8)
    found = allocate(curves, cost, budget)
    assert cost(np.array([found]))[0] <= budget * cost(np.zeros((1, groups), int))[0] * (1 + 1e-9)
    assert done(curves, found) <= exhaustive(curves, cost, budget) * 1.06


def test_a_cliff_after_a_plateau_is_seen() -> None:
    """The first step of the second group is dear, the next three are free."""
    steep, late = np.arange(6.0), np.array([0, 1.5, 1.5, 1.5, 1.5, 9])
    curves = [Curve(steep, 6), Curve(late, 6)]
    assert allocate(curves, lambda k: 12 - k.sum(axis=1).astype(float), 8 / 12) == [0, 4]


def test_a_measured_curve_goes_through_what_was_measured() -> None:
    shape = np.array([0, 0, 1.0, 2, 4, 8])
    found = through(shape, [1, 2, 4], [0.0, 0.5, 8.0])
    np.testing.assert_allclose(found, [0, 0, 0.5, 2.5, 8, 16])
    np.testing.assert_array_equal(through(0 * shape, [2], [1.0]), 0 * shape)
    falling = through(shape, [2, 3], [4.0, 1.0])
    assert (np.diff(falling) >= 0).all()


def test_counts_respect_multiples_and_the_least_share() -> None:
    curve = Curve(np.arange(60.0), classes=60, least=0.25, multiple=8)
    assert list(curve.counts) == [0, 4, 12, 20, 28, 36, 44]
    assert uniform([curve], 0.5) == [28]
    halves = Curve(np.arange(32.0), classes=32, least=0.5, multiple=8, width=2)
    assert list(halves.counts) == [0, 4, 8, 12, 16]


def test_a_budget_out_of_reach_takes_what_may_go() -> None:
    curve = Curve(np.arange(10.0), classes=10, least=0.5)
    assert allocate([curve], lambda k: 20.0 - k[:, 0], 0.1) == [5]


def test_nothing_goes_where_nothing_is_asked() -> None:
    curves, cost = chain(0, 3, 8)
    assert allocate(curves, cost, 1.0) == [0, 0, 0]
    assert uniform_under(curves, cost, 1.0) == [0, 0, 0]


def test_uniform_under_a_budget_meets_it() -> None:
    curves, cost = chain(1, 3, 10)
    found = uniform_under(curves, cost, 0.7)
    assert len(set(found)) == 1
    assert cost(np.array([found]))[0] <= 0.7 * cost(np.zeros((1, 3), int))[0] * (1 + 1e-9)
