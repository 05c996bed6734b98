"""Every scheme of `onnxc quantize` at every width on real networks, in RESULTS.md.

    python tests/bench/quantize_models.py [NAME ...]

One section a network. Each is calibrated, quantized and timed as the command does it, and judged on
validation data that nothing else sees.
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
from onnxc.errors import OnnxcError
from onnxc.report import Report

Case = dict[str, Any]

WIDTHS: tuple[Case, ...] = (
    {},
    {"rounding": "descent"},
    *({"bits": bits} for bits in (6, 5, 4, 3, 2)),
    {"bits": 4, "rounding": "nearest"},
    {"bits": 4, "rounding": "gptq"},
    {"bits": 3.5},
    {"bits": 4, "activations": "float"},
    {"bits": 8, "activations": 16},
)
SCHEMES: tuple[Case, ...] = (
    *({"scheme": "fixed", "bits": bits} for bits in (16, 8, 4)),
    *({"scheme": "pow2", "bits": bits} for bits in (4, 3)),
    {"scheme": "ternary"},
    *({"scheme": "binary", "bits": bases} for bases in (4, 3, 2, 1)),
    *({"scheme": "admm", "bits": bits} for bits in (4, 3)),
    *({"scheme": "levels", "bits": bits} for bits in (4, 3, 2)),
)
FEW: tuple[Case, ...] = (
    {},
    {"rounding": "descent"},
    *({"bits": bits} for bits in (4, 3)),
    {"bits": 4, "rounding": "nearest"},
    {"bits": 3.5},
    *({"scheme": "fixed", "bits": bits} for bits in (8, 4)),
    {"scheme": "pow2", "bits": 4},
    {"scheme": "binary", "bits": 4},
    {"scheme": "levels", "bits": 4},
)
DEEP: tuple[Case, ...] = (
    {},
    {"rounding": "descent"},
    {"bits": 4},
    {"bits": 3.5},
    {"scheme": "fixed", "bits": 8},
    {"scheme": "levels", "bits": 4},
)
WORDS: tuple[Case, ...] = (
    {},
    {"format": "qdq"},
    {"bits": 4},
    {"bits": 4, "rounding": "nearest"},
    *({"scheme": scheme, "bits": 4} for scheme in ("pow2", "binary", "levels")),
)
CASES = {
    "resnet20": (*WIDTHS, *SCHEMES),
    "squeezenet": FEW,
    "mobilenetv2": DEEP,
    "stories260k": WORDS,
}
HEADINGS = ("options", "judged by", "float", "result", "agreement", "SQNR", "file", "speed")
NOTE = (
    "Calibrated on data that is not judged. File is of the float one's bytes, speed of its latency "
    "on one thread."
)


def main() -> None:
    """Quantize networks in every way, print a line for each, and put tables into RESULTS.md."""
    if not (SHARED / "models").is_dir():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    for name in sys.argv[1:] or CASES:
        lines = [row(*HEADINGS), row(*("---" for _ in HEADINGS))]
        for settings in CASES[name]:
            lines.append(row(f"`{options(settings)}`", *_measured(name, settings)))
            print(name, lines[-1], flush=True)
        put_section(f"## {name}, `onnxc quantize`", NOTE + "\n\n" + "\n".join(lines))


def options(settings: Case) -> str:
    """As on the command line."""
    return " ".join(f"--{key} {value}" for key, value in settings.items()) or "by default"


def _measured(name: str, settings: Case) -> tuple[str, ...]:
    """The cells of one way; why there are none, where it is refused."""
    try:
        return tuple(_cells(quantized(name, settings)))
    except OnnxcError as error:
        return (str(error).replace("|", "/"), *[""] * (len(HEADINGS) - 2))


def quantized(name: str, settings: Case) -> Report:
    """Quantize one network."""
    real, data = NETWORKS[name], SHARED / "data"
    with tempfile.TemporaryDirectory() as folder:
        return onnxc.quantize(
            SHARED / "models" / f"{name}.onnx",
            data=data / real.calib,
            samples=real.samples,
            val=data / real.val,
            preprocess=real.preprocess,
            output=Path(folder) / "result.onnx",
            **settings,
        )


def _cells(found: Report) -> Iterator[str]:
    comparison = found.comparison
    assert comparison is not None
    yield from judged(comparison)
    yield f"{comparison.sqnr:.1f} dB"
    yield f"{100 * found.after.bytes / found.before.bytes:.1f} %"
    yield f"{found.speedup.median:.2f}x" if found.speedup else ""


if __name__ == "__main__":
    main()
