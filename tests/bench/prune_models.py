"""What pruning and zeros cost three real networks: accuracy and latency at each budget.

    python tests/bench/prune_models.py [NAME ...]

Each network is rewritten from its calibration data alone and judged on its own validation data,
with one thread, the float network and the result taken in turn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_models import NETWORKS, SHARED

import onnxc
from onnxc.report import Report

BUDGETS = (0.9, 0.8, 0.7, 0.6)  # of the MACs
INNER = {"include": ("/layer*conv1*",), "allocation": "uniform"}  # first in each block
RESNET: dict[str, tuple[str, dict[str, Any]]] = {
    "25 % inner": ("prune", {"ratio": 0.25, **INNER}),
    "50 % inner": ("prune", {"ratio": 0.5, **INNER}),
    "75 % MACs": ("prune", {"macs": 0.75}),
    "2:4": ("sparsify", {"nm": "2:4"}),
    "70 % zeros": ("sparsify", {"sparsity": 0.7}),
    "80 % zeros": ("sparsify", {"sparsity": 0.8}),
}
CASES = {
    "resnet20": RESNET,
    "mobilenetv2": {f"{100 * b:g} % MACs": ("prune", {"macs": b}) for b in BUDGETS},
    "squeezenet": {f"{100 * b:g} % MACs": ("prune", {"macs": b}) for b in BUDGETS},
}
HEADINGS = ("network", "what", "top-1", "agree", "SQNR", "MACs", "speed", "seconds")
WIDTHS = (13, 13, 17, 9, 8, 7, 8, 9)


def main() -> None:
    """Rewrite, judge, and print a line for each case."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    print("".join(f"{h:>{w}s}" for h, w in zip(HEADINGS, WIDTHS, strict=True)))
    for name in sys.argv[1:] or CASES:
        for case, (task, settings) in CASES[name].items():
            cells = (name, case, *_cells(measure(name, task, settings)))
            print("".join(f"{c:>{w}s}" for c, w in zip(cells, WIDTHS, strict=True)), flush=True)


def measure(name: str, task: str, settings: dict[str, Any]) -> Report:
    """Carry out one command on one network."""
    real, data = NETWORKS[name], SHARED / "data"
    with tempfile.TemporaryDirectory() as folder:
        report: Report = getattr(onnxc, task)(
            SHARED / "models" / f"{name}.onnx",
            data=data / real.calib,
            val=data / real.val,
            preprocess=real.preprocess,
            samples=real.samples,
            output=Path(folder) / "result.onnx",
            **settings,
        )
    return report


def _cells(found: Report) -> Iterator[str]:
    comparison = found.comparison
    assert comparison is not None and comparison.top1 is not None
    before, after = comparison.top1
    yield f"{100 * before:.2f} → {100 * after:.2f}"
    yield f"{100 * (comparison.agreement or 0):.1f}"
    yield f"{comparison.sqnr:.1f}"
    yield (
        f"{found.after.macs / found.before.macs:.2f}"
        if found.after.macs and found.before.macs
        else ""
    )
    yield f"{found.speedup.median:.2f}x" if found.speedup else ""
    yield f"{found.seconds or 0:.0f}"


if __name__ == "__main__":
    main()
