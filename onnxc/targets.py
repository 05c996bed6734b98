"""TARGETS: what each runtime and instruction set runs fast. One row a target.

Measured with ONNX Runtime 1.31 on a processor with AVX-512 VNNI: convolutional networks with int8
activations run at 0.6x of float speed, with uint8 activations at 1.4x to 1.9x. Without VNNI,
products of uint8 and int8 are added in pairs in 16 bits and saturate, so weights keep to 7 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import archspec.cpu
import archspec.cpu.detect

from onnxc.errors import OptionError


@dataclass(frozen=True)
class Target:
    """What a runtime runs fast, and so what a pass should write for it.

    activations: "uint8" or "int8". symmetric: zero point of activations in the middle. per_channel:
    one weight scale for each output channel. reduce_range: weights of 7 bits. power_of_two: scales
    restricted to 2**k. static: which heavy operators have integer kernels between Q/DQ pairs.
    dynamic: which have kernels that quantize activations on the fly. channels: channel counts are
    rounded to multiples of this. measured: whether we measured the row on such a machine.
    """

    name: str
    activations: str = "uint8"
    symmetric: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    power_of_two: bool = False
    static: frozenset[str] = frozenset({"Conv", "Gemm", "MatMul"})
    dynamic: frozenset[str] = frozenset({"Gemm", "MatMul", "LSTM"})
    channels: int = 8
    measured: bool = False
    note: str = ""


_QDQ_ALL = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NONE: frozenset[str] = frozenset()

TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target("x86-vnni", channels=16, measured=True, note="AVX-512 VNNI or AVX-VNNI"),
        Target("x86", reduce_range=True, channels=16, note="AVX2 without VNNI; not measured"),
        Target("arm64", activations="uint8", note="dot-product kernels; not measured"),
        Target("portable", reduce_range=True, note="safe on every processor; not measured"),
        Target("openvino", static=_QDQ_ALL, dynamic=_NONE, note="not measured"),
        Target(
            "tensorrt",
            activations="int8",
            symmetric=True,
            static=_QDQ_ALL,
            dynamic=_NONE,
            channels=32,
            note="zero points must be 0; not measured",
        ),
        Target("qnn", static=_QDQ_ALL, dynamic=_NONE, note="Hexagon; not measured"),
    )
}

_VNNI = {"avx512_vnni", "avx_vnni"}


def detect() -> str:
    """The name of the target that fits the processor of this machine."""
    family = archspec.cpu.host().family.name
    if family != "x86_64":
        return "arm64" if family == "aarch64" else "portable"
    flags = archspec.cpu.detect.detected_info().features  # those of a processor yet unnamed too
    return "x86-vnni" if flags.intersection(_VNNI) else "x86"


def choose(name: str) -> Target:
    """A row of TARGETS, or that of this machine's processor for "auto". Raises OptionError."""
    row = TARGETS.get(detect() if name == "auto" else name)
    if row is None:
        raise OptionError(f"target {name!r} is not known; choose auto, {', '.join(TARGETS)}")
    return row


def misjudged(target: Target) -> str:
    """Why this machine cannot tell what a target makes of 8-bit weights; empty if it can."""
    if target.reduce_range or not choose("auto").reduce_range:
        return ""
    return (
        f"int8 sums saturate on this processor, which is no {target.name}: the verdict is worse "
        "than what the target will give; --level none computes without those kernels"
    )
