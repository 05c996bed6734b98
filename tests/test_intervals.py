"""Confidence intervals against published figures, brute force, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxc.numerics.intervals import Z, change_interval, likeliest, score, share_interval

COUNTS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals_of_a_share(hits: int, n: int, low: float, high: float) -> None:
    assert share_interval(hits, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_ends_of_a_share_solve_their_equation(n: int, part: float) -> None:
    hits = round(part * n)
    p = hits / n
    for end in share_interval(hits, n):
        at_border = end in (0.0, 1.0)
        assert at_border or abs(p - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n))


def test_a_share_of_nothing_is_anything() -> None:
    assert share_interval(0, 0) == (0.0, 1.0)
    assert change_interval(0, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("lost", "won", "n", "change"),
    [(3, 5, 40, 0.1), (3, 5, 40, -0.1), (0, 5, 40, 0.2), (5, 0, 40, -0.2), (0, 0, 40, 0.1)],
)
def test_the_likeliest_share_is_that_of_brute_force(
    lost: int, won: int, n: int, change: float
) -> None:
    q = np.linspace(max(0.0, -change) + 1e-9, (1 - change) / 2 - 1e-9, 200_001)
    likelihood = (n - lost - won) * np.log(1 - 2 * q - change)
    likelihood += lost * np.log(q) if lost else 0
    likelihood += won * np.log(q + change) if won else 0
    assert likeliest(lost, won, n, change) == pytest.approx(q[likelihood.argmax()], abs=1e-5)


@given(COUNTS)
def test_the_ends_of_a_change_lie_z_errors_away(counts: tuple[int, int, int]) -> None:
    lost, won, both = counts
    n = max(lost + won + both, 1)
    low, high = change_interval(lost, won, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    for end, sign in ((low, 1), (high, -1)):
        assert abs(end) == 1 or score(lost, won, n, end) == pytest.approx(sign * Z, abs=1e-6)
    assert change_interval(won, lost, n) == pytest.approx((-high, -low), abs=1e-12)


def test_where_none_differ_more_samples_tell_more() -> None:
    for n in (10, 100, 1000):
        wide = Z * Z / (n + Z * Z)
        assert change_interval(0, 0, n) == pytest.approx((-wide, wide), abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """All outcomes of 60 samples, weighed by how likely they are."""
    n, lost, won = 60, 0.08, 0.05
    held = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            p = _multinomial(n, b, c, lost, won)
            if p > 1e-7:
                low, high = change_interval(b, c, n)
                held += p * (low <= won - lost <= high)
    assert 0.935 <= held <= 0.975


def _multinomial(n: int, b: int, c: int, lost: float, won: float) -> float:
    ways = math.comb(n, b) * math.comb(n - b, c)
    return float(ways * lost**b * won**c * (1 - lost - won) ** (n - b - c))
