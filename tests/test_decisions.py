"""Expected drops: against sampling, and against counting on many samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxc.numerics import decisions as d


def _scores(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibrated scores, labels drawn from them, and a disturbance of half their size."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, classes))
    p = d.softmax(z)
    labels = np.array([rng.choice(classes, p=row) for row in p])
    return z, labels, 0.5 * rng.standard_normal(z.shape)


def test_chances_are_those_of_sampling() -> None:
    rng = np.random.default_rng(0)
    z, sigma = rng.standard_normal((4, 5)), np.array([0.2, 0.5, 1.0, 2.0])
    w = d.win_chances(z, sigma)
    drawn = z[:, None] + sigma[:, None, None] * rng.standard_normal((4, 200_000, 5))
    for row in range(4):
        share = np.bincount(drawn[row].argmax(axis=1), minlength=5) / 200_000
        np.testing.assert_allclose(w[row], share, atol=4e-3)


@given(st.integers(0, 1000), st.integers(2, 8))
def test_chances_sum_to_one(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    z, sigma = rng.standard_normal((6, classes)), rng.uniform(0, 2, 6)
    z = -np.sort(-z, axis=1)
    w = d.win_chances(z, sigma)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=2e-3)
    assert (np.diff(w, axis=1) <= 1e-9).all()  # better scores win more often


def test_drop_is_what_counting_gives_with_a_fraction_of_its_spread() -> None:
    z, labels, e = _scores(20_000, 10, 1)
    lost = (z.argmax(1) == labels).astype(float) - ((z + e).argmax(1) == labels)
    told = d.Contest.of(z, z + e).expected_drop
    assert told.mean() == pytest.approx(lost.mean(), abs=3 * lost.std() / len(lost) ** 0.5)
    assert told.std() < lost.std() / 8


def test_disagreement_is_the_share_that_changes() -> None:
    z, _, e = _scores(20_000, 10, 2)
    found = d.Contest.of(z, z + e)
    assert found.disagreement.mean() == pytest.approx(found.changed.mean(), abs=0.01)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 20), st.floats(0.05, 1.0))
def test_two_classes_are_enough(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((4000, 2))
    z = y + sigma * rng.standard_normal(y.shape)
    found = d.Contest.of(y, z)
    assert found.disagreement.mean() == pytest.approx(found.changed.mean(), abs=0.04)


@pytest.mark.parametrize(
    ("left", "more", "size"),
    [(1.0, 4.0, 0.1), (0.5, 1.0, 0.05), (0.3, 2.0, 0.1)],
    ids=["rivals disturbed more", "margins that shrink", "both"],
)
def test_what_rivals_have_in_common_counts(left: float, more: float, size: float) -> None:
    """The spread over all classes alone is wrong by three times as much."""
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((4000, 20))
    e = size * rng.standard_normal(z.shape)
    best = np.argsort(-z, axis=1)[:, :4]
    np.put_along_axis(e, best, more * np.take_along_axis(e, best, axis=1), axis=1)
    found = d.Contest.of(z, left * z + e)
    counted = found.changed.mean()
    plain = 1 - d.win_chances(found.z, np.sqrt(found.variance))[:, 0].mean()
    error, without = (abs(np.log(x / counted)) for x in (found.disagreement.mean(), plain))
    assert error < 0.45 and error < without / 3


def test_equal_scores_lose_nothing() -> None:
    z, _, _ = _scores(50, 10, 3)
    found = d.Contest.of(z, z)
    for drop in (found.expected_drop, found.lost, found.disagreement, found.changed):
        np.testing.assert_allclose(drop, 0, atol=1e-9)


def test_joined_samples_are_those_of_the_parts() -> None:
    z, _, e = _scores(60, 7, 6)
    whole = d.Contest.of(z, z + e)
    parts = d.Contest.joined(
        [d.Contest.of(z[i : i + 20], (z + e)[i : i + 20]) for i in (0, 20, 40)]
    )
    np.testing.assert_array_equal(whole.expected_drop, parts.expected_drop)


def test_temperature_undoes_overconfidence() -> None:
    z, labels, _ = _scores(5_000, 10, 4)
    assert d.temperature(3 * z, labels) == pytest.approx(3, rel=0.12)


def test_probabilities_become_logits() -> None:
    z, _, _ = _scores(20, 6, 5)
    np.testing.assert_allclose(d.softmax(d.softmax(z)), d.softmax(z), atol=1e-9)
    np.testing.assert_array_equal(d.logits(z), z)
