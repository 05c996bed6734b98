"""The command line: help, exit codes, sentences on bad input, and what reaches the functions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import onnx
import onnx.parser
import pytest

import onnxc
from calib import merge, statistics
from onnxc import api, calibration, commands, options, vectors
from onnxc.cli import run
from onnxc.commands import Watch
from onnxc.core import Key
from onnxc.errors import OptionError
from onnxc.graph import load
from onnxc.paths import check_output
from onnxc.recipe import Recipe, dump
from onnxc.report import Effect, Measure, Preview, Report
from onnxc.runtime import LEVELS, Runtime, session

COMMANDS = ["inspect", "quantize", "validate", "bench", "calibrate"]
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
scores (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {1, -2, 3, 4, 5, -6, 7, 8, -9, 1, 2, 3}, float[3] b = {0.5, 0, -0.5}>
{ t = MatMul(x, w)  y = Add(t, b) }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "m.onnx", TEXT)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same interface, other scores."""
    return write(tmp_path / "other.onnx", TEXT.replace("1, -2", "-9, 9"))


@pytest.fixture
def samples(tmp_path: Path, model: Path) -> Path:
    """40 samples labelled with what the model says."""
    x = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    (y,) = session(model).run(None, {"x": x})
    path = tmp_path / "samples.npz"
    np.savez(path, x=x, labels=np.asarray(y).argmax(-1))
    return path


def write(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def call(*arguments: Any) -> int:
    return run([str(a) for a in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Example:" in shown
    assert f"onnxc {command} model.onnx" in shown


@pytest.mark.parametrize("command", commands.onnxc.commands.values(), ids=commands.onnxc.commands)
def test_each_option_tells_what_it_is(command: click.Command) -> None:
    """And nothing of others, as where one entry of a docstring holds several."""
    told = {p.name: p.help or "" for p in command.params if isinstance(p, click.Option)}
    assert [name for name, text in told.items() if not text] == []
    owners = "|".join(told)
    assert [name for name, text in told.items() if re.search(rf"\b({owners}): ", text)] == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert onnxc.__version__ in capsys.readouterr().out


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", model) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("MatMul 1", "float32 60 B", "x float32 [N, 4]"))


def test_inspect_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 15
    assert found["macs"] == 12
    assert found["bytes"] == model.stat().st_size


def test_bench(model: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", model, other, "--repeats", 3, "--min-time", 0, "--threads", 1, "--json")
    assert call(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["latencies"]) == ["m.onnx", "other.onnx"]
    assert found["ratios"]["other.onnx"]["median"] > 0
    assert any("synthesized" in note for note in found["notes"])


def test_bench_needs_the_same_inputs(model: Path, tmp_path: Path, capsys: Any) -> None:
    renamed = write(tmp_path / "renamed.onnx", TEXT.replace(" x)", " z)").replace("(x,", "(z,"))
    assert call("bench", model, renamed) == 2
    assert "do not take the same inputs" in capsys.readouterr().err


def test_validate_a_model_with_itself(model: Path, samples: Path, capsys: Any) -> None:
    assert call("validate", model, model, "--data", samples, "--max-drop", 0) == 0
    shown = capsys.readouterr().out
    assert "good" in shown
    assert "100.00 %" in shown
    assert "\x1b" not in shown  # no colours where nobody sees them


def test_a_missed_bound_is_exit_code_1(
    model: Path, other: Path, samples: Path, capsys: Any
) -> None:
    arguments = ("validate", model, other, "--data", samples)
    assert call(*arguments) == 0
    assert call(*arguments, "--max-drop", 1) == 1
    assert "top-1 drops by" in capsys.readouterr().out


def test_validate_without_data_says_so(model: Path, other: Path, capsys: Any) -> None:
    assert call("validate", model, other) == 0
    assert "synthesized" in capsys.readouterr().out


def test_saved_vectors_hold_the_outputs_of_the_reference(
    model: Path, other: Path, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vectors"
    assert call("validate", model, other, "--data", samples, "--save-vectors", folder) == 0
    assert (folder / "model.onnx").read_bytes() == other.read_bytes()
    sets = sorted(folder.glob("test_data_set_*"))
    assert len(sets) == vectors.SETS
    x, y = (tensor(sets[0] / f"{side}_0.pb") for side in ("input", "output"))
    (expected,) = session(model).run(None, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert not np.allclose(y, session(other).run(None, {"x": x})[0], rtol=1e-3)


def tensor(path: Path) -> np.ndarray:
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def test_saved_vectors_carry_external_data(model: Path, samples: Path, tmp_path: Path) -> None:
    split, folder = tmp_path / "split.onnx", tmp_path / "vectors"
    proto = onnx.load(model)
    onnx.save(proto, split, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert call("validate", model, split, "--data", samples, "--save-vectors", folder) == 0
    assert call("validate", model, folder / "model.onnx", "--data", folder, "--max-drop", 0) == 0


def test_interrupted_vectors_leave_nothing(model: Path, samples: Path, monkeypatch: Any) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(model.parent.iterdir())
    monkeypatch.setattr(vectors, "_write_tensors", interrupt)
    folder = model.parent / "vectors"
    assert call("validate", model, model, "--data", samples, "--save-vectors", folder) == 130
    assert sorted(model.parent.iterdir()) == before


def test_vectors_are_never_mixed_with_old_ones(model: Path, samples: Path, tmp_path: Path) -> None:
    arguments = ("validate", model, model, "--data", samples, "--save-vectors", tmp_path / "v")
    assert call(*arguments) == 0
    assert call(*arguments) == 2


def test_calibrate_writes_statistics_of_this_model(
    model: Path, other: Path, samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.stats"
    assert call("calibrate", model, "--data", samples, "-o", path) == 0
    found = statistics.load(path, merge.digest(load(model)))
    x = np.load(samples)["x"]
    seen: Any = found.stats[Key("x", "histogram")]
    assert seen.low == pytest.approx(float(x.min()), abs=0)
    assert seen.count == x.size
    with pytest.raises(OptionError, match="another model"):
        statistics.load(path, merge.digest(load(other)))


def test_equal_calibrations_are_equal_files(model: Path, samples: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.stats", tmp_path / "2.stats"
    assert call("calibrate", model, "--data", samples, "-o", first) == 0
    assert call("calibrate", model, "--data", samples, "-o", second) == 0
    assert first.read_bytes() == second.read_bytes()


BAD_INPUT = {
    "unknown command": (["inspekt", "{model}"], "inspekt"),
    "unknown option": (["inspect", "{model}", "--sample", "3"], "--sample"),
    "missing model": (["inspect", "{folder}/no.onnx"], "no.onnx"),
    "folder for a model": (["bench", "{folder}"], "is a folder"),
    "missing data": (["validate", "{model}", "{model}", "--data", "{folder}/no"], "no"),
    "data that does not fit": (["validate", "{model}", "{model}", "--data", "{wrong}"], "'x'"),
    "unknown provider": (["bench", "{model}", "--provider", "Abacus"], "Abacus"),
    "memory without unit": (["calibrate", "{model}", "--max-memory", "lots"], "400MB"),
    "no memory": (["calibrate", "{model}", "--max-memory", "0MB"], "no memory"),
    "missing output": (["calibrate", "{model}", "--data", "{samples}"], "--output"),
    "output in no folder": (
        ["calibrate", "{model}", "--data", "{samples}", "-o", "{folder}/no/s"],
        "no folder",
    ),
    "output is a folder": (
        ["calibrate", "{model}", "--data", "{samples}", "-o", "{folder}"],
        "is a folder",
    ),
    "output is the input": (
        ["calibrate", "{model}", "--data", "{samples}", "-o", "{model}"],
        "is the input itself",
    ),
    "vectors in a file": (
        ["validate", "{model}", "{model}", "--save-vectors", "{model}"],
        "is a file",
    ),
    "missing recipe": (["quantize", "{model}", "--recipe", "{folder}/no.toml"], "no.toml"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, model: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.ones((5, 9), np.float32))
    places = {"model": model, "samples": samples, "folder": tmp_path}
    places["wrong"] = tmp_path / "wrong.npz"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments, word = BAD_INPUT[name]
    assert call(*(a.format(**places) for a in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Error: ")
    assert shown.err.count("\n") == 1
    assert word in shown.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes, capsys: Any) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    for command in ("inspect", "bench"):
        assert call(command, path) == 2
        assert "broken.onnx" in capsys.readouterr().err


def test_a_model_that_does_not_load_is_named(model: Path, tmp_path: Path, capsys: Any) -> None:
    bad = write(tmp_path / "bad.onnx", TEXT.replace("[4, 3] w", "[5, 3] w"))
    assert call("bench", model, bad) == 2
    assert "bad.onnx: ONNX Runtime refuses" in capsys.readouterr().err


def test_output_that_is_not_writable(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OptionError, match="not writable"):
        check_output(tmp_path / "out.onnx", model)


def test_output_is_checked_before_the_long_work(
    model: Path, samples: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(calibration, "open_data", lambda *a, **k: pytest.fail("the work has begun"))
    assert call("calibrate", model, "--data", samples, "-o", model) == 2


def test_interruption(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "inspect", interrupt)
    assert call("inspect", model) == 130
    assert capsys.readouterr().err.strip() == "Interrupted; no partial file was left."


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(28, "No space left on device", "out.onnx"), "out.onnx: No space"),
        (MemoryError(), "memory"),
        (RuntimeError("can't start new thread"), "no further thread"),
    ],
)
def test_what_the_system_refuses(
    error: BaseException, word: str, model: Path, monkeypatch: Any, capsys: Any
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    assert call("inspect", model) == 2
    assert word in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `onnxc quantize` asks of `api.quantize`; the answer misses a bound if one is given."""
    heard: dict[str, Any] = {}

    def quantize(model: Any, **settings: Any) -> Report:
        heard.update(settings, model=model)
        missed = ("top-1 drops by 9 points",) if settings["max_drop"] == 0 else ()
        return Report("m", "o", Measure(4), Measure(1), missed=missed, recipe=dump(Recipe(seed=7)))

    monkeypatch.setattr(api, "quantize", quantize)
    return heard


def test_quantize_passes_its_options_on(asked: dict[str, Any], tmp_path: Path) -> None:
    arguments = "quantize m.onnx --data d --val v --samples 9 -o o.onnx --preset imagenet "
    arguments += "--resize none --mean 0.1,0.2,0.3 --scale 1/255 --size 240x320 --bits 4 "
    arguments += "--format weight-only --ranges mse --include /a/* --include op:Conv --exclude b "
    arguments += "--max-memory 1.5GB --threads 2 --level basic --seed 3 --strict"
    assert call(*arguments.split()) == 0
    assert asked["model"] == Path("m.onnx")
    assert asked["output"] == Path("o.onnx")
    assert (asked["data"], asked["val"], asked["samples"], asked["seed"]) == ("d", "v", 9, 3)
    assert asked["preprocess"].preset == "imagenet"
    assert asked["preprocess"].resize == "none"
    assert asked["preprocess"].size == "240x320"
    assert asked["preprocess"].mean == (0.1, 0.2, 0.3)
    assert asked["preprocess"].scale == pytest.approx(1 / 255, abs=1e-12)
    assert asked["settings"] == api.QuantizeSettings("weight-only", "affine", 4, ranges="mse")
    assert (asked["include"], asked["exclude"]) == (("/a/*", "op:Conv"), ("b",))
    assert asked["max_memory"] == 1_500_000_000
    assert asked["runtime"] == Runtime(threads=2, level="basic")
    assert asked["strict"] is True


def test_a_dry_run_asks_for_a_preview(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    heard: dict[str, Any] = {}

    def preview(model: Any, **settings: Any) -> Preview:
        heard.update(settings)
        return Preview("m.onnx", "o.onnx", "x86", (), {"static": Effect((), (), ())})

    monkeypatch.setattr(api, "preview", preview)
    assert call("quantize", "m.onnx", "--dry-run", "--exclude", "/a", "--samples", 3) == 0
    assert (heard["exclude"], heard["samples"]) == (("/a",), 3)
    assert "not written" in capsys.readouterr().out


def test_a_counted_progress_gets_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    clock = iter([0.0, 10.0, 15.0, 16.0])
    monkeypatch.setattr("onnxc.commands.time.monotonic", lambda: next(clock))
    watch = Watch(shown.append)
    for text in ("calibrating 0/40", "calibrating 10/40", "calibrating 40/40", "timing"):
        watch(text)
    assert shown == [
        "calibrating 0/40",
        "calibrating 10/40, about 30 s left",
        "calibrating 40/40",
        "timing",
    ]


def test_quantize_without_options_asks_for_the_defaults(asked: dict[str, Any]) -> None:
    assert call("quantize", "m.onnx") == 0
    assert asked["settings"] == api.QuantizeSettings()
    assert asked["runtime"] == Runtime()
    assert asked["recipe"] is None


def test_quantize_exit_codes_and_recipe(asked: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "r.toml"
    path.write_text(dump(Recipe(seed=5)))
    assert call("quantize", "m.onnx", "--recipe", path, "--print-recipe", "--quiet") == 0
    assert asked["recipe"] == Recipe(seed=5)
    assert capsys.readouterr().out.startswith("seed = 7\n")
    assert call("quantize", "m.onnx", "--max-drop", 0) == 1


@dataclass(frozen=True)
class Settings:
    """Fields of every kind.

    share: how much
        of it. on: is not an entry.
    low, high: the ends.
    """

    share: float = 0.5
    on: bool = True
    word: Literal["fast", "small"] = "fast"
    bits: Literal[4, 8] = 8
    limit: int | None = 9
    low: tuple[float, ...] = (1.0,)
    high: int | str | None = None
    mixed: Literal["auto", 8, "float"] = "auto"


def settings_from(*arguments: str) -> Settings:
    @click.command()
    @options.from_fields(Settings)
    @click.pass_context
    def command(context: click.Context, /, **given: Any) -> Settings:
        return options.build(context, Settings)

    result: Settings = command.main(list(arguments), standalone_mode=False)
    return result


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", Settings()),
        ("--share 1 --no-on --word small --bits 4", Settings(1.0, False, "small", 4)),
        ("--limit none --low 0.5,2", Settings(limit=None, low=(0.5, 2.0))),
        ("--low 3 --high 3", Settings(low=(3.0,), high=3)),
        ("--high none", Settings(high="none")),
        ("--mixed 8", Settings(mixed=8)),
        ("--mixed float", Settings(mixed="float")),
    ],
)
def test_options_come_from_fields(arguments: str, expected: Settings) -> None:
    assert settings_from(*arguments.split()) == expected


@pytest.mark.parametrize(
    "arguments", ["--share x", "--word slow", "--bits 5", "--low a,b", "--mixed 7"]
)
def test_options_refuse_other_types(arguments: str) -> None:
    with pytest.raises(click.BadParameter):
        settings_from(*arguments.split())


def test_option_help_comes_from_the_docstring() -> None:
    @click.command()
    @options.from_fields(Settings)
    def command(**given: Any) -> None: ...

    shown = " ".join(command.get_help(click.Context(command)).split())
    assert "--share NUMBER How much of it." in shown
    assert "[default: 0.5]" in shown
    assert "--bits 4|8" in shown
    assert "--low LIST The ends. [default: 1.0]" in shown


@pytest.mark.parametrize(
    ("text", "amount"),
    [("400MB", 400_000_000), ("2GB", 2_000_000_000), ("1.5 GiB", 1_610_612_736), ("123", 123)],
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert options.amount(text) == amount


def test_levels_are_those_of_the_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", "--help") == 0
    assert f"[{'|'.join(LEVELS)}]" in capsys.readouterr().out


def test_shells_complete_commands_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    from click.shell_completion import BashComplete

    from onnxc.commands import onnxc

    complete = BashComplete(onnxc, {}, "onnxc", "_ONNXC_COMPLETE")
    found = {item.value for item in complete.get_completions([], "c")}
    assert {"calibrate", "cluster", "compress"} <= found
    found = {item.value for item in complete.get_completions(["compress", "--minimize"], "")}
    assert found == {"latency", "size", "energy-proxy"}


def test_starting_takes_no_library_that_is_not_used() -> None:
    """Each command pays for what is imported, and so does each process that opens a model."""
    heavy = ("sympy", "matplotlib", "jinja2", "PIL", "distributed", "onnxscript", "torch")
    program = f"import sys, onnxc.commands, onnxc.api; print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
