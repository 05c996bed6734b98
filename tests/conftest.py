"""Fixtures for all tests: the shared inputs, models from ONNX text, and one run of a model.

The summary of a run ends with tables of what became of the models of corpora.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from outcomes import Outcome, tables

from onnxc import opening
from onnxc.graph import Model, to_bytes
from onnxc.runtime import Runtime, run, session

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[2] / "shared"

Weights = dict[str, NDArray[Any]]
Parse = Callable[..., onnx.ModelProto]
Outputs = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report opens each file in one process of its own, not in several: that takes seconds."""
    monkeypatch.setattr(opening, "ROUNDS", 1)


@pytest.fixture
def shared() -> Path:
    """The folder of real models and data beside the repository; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real models and data is not here")
    return SHARED


@pytest.fixture
def parse() -> Parse:
    """`parse(text, w=array)`: a model from ONNX text; arrays become its initializers.

    The header `<ir_version: 8, opset_import: ["" : 17]>` is added where the text has none.
    """

    def parsed(text: str, **weights: NDArray[Any]) -> onnx.ModelProto:
        header = "" if text.lstrip().startswith("<") else '<ir_version: 8, opset_import: ["" : 17]>'
        model = onnx.parser.parse_model(header + text)
        tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
        model.graph.initializer.extend(tensors)
        return model

    return parsed


@pytest.fixture
def outputs() -> Outputs:
    """`outputs(model, x=array)`: one run without optimizations; outputs by name."""

    def computed(model: Model | onnx.ModelProto | bytes, **feed: Any) -> dict[str, Any]:
        if isinstance(model, Model):
            model = to_bytes(model)
        data = model if isinstance(model, bytes) else model.SerializeToString()
        return run(session(data, Runtime(level="none")), feed)

    return computed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables of the outcomes that tests recorded, here or in other processes."""
    reports = (r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()))
    recorded = (p for report in reports for p in getattr(report, "user_properties", ()))
    outcomes = [Outcome(*o) for name, found in recorded if name == "outcomes" for o in found]
    if outcomes:
        terminalreporter.section("corpora")
        terminalreporter.write_line("\n".join(tables(outcomes)))
