"""`onnxc factorize` from a model file to the written, proven one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from calls import call, report_of

import onnxc
from onnxc import compression
from onnxc.errors import OptionError
from onnxc.factorization import FactorizeSettings, Plan
from onnxc.recipe import loads
from onnxc.workpiece import Workpiece
from passes.factorize import Factorize

MODELS = Path(__file__).resolve().parents[1] / "models"
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"
ARGUMENTS = ("factorize", TOKENS, "--data", TOKEN_DATA, "--samples", 40)


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "extra",
    [
        ["--macs", 0.8, "--no-faster"],
        pytest.param(["--params", 0.8, "--no-faster"], marks=pytest.mark.slow),
        pytest.param(["--sqnr", 20, "--no-faster"], marks=pytest.mark.slow),
        ["--macs", 0.9, "--allocation", "uniform", "--method", "svd", "--nonlinear"],
    ],
)
def test_layers_are_factorized_and_the_recipe_replays_it(extra: list[Any], capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "-o", "1.onnx", *extra)
    assert found["count"] and found["comparison"]["sqnr"] > 5
    Path("r.toml").write_text(found["recipe"])
    report_of(capsys, "factorize", TOKENS, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    assert [p.name for p in loads(found["recipe"]).passes] == ["factorize", "reconstruct"]


def test_what_is_not_faster_stays(capsys: Any) -> None:
    """Times decide, so the budget may be missed; each layer then says what it stays for."""
    assert call(*ARGUMENTS, "-o", "o.onnx", "--macs", 0.8, "--json") in (0, 1)
    found = json.loads(capsys.readouterr().out)
    (first, _) = loads(found["recipe"]).passes
    assert isinstance(first, Factorize)
    assert len(first.ranks) == found["count"]
    told = {skip["node"] for skip in found["skips"] if skip["reason"].startswith("stays whole")}
    assert {entry.split("=")[0] for entry in first.whole} == told
    assert len(told) + found["count"] == 13


def test_of_a_slow_model_few_layers_are_tried_in_it(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "Workpiece", partial(Workpiece, patience=0.0))
    found = report_of(capsys, *ARGUMENTS, "-o", "o.onnx", "--macs", 0.8, "--no-faster")
    assert found["count"] and found["comparison"]["sqnr"] > 5
    assert any("12 of 13 layers were not tried in the model" in note for note in found["notes"])


def test_ranks_may_be_given(capsys: Any) -> None:
    nodes = [n for n in onnxc.load(TOKENS).graph.nodes if n.op in ("MatMul", "Gemm")]
    name = next(n.name for n in nodes if len(n.inputs[1].shape) == 2 and min(n.inputs[1].shape) > 9)
    found = report_of(capsys, *ARGUMENTS, "-o", "o.onnx", "--ranks", f"{name}=svd:8")
    assert found["count"] == 1
    assert next(c["node"] for c in found["changes"] if "svd of rank 8" in c["what"]) == name


def test_without_data_it_is_said(capsys: Any) -> None:
    arguments = ("factorize", TOKENS, "--macs", 0.8, "--method", "svd", "-o", "o.onnx")
    found = report_of(capsys, *arguments, "--no-faster")
    assert found["count"] or found["notes"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"macs": 0.5, "sqnr": 20.0}, "give one of"),
        ({"params": 1.5}, "share between 0 and 1"),
        ({"latency": 0.5, "allocation": "uniform"}, "uniform allocation"),
        ({"ranks": ("a=b",)}, "METHOD:RANK"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        FactorizeSettings(**settings)


@pytest.mark.slow
def test_factors_are_layers_to_all_other_commands(capsys: Any) -> None:
    """Pruned, computed in integers, clustered and packed like any other layers."""
    model, data = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
    common = ("--data", data, "--samples", 40)
    told = ("--macs", 0.6, "--method", "spatial", "--allocation", "uniform")
    thin = report_of(capsys, "factorize", model, *common, *told, "-o", "thin.onnx")
    pruning = ("--ratio", 0.2, "--allocation", "uniform", "--include", "*_factor*")
    pruned = report_of(capsys, "prune", "thin.onnx", *common, *pruning, "-o", "pruned.onnx")
    assert pruned["count"] and pruned["after"]["macs"] < thin["after"]["macs"]
    whole = report_of(capsys, "quantize", "thin.onnx", *common, "--format", "qdq", "-o", "q.onnx")
    assert whole["coverage"]["integer"] == whole["coverage"]["total"] > 10
    plain = ("--bits", 5, "--no-reconstruct")
    few = report_of(capsys, "cluster", "thin.onnx", *common, *plain, "-o", "few.onnx")
    assert few["after"]["bytes"] < 0.3 * thin["after"]["bytes"]
    assert call("pack", "few.onnx", "-o", "few.onnxz") == 0
    assert Path("few.onnxz").stat().st_size < Path("few.onnx").stat().st_size


def test_factors_that_are_not_faster_together_are_given_up(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "_latency", lambda plan, chosen: 1.02)
    assert call(*ARGUMENTS, "-o", "o.onnx", "--macs", 0.8, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 0 and found["after"]["macs"] == found["before"]["macs"]
    assert any("all together" in skip["reason"] for skip in found["skips"])
    assert any("more than the 80% asked for" in sentence for sentence in found["missed"])
