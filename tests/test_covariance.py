"""Covariances of few rows, and of rows that hardly vary about a large mean."""

from __future__ import annotations

import numpy as np

from onnxc.numerics.covariance import centred, root, shrunk


def test_few_rows_are_shrunk_towards_a_multiple_of_one() -> None:
    x = np.random.default_rng(0).standard_normal((6, 12))
    C = (x.T @ x / 6)[None]
    found = shrunk(C, 6)
    assert np.isclose(np.trace(found[0]), np.trace(C[0]))
    assert np.linalg.eigvalsh(found)[0, 0] > 0.01
    many = shrunk(C, 1e9)
    np.testing.assert_allclose(
        many, 0.998 * C + 0.002 * np.trace(C[0]) / 12 * np.eye(12), rtol=1e-6
    )


def test_a_root_squared_is_the_covariance() -> None:
    x = np.random.default_rng(1).standard_normal((3, 50, 8))
    C = x.swapaxes(1, 2) @ x / 50
    L = root(C)
    np.testing.assert_allclose(L @ L.swapaxes(1, 2), C, rtol=0, atol=1e-7)
    assert not np.triu(L, 1).any()


def test_a_difference_that_is_mostly_rounding_has_a_root() -> None:
    """Of rows 1e6 + noise of 1e-6, second moments less the mean's are no covariance any more."""
    x = 1e6 + 1e-6 * np.random.default_rng(2).standard_normal((200, 9))
    C = centred((x.T @ x / 200)[None], x.mean(axis=0)[None])
    assert np.linalg.eigvalsh(C)[0, 0] < 0
    L = root(C)
    assert np.isfinite(L).all() and (np.diagonal(L[0]) > 0).all()
    assert np.isfinite(np.linalg.inv(L)).all()


def test_nothing_at_all_has_a_root() -> None:
    assert np.isfinite(root(np.zeros((2, 4, 4)))).all()
