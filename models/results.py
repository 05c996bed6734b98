"""Make RESULTS.md: what onnxc makes of the small networks in this folder, in every format.

    python models/results.py

Each file is written by `onnxc.quantize` from 200 calibration samples and judged by
`onnxc.validate`, as a file on disk, with 477 validation samples that calibration never sees. The
target is fixed, so that other machines write the same files, but for `auto`, which goes by what it
measures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnxruntime

import onnxc
from onnxc.api import QuantizeSettings
from onnxc.report import Validation
from onnxc.targets import detect

HERE = Path(__file__).resolve().parent
NETWORKS = ("digits_cnn", "digits_transformer")
TARGET = "x86-vnni"
WAYS = {
    "auto (default)": QuantizeSettings(),
    "qdq": QuantizeSettings("qdq"),
    "qoperator": QuantizeSettings("qoperator"),
    "dynamic": QuantizeSettings("dynamic"),
    "weight-only": QuantizeSettings("weight-only"),
    "weight-only, 4 bits": QuantizeSettings("weight-only", bits=4),
    "fixed point": QuantizeSettings("qdq", "fixed"),
    "fixed point, 16 bits": QuantizeSettings("qdq", "fixed", 16),
}
HEADINGS = ("format", "file", "top-1", "agreement", "SQNR", "speed", "int kernels")
REAL = "\n# Real networks\n"
TITLE = "# Results\n\nMade by `python models/results.py`; do not edit.\n"


def main() -> None:
    """Write RESULTS.md beside this script and print it."""
    sections = ["\n".join(_section(name)) for name in NETWORKS]
    text = "\n".join((TITLE, _setting(), *sections))
    old = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    _, mark, real = old.partition(REAL)  # the part that tests/bench writes
    (HERE / "RESULTS.md").write_text(f"{text.rstrip()}\n{mark}{real}", encoding="utf-8")
    print(text)


def _setting() -> str:
    return (
        "Calibrated on 200 samples, judged on the 477 validation samples, none of them in both. "
        f"ONNX Runtime {onnxruntime.__version__}, target `{TARGET}`, measured on a processor of "
        f"class `{detect()}` with one thread. Top-1 and agreement (the same class as the float "
        "network) are shares of the samples, so one sample is 0.21 %. Speed is the median of "
        "float latency over result latency, both taken in turn: above 1 is faster, and the second "
        "digit is noise. Int kernels are the heavy nodes (Conv, Gemm, MatMul) that run in "
        "integers after ONNX Runtime's own optimization.\n"
    )


def _section(name: str) -> Iterator[str]:
    """A heading and a table with one row a format."""
    yield f"## {name}\n"
    yield _row(*HEADINGS)
    yield _row(*("---" if h == "format" else "---:" for h in HEADINGS))
    written: dict[bytes, str] = {}
    for number, way in enumerate(WAYS):
        print(f"{name}: {way}", file=sys.stderr)
        try:
            content, found = measure(name, WAYS[way])
        except onnxc.OnnxcError as error:
            yield _row(way, f"refused: {error}", *[""] * 5)
            continue
        if not number:
            before = found.comparison.top1[0] if found.comparison.top1 else float("nan")
            yield _row("float", _kilobytes(found.before.bytes), _share(before), *[""] * 4)
        if content in written:
            yield _row(way, f"the same file as {written[content]}", *[""] * 5)
            continue
        written[content] = way
        yield _row(way, *_figures(found))
    yield ""


def measure(name: str, settings: QuantizeSettings) -> tuple[bytes, Validation]:
    """The file that quantizing a network gives, and its validation."""
    model = HERE / f"{name}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.onnx"
        onnxc.quantize(
            model,
            data=HERE / f"{name}_calib.npz",
            val=HERE / f"{name}_val.npz",
            output=output,
            target=TARGET,
            settings=settings,
        )
        found = onnxc.validate(model, output, data=HERE / f"{name}_val.npz")
        return output.read_bytes(), found


def _figures(found: Validation) -> Iterator[str]:
    comparison, coverage = found.comparison, found.coverage
    yield _kilobytes(found.after.bytes)
    yield _share(comparison.top1[1] if comparison.top1 else None)
    yield _share(comparison.agreement)
    yield f"{comparison.sqnr:.1f} dB"
    yield f"{found.speedup.median:.1f}x" if found.speedup else ""
    yield f"{coverage.integer}/{coverage.total}" if coverage else ""


def _kilobytes(count: int) -> str:
    return f"{count / 1000:.1f} kB"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
