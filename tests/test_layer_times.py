"""Times of layers: kept by operator, shapes and types, across models and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxc import layer_times
from onnxc.graph import Model, load
from onnxc.layer_times import LayerTimes, kept, key_of
from onnxc.runtime import Runtime
from onnxc.shapes import infer

Parse = Callable[..., onnx.ModelProto]
FEED = {"x": np.ones((1, 4, 6, 6), np.float32)}
ONE = "m (float[1,4,6,6] x) => (float[1,4,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
TWO = """m (float[1,4,6,6] x) => (float[1,4,6,6] y) {
  a = Conv<pads=[1,1,1,1]>(x, w)
  y = Relu(a)
}"""


def _model(parse: Parse, text: str, name: str) -> Model:
    model = load(parse(text, w=np.ones((4, 4, 3, 3), np.float32)))
    for number, node in enumerate(model.graph.nodes):
        node.name = f"{name}{number}"
    infer(model, FEED)
    return model


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first nodes of models that were profiled; each node takes 2 ms, then 4, then 8."""
    seen: list[str] = []

    def times(model: Model, feed: Any, runtime: Runtime) -> dict[str, float]:
        seen.append(model.graph.nodes[0].name)
        return {node.name: 2.0 ** len(seen) for node in model.graph.nodes}

    monkeypatch.setattr(layer_times, "node_times", times)
    return seen


def test_a_layer_of_another_name_is_known(parse: Parse, profiled: list[str]) -> None:
    table = LayerTimes()
    assert table.of(_model(parse, ONE, "a"), FEED) == {"a0": 2.0}
    assert table.of(_model(parse, ONE, "b"), FEED) == {"b0": 2.0}
    assert profiled == ["a0"]


def test_new_times_are_scaled_by_the_known_ones(parse: Parse, profiled: list[str]) -> None:
    table = LayerTimes()
    table.of(_model(parse, ONE, "a"), FEED)
    model = _model(parse, TWO, "b")
    table.of(model, FEED)  # all takes twice as long as before
    assert [table.known[key_of(node)] for node in model.graph.nodes] == [2.0, 2.0]


def test_the_table_is_kept_for_a_machine_and_runtime(
    parse: Parse, profiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXC_CACHE", str(tmp_path / "cache"))
    kept("x86", Runtime()).of(_model(parse, ONE, "a"), FEED)
    assert kept("x86", Runtime()).of(_model(parse, ONE, "b"), FEED) == {"b0": 2.0}
    assert kept("x86", Runtime(threads=2)).known == {} and kept("arm64", Runtime()).known == {}
    next((tmp_path / "cache").iterdir()).write_text("{broken")
    assert kept("x86", Runtime()).known == {}


def test_a_folder_that_cannot_be_written_is_no_fault(
    parse: Parse, profiled: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    table = LayerTimes(tmp_path / "file" / "times.json")
    assert table.of(_model(parse, ONE, "a"), FEED) == {"a0": 2.0}
