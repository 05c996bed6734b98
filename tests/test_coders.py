"""Coders of streams: what goes in comes out, in as few bytes as its entropy allows."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.errors import ModelError, OptionError
from onnxc.numerics import entropy
from onnxc.storage import coders
from onnxc.storage.coders import Coded, Head, numbers

Bytes = NDArray[np.uint8]


def skewed(count: int, symbols: int = 16, seed: int = 0) -> Bytes:
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(symbols / 2, symbols / 6, count))
    return x.clip(0, symbols - 1).astype(np.uint8)


def back(coded: Coded, size: int) -> Bytes:
    head = Head(coded.head)
    data, used = coders.decode(head, memoryview(coded.payload), size)
    assert (used, head.at) == (len(coded.payload), len(coded.head))
    return data


def coder_of(coded: Coded) -> str:
    return coders.NAMES[coded.head[0]]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=8))
def test_numbers(values: list[int]) -> None:
    head = Head(numbers(*values))
    assert [head.number() for _ in values] == values
    with pytest.raises(ModelError, match="too short"):
        head.number()


def test_a_number_has_an_end() -> None:
    with pytest.raises(ModelError, match="too large"):
        Head(b"\xff" * 20).number()


@given(st.binary(max_size=400), st.sampled_from([1, 2, 3]), st.booleans())
def test_any_stream_comes_back(data: bytes, channels: int, thorough: bool) -> None:
    stream = np.frombuffer(data, np.uint8)
    coded = coders.encode(stream, channels, thorough)
    assert back(coded, stream.size).tobytes() == data
    assert coded.size <= stream.size + 4


@pytest.mark.parametrize("symbols", [2, 16, 255])
def test_rans_comes_within_a_percent_of_the_entropy(symbols: int) -> None:
    data = skewed(1 << 20, symbols)
    coded = coders.encode(data)
    assert coder_of(coded) == "rANS"
    assert 8 * coded.size <= 1.01 * entropy.entropy(coders.histograms(data))
    np.testing.assert_array_equal(back(coded, data.size), data)


def test_channels_that_differ_get_models_of_their_own() -> None:
    parts = [skewed(4096, 8, seed) + np.uint8(8 * seed) for seed in range(8)]
    data = np.concatenate(parts)
    apart, pooled = coders.encode(data, 8), coders.encode(data)
    assert apart.size < 0.85 * pooled.size
    np.testing.assert_array_equal(back(apart, data.size), data)
    counts = coders.histograms(data, 8)
    assert counts.shape == (8, 256)
    assert 8 * len(apart.payload) <= 1.01 * entropy.entropy(counts) + 64


def test_channels_that_are_alike_share_a_model() -> None:
    data = skewed(1 << 15)
    assert coders.encode(data, 64).size <= coders.encode(data).size + 1


def test_repeats_go_to_zstandard() -> None:
    data = np.tile(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8), 40)
    for coded in (coders.encode(data), coders.general(data, data.size)):
        assert coded is not None and coder_of(coded) == "zstd"
        np.testing.assert_array_equal(back(coded, data.size), data)


def test_symbols_that_drift_go_to_huffman_codes_of_blocks() -> None:
    rng = np.random.default_rng(0)
    data = np.concatenate([rng.permutation(np.arange(256))[skewed(1 << 16)] for _ in range(6)])
    coded = coders.general(data.astype(np.uint8), data.size, thorough=True)
    assert coded is not None
    np.testing.assert_array_equal(back(coded, data.size), data)
    huffman = coders.huffman(data.astype(np.uint8))
    np.testing.assert_array_equal(back(huffman, data.size), data)
    assert huffman.size < coders.rans(data.astype(np.uint8), model(data.astype(np.uint8))).size


def model(data: Bytes) -> coders.Model:
    found = coders.model_of(coders.histograms(data), 9.0 * data.size)
    assert found is not None
    return found


def test_noise_is_stored() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 17, dtype=np.uint8)
    assert coder_of(coders.encode(data)) == "stored"
    assert coders.general(data, data.size) is None


def test_large_streams_are_judged_without_running_zstandard_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = skewed(1 << 21, 200)
    tried: list[int] = []
    compress = zstandard.compress

    def watched(part: Any, level: int = 3) -> bytes:
        tried.append(len(part) if level == coders.LEVEL else 0)
        return bytes(compress(part, level))

    monkeypatch.setattr(zstandard, "compress", watched)
    assert coders.general(data, coders.encode(data).size) is None
    assert sum(tried) <= data.size // 256


def test_the_format_of_rans_is_fixed() -> None:
    """Packages outlive versions of constriction: these bytes must decode for ever."""
    data = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3] * 4, np.uint8)
    coded = coders.rans(data, model(data))
    assert coded.head.hex() == HEAD
    assert coded.payload.hex() == PAYLOAD
    fixed = Coded(bytes.fromhex(HEAD), bytes.fromhex(PAYLOAD))
    np.testing.assert_array_equal(back(fixed, data.size), data)


def test_the_format_of_rans_of_long_rows_is_fixed() -> None:
    data = (np.arange(6000) ** 2 % 7).astype(np.uint8)
    for symbols, expected in ((2, SUMS[0]), (4, SUMS[1]), (7, SUMS[2])):
        few = np.minimum(data, symbols - 1).astype(np.uint8)
        coded = coders.rans(few, model(few))
        assert zlib.crc32(coded.head + coded.payload) == expected
        np.testing.assert_array_equal(back(coded, few.size), few)


SUMS = (2041516749, 2833177786, 200646866)
HEAD = "031c010108080000"
PAYLOAD = "95366ed0d6a576420b0effd1ae3f7f674947840f679142ec8a801a30"


@pytest.mark.parametrize("coder", ["zstd", "huffman", "rans"])
def test_a_damaged_payload_is_an_error_or_other_bytes_of_the_same_length(coder: str) -> None:
    data = skewed(2000)
    coded = {
        "zstd": coders.zstd,
        "huffman": coders.huffman,
        "rans": lambda d: coders.rans(d, model(d)),
    }[coder](data)
    rng = np.random.default_rng(0)
    for _ in range(200):
        payload = bytearray(coded.payload)
        payload[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
        try:
            found, _ = coders.decode(Head(coded.head), memoryview(bytes(payload)), data.size)
        except ModelError:
            continue
        assert found.size == data.size


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 5000))
def test_any_head_is_read_or_refused(head: bytes, payload: bytes, size: int) -> None:
    try:
        data, _ = coders.decode(Head(head), memoryview(payload), size)
    except ModelError:
        return
    assert data.size == size


@given(
    st.tuples(st.integers(0, 5), st.integers(0, 300), st.integers(0, 300), st.integers(0, 40)),
    st.binary(max_size=60),
    st.integers(0, 10).map(lambda n: 4 * n),
)
def test_any_model_is_read_or_refused(
    told: tuple[int, int, int, int], knots: bytes, length: int
) -> None:
    head = numbers(coders.RANS, length, *told) + knots
    try:
        data, _ = coders.decode(Head(head), memoryview(b"\x5a" * length), 600)
    except ModelError:
        return
    assert data.size == 600


def test_a_stream_that_declares_another_length_is_refused() -> None:
    coded = coders.zstd(skewed(1000))
    for size in (999, 1001, 1 << 40):
        with pytest.raises(ModelError, match="another length"):
            coders.decode(Head(coded.head), memoryview(coded.payload), size)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(OptionError, match=r'pip install "onnxc\[pack\]"'):
        coders.encode(skewed(100))
