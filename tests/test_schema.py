"""The schema of reports: it is that of the code, and real reports fit it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from calls import report_of
from test_html import CHECKED, FULL, PRUNED, TIMED

from onnxc import schema
from onnxc.report import to_json

ROOT = Path(__file__).resolve().parents[1]
MODELS, DOCS = ROOT / "models", ROOT / "docs"
WEIGHTS = ("--format", "weight-only")
DATA = ("--data", MODELS / "digits_cnn_calib.npz", "--samples", 40)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return schema.schema()


def check(whole: dict[str, Any], name: str, found: Any) -> None:
    """Raise ValidationError where a report is not what its definition says."""
    validator = jsonschema.Draft202012Validator
    validator({**whole["$defs"][name], "$defs": whole["$defs"]}).validate(found)
    validator(whole).validate(found)


def test_the_file_is_that_of_the_code(whole: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(whole)
    text = (DOCS / "report.schema.json").read_text(encoding="utf-8")
    assert text == schema.to_text(), "write it anew with onnxc.schema.to_text()"


@pytest.mark.parametrize("report", [FULL, PRUNED, CHECKED, TIMED])
def test_reports_fit(whole: dict[str, Any], report: Any) -> None:
    check(whole, type(report).__name__, json.loads(to_json(report)))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("Inspection", ("inspect", MODELS / "digits_cnn.onnx")),
        ("Preview", ("quantize", MODELS / "digits_cnn.onnx", *DATA, "--dry-run")),
        ("Report", ("quantize", MODELS / "digits_cnn.onnx", *WEIGHTS, "-o", "{}/m.onnx")),
        ("Report", ("quantize", MODELS / "digits_cnn.onnx", *DATA, "-o", "{}/m.onnx")),
        ("Calibrated", ("calibrate", MODELS / "digits_cnn.onnx", *DATA, "-o", "{}/m.stats")),
    ],
)
def test_what_commands_print_fits(
    whole: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: tuple[Any, ...],
) -> None:
    found = report_of(capsys, *(str(part).format(tmp_path) for part in command))
    check(whole, name, found)


def test_what_does_not_fit_is_refused(whole: dict[str, Any]) -> None:
    found = json.loads(to_json(FULL))
    for broken in ({**found, "more": 1}, {**found, "model": None}, {"model": "m"}):
        with pytest.raises(jsonschema.ValidationError):
            check(whole, "Report", broken)


@dataclass
class Odd:
    """Odd. first, second: two keys. third: one."""

    first: int
    second: tuple[int, str] | None
    third: complex = 1j


def test_descriptions_come_from_docstrings_and_odd_types_are_refused() -> None:
    told = schema._entries(Odd, ["first", "second", "third"])
    assert [entry["description"] for entry in told.values()] == ["two keys.", "two keys.", "one."]
    with pytest.raises(TypeError, match="complex"):
        schema._of(Odd, {})


def test_every_key_is_explained(whole: dict[str, Any]) -> None:
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w.]+)`", text))
    keys = {key for entry in whole["$defs"].values() for key in entry["properties"]}
    assert keys <= {part for name in told for part in name.split(".")}
