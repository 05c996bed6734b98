"""What opening a model takes, measured in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from texts import bind

from onnxc.opening import STATUS, openings

SIZE = 24 << 20  # bytes of the weight


@pytest.fixture(scope="module")
def large(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("opening") / "large.onnx"
    side = int((SIZE / 4) ** 0.5)
    weight = np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)
    text = f"g (float[1,{side}] x, float[{side},{side}] W) => (float[1,{side}] y)"
    onnx.save(bind(text + " { y = MatMul (x, W) }", W=weight), path)
    return path


def test_weights_take_memory_and_time(large: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    onnx.save(bind("g (float[1,4] x) => (float[1,4] y) { y = Relu (x) }"), small)
    one, other = openings((large, small))
    assert one is not None and other is not None
    assert one.ms > other.ms > 0
    if STATUS.exists():
        assert one.memory is not None and other.memory is not None
        assert one.memory > other.memory + 0.9 * SIZE


def test_what_can_not_be_opened_is_not_known(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert openings((broken, tmp_path / "missing.onnx")) == [None, None]
