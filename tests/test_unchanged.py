"""Inputs that change or go away while they are read: nothing is written, and a sentence says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxc import api, calibration
from onnxc.anytime import run as search
from onnxc.cli import run
from onnxc.storage import package

MODELS = Path(__file__).resolve().parents[1] / "models"
FEW = ("--data", "data.npz", "--samples", "8", "--quiet")
Fault = Callable[[], None]

COMMANDS = {
    "quantize": ("quantize", "model.onnx", "--format", "weight-only", *FEW),
    "calibrate": ("calibrate", "model.onnx", "--what", "range", *FEW),
    "pack": ("pack", "model.onnx", "--quiet"),
    "compress": ("compress", "model.onnx", "--data", "data.npz", "--max-time", "1s", "--quiet"),
}


def edit(name: str) -> Fault:
    """One more byte, as an editor or a download would leave the file."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes() + b"x")


FAULTS: dict[str, tuple[Fault, str]] = {
    "the model": (edit("model.onnx"), "model.onnx changed while it was read"),
    "its weights": (edit("weights"), "weights changed while it was read"),
    "gone": (lambda: Path("weights").unlink(), "weights went away while it was read"),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = onnx.load(MODELS / "digits_cnn.onnx")
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights")
    shutil.copy(MODELS / "digits_cnn_calib.npz", "data.npz")
    return tmp_path


def suffer(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault comes when all is read and nothing written yet."""

    def before(module: Any) -> None:
        check = module.check_unchanged

        def late(*given: Any) -> None:
            fault()
            check(*given)

        monkeypatch.setattr(module, "check_unchanged", late)

    for module in (api, calibration, package, search):
        before(module)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_written(
    command: str, fault: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    do, words = FAULTS[fault]
    suffer(do, monkeypatch)
    code = run([*COMMANDS[command], "-o", "out"])
    assert (code, words in capsys.readouterr().err) == (2, True)
    names = {p.name for p in place.iterdir()} - {"out.search"}  # what was found so far
    assert names <= {"model.onnx", "weights", "data.npz"}


def test_data_that_change(monkeypatch: pytest.MonkeyPatch, place: Path, capsys: Any) -> None:
    suffer(edit("data.npz"), monkeypatch)
    assert run([*COMMANDS["quantize"], "-o", "out"]) == 2
    assert "data.npz changed while it was read" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(place: Path, capsys: Any) -> None:
    Path("recipe.toml").write_text("seed = 3\n")
    arguments = (*COMMANDS["quantize"], "--recipe", "recipe.toml", "-o", "recipe.toml")
    assert run(arguments) == 2
    assert "recipe.toml is the input itself" in capsys.readouterr().err
