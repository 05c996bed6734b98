"""models/RESULTS.md holds what models/results.py would write today."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from texts import exact_sums

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
Rows = dict[tuple[str, str], list[str]]

FILE_SHARE = 0.05  # by which a file may differ from the table before it has to be made again
POINTS = 1.0  # of top-1 and agreement, in per cent: 5 of 477 samples
DECIBELS = 3.0


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """models/results.py as a module."""
    sys.path.insert(0, str(MODELS))
    try:
        import results
    finally:
        sys.path.remove(str(MODELS))
    return results


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Cells of the table by network and format."""
    found: Rows = {}
    network = ""
    own, _, _ = (MODELS / "RESULTS.md").read_text(encoding="utf-8").partition("\n# ")
    for line in own.splitlines():
        network = line.removeprefix("## ") if line.startswith("## ") else network
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] not in ("format", "---"):
            found[network, cells[0]] = cells[1:]
    return found


def number(cell: str) -> float:
    match = re.match(r"[\d.]+", cell)
    assert match, f"{cell!r} is no figure"
    return float(match[0])


def test_every_network_and_format_has_a_row(script: ModuleType, rows: Rows) -> None:
    ways = ("float", *script.WAYS)
    assert list(rows) == [(network, way) for network in script.NETWORKS for way in ways]
    assert {p.stem for p in MODELS.glob("*.onnx")} == set(script.NETWORKS)


@pytest.mark.parametrize(
    ("network", "way"),
    [
        pytest.param("digits_cnn", "auto (default)", marks=exact_sums),
        ("digits_transformer", "weight-only"),
    ],
)
def test_the_figures_hold(script: ModuleType, rows: Rows, network: str, way: str) -> None:
    file, top1, agreement, sqnr, _, kernels = rows[network, way]
    _, found = script.measure(network, script.WAYS[way])
    assert found.after.bytes == pytest.approx(1000 * number(file), rel=FILE_SHARE)
    assert found.comparison.top1 is not None
    assert 100 * found.comparison.top1[1] == pytest.approx(number(top1), abs=POINTS)
    assert 100 * found.comparison.agreement == pytest.approx(number(agreement), abs=POINTS)
    assert found.comparison.sqnr == pytest.approx(number(sqnr), abs=DECIBELS)
    assert f"{found.coverage.integer}/{found.coverage.total}" == kernels


def test_the_readme_shows_the_default_of_the_digits_network(rows: Rows) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if line.startswith("| [digits_cnn]"))
    file, top1, agreement, *_ = rows["digits_cnn", "auto (default)"]
    assert f"→ {number(file):.0f} kB" in line
    assert f"→ {number(top1):.2f} %" in line
    assert f"| {number(agreement):.1f} %" in line
