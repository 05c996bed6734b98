"""`onnxc quantize` from a model file to the written, proven one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from calls import call, report_of

import onnxc
from calib.data import Preprocess
from onnxc import api, few_bits, request, search, targets
from onnxc.cost import inspect
from onnxc.errors import OptionError
from onnxc.recipe import Recipe, loads
from onnxc.report import to_dict
from onnxc.runtime import Runtime, session
from passes.quantize import Quantize

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CNN_DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
CNN_VAL = MODELS / "digits_cnn_val.npz"
TEN = "ten.npz"  # validation samples, written by the test
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "data", "extra"),
    [
        (CNN, CNN_DATA, ["--samples", 40]),
        (CNN, CNN_DATA, ["--samples", 20, "--val", TEN]),
        (CNN, CNN_DATA, ["--samples", 40, "--seed", 3, "--exclude", "op:Gemm"]),
        (CNN, None, ["--format", "qdq", "--ranges", "minmax"]),
        (TOKENS, TOKEN_DATA, ["--samples", 40]),
        (TOKENS, TOKEN_DATA, ["--samples", 40, "--bits", 4]),
    ],
    ids=["cnn", "validation", "choices", "no data", "tokens", "4 bits"],
)
def test_the_recipe_of_a_report_replays_it_byte_for_byte(
    model: Path, data: Path | None, extra: list[Any], capsys: Any
) -> None:
    np.savez(TEN, image=np.load(CNN_VAL)["image"][:10].astype(np.float32))
    given = ["--data", data] if data else []
    found = report_of(capsys, "quantize", model, *given, "-o", "1.onnx", *extra)
    Path("r.toml").write_text(found["recipe"])
    again = report_of(capsys, "quantize", model, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    assert again["recipe"] == found["recipe"]
    assert again["changes"] == found["changes"]


def test_the_recipe_is_complete(capsys: Any) -> None:
    arguments = ["--preset", "imagenet", "--resize", "none", "--exclude", "/1/*", "--seed", 5]
    arguments += ["--samples", 30, "--val", CNN_VAL]
    found = report_of(
        capsys, "quantize", CNN, "--data", CNN_DATA, "-o", "o.onnx", "--max-drop", 5, *arguments
    )
    recipe = loads(found["recipe"])
    assert (recipe.seed, recipe.only.exclude) == (5, ("/1/*",))
    assert recipe.target == found["target"] != "auto"
    kept = recipe.calibration
    assert (kept.data, kept.val, kept.samples) == (str(CNN_DATA), str(CNN_VAL), 30)
    assert kept.max_memory == request.LEAST_MEMORY
    assert kept.preprocess == Preprocess(preset="imagenet", resize="none")
    assert {p.name for p in recipe.passes} >= {"quantize"}


def test_options_go_before_the_keys_of_the_recipe(capsys: Any) -> None:
    text = f"""seed = 4
    exclude = ["op:Gemm"]
    [calibration]
    data = "{CNN_DATA}"
    samples = 30
    [[pass]]
    name = "quantize"
    ranges = "entropy"
    """
    Path("r.toml").write_text(text)
    plain = report_of(capsys, "quantize", CNN, "--recipe", "r.toml", "-o", "1.onnx")
    assert any("calibrated on 24 samples" in note for note in plain["notes"])
    options = ["--samples", 20, "--exclude", "/0/*", "--ranges", "minmax"]
    changed = report_of(capsys, "quantize", CNN, "--recipe", "r.toml", "-o", "2.onnx", *options)
    recipe = loads(changed["recipe"])
    assert recipe.seed == 4
    assert recipe.only.exclude == ("/0/*",)
    assert recipe.calibration.samples == 20
    assert [getattr(p, "ranges", None) for p in recipe.passes] == ["minmax"]
    assert {s["node"] for s in changed["skips"] if s["reason"] == "excluded"} >= {
        node for node in ops(CNN, "Conv") if node.startswith("/0/")
    }


def ops(model: Path, op: str) -> list[str]:
    return [node.name for node in onnx.load(model).graph.node if node.op_type == op]


def test_a_dry_run_lists_the_effect_and_writes_nothing(box: Path, capsys: Any) -> None:
    arguments = ("quantize", CNN, "--data", CNN_DATA, "-o", "out.onnx", "--exclude", "op:Gemm")
    found = report_of(capsys, *arguments, "--dry-run")
    assert list(box.iterdir()) == []
    assert found["output"] == "out.onnx"
    static = found["ways"]["static"]
    assert {c["node"] for c in static["done"]} >= set(ops(CNN, "Conv"))
    assert {"node": ops(CNN, "Gemm")[0], "reason": "excluded"} in static["skips"]
    assert call(*arguments, "--dry-run") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "not written" in words and "way: static" in words
    assert f"1 excluded: {ops(CNN, 'Gemm')[0]}" in words


def test_a_dry_run_names_the_nodes_that_the_run_changes(capsys: Any) -> None:
    arguments = ("quantize", TOKENS, "--data", TOKEN_DATA, "-o", "out.onnx", "--format", "dynamic")
    before = report_of(capsys, *arguments, "--dry-run")["ways"]["dynamic"]
    found = report_of(capsys, *arguments)
    changed = {change["node"] for change in found["changes"]}
    assert {c["node"] for c in before["done"]} <= changed
    assert found["count"] == len({c["node"] for c in before["done"]})


def test_the_default_output_lies_beside_the_model(capsys: Any) -> None:
    shutil.copy(TOKENS, "m.onnx")
    arguments = ("quantize", "m.onnx", "--data", TOKEN_DATA, "--samples", 20)
    assert report_of(capsys, *arguments, "--format", "weight-only")["output"] == "m.int8.onnx"
    assert report_of(capsys, *arguments, "--bits", 4)["output"] == "m.int4.onnx"
    assert Path("m.int8.onnx").is_file() and Path("m.int4.onnx").is_file()


def test_what_was_quantized_is_left_alone(capsys: Any) -> None:
    for number, kind in enumerate(("qdq", "dynamic", "weight-only")):
        made = f"{number}.onnx"
        arguments = ("--data", TOKEN_DATA, "--samples", 20, "--format", kind, "-o", made)
        assert call("quantize", TOKENS, *arguments, "--quiet") == 0
        assert call("quantize", made, "--data", TOKEN_DATA) == 2
        assert "already quantized" in capsys.readouterr().err
        assert call("inspect", made) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "already quantized" in shown and "no node can be compressed" in shown


def test_the_result_is_judged_with_the_labels_of_samples_it_never_saw(capsys: Any) -> None:
    found = report_of(capsys, "quantize", CNN, "--data", CNN_DATA, "-o", "o.onnx")
    held = found["comparison"]["samples"]
    total = len(np.load(CNN_DATA)["image"])
    assert (
        f"calibrated on {total - held} samples, judged on {held} held out of them" in found["notes"]
    )
    assert found["comparison"]["top1"][0] > 0.9


def test_validation_data_judge_and_held_out_samples_choose(capsys: Any) -> None:
    arguments = ("quantize", CNN, "--data", CNN_DATA, "--samples", 30, "--val", CNN_VAL)
    found = report_of(capsys, *arguments, "-o", "o.onnx")
    count = len(np.load(CNN_VAL)["image"])
    assert found["comparison"]["samples"] == count
    told = f"chosen on 6 held out of them, judged on {count} of the validation data"
    assert f"calibrated on 24 samples, {told}" in found["notes"]


def test_made_without_data_is_the_first_line(capsys: Any) -> None:
    assert call("quantize", CNN, "-o", "o.onnx") == 0
    first = " ".join(capsys.readouterr().out.splitlines()[:2])
    assert first.startswith("made without data")


def test_a_missed_bound_is_exit_code_1_and_strict_writes_nothing(box: Path, capsys: Any) -> None:
    arguments = ("quantize", CNN, "--data", noise(), "-o", "o.onnx", "--max-drop", -1)
    found = report_of(capsys, *arguments, code=1)
    assert "disagreement is" in found["missed"][0]
    assert (box / "o.onnx").is_file()
    (box / "o.onnx").unlink()
    found = report_of(capsys, *arguments, "--strict", code=1)
    assert found["output"] is None
    assert not (box / "o.onnx").exists()


def noise() -> str:
    x = np.random.default_rng(0).standard_normal((10, 1, 32, 32)).astype(np.float32)
    np.savez("noise.npz", image=x)
    return "noise.npz"


def test_excluding_everything_is_told(capsys: Any) -> None:
    found = report_of(capsys, "quantize", CNN, "--data", noise(), "-o", "o.onnx", "--exclude", "*")
    assert found["count"] == 0
    assert found["is_good"] is False
    assert "nothing was quantized" in found["verdict"]


def test_a_model_with_several_outputs_and_without_heavy_nodes(capsys: Any) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    m (float[N, 4] x) => (float[N, 4] y, int64[N, 1] z)
    { y = Softmax(x)  z = ArgMax(x) }"""
    Path("m.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    found = report_of(capsys, "quantize", "m.onnx", "-o", "o.onnx")
    assert list(found["comparison"]["outputs"]) == ["y", "z"]
    assert found["count"] == 0
    session(Path("o.onnx"))


def test_json_and_console_have_the_same_content(capsys: Any) -> None:
    report = api.quantize(CNN, data=CNN_DATA, output="o.onnx", samples=40)
    keys = set(to_dict(report))
    assert keys >= {"is_good", "verdict", "way", "target", "recipe", "memory_peak", "seconds"}
    assert report.after.bytes == Path("o.onnx").stat().st_size
    assert report.before.bytes == CNN.stat().st_size


def test_the_function_takes_arrays_and_a_recipe() -> None:
    x = np.load(CNN_DATA)["image"].astype(np.float32)[:20]
    found = onnxc.quantize(
        CNN, data={"image": x}, output="o.onnx", recipe=Recipe(seed=2), exclude=["op:Gemm"]
    )
    assert loads(found.recipe).seed == 2
    assert loads(found.recipe).calibration.data is None
    assert inspect("o.onnx").quantized == "qdq"


def test_functions_refuse_a_runtime_that_there_is_not() -> None:
    with pytest.raises(OptionError, match="'Abacus'"):
        api.quantize(CNN, output="o.onnx", runtime=Runtime(provider="Abacus"))
    with pytest.raises(OptionError, match="level 'most'"):
        api.benchmark([CNN], runtime=Runtime(level="most"))


def test_steps_and_samples_are_told() -> None:
    told: list[str] = []
    api.quantize(CNN, data=CNN_DATA, output="o.onnx", samples=40, progress=told.append)
    assert any(text.endswith("calibrating 32/32") for text in told)
    assert told.index("loading") < told.index("measuring") < told.index("writing")


def test_few_bits_run_in_integer_kernels_and_are_stored_small(capsys: Any) -> None:
    arguments = ("quantize", CNN, "--data", CNN_DATA, "--samples", 40, "--bits", 3)
    found = report_of(capsys, *arguments, "-o", "o.onnx")
    assert (found["way"], found["output"]) == ("static, rounded", "o.onnx")
    assert found["coverage"]["integer"] == found["coverage"]["total"] == 10
    assert found["after"]["bytes"] < found["before"]["bytes"] / 6
    assert found["comparison"]["agreement"] > 0.9
    names = [p.name for p in loads(found["recipe"]).passes]
    order = ["quantize", "quantize-layers", "quantize-constants"]
    assert [name for name in names if name in order] == order
    Path("r.toml").write_text(found["recipe"])
    report_of(capsys, "quantize", CNN, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("o.onnx").read_bytes() == Path("2.onnx").read_bytes()


def test_few_bits_with_float_activations_compute_in_float(capsys: Any) -> None:
    arguments = ("quantize", CNN, "--data", CNN_DATA, "--samples", 20, "--activations", "float")
    found = report_of(capsys, *arguments, "--bits", 2, "--rounding", "gptq", "-o", "o.onnx")
    assert (found["way"], found["coverage"]["integer"]) == ("rounded", 0)
    assert found["after"]["bytes"] < found["before"]["bytes"] / 6
    assert found["count"] >= 9


def test_products_alone_get_few_bits_in_float(capsys: Any) -> None:
    arguments = ("quantize", TOKENS, "--data", TOKEN_DATA, "--samples", 20, "--bits", 3)
    found = report_of(capsys, *arguments, "-o", "o.onnx")
    assert (found["way"], found["coverage"]["integer"]) == ("rounded", 0)
    assert found["after"]["bytes"] < found["before"]["bytes"] / 4
    assert found["comparison"]["agreement"] > 0.8


def test_few_bits_of_statistics_are_rounded_by_moments(capsys: Any) -> None:
    arguments = ("calibrate", CNN, "--data", CNN_DATA, "--samples", 30, "-o", "s.npz")
    assert call(*arguments, "--what", "histogram,moments") == 0
    capsys.readouterr()
    found = report_of(capsys, "quantize", CNN, "--stats", "s.npz", "--bits", 4, "-o", "o.onnx")
    assert found["coverage"]["integer"] == found["coverage"]["total"] == 10
    told = [c["what"] for c in found["changes"] if " of its output lost" in c["what"]]
    assert len(told) == 10 and not any("if inputs are alike" in what for what in told)


def test_few_bits_with_no_data_at_all(capsys: Any) -> None:
    found = report_of(capsys, "quantize", CNN, "--bits", 4, "-o", "o.onnx")
    assert found["coverage"]["integer"] == 10
    assert "synthesized" in found["headline"]


@pytest.mark.slow
def test_weights_are_rounded_for_their_outputs_where_all_else_falls_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"data": CNN_DATA, "samples": 40}
    plain = onnxc.quantize(CNN, output="plain.onnx", **settings)
    assert not any("rounded" in note for note in plain.notes)
    assert plain.comparison is not None
    monkeypatch.setattr(search, "FLOOR", plain.comparison.sqnr + 0.01)
    rescued = onnxc.quantize(CNN, output="rescued.onnx", **settings)
    assert any("static, rounded: " in note for note in rescued.notes)
    assert rescued.comparison is not None
    assert rescued.comparison.sqnr >= plain.comparison.sqnr


def test_products_in_blocks_of_four_bits_are_rounded_by_their_outputs(capsys: Any) -> None:
    arguments = ("quantize", TOKENS, "--data", TOKEN_DATA, "--samples", 40, "--bits", 4)
    found = report_of(capsys, *arguments, "-o", "o.onnx")
    nearest = report_of(capsys, *arguments, "--rounding", "nearest", "-o", "n.onnx")
    assert {found["way"], nearest["way"]} <= {"weight-only", "MatMulNBits"}
    assert found["comparison"]["sqnr"] > nearest["comparison"]["sqnr"] + 2
    assert found["after"]["bytes"] < found["before"]["bytes"] / 4
    names = [p.name for p in loads(found["recipe"]).passes]
    assert names[-3:] == ["upgrade-opset", "quantize-layers", "quantize-weights"]


def test_what_takes_long_is_only_done_where_it_is_asked_for(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_bits, "MOST_WORK", 1.0)
    arguments = ("quantize", TOKENS, "--data", TOKEN_DATA, "--samples", 10, "--bits", 4)
    found = report_of(capsys, *arguments, "-o", "o.onnx")
    assert "quantize-layers" not in found["recipe"]
    assert any("are rounded to the nearest" in note for note in found["notes"])
    asked = report_of(capsys, *arguments, "--rounding", "descent", "-o", "o.onnx", "--dry-run")
    assert not any("are rounded to the nearest" in note for note in asked["notes"])


def test_made_up_samples_round_no_layers(capsys: Any) -> None:
    found = report_of(capsys, "quantize", TOKENS, "--bits", 4, "-o", "o.onnx")
    assert "quantize-layers" not in found["recipe"]


@pytest.mark.parametrize("extra", [("--rounding", "descent"), ("--format", "qdq", "--bits", 4)])
def test_products_of_rounded_weights_compute_in_integers(extra: Any, capsys: Any) -> None:
    arguments = ("quantize", TOKENS, "--data", TOKEN_DATA, "--samples", 20, "-o", "o.onnx")
    found = report_of(capsys, *arguments, *extra)
    assert (found["way"], found["coverage"]["integer"]) == ("static, rounded", 13)
    assert ("equalize" in found["recipe"]) == ("--bits" not in extra)


@pytest.mark.parametrize(("level", "is_told"), [("all", True), ("none", False)])
def test_a_target_that_this_processor_cannot_judge_is_told(
    level: str, is_told: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "detect", lambda: "x86")
    arguments = ("quantize", CNN, "--target", "x86-vnni", "--format", "weight-only")
    found = report_of(capsys, *arguments, "--level", level, "-o", "o.onnx")
    assert any("int8 sums saturate" in note for note in found["notes"]) is is_told


def test_layers_that_hurt_stay_float(capsys: Any) -> None:
    given = ("quantize", CNN, "--data", CNN_DATA, "--samples", 40, "-o", "o.onnx")
    report = report_of(capsys, *given, "--keep-float", 2)
    left = [k["node"] for k in report["coverage"]["kernels"] if not k["integer"]]
    (quantize,) = [p for p in loads(report["recipe"]).passes if p.name == "quantize"]
    assert isinstance(quantize, Quantize) and 1 <= len(quantize.sensitive) <= 2
    assert set(quantize.sensitive) <= set(left)
    assert call(*given, "--keep-float", 2, "--bits", 4) == 2
