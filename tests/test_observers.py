"""Observers are commutative monoids: order, batching and merging do not change a statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.observers import (
    OBSERVERS,
    SIDE,
    HistogramObserver,
    MeanObserver,
    RangeObserver,
    every_nth,
    exponent_of,
    is_equal,
)
from onnxc.errors import OptionError

Array = NDArray[Any]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
    [0.0, -0.0, 2.0**-140, -(2.0**-140), 6.0, 1024.0]
)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(7)), elements=FLOATS)
EXACT = [("range", None), ("range", 1), ("histogram", None)]


def observe(what: str, axis: int | None, *batches: Array) -> Any:
    observer = OBSERVERS[what](axis)
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.mark.parametrize(("what", "axis"), EXACT)
@given(a=ROWS, b=ROWS, c=ROWS)
def test_observing_together_equals_merging_in_any_order(
    what: str, axis: int | None, a: Array, b: Array, c: Array
) -> None:
    together = observe(what, axis, np.concatenate([a, b, c]))
    x, y, z = (observe(what, axis, part) for part in (a, b, c))
    assert is_equal(observe(what, axis, a, b, c), together)
    assert is_equal(x.merge(y).merge(z), together)
    assert is_equal(z.merge(x.merge(y)), together)
    assert is_equal(observe(what, axis).merge(together), together)


@given(a=ROWS, b=ROWS)
def test_means_merge_to_rounding(a: Array, b: Array) -> None:
    together = observe("mean", 1, np.concatenate([a, b]))
    merged = observe("mean", 1, a).merge(observe("mean", 1, b))
    scale = np.abs(np.concatenate([a, b]).astype(np.float64)).sum(axis=0)
    assert merged.count == together.count == len(a) + len(b)
    assert np.all(np.abs(merged.total - together.total) <= 1e-12 * scale + 1e-300)


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS))
def test_a_bin_holds_the_values_that_truncate_to_its_index(x: Array) -> None:
    seen = observe("histogram", None, x)
    index = np.trunc(x.astype(np.float64) / 2.0**seen.exponent).astype(int)
    expected = np.bincount(index + SIDE - 1, minlength=2 * SIDE - 1)
    np.testing.assert_array_equal(seen.counts, expected)
    assert (seen.low, seen.high, seen.count) == (x.min(), x.max(), x.size)


@given(st.floats(2.0**-100, 2.0**100))
def test_the_exponent_is_the_smallest_that_holds_the_data(largest: float) -> None:
    k = exponent_of(largest)
    assert largest / 2.0**k < SIDE <= largest / 2.0 ** (k - 1)


def test_one_sided_data_is_as_fine_as_two_sided() -> None:
    relu6 = observe("histogram", None, np.linspace(0, 6, 1000, dtype=np.float32))
    assert relu6.width == 2.0**-8
    assert relu6.counts[: SIDE - 1].sum() == 0


def test_minimum_and_maximum_see_what_the_stride_skips() -> None:
    x = np.zeros((2, 1000), np.float32)
    x[1, 501], x[0, 7] = 9.0, -3.0
    seen = HistogramObserver(positions=10)
    seen.update(x)
    assert (seen.low, seen.high, seen.count) == (-3.0, 9.0, 2000)
    assert seen.binned <= 20


@given(size=st.integers(1, 3000), positions=st.integers(1, 400), samples=st.integers(1, 4))
def test_sampling_takes_at_most_its_positions_of_each_sample_and_visits_every_column(
    size: int, positions: int, samples: int
) -> None:
    x = np.arange(samples * size).reshape(samples, size)
    taken = every_nth(x, positions, samples)
    assert len(set(taken)) == len(taken)
    counts = np.bincount(taken // size, minlength=samples)
    assert counts.min() >= 1
    assert counts.max() <= positions
    if size <= positions:
        np.testing.assert_array_equal(taken, x.reshape(-1))
    alone = [every_nth(row[None], positions, 1) for row in x]
    np.testing.assert_array_equal(np.concatenate(alone), taken)


def test_sampling_favours_no_channel_of_an_image() -> None:
    channel_last = np.arange(64 * 64 * 16).reshape(1, 64, 64, 16) % 16
    counts = np.bincount(every_nth(channel_last, 1024))
    assert counts.min() > 0.9 * counts.max()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_samples_in_a_batch_do_not_change_the_histogram(samples: int) -> None:
    x = np.random.default_rng(0).normal(size=(6, 8, 50, 50)).astype(np.float32)
    one, many = HistogramObserver(positions=999), HistogramObserver(positions=999)
    for row in x:
        one.update(row[None], 1)
    for start in range(0, 6, samples):
        merged = x[start : start + samples].reshape(samples * 8, 50, 50)  # batch-major, merged
        many.update(merged, samples)
    assert is_equal(one, many)


def test_a_range_by_channel_reduces_all_other_axes() -> None:
    x = np.random.default_rng(1).normal(size=(3, 5, 4, 2)).astype(np.float32)
    for axis in (1, -3, 3, 0):
        seen = observe("range", axis, x)
        others = tuple(i for i in range(4) if i != axis % 4)
        np.testing.assert_array_equal(seen.low, x.min(axis=others).astype(np.float64))
        np.testing.assert_array_equal(seen.high, x.max(axis=others).astype(np.float64))


def test_a_mean_by_channel_is_that_of_numpy() -> None:
    x = np.random.default_rng(2).normal(3, 1, size=(4, 5, 6)).astype(np.float32)
    seen = observe("mean", 1, x[:1], x[1:])
    np.testing.assert_allclose(seen.mean, x.astype(np.float64).mean(axis=(0, 2)), rtol=1e-12)
    assert seen.count == 4 * 6


@pytest.mark.parametrize("what", list(OBSERVERS))
@pytest.mark.parametrize(("bad", "has_nan"), [(np.nan, True), (np.inf, False), (-np.inf, False)])
def test_values_that_are_not_finite_are_flagged_and_stay_flagged(
    what: str, bad: float, has_nan: bool
) -> None:
    good, mixed = np.ones((1, 3), np.float32), np.array([[1, bad, 2]], np.float32)
    seen = observe(what, None, good, mixed, good)
    assert not seen.is_finite
    assert seen.has_nan == has_nan
    assert observe(what, None, good).is_finite
    assert not observe(what, None, good).merge(seen).is_finite


@pytest.mark.parametrize("what", list(OBSERVERS))
def test_an_empty_tensor_changes_nothing(what: str) -> None:
    seen = observe(what, None, np.zeros((0, 3), np.float32))
    assert is_equal(seen, OBSERVERS[what](None))
    assert seen.is_finite and not seen.has_nan


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int32, np.bool_])
def test_every_real_type_is_counted_as_float32_would_be(dtype: Any) -> None:
    x = np.array([[0, 1, 0, 1, 1]])
    for what in OBSERVERS:
        assert is_equal(observe(what, None, x.astype(dtype)), observe(what, None, x.astype("f4")))


def test_statistics_of_different_kinds_do_not_merge() -> None:
    with pytest.raises(OptionError, match="different axis"):
        RangeObserver(axis=1).merge(RangeObserver(axis=None))
    with pytest.raises(OptionError, match="different axis"):
        MeanObserver(axis=1).merge(MeanObserver(axis=2))
    with pytest.raises(OptionError, match="different number of positions"):
        HistogramObserver(positions=10).merge(HistogramObserver(positions=20))
    with pytest.raises(OptionError, match="whole tensor"):
        HistogramObserver(axis=1)
