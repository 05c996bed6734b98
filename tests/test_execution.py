"""Results under the options of their deployment, and what optimizations do to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import report_of
from quantizing import dataset
from rich.console import Console
from texts import bind, context, normal

from onnxc import check, execution
from onnxc.api import quantize, validate
from onnxc.console import render_validation
from onnxc.execution import EXACT, Execution
from onnxc.graph import load, save, to_bytes
from onnxc.pipeline import Calibration, compress
from onnxc.report import Measure, Report, to_dict, verdict
from onnxc.runtime import LEVELS, Runtime
from passes.quantize import Quantize

RARE = 500.0  # a weight of an input that is always 0


def weight() -> np.ndarray[Any, Any]:
    return np.concatenate([np.full((1, 6), RARE, np.float32), normal(7, 6)])


FLOAT = bind("g (float[N,8] x, float[8,6] W) => (float[N,6] y) { y = Gemm (x, W) }", W=weight())
HALF_QUANTIZED = bind(  # the optimizer puts W on 8 bits, with one scale for all: RARE takes them
    """g (float[N,8] x, float[8,6] W, float s, uint8 z, float t) => (float[N,6] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        m = Gemm (d, W)
        r = QuantizeLinear (m, t, z)
        y = DequantizeLinear (r, t, z) }""",
    W=weight(),
    s=np.float32(0.03),
    z=np.uint8(128),
    t=np.float32(0.12),
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The float model, the half-quantized one, and samples whose first value is 0."""
    first, second, data = (tmp_path / n for n in ("float.onnx", "half.onnx", "x.npz"))
    save(load(FLOAT), first)
    save(load(HALF_QUANTIZED), second)
    x = normal(20, 8)
    x[:, 0] = 0
    np.savez(data, x=x)
    return first, second, data


def test_an_optimizer_that_rounds_is_told(files: tuple[Path, Path, Path]) -> None:
    first, second, data = files
    found = validate(first, second, data=data)
    done = found.execution
    assert done is not None and done.plain is not None and done.moved is not None
    assert done.plain > 30 and done.moved < 10 and done.is_doubtful
    assert not found.is_good and "optimizations change its outputs by more" in found.verdict
    assert to_dict(found)["execution"]["is_doubtful"] is True


def test_it_is_red_on_the_console(files: tuple[Path, Path, Path]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_validation(validate(*files[:2], data=files[2])))
    told = console.export_text(styles=True)
    (line,) = [line for line in told.splitlines() if "optimizations change" in line]
    assert "\x1b[31mONNX Runtime's" in line or "\x1b[31m" in line.split("ONNX Runtime")[0]
    assert "not optimized" in told


def test_without_optimizations_there_is_nothing_to_tell(files: tuple[Path, Path, Path]) -> None:
    first, second, data = files
    found = validate(first, second, data=data, runtime=Runtime(level="none"))
    assert found.execution == Execution(Runtime(level="none"))
    assert "optimizations" not in found.verdict and found.comparison.sqnr > 30


@pytest.mark.parametrize("level", LEVELS)
def test_the_report_names_the_options_of_the_proof(
    level: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, data = files
    options = ("--level", level, "--threads", "2")
    found = report_of(capsys, "validate", first, second, "--data", data, *options)
    ran = found["execution"]["runtime"]
    assert (ran["level"], ran["threads"], ran["provider"]) == (level, 2, "CPU")


def test_a_good_result_keeps_its_verdict(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    proto = bind(
        "g (float[N,8] x, float[8,64] W) => (float[N,64] y) { y = MatMul (x, W) }", W=normal(8, 64)
    )
    save(load(proto), tmp_path / "wide.onnx")
    report = quantize(tmp_path / "wide.onnx", data={"x": normal(40, 8)})
    done = report.execution
    assert done is not None and not done.is_doubtful and not done.failure
    assert done.plain is not None and done.plain > 25 and done.samples == execution.SAMPLES


def test_the_file_is_judged_that_was_written(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk is run, not what was meant to be there."""
    from onnxc import api

    seen: list[Any] = []
    real = api.execution
    monkeypatch.setattr(api, "execution", lambda *given: seen.append(given) or real(*given))
    report = quantize(files[0], data=files[2], runtime=Runtime(threads=2))
    (given,) = seen
    assert given[:2] == (files[0], Path(report.output or "")) and given[3].threads == 2


@pytest.mark.parametrize(
    ("plain", "moved", "is_doubtful"),
    [
        (30.0, 20.0, True),
        (30.0, 40.0, False),
        (200.0, EXACT + 1, False),  # nothing was rewritten, and sums are added in another order
        (200.0, EXACT - 1, True),
        (30.0, -math.inf, True),  # the optimized file gives NaN
        (None, None, False),
    ],
)
def test_when_it_is_doubtful(plain: float | None, moved: float | None, is_doubtful: bool) -> None:
    found = Execution(Runtime(), 4, plain, moved)
    assert found.is_doubtful is is_doubtful
    report = Report("m", "o", Measure(4), Measure(1), execution=found)
    assert verdict(report)[0] is not is_doubtful


def test_what_does_not_run_without_optimizations_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxc.errors import ModelError

    def refused(*given: Any, **more: Any) -> None:
        raise ModelError("ONNX Runtime refuses the model: no kernel")

    monkeypatch.setattr(execution, "compare", refused)
    data = dataset(load(FLOAT), {"x": normal(4, 8)})
    found = execution.execution(to_bytes(load(FLOAT)), to_bytes(load(FLOAT)), data)
    assert found.failure == "ONNX Runtime refuses the model: no kernel" and not found.is_doubtful


def test_each_rewrite_is_proven_under_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Runtime] = []
    real = check.open_stages

    def opened(model: Any, feed: Any, runtime: Runtime) -> Any:
        seen.append(runtime)
        return real(model, feed, runtime)

    monkeypatch.setattr(check, "open_stages", opened)
    model, feed = load(FLOAT), {"x": normal(20, 8)}
    calibration = Calibration(dataset(model, feed), runtime=Runtime(3, "basic"))
    (step,) = compress(model, [Quantize()], context(model), calibration, {"x": feed["x"][:1]})
    assert step.changes and len(seen) >= 2
    assert {(ran.threads, ran.level) for ran in seen} == {(3, "basic")}
