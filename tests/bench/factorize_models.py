"""What factors of low rank cost real networks: MACs against agreement and latency, in RESULTS.md.

    python tests/bench/factorize_models.py [NAME ...]

Each network is rewritten for four budgets of MACs: from its calibration data, from the weights
alone, and keeping to layers whose factors are faster here (the default). It is judged on validation
data that nothing else sees, with one thread, the float network and the result taken in turn. The
tables go into the part of models/RESULTS.md on real networks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_models import NETWORKS, SHARED
from sections import put_section, row

import onnxc
from onnxc.report import Report
from onnxc.targets import detect

BUDGETS = (0.9, 0.8, 0.7, 0.6)  # of the MACs
WAYS: dict[str, dict[str, Any]] = {
    "all layers": {"faster": False},
    "all layers, without data": {"faster": False, "data": None, "samples": None},
    "faster layers (default)": {},
}
HEADINGS = ("MACs asked", "what", "MACs", "weights", "top-1", "agreement", "SQNR", "speed")


def main() -> None:
    """Rewrite, judge, print a line for each case, and put the tables into RESULTS.md."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    for name in sys.argv[1:] or ("squeezenet", "mobilenetv2"):
        lines = []
        for line in table(name):
            print(line, flush=True)
            lines.append(line)
        put_section(f"## {name}, `onnxc factorize --macs`", "\n".join(lines))


def table(name: str) -> Iterator[str]:
    """The setting and the rows of one network."""
    yield (
        f"{_setting(name)}, one thread of a processor of class `{detect()}`; above 1 is faster.\n"
    )
    yield row(*HEADINGS)
    yield row(*("---" if h == "what" else "---:" for h in HEADINGS))
    for budget in BUDGETS:
        for way, settings in WAYS.items():
            yield row(f"{budget:.0%}", way, *_cells(measure(name, macs=budget, **settings)))


def _setting(name: str) -> str:
    return f"Judged on the validation data of `{NETWORKS[name].val}`"


def measure(name: str, **settings: Any) -> Report:
    """Factorize one network."""
    real, data = NETWORKS[name], SHARED / "data"
    given = {"data": data / real.calib, "samples": real.samples, **settings}
    with tempfile.TemporaryDirectory() as folder:
        return onnxc.factorize(
            SHARED / "models" / f"{name}.onnx",
            val=data / real.val,
            preprocess=real.preprocess,
            output=Path(folder) / "result.onnx",
            **given,
        )


def _cells(found: Report) -> Iterator[str]:
    comparison, before, after = found.comparison, found.before, found.after
    assert comparison is not None and comparison.top1 is not None
    yield f"{after.macs / before.macs:.0%}" if after.macs and before.macs else ""
    yield f"{after.bytes / before.bytes:.0%}"
    yield f"{100 * comparison.top1[0]:.1f} → {100 * comparison.top1[1]:.1f} %"
    yield f"{100 * (comparison.agreement or 0):.1f} %"
    yield f"{comparison.sqnr:.1f} dB"
    yield f"{found.speedup.median:.2f}x" if found.speedup else ""


if __name__ == "__main__":
    main()
