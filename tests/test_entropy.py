"""Models of histograms: their weights, what they cost, and which knots are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxc.numerics import entropy

LAPLACE = np.exp(-np.abs(np.arange(255) - 127) / 9.0)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    p = LAPLACE / LAPLACE.sum()
    return np.random.default_rng(seed).multinomial(count, p)[None]


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=40),
    st.sampled_from(entropy.STEPS),
    st.integers(0, 31),
)
def test_weights_are_the_powers_that_the_docstring_says(
    knots: list[int], step: int, less: int
) -> None:
    size = max((len(knots) - 1) * step + 1 - less, 1)
    count = entropy.knot_count(size, step)
    q = np.array(knots[:count] or [0], np.uint8)[None]
    if q.shape[1] < count:
        return
    w = entropy.weights(q, step, size)
    L = np.interp(np.arange(size), step * np.arange(count), q[0])
    expected = np.maximum(np.floor(2.0 ** (30 - L / 8)), 1)
    np.testing.assert_allclose(w[0], expected, rtol=1e-7, atol=1)


def test_weights_never_change() -> None:
    """A package is read with them: other weights are another format."""
    q = np.arange(256, dtype=np.uint8)[None]
    sums = [int(entropy.weights(q, step, 255 * step + 1).sum()) for step in entropy.STEPS]
    assert sums == [12937278603, 25326059020, 50109432802, 99679087443, 198819850370, 397102102944]


@pytest.mark.parametrize("count", [300, 3000, 30_000, 3_000_000])
def test_a_model_costs_little_more_than_the_law_it_is_of(count: int) -> None:
    counts = drawn(count)
    found = entropy.fit(counts)
    law = LAPLACE / LAPLACE.sum()
    ideal = -(counts * np.log2(law)).sum()
    assert found.bits <= ideal + 8 * 64 + 0.002 * count
    if count >= 30_000:
        assert found.bits <= 1.01 * entropy.entropy(counts)


def test_few_symbols_get_few_knots() -> None:
    steps = [entropy.fit(drawn(count)).step for count in (200, 5000, 5_000_000)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] <= 2


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=64).filter(any))
def test_no_model_is_below_the_entropy(counts: list[int]) -> None:
    c = np.array(counts)[None]
    assert entropy.fit(c.astype(float)).bits >= entropy.entropy(c) - 1e-6


def test_channels_have_models_of_their_own() -> None:
    counts = np.stack([drawn(50_000)[0], np.roll(drawn(50_000)[0], 90)]).astype(float)
    apart, pooled = entropy.fit(counts), entropy.fit(counts.sum(axis=0, keepdims=True))
    assert apart.bits < 0.9 * pooled.bits
    one = entropy.fit(counts[:1])
    assert apart.bits == pytest.approx(2 * one.bits, rel=0.01)
