"""What a figure was measured with: versions of the libraries, the class of the processor."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version

import archspec.cpu
import archspec.cpu.detect

LIBRARIES = ("onnxc", "onnx", "onnxruntime", "numpy")
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Surroundings:
    """Where a report was made. versions: of Python and of LIBRARIES.

    system: the operating system and the kind of machine; no name of either. processor: its class.
    features: those of its instructions that make integers fast. cores: that this process may use.
    """

    versions: dict[str, str] = field(default_factory=dict)
    system: str = ""
    processor: str = ""
    features: tuple[str, ...] = ()
    cores: int = 0


def surroundings() -> Surroundings:
    """Those of this process."""
    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    flags = archspec.cpu.detect.detected_info().features
    return Surroundings(
        versions=found,
        system=f"{platform.system()} {platform.machine()}",
        processor=archspec.cpu.host().name,
        features=tuple(name for name in FEATURES if name in flags),
        cores=_cores(),
    )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
