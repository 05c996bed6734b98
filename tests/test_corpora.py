"""Every command on real models: no traceback, no bad file, no other interface, no lost heavy node.

Each is called as a user calls it, in a process of its own (`corpora`). Tables with counts per
reason end the output of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from corpora import COMMANDS, FAULTS, VARIANTS, Ended, Subject, accounted, called, judge, judged
from outcomes import Outcome, faults, plain, tables
from texts import bind, normal
from zoo import entries, quick, subject, with_options

from onnxc.graph import load, save

SAMPLE = ("winml_mnist", "pipeline_vectorize")  # of the zoo, in the quick suite
QUICK = ("inspect", "quantize", "pack", "unpack", "validate")

Record = Callable[[str, object], None]
every_model = pytest.mark.parametrize(
    "entry", entries() or [{"name": "none"}], ids=lambda entry: str(entry["name"])
)


def check(outcomes: list[Outcome], record: Record) -> None:
    record("outcomes", [tuple(outcome) for outcome in outcomes])
    assert not faults(outcomes)
    assert not [str(outcome) for outcome in outcomes if outcome.ending == "late"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(
    name: str, shared: Path, tmp_path: Path, record_property: Record
) -> None:
    (entry,) = [entry for entry in entries() if entry["name"] == name]
    folder = tmp_path / "out"
    folder.mkdir()
    check(list(judged(subject(entry, tmp_path), folder, QUICK)), record_property)


@pytest.mark.slow
@every_model
def test_the_zoo(
    entry: dict[str, Any], shared: Path, tmp_path: Path, record_property: Record
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    check(list(judged(subject(entry, tmp_path), folder)), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(VARIANTS)))
def test_each_option_on_models_of_the_zoo(
    turn: int, shared: Path, tmp_path: Path, record_property: Record
) -> None:
    check(list(with_options(turn, quick(), tmp_path)), record_property)


@pytest.fixture
def small(tmp_path: Path) -> Subject:
    proto = bind(
        "g (float[N,8] x, float[8,64] W) => (float[N,64] y) { y = MatMul (x, W) }", W=normal(8, 64)
    )
    save(load(proto), tmp_path / "small.onnx")
    np.savez(tmp_path / "x.npz", x=normal(12, 8))
    feed = {"x": normal(1, 8)}
    return Subject("own", "small", tmp_path / "small.onnx", tmp_path / "x.npz", feed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "out"
    place.mkdir()
    return place


TRACE = 'Traceback (most recent call last):\n  File "a.py", line 1\nKeyError: 1'


@pytest.mark.parametrize(
    ("code", "out", "err", "ending"),
    [
        (1, "", TRACE, "traceback"),
        (-11, "", "", "signal"),
        (3, "", "", "exit code"),
        (2, "", "Error: one\nand two", "no sentence"),
        (2, "", "", "no sentence"),
        (0, "no report", "", "report"),
        (0, "{}", "", "invalid"),
        (None, "", "", "late"),
        (2, "", "Error: a sentence", "refused"),
    ],
)
def test_each_bad_end_is_told(
    code: int | None,
    out: str,
    err: str,
    ending: str,
    small: Subject,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("corpora.called", lambda *given: Ended(code, out, err))
    found = judge(small, COMMANDS["sparsify"], folder)
    assert found.ending == ending
    assert found.is_fault is (ending in FAULTS) is (ending not in ("late", "refused"))


def written(
    change: Callable[[onnx.ModelProto], object], small: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that writes the model with a change."""
    proto = onnx.load(small.model)
    change(proto)

    def wrote(arguments: list[str], folder: Path, limit: float) -> Ended:
        output = Path(arguments[arguments.index("-o") + 1])
        output.write_bytes(proto.SerializeToString())
        return Ended(0, "{}", "")

    monkeypatch.setattr("corpora.called", wrote)


def test_files_are_looked_at(small: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = proto.graph.node[0].input[0] = "other"

    def widen(proto: onnx.ModelProto) -> None:
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "M"

    def break_off(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "Nothing"

    for change, ending in ((rename, "invalid"), (widen, "interface"), (break_off, "invalid")):
        written(change, small, monkeypatch)
        assert judge(small, COMMANDS["sparsify"], folder).ending == ending
    written(lambda proto: None, small, monkeypatch)
    assert judge(small, COMMANDS["sparsify"], folder).ending == "done"


def test_files_that_nobody_asked_for_are_told(
    small: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strays(arguments: list[str], folder: Path, limit: float) -> Ended:
        (folder / ".left.tmp").touch()
        return Ended(2, "", "Error: a sentence")

    monkeypatch.setattr("corpora.called", strays)
    found = judge(small, COMMANDS["sparsify"], folder)
    assert (found.ending, found.reason) == ("stray file", ".left.tmp")


def test_a_heavy_node_that_is_not_told_is_a_fault(
    small: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = called

    def silent(arguments: list[str], folder: Path, limit: float) -> Ended:
        ended = real(arguments, folder, limit)
        report = json.loads(ended.out)
        assert accounted(report)
        silenced = {**report, "changes": [], "skips": [], "coverage": None}
        return ended if not told else Ended(ended.code, json.dumps(silenced), ended.err)

    monkeypatch.setattr("corpora.called", silent)
    told = False
    assert judge(small, COMMANDS["quantize"], folder).ending == "done"
    told = True
    assert judge(small, COMMANDS["quantize"], folder).ending == "heavy node"


def test_a_command_that_hangs_is_ended(small: Subject, folder: Path) -> None:
    ended = called(["inspect", str(small.model)], folder, limit=0.0)
    assert ended.code is None
    assert list(folder.iterdir()) == []


def test_tables_count_by_reason() -> None:
    found = [
        Outcome("zoo", "a", "prune", "refused", "/x/a.onnx is already quantized (qdq)"),
        Outcome("zoo", "b", "prune", "refused", "/x/b.onnx is already quantized (qdq)"),
        Outcome("zoo", "b", "inspect", "done"),
    ]
    text = "\n".join(tables(found))
    assert text.startswith("zoo, 2 models")
    assert "| `prune` | 2 | 0 | 2 |" in text and "| `inspect` | 1 | 1 | 0 |" in text
    assert "| refused | is already quantized (qdq) | 2 |" in text
    assert plain("weight 'w' has 12 of 3.5") == "weight … has n of n"
