"""`onnxc sparsify` from a model file to the written, proven one, by the route of all commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, report_of

import onnxc
from onnxc import api
from onnxc.bench import Ratio
from onnxc.errors import OptionError
from onnxc.recipe import Recipe, loads
from onnxc.report import Aim, Measure, Report, verdict
from onnxc.sparsification import SparsifySettings
from passes.sparsify import Sparsify

MODELS = Path(__file__).resolve().parents[1] / "models"
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"
ARGUMENTS = ("sparsify", TOKENS, "--data", TOKEN_DATA, "--samples", 40)
ALONE = ("--no-reconstruct",)  # where a refit, which takes most of the time, tells nothing


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_zeros_are_made_counted_and_proven(box: Path, capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "--sparsity", 0.6, "-o", "o.onnx")
    before, after = found["zeros"]
    assert before["share"] < 0.01 and after["share"] == pytest.approx(0.6, abs=0.02)
    assert after["coded"] < 0.6 * before["coded"]
    assert found["count"] == len({change["node"] for change in found["changes"]} & heavy())
    assert found["comparison"]["agreement"] > 0.9
    assert found["coverage"] is None
    assert (box / "o.onnx").is_file()


def heavy() -> set[str]:
    return {node.name for node in onnxc.load(TOKENS).graph.nodes if node.op in ("MatMul", "Gemm")}


def test_the_console_says_what_zeros_are_good_for(capsys: Any) -> None:
    assert call(*ARGUMENTS, "-o", "o.onnx") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "zero weights" in words and "with zeros coded" in words
    assert "stock runtimes multiply by zeros too: no speed is gained from them" in words
    assert "integer kernels" not in words


PATTERN = pytest.param(["--nm", "2:4", "--exclude", "op:Gemm"], marks=pytest.mark.slow)


@pytest.mark.parametrize("extra", [["--sparsity", 0.4], PATTERN])
def test_the_recipe_of_a_report_replays_it_byte_for_byte(extra: list[Any], capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "-o", "1.onnx", *extra)
    Path("r.toml").write_text(found["recipe"])
    again = report_of(capsys, "sparsify", TOKENS, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    assert again["recipe"] == found["recipe"]
    assert [p.name for p in loads(found["recipe"]).passes] == ["sparsify", "reconstruct"]


def test_options_go_before_the_recipe(capsys: Any) -> None:
    Path("r.toml").write_text('[[pass]]\nname = "sparsify"\nsparsity = 0.3\n')
    arguments = (*ARGUMENTS, "--recipe", "r.toml", "-o", "o.onnx", "--criterion", "magnitude")
    (made,) = loads(report_of(capsys, *arguments)["recipe"]).passes
    assert made == Sparsify(0.3, criterion="magnitude")


def test_the_default_output_lies_beside_the_model(capsys: Any) -> None:
    shutil.copy(TOKENS, "m.onnx")
    arguments = ("sparsify", "m.onnx", "--data", TOKEN_DATA, "--samples", 20, *ALONE)
    assert report_of(capsys, *arguments)["output"] == "m.sparse.onnx"


def test_a_dry_run_lists_the_effect_and_writes_nothing(box: Path, capsys: Any) -> None:
    arguments = (*ARGUMENTS, *ALONE, "-o", "o.onnx", "--dry-run")
    found = report_of(capsys, *arguments, "--exclude", "op:Gemm")
    assert list(box.iterdir()) == []
    (way,) = found["ways"].values()
    assert list(found["ways"]) == ["50 % zero by obs, global"]
    assert way["done"] and found["aim"]["name"] == "sparsify"
    assert any(skip["reason"] == "not sparse: excluded" for skip in way["skips"])
    assert call(*arguments) == 0
    assert "made sparse" in capsys.readouterr().out


def test_statistics_of_a_file_are_enough(capsys: Any) -> None:
    x = np.load(TOKEN_DATA)
    np.savez("val.npz", **{name: x[name][-30:] for name in x.files})
    np.savez("seen.npz", **{name: x[name][:40] for name in x.files})
    onnxc.calibrate(TOKENS, data="seen.npz", output="s.stats", what=("moments",))
    arguments = ("sparsify", TOKENS, "--stats", "s.stats", "--val", "val.npz", "-o", "o.onnx")
    found = report_of(capsys, *arguments)
    assert found["count"] and not any("by magnitude" in c["what"] for c in found["changes"])


def test_a_quantized_model_is_left_alone(capsys: Any) -> None:
    arguments = ("--data", TOKEN_DATA, "--samples", 20, "--format", "weight-only", "-o", "q.onnx")
    assert call("quantize", TOKENS, *arguments, "--quiet") == 0
    assert call("sparsify", "q.onnx", "--data", TOKEN_DATA) == 2
    assert "already quantized" in capsys.readouterr().err


def test_reconstruction_can_be_left_out(capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "-o", "o.onnx", "--no-reconstruct")
    assert [p.name for p in loads(found["recipe"]).passes] == ["sparsify"]


def test_a_missed_bound_with_strict_writes_nothing(box: Path, capsys: Any) -> None:
    arguments = (*ARGUMENTS, *ALONE, "--sparsity", 0.97, "--max-drop", 0.1, "--strict")
    found = report_of(capsys, *arguments, "-o", "o.onnx", code=1)
    assert found["missed"] and found["output"] is None
    assert list(box.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--sparsity", "1.5"], "share between 0 and 1"), (["--nm", "4:2"], "N:M with N below M")],
)
def test_options_that_mean_nothing_are_told(options: list[str], words: str, capsys: Any) -> None:
    assert call(*ARGUMENTS, *options) == 2
    assert words in capsys.readouterr().err


def test_the_function_takes_settings_singly_or_whole() -> None:
    common: dict[str, Any] = {"data": TOKEN_DATA, "samples": 20}
    whole = SparsifySettings(reconstruct=False)
    single = onnxc.sparsify(TOKENS, **common, output="1.onnx", sparsity=0.5, reconstruct=False)
    given = onnxc.sparsify(TOKENS, **common, output="2.onnx", settings=whole)
    assert single.recipe == given.recipe
    with pytest.raises(OptionError, match="sparsity in the settings of sparsify must be a number"):
        onnxc.sparsify(TOKENS, sparsity="much")
    with pytest.raises(TypeError, match="sparsityy"):
        onnxc.sparsify(TOKENS, sparsityy=0.5)


def test_the_function_takes_a_recipe() -> None:
    recipe = Recipe(passes=(Sparsify(nm="1:4"),))
    found = api.sparsify(TOKENS, data=TOKEN_DATA, samples=20, output="o.onnx", recipe=recipe)
    assert found.zeros is not None and found.zeros[1].share > 0.6


@pytest.mark.parametrize(("seeks", "is_good"), [("speed", False), ("zeros", True)])
def test_slower_is_always_said_and_bad_only_where_speed_was_sought(
    seeks: Any, is_good: bool
) -> None:
    slower = Ratio(0.8, 0.75, 0.85)
    report = Report("m", "o", Measure(4), Measure(4), aim=Aim("t", "done", seeks), speedup=slower)
    good, sentence = verdict(report)
    assert good is is_good
    assert "slower" in sentence and "0.80x" in sentence
