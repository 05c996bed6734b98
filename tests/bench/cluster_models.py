"""What shared weights cost real networks, as they are and packed, in RESULTS.md.

    python tests/bench/cluster_models.py [NAME ...]

Codebooks of few bits, then the chain of Deep Compression (Han 2016) by the recipe of that name,
beside what the paper reports. Networks are judged on validation data that nothing else sees.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_models import NETWORKS, SHARED
from sections import judged, put_section, row

import onnxc
from onnxc import recipe
from onnxc.report import Packed, Report

CASES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "resnet20": (("--bits 4", {"bits": 4}), ("--bits 3", {"bits": 3})),
    "squeezenet": (
        ("--bits 4", {"bits": 4}),
        ("--bits 4 --gains always", {"bits": 4, "gains": "always"}),
    ),
    "mobilenetv2": (("--bits 5", {"bits": 5}),),
    "stories260k": (
        ("--bits 4", {"bits": 4}),
        ("--bits 4 --gains always", {"bits": 4, "gains": "always"}),
    ),
}
CHAIN = "--recipe deep-compression"
PAPER = (
    ("LeNet-300-100", "40x"),
    ("LeNet-5", "39x"),
    ("AlexNet", "35x"),
    ("VGG-16", "49x"),
)
HEADINGS = ("network", "options", "judged by", "float", "result", "agreement", "file", "packed")
HEADING = "## `onnxc cluster` and `onnxc pack`"
RATIOS = "Ratios are of the float file. "


def main() -> None:
    """Rewrite, judge, pack, print a line for each case, and put the table into RESULTS.md."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    names = sys.argv[1:] or list(CASES)
    lines = [row(*HEADINGS), row(*("---" for _ in HEADINGS))]
    for name in names:
        for line in rows(name):
            print(line, flush=True)
            lines.append(line)
    lines += [
        row(net, "Deep Compression, with training", "", "", "", "", "", x) for net, x in PAPER
    ]
    put_section(HEADING, RATIOS + "\n\n" + "\n".join(lines))


def rows(name: str) -> Iterator[str]:
    """The cases of one network."""
    chain = {"recipe": recipe.load("deep-compression")}
    for options, settings in (*CASES[name], (CHAIN, chain)):
        yield row(name, f"`{options}`", *_cells(*measure(name, settings)))


def measure(name: str, settings: dict[str, Any]) -> tuple[Report, Packed]:
    """Cluster one network and pack the file."""
    real, data = NETWORKS[name], SHARED / "data"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.onnx"
        found = onnxc.cluster(
            SHARED / "models" / f"{name}.onnx",
            data=data / real.calib,
            samples=real.samples,
            val=data / real.val,
            preprocess=real.preprocess,
            output=output,
            **settings,
        )
        return found, onnxc.pack(output)


def _cells(found: Report, packed: Packed) -> Iterator[str]:
    comparison, before = found.comparison, found.before.bytes
    assert comparison is not None
    yield from judged(comparison)
    yield f"{before / found.after.bytes:.1f}x"
    yield f"{before / packed.after:.1f}x"


if __name__ == "__main__":
    main()
