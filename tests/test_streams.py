"""Forms of tensors: which is chosen, that it comes back, and that zstandard is never smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.errors import ModelError
from onnxc.numerics import entropy, symbols
from onnxc.storage import coders, streams
from onnxc.storage.coders import Coded, Head, numbers
from onnxc.storage.streams import Kind

Array = NDArray[Any]
COUNT = 1 << 15
FLOAT, HALF, BYTE = Kind(4, True), Kind(2, True), Kind()


def weights(count: int = COUNT) -> Array:
    return np.random.default_rng(0).normal(0, 0.05, count).astype(np.float32)


def pruned() -> Array:
    w = weights()
    w[np.random.default_rng(1).random(w.size) < 0.8] = 0
    return w


def two_of_four(dtype: Any) -> Array:
    w = weights().reshape(-1, 4)
    least = np.argsort(np.abs(w), axis=1)[:, :2]
    w[np.arange(len(w))[:, None], least] = 0
    return w if dtype is np.float32 else np.round(w * 600).clip(-127, 127).astype(dtype)


def indices(bits: int, count: int = COUNT) -> NDArray[np.uint8]:
    x = np.random.default_rng(2).normal(2**bits / 2, 2**bits / 7, count)
    return np.round(x).clip(0, 2**bits - 1).astype(np.uint8)


def clustered() -> Array:
    return np.sort(weights(16))[indices(4)]


def packed(bits: int, high_first: bool = False) -> Array:
    return symbols.join_fields(indices(bits), bits, COUNT * bits // 8, high_first)


CASES: dict[str, tuple[Callable[[], Array], Kind, str]] = {
    "float": (weights, FLOAT, "byte planes, rANS"),
    "half": (lambda: weights().astype(np.float16), HALF, "byte planes, rANS"),
    "float from half": (
        lambda: weights().astype(np.float16).astype(np.float32),
        FLOAT,
        "byte planes, rANS",
    ),
    "pruned": (pruned, FLOAT, "zeros apart, byte planes, rANS"),
    "2:4": (lambda: two_of_four(np.float32), FLOAT, "zeros apart, byte planes, rANS"),
    "2:4 int8": (lambda: two_of_four(np.int8), BYTE, "zeros apart, bytes, rANS"),
    "clustered": (clustered, FLOAT, "codebook, rANS"),
    "int8": (lambda: np.round(weights() * 600).astype(np.int8), BYTE, "bytes, rANS"),
    "1 bit": (lambda: packed(1), BYTE, ""),
    "2 bits": (lambda: packed(2), BYTE, "bit fields, rANS"),
    "3 bits": (lambda: packed(3), BYTE, "bit fields, rANS"),
    "4 bits": (lambda: packed(4), BYTE, "bit fields, rANS"),
    "5 bits": (lambda: packed(5), BYTE, "bit fields, rANS"),
    "6 bits": (lambda: packed(6), BYTE, "bit fields, rANS"),
    "5 bits, high first": (lambda: packed(5, True), BYTE, "bit fields, rANS"),
    "ids": (lambda: np.arange(COUNT), Kind(8), "byte planes, zstd"),
    "rows that repeat": (lambda: np.tile(weights(500), 60), FLOAT, "byte planes, zstd"),
    "noise": (lambda: np.frombuffer(np.random.default_rng(0).bytes(COUNT)), BYTE, "bytes, stored"),
    "nothing": (lambda: weights(0), FLOAT, ""),
    "odd bytes": (lambda: indices(8, 1001), FLOAT, ""),
}


def raw(array: Array) -> NDArray[np.uint8]:
    return np.frombuffer(array.tobytes(), np.uint8).copy()


def back(coded: Coded, size: int) -> NDArray[np.uint8]:
    head = Head(coded.head)
    data, used = streams.decode(head, memoryview(coded.payload), size)
    assert (used, head.at) == (len(coded.payload), len(coded.head))
    return data


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_from_the_form_that_suits_them(name: str) -> None:
    make, kind, expected = CASES[name]
    data = raw(make())
    coded, label = streams.encode(data, kind)
    np.testing.assert_array_equal(back(coded, data.size), data)
    assert label == expected or not expected
    assert coded.size <= len(zstandard.compress(data.tobytes(), 19)) + 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_packed_indices_come_within_a_percent_of_their_entropy(bits: int) -> None:
    data = packed(bits)
    coded, _ = streams.encode(data)
    bound = entropy.entropy(coders.histograms(indices(bits)))
    assert 8 * coded.size <= 1.01 * bound + 8 * 64


def test_a_mask_of_two_in_four_costs_what_its_patterns_do() -> None:
    data = raw(two_of_four(np.int8))
    coded, _ = streams.encode(data)
    w = data[data != 0]
    values = entropy.entropy(coders.histograms(w))
    assert 8 * coded.size <= 1.01 * (values + data.size / 4 * np.log2(6)) + 8 * 128


@given(
    st.binary(max_size=300),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_any_bytes_come_back(
    data: bytes, width: int, is_float: bool, channels: int, thorough: bool
) -> None:
    array = np.frombuffer(data, np.uint8)
    coded, _ = streams.encode(array, Kind(width, is_float, channels), thorough)
    assert back(coded, array.size).tobytes() == data
    assert coded.size <= len(data) + 4


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_a_constant_is_not_taken_for_a_trap(make: Callable[..., Array]) -> None:
    data = raw(make(20 << 18, np.float32))
    coded, _ = streams.encode(data, FLOAT)
    assert coded.size <= len(zstandard.compress(data.tobytes(), 19)) + 8
    assert data.size <= coders.EXPANSION * coded.size
    np.testing.assert_array_equal(back(coded, data.size), data)


def test_values_that_only_look_like_zeros_are_kept() -> None:
    w = np.zeros(4096, np.float32)
    w[::3] = -0.0
    w[::7] = np.nan
    coded, _ = streams.encode(raw(w), FLOAT)
    assert back(coded, 4 * w.size).tobytes() == w.tobytes()


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 3000))
def test_any_head_is_read_or_refused(head: bytes, payload: bytes, size: int) -> None:
    try:
        data, _ = streams.decode(Head(head), memoryview(payload), size)
    except ModelError:
        return
    assert data.size == size


@pytest.mark.parametrize("name", ["float", "pruned", "clustered", "3 bits", "ids"])
def test_a_damaged_head_is_refused_or_read_as_other_bytes(name: str) -> None:
    make, kind, _ = CASES[name]
    data = raw(make())[:4096]
    coded, _ = streams.encode(data, kind)
    rng = np.random.default_rng(0)
    for _ in range(150):
        head = bytearray(coded.head)
        head[rng.integers(len(head))] = rng.integers(256)
        try:
            found, _ = streams.decode(Head(bytes(head)), memoryview(coded.payload), data.size)
        except ModelError:
            continue
        assert found.size == data.size


def test_forms_in_forms_have_an_end() -> None:
    deep = b"".join(numbers(streams.ZEROS, 4, 10, coders.RAW, 2) for _ in range(9))
    with pytest.raises(ModelError, match="unknown form"):
        streams.decode(Head(deep), memoryview(b"\xff" * 99), 64)
