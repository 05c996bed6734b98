"""Prices of code length by what the outputs of a model feel of each layer."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnxc
from onnxc.errors import OptionError
from onnxc.recipe import loads
from onnxc.report import Report
from passes.cluster import Cluster

MODELS = Path(__file__).resolve().parents[1] / "models"


def _clustered(tmp_path: Path, loss: float | None, method: str = "ecsq") -> Report:
    return onnxc.cluster(
        MODELS / "digits_cnn.onnx",
        data=MODELS / "digits_cnn_calib.npz",
        samples=40,
        output=tmp_path / "made.onnxz",
        method=method,
        bits=6,
        loss=loss,
    )


def _prices(report: Report) -> dict[str, float]:
    (cluster,) = [p for p in loads(report.recipe).passes if isinstance(p, Cluster)]
    return cluster.of_layers


@pytest.mark.slow
def test_a_loss_that_is_larger_makes_codes_shorter(tmp_path: Path) -> None:
    little, much = _clustered(tmp_path, 0.001), _clustered(tmp_path, 0.1)
    first, second = _prices(little), _prices(much)
    assert first.keys() == second.keys() and len(first) > 5
    for name in first:
        assert second[name] == pytest.approx(100 * first[name], rel=1e-3)
    assert max(first.values()) > 2 * min(first.values())  # layers are not felt alike
    assert much.after.bytes < 0.85 * little.after.bytes
    assert little.comparison is not None and much.comparison is not None
    assert little.comparison.sqnr > much.comparison.sqnr + 3


def test_what_does_not_go_with_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--loss is for --method ecsq"):
        _clustered(tmp_path, 0.1, method="dp")
    with pytest.raises(OptionError, match="more than 0"):
        _clustered(tmp_path, -1.0)
