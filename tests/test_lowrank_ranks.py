"""Rules for ranks: planted ranks are found under noise, and bounds on errors are tight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics import vbmf
from onnxc.numerics.lowrank import factorize, macs, ranks
from onnxc.numerics.lowrank_ranks import Rule

Array = NDArray[Any]


def noisy(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Array:
    source = np.random.default_rng(seed)
    made = source.standard_normal((rows, rank)) @ source.standard_normal((rank, columns))
    return np.asarray(made + noise * source.standard_normal((rows, columns)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 8), st.integers(20, 60), st.integers(20, 90), st.integers(0, 99))
def test_components_above_noise_are_counted(rank: int, rows: int, columns: int, seed: int) -> None:
    V = noisy(rows, columns, rank, 0.1, seed)
    assert vbmf.rank(V) == rank
    assert vbmf.rank(V.T) == rank
    assert vbmf.rank(1e-3 * V) == rank


def test_nothing_has_no_components() -> None:
    assert vbmf.rank(np.zeros((4, 6))) == 0
    assert vbmf.rank(np.zeros((0, 6))) == 0


def test_components_below_noise_are_not() -> None:
    strong = vbmf.rank(noisy(40, 60, 6, 0.1))
    weak = vbmf.rank(noisy(40, 60, 6, 30.0))
    assert strong == 6 and weak < 6


WEIGHTS = np.random.default_rng(1).standard_normal((1, 24, 12, 3, 3))
ROWS = np.random.default_rng(2).standard_normal((400, 108)) * np.geomspace(1, 0.05, 108)
H = (ROWS.T @ ROWS / len(ROWS))[None]


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
@pytest.mark.parametrize("text", ["energy:0.9", "sqnr:9"])
def test_ranks_are_the_smallest_that_lose_no_more(method: str, text: str) -> None:
    rule = Rule.read(text)
    found = rule.ranks(method, WEIGHTS, H)
    assert found is not None
    every = ranks(method, WEIGHTS.shape)
    smaller = every[every.index(found) - 1]
    assert factorize(method, WEIGHTS, H, found).error <= rule.error
    assert factorize(method, WEIGHTS, H, smaller).error > rule.error


def test_energy_and_decibels_say_the_same() -> None:
    assert Rule.read("energy:0.9").error == pytest.approx(Rule.read("sqnr:10").error)


def test_what_saves_nothing_has_no_ranks() -> None:
    assert Rule.read("energy:0.999999").ranks("channel", WEIGHTS, H) is None


def test_vbmf_finds_the_ranks_of_a_noisy_layer() -> None:
    W = noisy(24, 108, 5, 0.1).reshape(1, 24, 12, 3, 3)
    found = Rule.read("vbmf").ranks("channel", W, None)
    assert found == (5,)
    shared = Rule.read("vbmf").ranks("channel", np.concatenate([W, 0 * W]), None)
    assert shared == (5,)


def test_ranks_keep_to_multiples_of_channels() -> None:
    W = noisy(64, 108, 5, 0.1).reshape(1, 64, 12, 3, 3)
    assert Rule.read("vbmf").ranks("channel", W, None, (), 8) == (8,)
    assert macs("channel", W.shape, (8,)) < 1


def test_vbmf_is_for_ranks_of_matrices() -> None:
    rule = Rule.read("vbmf")
    assert "matrix" in rule.why_not("cp") and rule.why_not("tucker") == ""
    assert Rule.read("sqnr:3").why_not("cp") == ""


@pytest.mark.parametrize("text", ["", "energy", "energy:1.2", "sqnr:-3", "vbmf:2", "other:1"])
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a rule for ranks is"):
        Rule.read(text)
