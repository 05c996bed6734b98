"""What default settings make of six real networks: accuracy, speed, size, integer kernels.

    python tests/bench/real_models.py [NAME ...]

Each network is quantized from its calibration data alone and judged by `onnxc.validate` on its own
validation data, with one thread, the float network and the result taken in turn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxc
from calib.data import Preprocess
from onnxc.report import Validation

SHARED = Path(__file__).resolve().parents[3] / "shared"
IMAGENET = Preprocess("imagenet")
HEADINGS = ("network", "samples", "top-1", "agree", "SQNR", "speed", "size", "int kernels")
WIDTHS = (13, 9, 17, 9, 7, 8, 8, 13)


@dataclass(frozen=True)
class Real:
    """A network's data below the folder data: what calibrates it and what judges it."""

    calib: str
    val: str
    preprocess: Preprocess | None = None
    samples: int | None = None  # of the calibration data


NETWORKS = {
    "mobilenetv2": Real("imagenet1k/calib", "imagenet1k/val", IMAGENET),
    "squeezenet": Real("imagenet1k/calib", "imagenet1k/val", IMAGENET),
    "resnet20": Real("cifar10/calib", "cifar10/val", Preprocess("imagenet", resize="none"), 256),
    "stories260k": Real("stories260k/calib.npz", "stories260k/val.npz"),
    "sst2": Real("sst2/calib.npz", "sst2/val.npz"),
    "agnews": Real("agnews/calib.npz", "agnews/val.npz"),
}


def main() -> None:
    """Quantize, validate, and print a line for each network."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    print("".join(f"{h:>{w}s}" for h, w in zip(HEADINGS, WIDTHS, strict=True)))
    for name in sys.argv[1:] or NETWORKS:
        cells = (name, *_cells(measure(name)))
        print("".join(f"{c:>{w}s}" for c, w in zip(cells, WIDTHS, strict=False)), *cells[8:])


def measure(name: str) -> Validation:
    """Quantize one network by default settings and validate the file."""
    model, real = SHARED / "models" / f"{name}.onnx", NETWORKS[name]
    data = SHARED / "data"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.onnx"
        onnxc.quantize(
            model,
            data=data / real.calib,
            preprocess=real.preprocess,
            samples=real.samples,
            output=output,
        )
        return onnxc.validate(model, output, data=data / real.val, preprocess=real.preprocess)


def _cells(found: Validation) -> Iterator[str]:
    comparison, coverage = found.comparison, found.coverage
    yield str(comparison.samples)
    yield _pair(comparison.top1)
    yield "" if comparison.agreement is None else f"{100 * comparison.agreement:.2f}"
    yield f"{comparison.sqnr:.1f}"
    yield f"{found.speedup.median:.2f}x" if found.speedup else ""
    yield f"{found.before.bytes / found.after.bytes:.2f}x"
    yield f"{coverage.integer}/{coverage.total}" if coverage else ""
    if comparison.perplexity:
        yield f"  perplexity {comparison.perplexity[0]:.3f} -> {comparison.perplexity[1]:.3f}"


def _pair(shares: tuple[float, float] | None) -> str:
    return f"{100 * shares[0]:.2f} -> {100 * shares[1]:.2f}" if shares else ""


if __name__ == "__main__":
    main()
