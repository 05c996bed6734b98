"""What `onnxc quantize` may be asked for, and the ways that are worth trying for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
    bits: of the weights; fixed point has 8 or 16, of activations, too.
    rounding: of the weights: each to the nearest, or as the outputs of their layer ask for, by
        columns that make up for those before (gptq) or by coordinate descent; auto: nearest for 8
        bits, descent for fewer.
    activations: bits of the activations, or float, to store weights in few bits and compute in
        float; auto: 8, and float for fewer than 8 bits of weights where nothing convolves.
    keep_ends: whether first and last layers keep 8 bits where the others get fewer.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed"] = "affine"
    bits: Bits = 8
    rounding: Literal["auto", "nearest", "gptq", "descent"] = "auto"
    activations: Literal["auto", 8, 16, "float"] = "auto"
    keep_ends: bool = True
    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return f"int{self.bits}"

    @property
    def is_rounded(self) -> bool:
        """Whether weights are put on their integers layer after layer."""
        is_plain = self.bits == 8 and self.rounding in ("auto", "nearest")
        return not is_plain and self.scheme == "affine"


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, bits, given = settings.format, settings.bits, settings.activations
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
    if settings.bits not in (8, 16):
        raise OptionError(f"fixed point has 8 or 16 bits, not {settings.bits}: leave --scheme out")
    if settings.rounding not in ("auto", "nearest") or settings.activations != "auto":
        raise OptionError("fixed point has no --rounding and no --activations: leave them out")


def ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The candidates that fit the settings, by name."""
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    is_float = "float" in (settings.activations, settings.format.replace("weight-only", "float"))
    kind = "weight-only" if is_float else settings.format
    if settings.is_rounded or settings.activations == 16:
        activations: Activations = "float" if is_float else settings.activations
        if settings.format == "qdq" and activations == "auto":
            activations = 8
        is_asked, is_measured = settings.rounding != "auto", piece.is_measured
        wanted = Wanted(_layers(settings), is_asked, activations, ranges, is_measured)
        return few_bits.ways(wanted, piece.model, piece.context, piece.has_data)
    return search.candidates(
        *(piece.model, piece.context, kind, ranges, settings.bits),
        pow2=settings.scheme == "fixed",
        has_data=piece.has_data,
    )


def _layers(settings: QuantizeSettings) -> QuantizeLayers:
    assert settings.bits != 16
    rounding = "descent" if settings.rounding == "auto" else settings.rounding
    return QuantizeLayers(settings.bits, rounding, settings.keep_ends)


def rescue(settings: QuantizeSettings, has_data: bool) -> Mapping[str, tuple[Pass, ...]]:
    """What is tried where all else falls short; nothing where something was asked for by name."""
    return search.fallback(has_data) if settings == QuantizeSettings() else {}
