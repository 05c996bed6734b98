"""Bytes as streams of symbols: what is split joins to the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics import symbols

Bytes = NDArray[np.uint8]


def noise(count: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("rotate", [False, True])
def test_planes(width: int, rotate: bool) -> None:
    data = noise(999 * width)
    planes = symbols.split_planes(data, width, rotate)
    assert [plane.size for plane in planes] == [999] * width
    np.testing.assert_array_equal(symbols.join_planes(planes, rotate), data)


def test_exponents_are_in_the_top_plane() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    planes = symbols.split_planes(x.view(np.uint8), 4, True)
    exponent = np.frexp(x)[1] + 126
    np.testing.assert_array_equal(planes[3], exponent)
    np.testing.assert_array_equal(planes[0] & 1, x < 0)


@given(st.binary(max_size=200), st.integers(1, 7), st.booleans())
def test_fields(data: bytes, bits: int, high_first: bool) -> None:
    array = np.frombuffer(data, np.uint8)
    found = symbols.fields(array, bits, high_first)
    assert found.size == 8 * array.size // bits
    assert not found.size or found.max() < 1 << bits
    np.testing.assert_array_equal(found, brute_fields(array, bits, high_first))
    joined = symbols.join_fields(found, bits, array.size, high_first)
    expected = array.copy()
    if array.size and 8 % bits:
        rest = 8 * array.size - bits * found.size
        keep = 0xFF << rest if high_first else 0xFF >> rest
        expected[-1] &= keep & 0xFF
    np.testing.assert_array_equal(joined, expected)


def brute_fields(data: Bytes, bits: int, high_first: bool) -> list[int]:
    stream = "".join(f"{b:08b}" if high_first else f"{b:08b}"[::-1] for b in data.tolist())
    parts = [stream[i : i + bits] for i in range(0, len(stream) - bits + 1, bits)]
    return [int(part if high_first else part[::-1], 2) for part in parts]


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("count", [1, 2, 17, 256])
def test_a_book_of_all_values(kind: Any, count: int) -> None:
    rng = np.random.default_rng(count)
    values = np.unique(rng.integers(0, np.iinfo(kind).max, 4 * count, dtype=kind))
    book = np.sort(rng.permutation(values)[:count])
    u = book[rng.integers(0, book.size, 200_001)]
    found = symbols.find_book(u)
    assert found is not None
    np.testing.assert_array_equal(found[0], np.unique(u))
    np.testing.assert_array_equal(found[0][found[1]], u)


def test_a_book_grows_by_values_that_are_rare() -> None:
    u = np.full(300_000, 7, np.uint32)
    u[[123_457, 199_999, 299_999]] = 3, 2**32 - 1, 5
    found = symbols.find_book(u)
    assert found is not None
    assert found[0].tolist() == [3, 5, 7, 2**32 - 1]
    np.testing.assert_array_equal(found[0][found[1]], u)


def test_no_book_of_more_than_256_values() -> None:
    u = np.zeros(1 << 18, np.uint32)
    u[-257:] = np.arange(257)
    assert symbols.find_book(u) is None
    assert symbols.find_book(np.arange(1000, dtype=np.uint16)) is None


@given(st.lists(st.sampled_from([0, 0, 0, 1, 9]), max_size=50))
def test_zeros(values: list[int]) -> None:
    u = np.array(values, np.uint32)
    mask, kept = symbols.split_zeros(u)
    assert (mask.size, kept.tolist()) == (-(-u.size // 8), [v for v in values if v])
    np.testing.assert_array_equal(symbols.join_zeros(mask, kept, u.size), u)
