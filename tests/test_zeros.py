"""Zeros counted, and what a file that codes them could save."""

from __future__ import annotations

import numpy as np
import pytest
from texts import bind, normal

from onnxc.graph import load, size
from onnxc.zeros import count_zeros, entropy


def test_entropy_of_a_coin_and_of_certainty() -> None:
    assert [entropy(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0, 1, 0], abs=1e-12)
    assert entropy(0.11) == pytest.approx(0.5, abs=0.001)


def test_weights_are_counted_once_and_only_those_that_multiply() -> None:
    W = normal(16, 16)
    W[:, 4:] = 0
    proto = bind(
        """g (float[1,16] x, float[16,16] W, float[16] b, float[1,16] z) => (float[1,16] y) {
        h = MatMul (x, W)
        i = MatMul (h, W)
        j = Add (i, b)
        y = Add (j, z) }""",
        W=W,
        b=np.zeros(16, np.float32),
        z=np.zeros((1, 16), np.float32),
    )
    model = load(proto)
    found = count_zeros(model)
    assert (found.weights, found.zeros, found.share) == (256, 192, 0.75)
    assert found.bits == pytest.approx(entropy(0.75), abs=1e-9)
    saved = 4 * 192 - round(256 * entropy(0.75) / 8)
    assert found.coded == size(model) - saved


def test_without_zeros_nothing_is_saved() -> None:
    proto = bind(
        "g (float[1,4] x, float[4,4] W) => (float[1,4] y) { y = MatMul (x, W) }", W=normal(4, 4)
    )
    model = load(proto)
    found = count_zeros(model)
    assert (found.zeros, found.bits, found.coded) == (0, 0.0, size(model))
