"""Codes, books and scales fitted to the second moments, against brute force and least squares."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_codebook import problem

from onnxc.numerics import subvectors, vector_fit
from onnxc.numerics.aim import Aim
from onnxc.numerics.refit import Sums
from onnxc.numerics.sparse import Quadratic
from onnxc.numerics.subvectors import Vectors, descend, feed_forward, fit, measured
from onnxc.numerics.vector_fit import Bounds, Form, choose, finish, forms, start
from onnxc.numerics.vector_kmeans import kmeans

Array = NDArray[Any]


def vectors(W: Array, s: int, K: int, M: int = 1, seed: int = 0) -> Vectors:
    """Random books, codes and scales for a weight."""
    rng = np.random.default_rng(seed)
    groups, outputs, d = W.shape
    codes = rng.integers(0, K, (M, groups, outputs, d // s))
    scale = np.asarray(rng.uniform(0.5, 1.5, (groups, outputs)))
    return Vectors(rng.standard_normal((M, K, s)), codes, scale)


def test_the_codes_of_one_sub_vector_are_the_best() -> None:
    for seed in range(10):
        W, E = problem(5, 4, groups=2, seed=seed)
        found = descend(W, E, vectors(W, 4, 6, seed=seed))
        costs = []
        for k in range(6):
            tried = replace(found, codes=np.full_like(found.codes, k))
            costs.append(np.sum(E.times(W - tried.weight) * (W - tried.weight), axis=2))
        np.testing.assert_array_equal(found.codes[0, ..., 0], np.argmin(costs, axis=0))


def test_codes_are_near_the_best_of_all() -> None:
    found, least, nearest = 0.0, 0.0, 0.0
    for seed in range(12):
        W, E = problem(1, 8, seed=seed)
        begun = vectors(W, 2, 4, seed=seed)
        every = (np.array(a).reshape(begun.codes.shape) for a in product(range(4), repeat=4))
        best = min(E.error(W - replace(begun, codes=codes).weight) for codes in every)
        now = feed_forward(W, E, begun)
        for _ in range(10):
            now = descend(W, E, now)
        alone = descend(W, measured(Quadratic(), 1, 8, 2), begun)
        assert best <= E.error(W - now.weight) * (1 + 1e-12)
        found, least = found + E.error(W - now.weight), least + best
        nearest += E.error(W - alone.weight)
    assert found - least < 0.5 * (nearest - least)


def test_no_change_of_one_code_helps_after_descent() -> None:
    W, E = problem(3, 72, groups=2)  # wider than what is multiplied out together
    now = vectors(W, 3, 5, M=2)
    for _ in range(40):
        now = descend(W, E, now)
    least, rng = E.error(W - now.weight), np.random.default_rng(1)
    for _ in range(200):
        codes = now.codes.copy()
        codes[tuple(rng.integers(0, n) for n in codes.shape)] = rng.integers(0, 5)
        assert E.error(W - replace(now, codes=codes).weight) >= least * (1 - 1e-9)


@pytest.mark.parametrize("M", [1, 2])
def test_books_are_those_of_least_squares(M: int) -> None:
    W, E = problem(6, 12, groups=2)
    begun = vectors(W, 3, 4, M)
    found = subvectors.solve_books(W, E, begun)
    unit = np.eye(begun.books.size).reshape(-1, *begun.books.shape)
    A = np.stack([replace(begun, books=books).weight for books in unit])
    G = np.stack([E.times(a) for a in A])
    system = np.einsum("igod,jgod->ij", G, A)
    expected = np.linalg.lstsq(system, np.einsum("igod,god->i", G, W), rcond=None)[0]
    best = replace(begun, books=expected.reshape(begun.books.shape))
    assert E.error(W - found.weight) == pytest.approx(E.error(W - best.weight), rel=1e-4)
    assert E.error(W - found.weight) < E.error(W - begun.weight)


def test_scales_are_those_of_least_squares() -> None:
    W, E = problem(5, 8)
    W[0, 2] = 0  # its scale would be 0
    begun = feed_forward(W, E, vectors(W, 2, 4))
    found = subvectors.solve_scales(W, E, begun)
    assert found.scale[0, 2] == begun.scale[0, 2]
    L = np.linalg.cholesky(E.blocks[0][0])
    for row in (0, 1, 3, 4):
        u, w = begun.unit[0, row] @ L, W[0, row] @ L
        expected = np.linalg.lstsq(u[:, None], w, rcond=None)[0][0]
        assert found.scale[0, row] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("groups", "M"), [(1, 1), (3, 1), (1, 2)])
def test_each_step_lowers_the_error(groups: int, M: int) -> None:
    W, E = problem(12, 24, groups)
    now = start(W, E, Form(4, 8, M, True))
    for _ in range(3):
        for step in (subvectors.solve_books, subvectors.solve_scales, descend):
            after = step(W, E, now)
            assert E.error(W - after.weight) <= E.error(W - now.weight) * (1 + 1e-9)
            now = after
    begun = start(W, E, Form(4, 8, M, True))
    assert E.error(W - fit(W, E, begun).weight) < E.error(W - begun.weight)


def test_feeding_forward_beats_the_nearest_codewords() -> None:
    W, E = problem(8, 48)
    begun = start(W, E, Form(3, 8))
    nearest = descend(W, measured(Quadratic(), 1, 48, 3), begun)
    assert E.error(W - begun.weight) < E.error(W - nearest.weight)


def test_blocks_make_up_the_moments() -> None:
    _, E = problem(1, 12, groups=2)
    (C,) = E.blocks
    U, D = subvectors._block_factors(C, 3)
    whole = np.zeros_like(C)
    for b in range(4):
        here = slice(3 * b, 3 * b + 3)
        whole[:, here, here] = D[:, b]
        np.testing.assert_allclose(U[:, here, here], np.eye(3)[None].repeat(2, 0), atol=1e-12)
        assert not U[:, here, : 3 * b].any()
    np.testing.assert_allclose(U @ whole @ U.swapaxes(1, 2), C, rtol=0, atol=1e-9)


def test_planted_codewords_are_found() -> None:
    rng = np.random.default_rng(3)
    _, E = problem(1, 24)
    book, codes = rng.standard_normal((1, 8, 4)), rng.integers(0, 8, (1, 1, 60, 6))
    W = Vectors(book, codes, np.ones((1, 60))).weight
    found = fit(W, E, start(W, E, Form(4, 8)), is_scaled=False)
    assert E.error(W - found.weight) < 1e-9 * E.error(W)


def test_without_moments_each_sub_vector_gets_the_nearest() -> None:
    W = np.random.default_rng(0).standard_normal((1, 40, 70))
    form = Form(7, 16)
    found = finish(W, Quadratic(), start(W, Quadratic(), form), False)
    gaps = W.reshape(-1, 1, 7) - found.scale[0, 0] * found.books[0]
    nearest = np.argmin(np.sum(gaps**2, axis=2), axis=1)
    np.testing.assert_array_equal(found.codes.reshape(-1), nearest)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_books_become_integers_and_scales_short(is_scaled: bool) -> None:
    W, E = problem(12, 24)
    begun = start(W, E, Form(3, 16, 2, is_scaled))
    free, found = fit(W, E, begun, is_scaled), finish(W, E, begun, is_scaled)
    assert (found.books == np.rint(found.books)).all() and np.abs(found.books).max() <= 127
    kind = np.float16 if is_scaled else np.float32
    np.testing.assert_array_equal(found.scale.astype(kind).astype(np.float64), found.scale)
    assert E.error(W - found.weight) < 1.1 * E.error(W - free.weight)


def test_small_scales_are_not_rounded_to_half() -> None:
    scale = np.array([[1e-6, 2e-6]])
    np.testing.assert_allclose(vector_fit.halved(scale, True), scale, rtol=1e-6)


@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([0.5, 1.0, 1.7, 2.0, 4.0]),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_forms_are_within_bounds(rows: int, d: int, rate: float, bits: int, books: int) -> None:
    bounds = Bounds(rate, tuple(range(1, bits + 1)), books)
    for form in forms(rows, d, (1, 2, 3, 4, 9), bounds):
        assert form.size(rows, d) <= rate * rows * d / 8
        assert 2 <= form.count <= 1 << bits and d % form.length == 0
        larger = replace(form, count=form.count + 1)
        is_most = form.count in (1 << bits, rows * (d // form.length) // vector_fit.SHARED)
        assert is_most or larger.size(rows, d) > rate * rows * d / 8


def test_forms_are_read_as_they_are_written() -> None:
    for form in (Form(9, 200), Form(4, 16, 2, True)):
        assert Form.read(str(form), form.books) == form
    for text in ("9", "0x4", "9x1", "9x300", "9x20t", "-1x2"):
        with pytest.raises(ValueError, match="LENGTHxCOUNT"):
            Form.read(text)


def test_the_form_of_the_least_error_for_its_bytes_is_chosen() -> None:
    rng = np.random.default_rng(5)
    book = rng.standard_normal((16, 9))
    W = book[rng.integers(0, 16, (1, 64, 8))].reshape(1, 64, 72)  # whole kernels are shared
    tried = list(forms(64, 72, (1, 2, 4, 9), Bounds(1.0)))
    form, _ = choose(W, Quadratic(), tried, lambda form: 0)
    assert form.length == 9
    cheap, _ = choose(W, Quadratic(), tried, lambda form: 100_000 * (form.length > 2))
    assert cheap.length <= 2


def test_a_goal_is_the_best_weight_with_its_metric() -> None:
    rng = np.random.default_rng(7)
    W, b = rng.standard_normal((1, 5, 12)), rng.standard_normal((1, 5))
    x = rng.standard_normal((1, 600, 12)) @ rng.standard_normal((12, 12)) + 1
    noisy = x + 0.3 * rng.standard_normal(x.shape)  # what the layers before now give
    t = x @ W.swapaxes(1, 2) + b[:, None]
    folds = [Sums.of(noisy[:, f::2], t[:, f::2]) for f in range(2)]
    goal = Aim.of(folds, W, b, True)
    made = finish(goal.W, goal.E, start(goal.W, goal.E, Form(3, 8)), False).weight
    plain = finish(W, Quadratic(), start(W, Quadratic(), Form(3, 8)), False).weight
    errors = []
    for weight in (made, plain):
        gap = t - noisy @ weight.swapaxes(1, 2)
        errors.append(float(np.sum((gap - gap.mean(axis=1, keepdims=True)) ** 2)))
    assert errors[0] < errors[1]
    np.testing.assert_allclose(
        goal.bias(made), (t - noisy @ made.swapaxes(1, 2)).mean(axis=1), rtol=0, atol=1e-9
    )


def test_kmeans_finds_planted_vectors() -> None:
    rng = np.random.default_rng(0)
    planted = 10 * rng.standard_normal((6, 3))
    x = planted[rng.integers(0, 6, 500)] + 0.01 * rng.standard_normal((500, 3))
    found = kmeans(x, np.ones_like(x), 6)
    gaps = np.linalg.norm(found[:, None] - planted, axis=2)
    assert gaps.min(axis=0).max() < 0.05
    np.testing.assert_array_equal(found, kmeans(x, np.ones_like(x), 6))


def test_kmeans_of_few_vectors_keeps_them_and_weights_count() -> None:
    x = np.array([[0.0, 1.0], [0.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(kmeans(x, np.ones_like(x), 4), np.unique(x, axis=0))
    x = np.random.default_rng(1).standard_normal((300, 2))
    first = np.broadcast_to(np.array([1.0, 1e-6]), x.shape)
    found = kmeans(x, first, 8)
    gap = np.abs(x[:, :1] - found[:, 0]).min(axis=1)
    assert np.mean(gap**2) < 0.05  # as good as 8 levels on a line


def test_many_sub_vectors_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    W, E = problem(20, 12)
    begun = vectors(W, 3, 8)
    whole = descend(W, E, begun)
    monkeypatch.setattr(subvectors, "CHUNK", 20)
    np.testing.assert_array_equal(descend(W, E, begun).codes, whole.codes)
