"""Factors of channels: the error that rounding makes of them, and where there is none to save."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.smoothing import ALPHAS, LIMIT, error, factors, smoothing

Array = NDArray[Any]
N, M = 255, 254


def layer(seed: int, spread: float = 2.0) -> tuple[Array, Array, Array]:
    """Rows x whose channels differ in size, their peaks, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 24)) * np.exp(spread * rng.standard_normal(24))
    return x, np.abs(x).max(axis=0), rng.standard_normal((16, 24))


def lost(x: Array, W: Array, s: Array) -> float:
    """Power of what rounding x / s and W s changes the outputs by."""
    x, V = x / s, W * s
    step, rows = 2 * np.abs(x).max() / N, 2 * np.abs(V).max(axis=1, keepdims=True) / M
    made = (np.rint(x / step) * step) @ (np.rint(V / rows) * rows).T
    return float(np.square(made - x @ V.T).sum() / len(x))


def test_the_error_is_that_of_rounding() -> None:
    for seed in range(5):
        x, peak, W = layer(seed)
        power = np.square(x).mean(axis=0)
        for s in (np.ones(24), factors(peak, np.abs(W).max(axis=0), 0.5)):
            told = error(s, peak, [(W, power)], N, M)
            assert 0.5 < told / lost(x, W, s) < 2


@given(st.integers(0, 1000), st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_no_factors_lose_more_than_none(seed: int, spread: float) -> None:
    x, peak, W = layer(seed, spread)
    readers = [(W, np.square(x).mean(axis=0)), (W[:3], np.square(x).mean(axis=0))]
    s = smoothing(peak, readers, N, M)
    found = error(s, peak, readers, N, M)
    assert found <= error(np.ones(24), peak, readers, N, M)
    wide = np.abs(W).max(axis=0)
    if not (s == 1).all():
        tried = (error(factors(peak, wide, a), peak, readers, N, M) for a in ALPHAS)
        assert found <= min(tried) * (1 + 1e-12)
        assert abs(np.log(s).mean()) < 1e-9


def test_one_large_channel_is_worth_a_factor() -> None:
    x, _, W = layer(0, 0.1)
    x[:, 5] *= 50
    peak, power = np.abs(x).max(axis=0), np.square(x).mean(axis=0)
    s = smoothing(peak, [(W, power)], N, M)
    assert s[5] > 5 * np.delete(s, 5).max()
    assert lost(x, W, s) < lost(x, W, np.ones(24)) / 4


def test_like_channels_stay() -> None:
    x, peak, W = layer(0, 0.0)
    s = smoothing(peak, [(W, np.square(x).mean(axis=0))], N, M)
    np.testing.assert_array_equal(s, np.ones(24))


def test_channels_without_a_say_keep_one() -> None:
    peak, wide = np.array([0.0, 4.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0, 0.0])
    s = factors(peak, wide, 0.5)
    np.testing.assert_allclose(s, [1, np.sqrt(2), np.sqrt(0.5), 1], rtol=1e-12)
    np.testing.assert_array_equal(factors(np.zeros(3), np.ones(3), 0.5), np.ones(3))
    assert factors(np.array([1e-30, 1.0]), np.ones(2), 0.9).min() >= 1 / LIMIT
