"""`onnxc prune` from a model file to the written, proven one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calls import call, report_of

import onnxc
from onnxc.recipe import loads
from passes.prune import Prune
from passes.reconstruct import Reconstruct

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL, DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"
ARGUMENTS = ("prune", MODEL, "--data", DATA, "--samples", 40)


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_budget_of_macs_is_met_and_proven(box: Path, capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "--macs", 0.8, "-o", "o.onnx")
    assert found["after"]["macs"] <= 0.8 * found["before"]["macs"]
    assert found["after"]["bytes"] < 0.9 * found["before"]["bytes"]
    assert found["comparison"]["agreement"] > 0.9
    assert any("channels out by obs" in change["what"] for change in found["done"])
    before, after = onnxc.load(MODEL).graph, onnxc.load(box / "o.onnx").graph
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        assert [(t.name, t.shape, t.dtype) for t in old] == [
            (t.name, t.shape, t.dtype) for t in new
        ]


def test_the_recipe_of_a_report_replays_it_byte_for_byte(capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "--macs", 0.85, "-o", "1.onnx")
    Path("r.toml").write_text(found["recipe"])
    again = report_of(capsys, "prune", MODEL, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    assert again["recipe"] == found["recipe"]
    prune, *rest = loads(found["recipe"]).passes
    assert isinstance(prune, Prune) and prune.remove
    assert [p.name for p in rest] == ["reconstruct", "shrink"]


def test_a_head_is_a_channel(capsys: Any) -> None:
    arguments = (*ARGUMENTS, "--ratio", 0.25, "--allocation", "uniform", "--include", "*query*")
    found = report_of(capsys, *arguments, "--no-reconstruct", "-o", "o.onnx")
    told = [change["what"] for change in found["done"] if "channels" in change["what"]]
    assert len(told) == 3 and all("1 of 4 channels out" in what for what in told)
    assert found["after"]["macs"] < found["before"]["macs"]


def test_the_console_explains_what_went_and_what_must_stay(capsys: Any) -> None:
    assert call(*ARGUMENTS, "--macs", 0.9, "-o", "o.onnx") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "MACs" in words and "channels out by obs" in words
    assert "after the update" in words
    assert "10 channels must stay: logits is an output of the model" in words


def test_a_budget_that_cannot_be_met_is_said(capsys: Any) -> None:
    arguments = (*ARGUMENTS, "--macs", 0.05, "--no-reconstruct", "-o", "o.onnx")
    found = report_of(capsys, *arguments, code=1)
    assert "more than the 5 % asked for" in found["missed"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--macs", "1.5"], "macs is a share between 0 and 1"),
        (["--macs", "0.5", "--ratio", "0.5"], "give one of ratio, macs and latency"),
        (["--criterion", "l3"], "l3"),
        (["--include", "nothing*"], "matches no node"),
    ],
)
def test_options_that_mean_nothing_are_told(options: list[str], words: str, capsys: Any) -> None:
    assert call(*ARGUMENTS, *options) == 2
    assert words in capsys.readouterr().err


def test_layers_are_refit_through_their_relus_where_asked_for(capsys: Any) -> None:
    model, data = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
    arguments = ("prune", model, "--data", data, "--samples", 16, "--ratio", 0.3)
    arguments = (*arguments, "--allocation", "uniform", "-o", "o.onnx")
    found = report_of(capsys, *arguments, "--nonlinear")
    _, refit, _ = loads(found["recipe"]).passes
    assert isinstance(refit, Reconstruct) and refit.nonlinear
    assert any("behind the activation" in change["what"] for change in found["changes"])
