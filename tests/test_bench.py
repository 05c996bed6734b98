"""Timing in turn: the order of the runs, the statistics, and the ratio with its spread."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxc import bench
from onnxc.bench import Latency, speedup, time_interleaved
from onnxc.errors import ModelError, OptionError

SMALL = """
<ir_version: 8, opset_import: ["" : 13]>
small (float[8, 8] x) => (float[8, 8] y) { y = Relu(x) }
"""
LARGE = """
<ir_version: 8, opset_import: ["" : 13]>
large (float[N, 384] x) => (float[N, N] y) { t = Transpose(x)  y = MatMul(x, t) }
"""


def serialized(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(text).SerializeToString())


FEED = {"x": np.array(0, np.float32)}


class Recorder:
    """Stands for a session: notes each run under its name."""

    def __init__(self, name: str, log: list[tuple[str, float]]) -> None:
        self.name, self.log = name, log

    def get_outputs(self) -> list[Any]:
        return []

    def run(self, names: object, feed: dict[str, np.ndarray]) -> list[Any]:
        self.log.append((self.name, float(feed["x"])))
        return []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    runs: list[tuple[str, float]] = []
    monkeypatch.setattr(bench, "open_whole", lambda model, runtime: Recorder(str(model), runs))
    monkeypatch.setattr(bench, "interruptions", lambda: 0)
    return runs


def test_models_take_turns(log: list[tuple[str, float]]) -> None:
    time_interleaved({"a": "A", "b": "B"}, FEED, repeats=4)
    assert "".join(name for name, _ in log) == "AB" * (bench.WARM_UP + 4)


def test_both_models_see_the_same_feed_each_round(log: list[tuple[str, float]]) -> None:
    time_interleaved(
        {"a": "A", "b": "B"}, [{"x": np.array(i, np.float32)} for i in range(2)], repeats=3
    )
    timed = log[2 * bench.WARM_UP :]
    assert [value for _, value in timed] == [0, 0, 1, 1, 0, 0]


def test_warm_up_is_not_counted(log: list[tuple[str, float]]) -> None:
    latency = time_interleaved({"a": "A"}, FEED, repeats=5)["a"]
    assert len(latency.samples) == 5
    assert len(log) == 5 + bench.WARM_UP


def test_least_time_adds_rounds(log: list[tuple[str, float]]) -> None:
    few = time_interleaved({"a": "A"}, FEED, repeats=2)["a"]
    many = time_interleaved({"a": "A"}, FEED, repeats=2, min_time=0.02)["a"]
    assert len(few.samples) == 2
    assert len(many.samples) > 2


def test_a_slow_model_has_fewer_rounds(log: list[tuple[str, float]]) -> None:
    few = time_interleaved({"a": "A"}, FEED, repeats=1000, max_time=0.0)["a"]
    assert len(few.samples) == bench.LEAST


@pytest.mark.parametrize(
    ("calm", "rounds", "seconds", "over"),
    [
        (39, 39, 3.0, False),
        (40, 40, 0.5, False),
        (40, 40, 3.0, True),
        (39, 199, 3.0, False),
        (0, 200, 3.0, True),
        (9, 9, 9.0, False),
        (8, 8, 90.0, False),
        (0, 9, 11.0, True),
    ],
)
def test_timing_ends_by_rounds_and_by_time(
    calm: int, rounds: int, seconds: float, over: bool
) -> None:
    length = bench.Length(repeats=40, min_time=1.0, max_time=10.0)
    assert length.is_over(calm, rounds, seconds) is over


@pytest.mark.parametrize(("every", "counted"), [(3, 20), (1, 100)])
def test_interrupted_rounds_do_not_count_where_enough_are_left(
    log: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch, every: int, counted: int
) -> None:
    """One round in `every` is interrupted; the model then takes 50 ms."""
    states = itertools.count()
    monkeypatch.setattr(bench, "interruptions", lambda: (next(states) + 1) // (2 * every))
    slow = itertools.cycle([0.001] * (every - 1) + [0.05])
    monkeypatch.setattr(bench, "_time", lambda opened, feed: next(slow))
    found = time_interleaved({"a": "A"}, FEED, repeats=20)["a"]
    assert len(found.samples) == counted
    assert found.samples[0] == (50.0 if every == 1 else 1.0)


def test_percentiles_are_in_milliseconds() -> None:
    latency = Latency.of([0.001 * k for k in range(1, 12)])
    assert latency.p50 == pytest.approx(6.0, abs=1e-9)
    assert latency.p10 == pytest.approx(2.0, abs=1e-9)
    assert latency.p90 == pytest.approx(10.0, abs=1e-9)
    assert latency.spread == pytest.approx(5.0 / 6.0, abs=1e-9)


def test_paired_ratio_cancels_drift() -> None:
    drift = np.linspace(1.0, 3.0, 40)
    ratio = speedup(Latency.of(0.002 * drift), Latency.of(0.001 * drift))
    assert ratio.median == pytest.approx(2.0, abs=1e-9)
    assert ratio.high - ratio.low == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("seconds", "slower"), [(0.002, True), (0.0005, False)])
def test_slower_is_beyond_the_spread(seconds: float, slower: bool) -> None:
    assert speedup(Latency.of([0.001] * 9), Latency.of([seconds] * 9)).is_slower is slower


def test_a_ratio_inside_its_spread_is_not_slower() -> None:
    ratio = speedup(Latency.of([0.001] * 4), Latency.of([0.0008, 0.0009, 0.0012, 0.0013]))
    assert ratio.median < 1.0
    assert not ratio.is_slower


def test_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(OptionError, match="same rounds"):
        speedup(Latency.of([0.001] * 3), Latency.of([0.001] * 4))


def test_more_work_takes_longer() -> None:
    feed = {"x": np.ones((8, 8), np.float32)}
    large = {"x": np.ones((512, 384), np.float32)}
    small_ms = time_interleaved({"m": serialized(SMALL)}, feed, repeats=9)["m"].p50
    large_ms = time_interleaved({"m": serialized(LARGE)}, large, repeats=9)["m"].p50
    assert 0 < small_ms < large_ms


def test_a_model_that_cannot_run_is_named_by_a_sentence() -> None:
    with pytest.raises(ModelError, match="cannot run"):
        time_interleaved({"m": serialized(SMALL)}, {"x": np.ones((3, 3), np.float32)})


def test_no_model_is_an_error() -> None:
    with pytest.raises(OptionError, match="at least one model"):
        time_interleaved({}, FEED)
