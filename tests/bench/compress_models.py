"""`onnxc compress` on real networks, in RESULTS.md.

    python tests/bench/compress_models.py [NAME ...]

Each search has its minutes; the verdict is on validation data that it never sees.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from real_models import NETWORKS, SHARED
from sections import judged, put_section, row

import onnxc
from onnxc.report import Report


@dataclass(frozen=True)
class Case:
    """One search: what is to become small, minutes, and the suffix of the file."""

    name: str
    minimize: Literal["latency", "size"]
    minutes: int
    suffix: str


CASES = (
    Case("mobilenetv2", "latency", 10, ".onnx"),
    Case("resnet20", "latency", 15, ".onnx"),
    Case("mobilenetv2", "size", 12, ".onnxz"),
    Case("squeezenet", "size", 30, ".onnxz"),
    Case("resnet20", "size", 15, ".onnxz"),
)
HEADINGS = (
    *("network", "minimize", "found", "plans", "expected drop", "judged by", "float", "result"),
    *("agreement", "size", "file", "speed"),
)
NOTE = (
    "`--max-drop 1.0`: one point of top-1. The expected drop is that of the samples that chose, up "
    "to the upper bound of its interval, which the search keeps below 1; result and agreement are "
    "of validation data that it never saw. Speed is of the float model's latency on one thread."
)


def main() -> None:
    """Search, print a line for each, and put a table into RESULTS.md."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    lines = [row(*HEADINGS), row(*("---" for _ in HEADINGS))]
    for case in CASES:
        if not sys.argv[1:] or case.name in sys.argv[1:]:
            found = searched(case)
            lines.append(row(case.name, case.minimize, *cells(found)))
            print(lines[-1], flush=True)
    put_section("## `onnxc compress`", NOTE + "\n\n" + "\n".join(lines))


def searched(case: Case) -> Report:
    """Carry one search out."""
    real, data = NETWORKS[case.name], SHARED / "data"
    with tempfile.TemporaryDirectory() as folder:
        return onnxc.compress(
            SHARED / "models" / f"{case.name}.onnx",
            data=data / real.calib,
            val=data / real.val,
            preprocess=real.preprocess,
            output=Path(folder) / f"result{case.suffix}",
            minimize=case.minimize,
            max_drop=1.0,
            max_time=60.0 * case.minutes,
        )


def cells(found: Report) -> Iterator[str]:
    """Of a search: what it found, and what that is worth."""
    best = next(point for point in found.points if point.is_best)
    comparison = found.comparison
    assert comparison is not None
    yield f"`{best.name.partition(':')[0]}`"
    yield str(len({point.name.partition(":")[0] for point in found.points}) - 1)
    yield f"{best.drop:.2f} to {best.high:.2f}"
    yield from judged(comparison)
    yield f"{found.before.bytes / found.after.bytes:.1f}x"
    yield f"{found.after.bytes / 1e6:.3f} MB"
    yield f"{found.speedup.median:.2f}x" if found.speedup else ""


if __name__ == "__main__":
    main()
