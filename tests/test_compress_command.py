"""`onnxc compress` on real files: the whole way, recipes, what is refused, and a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxc
from calib.cluster import connected
from onnxc import cli, graph, recipe
from onnxc.anytime import searched
from onnxc.anytime.journal import place
from onnxc.anytime.moves import ladders
from onnxc.files import alone
from onnxc.runtime import run, session
from onnxc.search import Builder
from onnxc.storage import package

Parse = Callable[..., onnx.ModelProto]

TEXT = """m (float[N,8,8,8] x) => (float[N,10] y) {
  a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
  b = Relu(a)
  c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(b, w1, b1)
  d = Relu(c)
  e = GlobalAveragePool(d)
  f = Flatten(e)
  y = Gemm<transB=1>(f, w2, b2)
}"""


@pytest.fixture
def files(parse: Parse, tmp_path: Path) -> tuple[Path, Path]:
    """A small network with classes, and samples with its own decisions as labels."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        return (spread * rng.standard_normal(shape)).astype(np.float32)

    given = {"w0": weights(16, 8, 3, 3), "w1": weights(24, 16, 3, 3), "w2": 9 * weights(10, 24)}
    given |= {f"b{i}": np.zeros(n, np.float32) for i, n in enumerate((16, 24, 10))}
    onnx.save(parse(TEXT, **given), tmp_path / "net.onnx")
    x = rng.standard_normal((120, 8, 8, 8)).astype(np.float32)
    y = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})[0]
    np.savez(tmp_path / "data.npz", x=x, labels=y.argmax(1).astype(np.int64))
    return tmp_path / "net.onnx", tmp_path / "data.npz"


def _arguments(files: tuple[Path, Path], output: Path, *more: Any) -> list[str]:
    model, data = files
    return ["compress", str(model), "--data", str(data), "-o", str(output), *map(str, more)]


def test_the_smallest_file_under_a_bound(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small.onnxz"
    options = ("--minimize", "size", "--max-drop", 2, "--max-time", "5s", "--json")
    code = cli.run(_arguments(files, output, *options))
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["missed"] else 0)
    assert package.is_package(output) and output.stat().st_size == report["after"]["bytes"]
    assert report["before"]["bytes"] / report["after"]["bytes"] > 4
    assert [p["is_best"] for p in report["points"]].count(True) == 1
    best = next(p for p in report["points"] if p["is_best"])
    assert best["is_met"] and best["high"] <= 2 and best["on_front"]
    assert output.with_name("small.onnxz.search").exists()  # the time was over
    assert "72 samples, chosen on 24 held out of them, judged on 24 others of --data" in " ".join(
        report["notes"]
    )


def test_a_second_search_of_the_same_output_is_refused(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    with alone(place(output)):
        code = cli.run(_arguments(files, output))
    assert code == 2
    assert f"Error: another run writes {place(output)}: wait for its end" in capsys.readouterr().err
    assert not output.exists()


def test_weights_with_a_file_of_their_own(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing them takes a lock of its own; a search that held the same one would never end."""
    monkeypatch.setattr(graph, "SPLIT", 100)
    output = tmp_path / "out.onnx"
    onnxc.compress(files[0], data=files[1], output=output, minimize="size", max_time=1.0)
    left = {p.name for p in tmp_path.iterdir()} - {"out.onnx.search"}
    assert left == {"net.onnx", "data.npz", "out.onnx", "out.onnx.data"}
    session(output)


def test_the_best_model_is_made_once(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, add = list[Any](), Builder._add
    monkeypatch.setattr(Builder, "_add", lambda self, path: made.append(path) or add(self, path))
    report = onnxc.compress(
        files[0],
        data=files[1],
        output=tmp_path / "a.onnx",
        minimize="size",
        max_drop=2.0,
        max_time=2.0,
    )
    assert made.count(recipe.loads(report.recipe).passes) == 1


def test_a_report_replays_byte_for_byte(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = files
    output, again = tmp_path / "small.onnx", tmp_path / "again.onnx"
    report = onnxc.compress(
        model, data=data, output=output, minimize="size", max_drop=2.0, max_time=5.0
    )
    (tmp_path / "replay.toml").write_text(report.recipe)
    replayed = recipe.load(tmp_path / "replay.toml")
    onnxc.compress(model, data=data, output=again, recipe=replayed)
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize(
    ("metric", "bound"), [("agreement", 50.0), ("sqnr", 3.0), ("own:score", 60.0)]
)
def test_other_metrics(
    files: tuple[Path, Path],
    tmp_path: Path,
    metric: str,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own.py").write_text(
        "def score(outputs, labels):\n    return 100 * (outputs['y'].argmax(1) == labels).mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "small.onnx"
    report = onnxc.compress(
        files[0], data=files[1], output=output, metric=metric, minimize="energy-proxy",
        max_drop=bound, max_time=3.0,
    )  # fmt: skip
    best = next(p for p in report.points if p.is_best)
    assert best.high <= bound and best.name != "original"


def test_a_bound_that_nothing_keeps_leaves_the_original(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "same.onnx"
    report = onnxc.compress(
        files[0], data=files[1], output=output, metric="sqnr", minimize="size",
        max_drop=1e-9, max_time=0.1,
    )  # fmt: skip
    assert "nothing better than the original keeps the bound" in report.missed[0]
    assert report.comparison is not None and report.comparison.sqnr > 100
    onnx.checker.check_model(onnx.load(output))


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_shipped_recipes_are_carried_out(
    files: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "made.onnxz"
    report = onnxc.compress(
        files[0], data=files[1], output=output, recipe=recipe.load(name), samples=40
    )
    assert report.after.bytes < report.before.bytes / 1.5 and output.exists()
    assert report.comparison is not None and report.comparison.sqnr > 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--metric", "top2"), "--metric top2 is unknown"),
        (("--metric", "nobody:score"), "nobody:score fails with ModuleNotFoundError"),
        (("--metric", "perplexity"), "needs one input of (N, T) tokens"),
        (("--max-time", "soon"), "is no time; write 90s, 10m or 1.5h"),
        (("--minimize", "weight"), "is not one of"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    files: tuple[Path, Path],
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(_arguments(files, tmp_path / "o.onnx", *options)) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


@pytest.mark.slow
def test_killed_ten_times_and_resumed(files: tuple[Path, Path], tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    options = ("--minimize", "size", "--max-drop", 2, "--max-time", "1h", "--quiet")
    assert cli.run(_arguments(files, whole, *options)) in (0, 1)
    rng = np.random.default_rng(0)
    for _ in range(10):
        command = [sys.executable, "-m", "onnxc", *_arguments(files, output, *options, "--resume")]
        running = subprocess.Popen(command)
        time.sleep(rng.uniform(2, 12))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        if output.exists():
            onnx.checker.check_model(onnx.load(output))
    assert cli.run(_arguments(files, output, *options, "--resume")) in (0, 1)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_workers_find_the_same(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates that two processes make ahead are those that one makes in turn."""
    rows = [row for row in ladders("size", Path("o.onnxz")) if row.slot != "factorize"]
    few = tuple(replace(row, moves=row.moves[::5], first=1) for row in rows[::2])
    monkeypatch.setattr(searched, "ladders", lambda objective, output: few)
    found = []
    for workers in (None, 2):
        output = tmp_path / f"{workers}.onnx"
        with connected(workers=workers) as client:
            onnxc.compress(
                files[0], data=files[1], output=output, minimize="size", max_drop=2.0,
                max_time=1e6, client=client,
            )  # fmt: skip
        found.append(output.read_bytes())
    assert found[0] == found[1]


def test_the_verdict_of_any_metric_is_on_samples_that_judge(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that is worse only for the samples of --val, which have no labels."""
    (tmp_path / "late.py").write_text(
        "import numpy as np\n"
        "def score(outputs, labels):\n"
        "    if labels is not None:\n"
        "        return 0.0\n"
        "    return -abs(outputs['y'] - np.load('given.npy')).sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    x = np.load(files[1])["x"][:3]
    np.savez("val.npz", x=x)
    np.save("given.npy", run(session(files[0]), {"x": x})["y"])
    report = onnxc.compress(
        files[0], data=files[1], val="val.npz", output="late.onnx", metric="late:score",
        minimize="size", max_drop=1e-6, max_time=0.1,
    )  # fmt: skip
    assert "on the 3 samples that judge the drop is" in report.missed[0]
