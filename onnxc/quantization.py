"""What `onnxc quantize` may be asked for, and the ways that are worth trying for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnxc import few_bits, search
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.few_bits import Activations, Wanted
from onnxc.workpiece import Workpiece
from passes.quantize import Ranges
from passes.quantize_layers import QuantizeLayers

Bits = Literal[2, 3, 4, 5, 6, 8, 16]
IN_INTEGERS = ("auto", "qdq")


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize; the options of `onnxc quantize` besides data, target and nodes.

    format: how the integers are written; auto chooses for each layer by what it measures.
    scheme: affine (scale and zero point), or fixed point: scales that are powers of two, zero point
        0, signed Qm.n, or unsigned UQm.n where no value is negative; shifts and standard operators.
    bits: of the weights; 16 are for fixed point, of activations, too. A number with a point, such
        as 3.5 or 4.0, is an average, and each layer gets the bits that its outputs need.
    rounding: of the weights: each to the nearest, or as the outputs of their layer ask for, by
        columns that make up for those before (gptq) or by coordinate descent; auto: nearest for 8
        bits, descent for fewer and for fixed point. stochastic: up or down by chance, such that the
        mean stays.
    activations: bits of the activations, or float, to store weights in few bits and compute in
        float; auto: 8, and float for fewer than 8 bits of weights where nothing convolves.
    keep_ends: whether first and last layers keep 8 bits where the others get fewer.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed"] = "affine"
    bits: Bits | float = 8
    rounding: Literal["auto", "nearest", "gptq", "descent", "stochastic"] = "auto"
    activations: Literal["auto", 8, 16, "float"] = "auto"
    keep_ends: bool = True
    ranges: Literal["auto"] | Ranges = "auto"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return f"int{self.bits:g}"

    @property
    def is_rounded(self) -> bool:
        """Whether weights are put on their integers layer after layer."""
        if isinstance(self.bits, float):
            return True
        plain = ("nearest",) if self.scheme == "fixed" else ("auto", "nearest")
        return self.bits < 8 or (self.bits == 8 and self.rounding not in plain)


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, bits, given = settings.format, settings.bits, settings.activations
    if isinstance(bits, float) and not 2 <= bits <= 8:
        known = "2, 3, 4, 5, 6, 8 or 16, or an average of 2 to 8"
        raise OptionError(f"the bits of weights are {known}, not {bits:g}")
    if settings.scheme == "fixed":
        _check_fixed(settings)
        return
    if bits == 16:
        raise OptionError("16 bits are for fixed point: add --scheme fixed, or take 8 bits")
    if settings.is_rounded and kind in ("qoperator", "dynamic"):
        raise OptionError(
            "weights that are rounded layer after layer, or to fewer than 8 bits, are for --format "
            f"qdq or weight-only, not {kind}"
        )
    if given == "float" and kind not in ("auto", "weight-only"):
        raise OptionError(f"--activations float is --format weight-only, not {kind}")
    if given not in ("auto", "float") and kind not in IN_INTEGERS:
        raise OptionError(f"--activations {given} is for --format qdq, not {kind}")


def _check_fixed(settings: QuantizeSettings) -> None:
    if settings.format not in IN_INTEGERS:
        raise OptionError(
            f"fixed point is written in standard operators, as qdq, not as {settings.format}"
        )
    if settings.activations == "float":
        raise OptionError("fixed point computes in integers: leave --activations float out")
    if settings.bits == 16 and settings.rounding not in ("auto", "nearest"):
        raise OptionError("16 bits lose too little for --rounding: leave it out, or take 8 bits")
    if settings.bits == 16 and settings.activations == 8:
        raise OptionError("weights of 16 bits go with activations of 16: leave --activations out")


def ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The candidates that fit the settings, by name."""
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    is_float = "float" in (settings.activations, settings.format.replace("weight-only", "float"))
    kind = "weight-only" if is_float else settings.format
    if settings.is_rounded or (settings.activations == 16 and settings.bits != 16):
        activations: Activations = "float" if is_float else settings.activations
        if settings.scheme == "fixed" and activations == "auto":
            activations = 8
        average = settings.bits if isinstance(settings.bits, float) else None
        is_asked = settings.rounding != "auto"
        wanted = Wanted(_layers(settings), is_asked, activations, ranges, average)
        return few_bits.ways(wanted, piece)
    return search.candidates(
        *(piece.model, piece.context, kind, ranges, int(settings.bits)),
        pow2=settings.scheme == "fixed",
        has_data=piece.has_data,
    )


def _layers(settings: QuantizeSettings) -> QuantizeLayers:
    bits: Any = 4 if isinstance(settings.bits, float) else settings.bits
    rounding = "descent" if settings.rounding == "auto" else settings.rounding
    return QuantizeLayers(
        *(bits, rounding, settings.keep_ends),
        reconstruct=rounding != "stochastic",
        power_of_two=settings.scheme == "fixed",
    )


def rescue(settings: QuantizeSettings, has_data: bool) -> Mapping[str, tuple[Pass, ...]]:
    """What is tried where all else falls short; nothing where something was asked for by name."""
    return search.fallback(has_data) if settings == QuantizeSettings() else {}
