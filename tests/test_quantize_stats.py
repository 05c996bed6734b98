"""`onnxc quantize --stats`: what a file holds is not gathered again; what it saw judges nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import bind, normal

import onnxc
from calib import statistics
from onnxc import api, pipeline
from onnxc.cli import run
from onnxc.errors import DataError, OptionError
from onnxc.recipe import loads
from passes.correct_bias import CorrectBias

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CNN_DATA, CNN_VAL = (
    MODELS / name for name in ("digits_cnn.onnx", "digits_cnn_calib.npz", "digits_cnn_val.npz")
)
SEEN = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with statistics of the first digits, their data, and data with some of them."""
    folder = tmp_path_factory.mktemp("stats")
    data = np.load(CNN_DATA)
    for name, part in (("seen", slice(0, SEEN)), ("mixed", slice(30, 60)), ("new", slice(60, 90))):
        np.savez(folder / f"{name}.npz", image=data["image"][part], labels=data["labels"][part])
    onnxc.calibrate(CNN, data=folder / "seen.npz", output=folder / "s.stats")
    return folder


@pytest.fixture
def no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "collect", lambda *a, **k: pytest.fail("data was run"))
    monkeypatch.setattr(pipeline, "drift", lambda *a, **k: pytest.fail("drift was measured"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Kinds of statistics that each run over the data gathers."""
    found: list[set[str]] = []
    run = pipeline.collect

    def collect(model: Any, keys: Any, *arguments: Any, **settings: Any) -> Any:
        found.append({key.what for key in keys})
        return run(model, keys, *arguments, **settings)

    monkeypatch.setattr(pipeline, "collect", collect)
    return found


def quantized(home: Path, tmp_path: Path, **settings: Any) -> Any:
    settings.setdefault("stats", home / "s.stats")
    return onnxc.quantize(CNN, output=tmp_path / "o.onnx", **settings)


def names(report: Any) -> list[str]:
    return [p.name for p in loads(report.recipe).passes]


def test_statistics_alone_run_no_calibration(
    home: Path, tmp_path: Path, no_collecting: None
) -> None:
    found = quantized(home, tmp_path)
    assert found.headline == (
        f"ranges come from statistics {home / 's.stats'} ({SEEN} samples), the verdict from "
        "synthesized input: give --val"
    )
    assert found.way.startswith("static")
    assert "equalize" not in names(found) and "quantize" in names(found)
    (corrected,) = [p for p in loads(found.recipe).passes if isinstance(p, CorrectBias)]
    assert corrected.by == "mean"
    assert found.coverage.integer == found.coverage.total > 0
    assert any("bias corrected by up to" in change.what for change in found.changes)
    assert f"calibrated on the {SEEN} samples of statistics" in " ".join(found.notes)


def test_validation_data_choose_and_judge(home: Path, tmp_path: Path, no_collecting: None) -> None:
    found = quantized(home, tmp_path, val=CNN_VAL)
    assert found.headline == ""
    total = len(np.load(CNN_VAL)["image"])
    held = total - found.comparison.samples
    assert 0 < held < 50
    told = f"chosen on {held} of the validation data, judged on {total - held} others of it"
    assert any(told in note for note in found.notes)
    assert found.comparison.agreement > 0.98
    assert found.is_good


@pytest.mark.parametrize("kind", ["dynamic", "weight-only", "qdq", "qoperator"])
def test_every_format_does_with_statistics_alone(
    home: Path, tmp_path: Path, kind: Any, no_collecting: None
) -> None:
    settings = api.QuantizeSettings(format=kind)
    found = quantized(home, tmp_path, val=CNN_VAL, settings=settings)
    assert found.count and found.comparison.agreement > 0.98


@pytest.mark.parametrize("bits", [8, 16])
def test_fixed_point_too(home: Path, tmp_path: Path, bits: Any, no_collecting: None) -> None:
    settings = api.QuantizeSettings(scheme="fixed", bits=bits)
    found = quantized(home, tmp_path, val=CNN_VAL, settings=settings)
    assert found.count and found.comparison.agreement > 0.97


def test_data_serve_for_what_the_file_lacks(
    home: Path, tmp_path: Path, asked: list[set[str]]
) -> None:
    found = quantized(home, tmp_path, data=home / "new.npz")
    assert asked and {"peak"} not in asked  # those are in the file
    assert "equalize" in names(found)
    asked.clear()
    quantized(home, tmp_path, data=home / "new.npz", stats=None)
    assert {"peak"} in asked


def test_samples_that_statistics_saw_do_not_judge(home: Path, tmp_path: Path) -> None:
    found = quantized(home, tmp_path, data=home / "mixed.npz")
    assert found.comparison.samples == 6  # a fifth of 30, of the 20 that are new
    assert "10 samples did not judge: the statistics saw them" in found.notes
    with pytest.raises(DataError, match=r"saw all 40 samples of --data.* give --val with other"):
        quantized(home, tmp_path, data=home / "seen.npz")
    found = quantized(home, tmp_path, data=home / "seen.npz", val=home / "mixed.npz")
    assert any("judged on 16 others of it" in note for note in found.notes)
    assert "50 samples did not judge: the statistics saw them" in found.notes
    with pytest.raises(DataError, match="saw all 40 samples of --val"):
        quantized(home, tmp_path, val=home / "seen.npz")


def test_the_recipe_replays_with_the_statistics(home: Path, tmp_path: Path) -> None:
    first = quantized(home, tmp_path, val=home / "new.npz")
    made = (tmp_path / "o.onnx").read_bytes()
    recipe = loads(first.recipe)
    assert recipe.calibration.stats == str(home / "s.stats")
    assert recipe.calibration.data is None
    again = onnxc.quantize(CNN, output=tmp_path / "p.onnx", recipe=recipe)
    assert (tmp_path / "p.onnx").read_bytes() == made
    assert again.recipe.replace("p.onnx", "o.onnx") == first.recipe


def test_a_preview_needs_no_data(home: Path, tmp_path: Path, no_collecting: None) -> None:
    found = onnxc.preview(CNN, stats=home / "s.stats", output=tmp_path / "o.onnx")
    assert "static" in found.ways
    assert len(found.ways["static"].done) >= 10


def test_statistics_of_another_model_or_preparation(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.onnx"
    proto = bind(
        "g (float[N,1,32,32] image, float[2,1,3,3] W) => (float[N,2,30,30] y) "
        "{ y = Conv (image, W) }",
        W=normal(2, 1, 3, 3),
    )
    other.write_bytes(proto.SerializeToString())
    with pytest.raises(OptionError, match=r"s\.stats are of another model: calibrate this one"):
        onnxc.quantize(other, stats=home / "s.stats", output=tmp_path / "o.onnx")
    monkeypatch.setattr("onnxc.compression.structure", lambda graph: "0" * 64)
    with pytest.raises(OptionError, match=r"as another onnxc prepares it .*calibrate again"):
        quantized(home, tmp_path)
    assert not (tmp_path / "o.onnx").exists()


def test_images_prepared_otherwise_are_refused(home: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, pixels in enumerate(np.load(CNN_DATA)["image"][:12, 0]):
        folder = tmp_path / ("first" if number < 6 else "second")
        folder.mkdir(exist_ok=True)
        image.fromarray(np.uint8(pixels * 255)).save(folder / f"{number}.png")
    stats = tmp_path / "i.stats"
    onnxc.calibrate(CNN, data=tmp_path / "first", output=stats)
    found = quantized(home, tmp_path, stats=stats, val=tmp_path / "second")
    assert any("judged on" in note for note in found.notes)
    plain = onnxc.quantize(CNN, stats=stats, data=tmp_path / "second", output=tmp_path / "o.onnx")
    assert plain.count
    prepare = api.Preprocess(mean=0.5, std=0.5)
    with pytest.raises(DataError, match=r"i\.stats are of images prepared with other options"):
        quantized(home, tmp_path, stats=stats, val=tmp_path / "second", preprocess=prepare)


def test_what_the_file_does_not_hold_is_told(
    home: Path, tmp_path: Path, no_collecting: None
) -> None:
    onnxc_stats = tmp_path / "few.stats"
    full = statistics.load(home / "s.stats")
    kept = {k: o for k, o in full.stats.items() if k.what == "histogram"}
    statistics.save(statistics.replace(full, stats=kept), onnxc_stats)
    found = quantized(home, tmp_path, stats=onnxc_stats, val=CNN_VAL)
    assert found.count and found.comparison.agreement > 0.98
    told = next(note for note in found.notes if "do not hold" in note)
    assert "correct-bias wants" in told and "give --data" in told
    reasons = {skip.reason for skip in found.skips}
    assert "bias not corrected: the mean of its input is not known" in reasons


def test_a_recipe_that_equalizes_needs_data(
    home: Path, tmp_path: Path, no_collecting: None
) -> None:
    recipe = loads('[[pass]]\nname = "equalize"\n[[pass]]\nname = "quantize"\n')
    found = quantized(home, tmp_path, recipe=recipe)
    assert found.count == 0 and not found.is_good
    assert any("quantize wants what statistics" in note for note in found.notes)


def test_the_command_line(home: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ("quantize", CNN, "--stats", home / "s.stats", "-o", tmp_path / "o.onnx")
    assert run([*map(str, arguments)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("ranges come from statistics")
    assert run([*map(str, arguments), "--val", str(home / "new.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["headline"] == "" and 'by = "mean"' in found["recipe"]
    gone = ("quantize", CNN, "--stats", tmp_path / "gone", "-o", tmp_path / "o.onnx")
    assert run([*map(str, gone)]) == 2
    assert "gone do not exist; give a file that onnxc calibrate wrote" in capsys.readouterr().err


def test_the_output_is_not_the_statistics(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "s.stats"
    shutil.copy(home / "s.stats", place)
    with pytest.raises(OptionError, match="is the input itself"):
        onnxc.quantize(CNN, stats=place, output=place)
