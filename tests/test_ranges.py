"""Range methods against brute force, and what every range must hold."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.observers import SIDE, HistogramObserver, RangeObserver
from calib.ranges import METHODS, choose, divergence, importance, squared_error
from onnxc.errors import OptionError

Array = NDArray[Any]
VALUES = hnp.arrays(
    np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
)


def observed(x: Array) -> HistogramObserver:
    observer = HistogramObserver(positions=x.size or 1)
    observer.update(x.reshape(1, -1))
    return observer


def quantized(x: Array, low: float, high: float, bits: int) -> Array:
    levels = 2**bits
    scale = (high - low) / (levels - 1)
    zero = np.rint(-low / scale)
    grid = np.clip(np.rint(x.astype(np.float64) / scale) + zero, 0, levels - 1)
    return np.asarray((grid - zero) * scale)


def error(x: Array, low: float, high: float, bits: int) -> float:
    return float(np.mean((x.astype(np.float64) - quantized(x, low, high, bits)) ** 2))


def sample(kind: str, size: int = 50_000) -> Array:
    rng = np.random.default_rng(7)
    draws = {
        "normal": lambda: rng.normal(size=size),
        "laplace": lambda: rng.laplace(size=size),
        "skewed": lambda: rng.gamma(2, size=size) - 0.5,
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "relu6": lambda: np.clip(rng.normal(1, 3, size=size), 0, 6),
        "negative": lambda: -rng.gamma(2, size=size),
        "outlier": lambda: np.append(rng.normal(size=size - 1), 60.0),
    }
    return draws[kind]().astype(np.float32)


KINDS = ["normal", "laplace", "skewed", "relu", "relu6", "negative", "outlier"]


@settings(max_examples=30, deadline=None)
@given(x=VALUES, symmetric=st.booleans(), bits=st.sampled_from([4, 8, 16]))
@pytest.mark.parametrize("method", list(METHODS))
def test_a_range_holds_zero_and_stays_within_the_data(
    method: str, x: Array, symmetric: bool, bits: int
) -> None:
    low, high = choose(observed(x), method, bits, symmetric)
    largest = float(np.abs(x).max())
    assert low <= 0 <= high
    assert low >= (-largest if symmetric else min(float(x.min()), 0.0))
    assert high <= (largest if symmetric else max(float(x.max()), 0.0))
    assert (low, high) != (0, 0) or largest == 0 or method == "percentile"
    assert not symmetric or low == -high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_within_two_percent_of_a_brute_force_search(
    kind: str, symmetric: bool, bits: int
) -> None:
    x = sample(kind, 4_000)
    low, high = choose(observed(x), "minmax", bits, symmetric)
    shrink = np.linspace(0.02, 1, 80)
    lows = low * shrink if low < 0 else [0.0]
    highs = high * shrink if high > 0 else [0.0]
    pairs = [(-h, h) for h in highs] if symmetric else [(a, b) for a in lows for b in highs]
    best = min(error(x, a, b, bits) for a, b in pairs)
    found = error(x, *choose(observed(x), "mse", bits, symmetric), bits)
    assert found <= 1.02 * best
    assert found <= 1.001 * error(x, low, high, bits)


def test_mse_clips_an_outlier_and_keeps_a_saturated_end() -> None:
    low, high = choose(observed(sample("outlier")), "mse", bits=4)
    assert high < 10 and low < -1
    assert choose(observed(sample("relu6")), "mse") == pytest.approx((0, 6), abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_error_is_that_of_the_samples(kind: str) -> None:
    x = sample(kind)
    low, high = choose(observed(x), "minmax")
    scale = np.array([(high - low) / 255, (high - low) / 500])
    zero = np.rint(-low / scale)
    expected = [
        np.mean((x - (np.clip(np.rint(x / s) + z, 0, 255) - z) * s).astype(np.float64) ** 2)
        for s, z in zip(scale, zero, strict=True)
    ]
    np.testing.assert_allclose(squared_error(observed(x), scale, zero, 256), expected, rtol=0.1)


def migacz(counts: Array, first: int, last: int, levels: int) -> float:
    """KL divergence as the talk spells it, bin by bin."""
    p = counts[first:last].astype(np.float64)
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros_like(p)
    for level in range(levels):
        start = (level * (last - first)) // levels
        stop = ((level + 1) * (last - first)) // levels
        filled = p[start:stop] > 0
        total = counts[first + start : first + stop].sum()
        q[start:stop][filled] = max(total, 1e-4) / max(filled.sum(), 1)
    p, q = p / p.sum(), q / counts[first:last].sum()
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@settings(max_examples=60, deadline=None)
@given(
    counts=hnp.arrays(np.int64, 40, elements=st.integers(0, 20)),
    first=st.integers(0, 15),
    size=st.integers(4, 24),
    levels=st.integers(2, 4),
)
def test_the_divergence_is_that_of_a_plain_loop(
    counts: Array, first: int, size: int, levels: int
) -> None:
    counts[first + size // 2] += 1  # Q is not empty
    found = divergence(counts, np.array([first]), np.array([first + size]), levels)
    assert found[0] == pytest.approx(migacz(counts, first, first + size, levels), abs=1e-9)


@pytest.mark.parametrize("kind", ["relu", "laplace"])
def test_entropy_finds_the_best_threshold_of_an_exhaustive_search(kind: str) -> None:
    observer = observed(np.abs(sample(kind)))
    counts, top = observer.counts, int(observer.high / observer.width) + 1
    ends = np.arange(256, top + 1)
    zero = SIDE - 1
    every = divergence(counts, np.full_like(ends, zero), zero + ends, 256)
    _, high = choose(observer, "entropy")
    chosen = divergence(
        counts, np.array([zero]), np.array([zero + round(high / observer.width)]), 256
    )
    assert chosen[0] <= every.min() + 0.1 * (every[-1] - every.min()) + 1e-9
    assert high < observer.high


def test_a_percentile_is_that_of_numpy_to_a_bin() -> None:
    x = sample("skewed")
    observer = observed(x)
    low, high = choose(observer, "percentile", percentile=99.0)
    assert low == pytest.approx(np.percentile(x, 0.5), abs=2 * observer.width)
    assert high == pytest.approx(np.percentile(x, 99.5), abs=2 * observer.width)
    _, end = choose(observer, "percentile", symmetric=True, percentile=99.0)
    assert end == pytest.approx(np.percentile(np.abs(x), 99.0), abs=2 * observer.width)


@settings(max_examples=60, deadline=None)
@given(x=VALUES, symmetric=st.booleans())
def test_the_hundredth_percentile_is_the_full_range(x: Array, symmetric: bool) -> None:
    full = choose(observed(x), "minmax", symmetric=symmetric)
    assert choose(observed(x), "percentile", symmetric=symmetric, percentile=100) == full


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_seen_and_nothing_but_zero_give_an_empty_range(method: str) -> None:
    assert choose(HistogramObserver(), method) == (0, 0)
    assert choose(observed(np.zeros(9, np.float32)), method) == (0, 0)


def test_a_range_by_channel_gives_the_range_of_all_channels() -> None:
    observer = RangeObserver(axis=1)
    observer.update(np.array([[1.0, -3.0, 2.0]], np.float32))
    assert choose(observer) == (-3, 2)
    assert choose(observer, symmetric=True) == (-3, 3)


@pytest.mark.parametrize(
    ("method", "kind", "most"),
    [
        ("aciq", "normal", 1.1),
        ("aciq", "laplace", 1.1),
        ("aciq", "relu", 1.15),
        ("hwgq", "normal", 1.1),
        ("hwgq", "relu", 1.05),
    ],
)
@pytest.mark.parametrize("bits", [4, 6])
def test_closed_forms_are_near_the_best_range_where_they_fit(
    method: str, kind: str, most: float, bits: int
) -> None:
    x = sample(kind)
    best, found = (error(x, *choose(observed(x), m, bits), bits) for m in ("mse", method))
    assert best * 0.99 <= found <= most * best


@given(seed=st.integers(0, 10**6), bits=st.sampled_from([3, 4, 8]))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("method", ["aciq", "hwgq"])
def test_closed_forms_follow_the_scale_and_the_side(method: str, seed: int, bits: int) -> None:
    x = np.random.default_rng(seed).standard_normal(500).astype(np.float32)
    for values in (x, np.abs(x)):
        low, high = choose(observed(values), method, bits)
        np.testing.assert_allclose(
            choose(observed(8 * values), method, bits), (8 * low, 8 * high), rtol=1e-6
        )
        np.testing.assert_allclose(choose(observed(-values), method, bits), (-high, -low))
        if (values >= 0).all():
            assert low == 0


def channels(count: int, spread: float, seed: int = 0) -> tuple[Array, Array, Array]:
    """x (samples, channels) of different strengths, with u_j and m_j: the strong count least."""
    rng = np.random.default_rng(seed)
    strength = np.exp(rng.normal(0, spread, count))
    x = np.maximum(rng.laplace(size=(4000, count)) * strength, 0).astype(np.float32)
    return x, strength**-2.0, np.mean(np.float64(x) ** 2, axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_output_of_a_layer_says_what_may_be_cut_off(seed: int) -> None:
    x, u, m = channels(16, 1.0, seed)
    observer = observed(x.reshape(-1))
    omega = importance(observer, u, m)
    lost = {}
    for method in ("mse", "output"):
        low, high = choose(observer, method, 4, importance=omega)
        drift = x - quantized(x, low, high, 4)
        lost[method] = float(np.mean(drift**2, axis=0) @ u), high
    assert lost["output"][0] < 0.9 * lost["mse"][0]
    assert lost["output"][1] < lost["mse"][1]


def test_channels_that_count_alike_leave_the_range_as_it_is() -> None:
    x, _, m = channels(8, 1.0)
    observer = observed(x.reshape(-1))
    omega = importance(observer, np.full(8, 3.0), m)
    assert omega is not None
    np.testing.assert_allclose(omega, 1, rtol=1e-9)
    plain = choose(observer, "mse", 4)
    np.testing.assert_allclose(choose(observer, "output", 4, importance=omega), plain, rtol=1e-6)
    assert choose(observer, "output", 4) == plain  # where nothing is known
    assert importance(observer, np.zeros(8), m) is None
    assert importance(observer, u=np.ones(8), m=np.zeros(8)) is None


def test_bad_options_are_named() -> None:
    with pytest.raises(OptionError, match="'best' is unknown; use one of minmax"):
        choose(observed(sample("normal")), "best")
    with pytest.raises(OptionError, match="needs a histogram"):
        choose(RangeObserver(), "mse")
    with pytest.raises(OptionError, match=r"percentile 0 is not in \(0, 100\]"):
        choose(observed(sample("normal")), "percentile", percentile=0)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_range_takes_milliseconds(method: str) -> None:
    observer = observed(sample("laplace"))
    spent = []
    for _ in range(5):
        start = time.process_time()
        choose(observer, method)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.02
