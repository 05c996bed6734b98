"""Rows of a layer's input and of its goals: of the same positions, by sample, within bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from texts import normal

from calib import goals
from calib.goals import Cut, GoalObserver, RowsObserver
from onnxc.numerics.patches import Window

Array = NDArray[Any]
KERNEL = Window((3, 3), pads=(1, 1, 1, 1))


def convolved(x: Array, W: Array) -> Array:
    """A 3x3 convolution with a border of one zero."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, W)).astype(np.float32)


def joined(fold: list[Any], name: str) -> Array:
    return np.concatenate([getattr(part, name) for part in fold], axis=1)


def test_rows_and_goals_are_of_the_same_positions() -> None:
    x, W, added = normal(6, 4, 20, 20), normal(5, 4, 3, 3), normal(6, 5, 20, 20)
    observer = RowsObserver(Cut(1, KERNEL), 6)
    t = convolved(x, W)
    observer.update(x, t, 6, added + t)
    assert observer.is_finite and observer.samples == 6
    for fold in observer.folds:
        found = joined(fold, "x") @ W.reshape(5, -1).T
        np.testing.assert_allclose(found, joined(fold, "t"), atol=1e-4)
        assert found.shape[1] >= 3 * 64 / 2
        assert joined(fold, "a").shape == found.shape


def test_samples_go_to_the_folds_in_turn_in_any_batches() -> None:
    x = np.arange(9, dtype=np.float32)[:, None, None, None] + np.zeros((9, 2, 6, 6), np.float32)
    whole, parts = RowsObserver(expected=9), RowsObserver(expected=9)
    whole.update(x, 2 * x, 9)
    for begin, end in ((0, 2), (2, 7), (7, 9)):
        parts.update(x[begin:end], 2 * x[begin:end], end - begin)
    assert set(joined(whole.folds[0], "x").ravel()) == {0, 2, 4, 6, 8}
    assert set(joined(whole.folds[1], "x").ravel()) == {1, 3, 5, 7}
    for one, other in zip(whole.folds, parts.folds, strict=True):
        np.testing.assert_array_equal(joined(one, "x"), joined(other, "x"))
        np.testing.assert_array_equal(joined(one, "t"), joined(other, "t"))


def test_what_is_kept_is_bounded_and_spread_over_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(goals, "KEPT", 40_000)
    observer = RowsObserver(Cut(1, KERNEL), 10)
    for seed in range(10):
        x = normal(1, 4, 20, 20, seed=seed)
        observer.update(x, x, 1)
    parts = [part for fold in observer.folds for part in fold]
    assert len(parts) >= 10
    assert 20_000 < sum(part.x.nbytes + part.t.nbytes for part in parts) <= 40_000


def test_groups_have_rows_of_their_own() -> None:
    x = normal(4, 6, 8, 8)
    observer = RowsObserver(Cut(1, Window((3, 3), pads=(1, 1, 1, 1), groups=3)), 4)
    observer.update(x, x, 4)
    part = observer.folds[0][0]
    assert part.x.shape[0] == part.t.shape[0] == 3
    np.testing.assert_array_equal(part.x[:, :, 4], part.t[:, :, 0])  # the middle of the kernel


def test_what_is_not_finite_is_seen() -> None:
    x = np.ones((4, 3), np.float32)
    kept, summed = RowsObserver(expected=4), GoalObserver()
    for observer in (kept, summed):
        observer.update(x, x * np.float32(np.nan), 4)
        assert not observer.is_finite
