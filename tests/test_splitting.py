"""Channels are split where it helps most, and parts round to what the whole rounds to."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.splitting import Problem, Reader, copies, part, split, spread, steps

Array = NDArray[Any]


def layer(outputs: int, channels: int, seed: int, *, offsets: int = 1) -> tuple[Array, Array]:
    """W with heavy tails, and h."""
    rng = np.random.default_rng(seed)
    d = channels * offsets
    return rng.standard_t(3, (outputs, d)), rng.chisquare(2, d)


def problem(seed: int, channels: int = 5, outputs: int = 4, **settings: Any) -> Problem:
    W, h = layer(outputs, channels, seed)
    rng = np.random.default_rng([seed, 1])
    high = rng.chisquare(1, channels) * 3
    one_scale = settings.pop("one_scale", False)
    reader = Reader.of(W, h, np.arange(channels), channels, one_scale)
    return Problem(-high * rng.random(channels), high, [reader], **settings)


def brute(p: Problem, most: int) -> float:
    """The least error of all ways to give copies to channels, of their weights or their inputs."""
    count = len(p.low)
    best = np.inf
    for extra in product(range(most + 1), repeat=count):
        if sum(extra) > most:
            continue
        k = 1.0 + np.array(extra)
        divided = product(*([1.0, n] if n > 1 else [1.0] for n in k))
        for s in divided if p.has_inputs else [np.ones(count)]:
            best = min(best, p.error(np.array(s), k))
    return best


@given(
    st.floats(-300, 300, allow_nan=False),
    st.integers(1, 6),
    st.floats(0.01, 10, allow_nan=False),
)
def test_rounded_parts_sum_to_the_rounded_whole(w: float, k: int, step: float) -> None:
    """Hermite's identity; halves between integers go either way."""
    if abs(w / step - np.floor(w / step) - 0.5) < 1e-6:
        return
    parts = part(np.full(k, w), np.full(k, k), np.arange(k), np.full(k, step))
    assert np.sum(parts) == pytest.approx(w, abs=1e-9 * max(1, abs(w)))
    assert np.rint(parts / step).sum() == np.rint(w / step)


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(part(np.zeros(2), np.full(2, 2), np.arange(2), np.ones(2)), 0)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=30)
def test_no_part_reaches_beyond_the_grid(seed: int, most: int) -> None:
    """Δ of the split weights is what their largest part asks for, so that nothing is cut off."""
    q = 7
    W, h = layer(3, 4, seed)
    reader = Reader.of(W, h, np.arange(4), 4)
    found = split(Problem(np.zeros(4), np.ones(4), [reader], q=q, has_inputs=False), most)
    step = steps(reader.peaks, found.k, q)
    parts = [
        part(W[:, j, None], found.k[j], np.arange(found.k[j]), step[:, None]) for j in range(4)
    ]
    wide = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(np.abs(wide).max(axis=1), step * q, rtol=1e-9)
    codes = np.stack([np.rint(p / step[:, None]).sum(axis=1) for p in parts], 1)
    assert (np.abs(codes - W / step[:, None]) <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("has_inputs", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_close_to_the_best_of_all_ways(has_inputs: bool, most: int) -> None:
    """One copy is the best one; of more, the way there leaves little that others would take."""
    ratios = []
    for seed in range(12):
        p = problem(seed, has_inputs=has_inputs)
        found, best = split(p, most), brute(p, most)
        assert found.after >= best * (1 - 1e-9)
        ratios.append(found.after / best)
    assert max(ratios) <= (1 + 1e-9 if most == 1 else 1.15)
    assert np.mean(ratios) <= 1.03


@pytest.mark.parametrize("seed", range(4))
def test_one_scale_is_split_in_the_best_way(seed: int) -> None:
    """Where one number counts, splitting the largest again and again is the best of all."""
    p = problem(seed, one_scale=True, has_inputs=False)
    for most in (1, 3):
        assert split(p, most).after == pytest.approx(brute(p, most), rel=1e-9)


@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans())
@settings(max_examples=40)
def test_never_worse_and_within_the_budget(seed: int, most: int, has_inputs: bool) -> None:
    p = problem(seed, channels=6, has_inputs=has_inputs)
    found = split(p, most)
    assert found.after == pytest.approx(p.error(found.s, found.k.astype(float)))
    assert found.before == pytest.approx(p.error(np.ones(6), np.ones(6)))
    assert found.after <= found.before
    assert found.k.sum() - 6 <= most
    assert (found.k >= found.s).all()
    assert has_inputs or (found.s == 1).all()


def test_the_model_is_what_rounding_does() -> None:
    """E of many weights and inputs that lie anywhere between integers is the error of y = W x."""
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((200, 40)), rng.standard_normal((40, 5000)) * 10
    W[:, 3] *= 5
    x[7] *= 6
    reader = Reader.of(W, (x**2).mean(axis=1), np.arange(40), 40)
    p = Problem(x.min(axis=1), x.max(axis=1), [reader])
    found = split(p, 4)
    assert found.after < 0.4 * found.before
    for s, k in ((np.ones(40), np.ones(40)), (found.s, found.k.astype(float))):
        reached = (W * s, x / s[:, None])
        step = steps(np.abs(reached[0]), k, 127)[:, None]
        unit = (np.max(reached[1]) - np.min(reached[1])) / 255
        rounded = step * np.rint(reached[0] / step) @ (unit * np.rint(reached[1] / unit))
        error = np.square(rounded - W @ x).mean(axis=1).sum()
        assert error == pytest.approx(p.error(s, k), rel=0.1)


def test_channels_of_several_columns() -> None:
    W, h = layer(3, 4, 0, offsets=9)
    reader = Reader.of(W, h, np.repeat(np.arange(4), 9), 4)
    cut = W.reshape(3, 4, 9)
    np.testing.assert_allclose(reader.peaks, np.abs(cut).max(axis=2))
    np.testing.assert_allclose(reader.u, (cut**2).sum(axis=(0, 2)))
    np.testing.assert_allclose(reader.h, h.reshape(4, 9).sum(axis=1))
    np.testing.assert_allclose(reader.m, h.reshape(4, 9).mean(axis=1))
    one = Reader.of(W, h, np.repeat(np.arange(4), 9), 4, one_scale=True)
    np.testing.assert_allclose(one.peaks[0], reader.peaks.max(axis=0))
    assert one.outputs == 3


def test_nothing_to_split() -> None:
    reader = Reader.of(np.zeros((2, 3)), np.zeros(3), np.arange(3), 3)
    found = split(Problem(np.zeros(3), np.zeros(3), [reader]), 2)
    assert found.before == found.after == 0
    assert (found.k == 1).all()


def test_shares() -> None:
    assert copies(0.05, 3) == 1
    assert copies(0.1, 64) == 7
    np.testing.assert_allclose(spread(np.array([1.0, 2.0]), 127), [1, 2 - 1 / 254])
