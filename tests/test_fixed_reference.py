"""Exact numbers of integers and shifts, against fractions and the runtime's own pools."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from texts import RUNTIME, bind, outputs

from onnxc.numerics import fixed_reference as reference
from onnxc.numerics.affine import Grid
from onnxc.numerics.fixed_reference import ONE, Number, Pool

Array = NDArray[Any]
integers = st.integers(-(2**30), 2**30)
fractions = st.integers(-3, 20)


def number(a: Any, n: int, d: int = 1) -> Number:
    return Number(np.atleast_1d(np.int64(a)), np.asarray(n, np.int64), np.asarray(d, np.int64))


def exact(x: Number) -> list[Fraction]:
    n, d = (np.broadcast_to(part, x.a.shape).reshape(-1) for part in (x.n, x.d))
    parts = zip(x.a.reshape(-1).tolist(), n.tolist(), d.tolist(), strict=True)
    return [Fraction(a) / Fraction(2) ** k / c for a, k, c in parts]


@given(a=integers, n=fractions, d=st.integers(1, 200), m=fractions, signed=st.booleans())
def test_a_quantizer_rounds_fractions_to_even_and_saturates(
    a: int, n: int, d: int, m: int, signed: bool
) -> None:
    grid = Grid(8, signed)
    x = number(a, n, d)
    found = reference.quantize(x, np.float32(2.0**-m), grid)
    wanted = round(exact(x)[0] * Fraction(2) ** m)
    assert found.tolist() == [min(max(wanted, grid.low), grid.high)]
    assert found.dtype == grid.dtype


@given(a=integers, n=fractions, b=integers, m=fractions)
def test_sums_are_exact(a: int, n: int, b: int, m: int) -> None:
    x, y = number(a, n), number(b, m)
    assert exact(reference.add(x, y))[0] == exact(x)[0] + exact(y)[0]
    both = reference.concatenate([x, y], 0)
    assert exact(both) == [*exact(x), *exact(y)]
    assert both.width == int(np.abs(both.a).max()).bit_length() + 1


@given(a=integers, n=fractions, high=st.sampled_from([6.0, 0.75, 1 / 3, np.inf]))
def test_bounds_are_exact(a: int, n: int, high: float) -> None:
    high = float(np.float32(high))
    found = exact(reference.clip(number(a, n), -1.5, high))[0]
    wanted = max(exact(number(a, n))[0], Fraction(-3, 2))
    assert found == (wanted if np.isinf(high) else min(wanted, Fraction(high)))
    assert exact(reference.relu(number(a, n)))[0] == max(exact(number(a, n))[0], 0)


POOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("kernel_shape: ints = [2,2], strides: ints = [2,2]", {"strides": (2, 2)}),
    "padded": (
        "kernel_shape: ints = [2,2], pads: ints = [1,0,1,1], count_include_pad: int = 1",
        {"pads": (1, 0, 1, 1), "counts_pads": True},
    ),
    "not counted": (
        "kernel_shape: ints = [2,2], strides: ints = [2,1], pads: ints = [1,1,0,1]",
        {"strides": (2, 1), "pads": (1, 1, 0, 1)},
    ),
    "ceiled": (
        "kernel_shape: ints = [2,2], strides: ints = [3,3], ceil_mode: int = 1",
        {"strides": (3, 3), "is_ceiled": True},
    ),
    "ceiled and padded": (
        "kernel_shape: ints = [2,2], strides: ints = [2,3], pads: ints = [1,1,1,1], "
        "ceil_mode: int = 1, count_include_pad: int = 1",
        {"strides": (2, 3), "pads": (1,) * 4, "is_ceiled": True, "counts_pads": True},
    ),
}


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools_are_those_of_the_runtime(kind: str, op: str) -> None:
    text, settings = POOLS[kind]
    if (op, kind) == ("AveragePool", "padded") and RUNTIME < (1, 25):
        pytest.skip("this ONNX Runtime does not count the padding behind the last row")
    if op == "MaxPool":
        text = text.replace(", count_include_pad: int = 1", "")
    q = np.random.default_rng(0).integers(-99, 99, (2, 3, 6, 7))
    graph = f"g (float[2,3,6,7] x) => (float[N,3,H,V] y) {{ y = {op} <{text}> (x) }}"
    expected = outputs(bind(graph, opset=19), {"x": np.float32(q) / 8})["y"]
    usual = {"kernel": (2, 2), "strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1)}
    pool = Pool(**{**usual, **settings})
    make = reference.max_pool if op == "MaxPool" else reference.mean_pool
    found = make(Number(q, np.asarray(3), ONE), pool)
    np.testing.assert_allclose(found.value, expected, rtol=1e-6)
    if op == "MaxPool":
        np.testing.assert_array_equal(found.value, expected)


def test_what_is_not_quantized_is_not_multiplied() -> None:
    w = Number(np.ones((2, 1), np.int64), np.asarray(0), ONE)
    with pytest.raises(ValueError, match="not behind a quantizer"):
        reference.multiply(number([[1, 2]], 3, 7), w, None)
    with pytest.raises(ValueError, match="not quantized before it is added"):
        reference.add(number(1, 0, 3), number(1, 0))
    with pytest.raises(ValueError, match="not at the scale of its products"):
        reference.multiply(number([[1, 2]], 3), w, number([5], 4))
    with pytest.raises(ValueError, match="power of two"):
        Number.of(np.int8([1]), np.float32(0.3))
    with pytest.raises(ValueError, match="more digits"):
        Number.exactly(np.float64([1e15, 1e-15]))
