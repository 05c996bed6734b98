"""Drops and their intervals: each metric on outputs that are known, and the samples it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.data import Dataset, open_data
from onnxc.anytime.metric import Metric, _noise, estimated, open_metric
from onnxc.anytime.tallies import Estimate
from onnxc.errors import DataError, OptionError
from onnxc.request import input_specs
from onnxc.runtime import Runtime

Parse = Callable[..., onnx.ModelProto]
RUNTIME = Runtime()
SCALE = "m (float[N,5] x) => (float[N,5] y) { y = Mul(x, s) }"
SHIFT = "m (float[N,5] x) => (float[N,5] y) { y = Add(x, s) }"
TOKENS = """m (int64[N,T] x) => (float[N,T,4] y) { y = Gather(w, x) }"""


def _pair(
    parse: Parse, tmp_path: Path, text: str, s: Any, data: dict[str, Any]
) -> tuple[bytes, bytes, Dataset]:
    """The identity, a disturbed model, and data."""
    plain = parse(text, s=np.asarray(0 if text == SHIFT else 1, np.float32))
    path = tmp_path / "plain.onnx"
    onnx.save(plain, path)
    other = parse(text, s=np.asarray(s, np.float32))
    dataset = open_data(data, input_specs(path))
    return plain.SerializeToString(), other.SerializeToString(), dataset


def _scores(n: int = 400) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = (2 * rng.standard_normal((n, 5))).astype(np.float32)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return {"x": x, "labels": np.array([rng.choice(5, p=row) for row in p])}


def test_noise_is_in_percent_of_the_power(parse: Parse, tmp_path: Path) -> None:
    first, second, data = _pair(parse, tmp_path, SCALE, 0.9, {"x": _scores()["x"]})
    found = estimated(Metric("sqnr"), first, second, data, RUNTIME)
    assert found.drop == pytest.approx(1.0, rel=1e-4)  # 0.1² of the power
    assert found.high == pytest.approx(found.low, abs=1e-4) and found.samples == 400


def test_top1_is_that_of_counting(parse: Parse, tmp_path: Path) -> None:
    data = _scores(4000)
    shift = [0.5, -0.5, 0.3, -0.2, 0.0]
    first, second, samples = _pair(parse, tmp_path, SHIFT, shift, data)
    metric = open_metric(None, first, samples, RUNTIME)
    assert metric.name == "top1" and 0.9 < metric.T < 1.1
    found = estimated(metric, first, second, samples, RUNTIME)
    x, labels = data["x"], data["labels"]
    counted = (x.argmax(1) == labels).mean() - ((x + shift).argmax(1) == labels).mean()
    assert found.drop == pytest.approx(100 * counted, abs=0.6)
    assert found.low < found.drop < found.high


def test_agreement_without_labels(parse: Parse, tmp_path: Path) -> None:
    x = _scores(4000)["x"]
    first, second, samples = _pair(parse, tmp_path, SHIFT, [0.5, -0.5, 0.3, -0.2, 0.0], {"x": x})
    metric = open_metric(None, first, samples, RUNTIME)
    assert metric.name == "agreement"
    found = estimated(metric, first, second, samples, RUNTIME)
    changed = (x.argmax(1) != (x + np.array([0.5, -0.5, 0.3, -0.2, 0.0])).argmax(1)).mean()
    assert found.drop == pytest.approx(100 * changed, abs=1.5)


def test_gross_damage_is_counted(parse: Parse, tmp_path: Path) -> None:
    data = _scores(400)
    first, second, samples = _pair(parse, tmp_path, SCALE, -1.0, data)
    found = estimated(open_metric("top1", first, samples, RUNTIME), first, second, samples, RUNTIME)
    x, labels = data["x"], data["labels"]
    counted = (x.argmax(1) == labels).mean() - (x.argmin(1) == labels).mean()
    assert found.drop == pytest.approx(100 * counted, abs=6)


def test_perplexity_grows_in_percent(parse: Parse, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 4)).astype(np.float32)
    onnx.save(parse(TOKENS, w=w), tmp_path / "t.onnx")
    tokens = {"x": rng.integers(0, 4, (50, 12))}
    samples = open_data(tokens, input_specs(tmp_path / "t.onnx"))
    first = (tmp_path / "t.onnx").read_bytes()
    second = parse(TOKENS, w=w + 0.1 * rng.standard_normal((4, 4)).astype(np.float32))
    metric = open_metric(None, first, samples, RUNTIME)
    assert metric.name == "perplexity"
    found = estimated(metric, first, second.SerializeToString(), samples, RUNTIME)

    def loss(table: Any) -> float:
        z = table[tokens["x"][:, :-1]]
        logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -float(np.take_along_axis(logs, tokens["x"][:, 1:, None], -1).mean())

    other = onnx.numpy_helper.to_array(second.graph.initializer[0])
    assert found.drop == pytest.approx(100 * math.expm1(loss(other) - loss(w)), abs=0.05)


def test_few_samples_are_enough_far_from_the_bound(parse: Parse, tmp_path: Path) -> None:
    first, second, samples = _pair(parse, tmp_path, SCALE, 0.9, {"x": _scores()["x"]})
    metric = Metric("sqnr")
    assert estimated(metric, first, second, samples, RUNTIME, bound=3.0).samples == 32
    assert estimated(metric, first, second, samples, RUNTIME, bound=0.3).samples == 32
    near = Metric("agreement", "y")
    _, noisy, _ = _pair(parse, tmp_path, SHIFT, [0.5, -0.5, 0.3, -0.2, 0], {"x": _scores()["x"]})
    drop = estimated(near, first, noisy, samples, RUNTIME).drop
    assert estimated(near, first, noisy, samples, RUNTIME, bound=drop).samples > 32


def test_a_function_of_all_outputs(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_.py").write_text(
        "def right(outputs, labels):\n    return 100 * (outputs['y'].argmax(1) == labels).mean()\n"
        "def broken(outputs, labels):\n    return outputs['z']\n"
    )
    monkeypatch.chdir(tmp_path)
    data = _scores(400)
    first, second, samples = _pair(parse, tmp_path, SHIFT, [2, 0, 0, 0, -2], data)
    metric = open_metric("mine_:right", first, samples, RUNTIME)
    found = estimated(metric, first, second, samples, RUNTIME)
    x, y = data["x"], data["labels"]
    lost = 100 * ((x.argmax(1) == y) * 1.0 - ((x + np.array([2, 0, 0, 0, -2])).argmax(1) == y))
    assert found.drop == pytest.approx(lost.mean(), abs=1e-9)
    error = lost.std() / 20
    assert found.high - found.drop == pytest.approx(1.2816 * error, rel=0.4)
    with pytest.raises(DataError, match="mine_:broken fails with KeyError"):
        open_metric("mine_:broken", first, samples, RUNTIME)


def test_what_does_not_fit_is_told(parse: Parse, tmp_path: Path) -> None:
    first, _, samples = _pair(parse, tmp_path, SCALE, 1, {"x": _scores()["x"]})
    with pytest.raises(OptionError, match="needs labels"):
        open_metric("top1", first, samples, RUNTIME)
    onnx.save(parse("m (float[N] x) => (float[N] y) { y = Relu(x) }"), tmp_path / "flat.onnx")
    flat = open_data({"x": np.ones(9, np.float32)}, input_specs(tmp_path / "flat.onnx"))
    with pytest.raises(OptionError, match="needs a model with classes"):
        open_metric("agreement", (tmp_path / "flat.onnx").read_bytes(), flat, RUNTIME)
    assert open_metric(None, (tmp_path / "flat.onnx").read_bytes(), flat, RUNTIME).name == "sqnr"


def test_intervals_narrow_with_samples() -> None:
    rng = np.random.default_rng(0)
    few, many = (Estimate.of(rng.standard_normal(n)) for n in (25, 2500))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.3)
    assert Estimate.of(np.ones(1)).high == math.inf


def test_more_samples_of_the_original_narrow_the_interval(parse: Parse, tmp_path: Path) -> None:
    data, shift = _scores(4000), [0.5, -0.5, 0.3, -0.2, 0.0]
    first, second, samples = _pair(parse, tmp_path, SHIFT, shift, data)
    few, others = samples.subset(slice(0, 40)), samples.subset(slice(40, 400))
    alone = open_metric("top1", first, few, RUNTIME)
    beside = open_metric("top1", first, few, RUNTIME, others)
    found = [estimated(m, first, second, few, RUNTIME) for m in (alone, beside)]
    assert found[1].high - found[1].low < 0.6 * (found[0].high - found[0].low)
    whole = estimated(alone, first, second, samples, RUNTIME)
    assert found[1].low - 0.5 < whole.drop < found[1].high + 0.5


def test_an_output_without_an_axis_of_samples_counts_for_all() -> None:
    y, state = np.ones((3, 4), np.float32), np.ones((2, 3, 5), np.float32)
    feed, axes = {"s": state, "x": y}, {"s": 1, "x": 0}
    found = _noise({"y": y, "s": state}, {"y": y, "s": 1.1 * state}, None, feed, axes)
    np.testing.assert_allclose(found, [0.5] * 3, rtol=1e-5)
