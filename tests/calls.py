"""Commands as a user calls them: the exit code, or the report as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onnxc.cli import run


def call(*arguments: Any) -> int:
    return run([str(a) for a in arguments])


def report_of(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> dict[str, Any]:
    assert call(*arguments, "--json") == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found
