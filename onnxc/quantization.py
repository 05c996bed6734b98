"""What `onnxc quantize` may be asked for, and the ways that are worth trying for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from onnxc import few_bits, search
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.few_bits import Activations, Wanted
from onnxc.workpiece import Workpiece
from passes.quantize import Ranges
from passes.quantize_layers import QuantizeLayers
from passes.quantize_levels import QuantizeLevels, Scheme

Width = Literal[1, 2, 3, 4, 5, 6, 8, 16]
IN_INTEGERS = ("auto", "qdq")
USUAL: dict[str, Width] = {
    "pow2": 4,
    "ternary": 2,
    "binary": 2,
    "admm": 3,
    "levels": 3,
}  # bits of the schemes


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize; the options of `onnxc quantize` besides data, target and nodes.

    format: how the integers are written; auto chooses for each layer by what it measures.
    scheme: affine (scale and zero point), or fixed point: scales that are powers of two, zero point
        0, signed Qm.n, or unsigned UQm.n where no value is negative; shifts and standard operators;
        or weights on few levels: powers of two (pow2, admm with a factor for each output), ternary,
        sums of binary bases (binary), or any few for each output (levels).
    bits: of the weights, of binary how many bases; auto: 8, or few that suit the scheme; 16 are for
        fixed point, of activations, too.
    rounding: of the weights: each to the nearest, or as the outputs of their layer ask for, by
        columns that make up for those before (gptq) or by coordinate descent; auto: nearest for 8
        bits, descent for fewer. admm: from the better of descent and ADMM, slow. stochastic: up or
        down by chance, such that the mean stays.
    activations: bits of the activations, or float, to store weights in few bits and compute in
        float; auto: 8, and float for fewer than 8 bits of weights where nothing convolves, and for
        levels.
    keep_ends: whether first and last layers keep 8 bits where the others get fewer.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed", "pow2", "ternary", "binary", "admm", "levels"] = "affine"
    bits: Literal["auto"] | Width = "auto"
    rounding: Literal["auto", "nearest", "gptq", "descent", "admm", "stochastic"] = "auto"
    activations: Literal["auto", 8, 16, "float"] = "auto"
    keep_ends: bool = True
    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return self.scheme if self.has_levels else f"int{self.width}"

    @property
    def has_levels(self) -> bool:
        """Whether weights are put on levels of a scheme."""
        return self.scheme in get_args(Scheme)

    @property
    def width(self) -> Width:
        """Bits of the weights."""
        return USUAL.get(self.scheme, 8) if self.bits == "auto" else self.bits

    @property
    def is_rounded(self) -> bool:
        """Whether weights are put on their integers layer after layer."""
        if self.has_levels or self.width == 16:
            return False
        return self.width < 8 or self.rounding not in ("auto", "nearest")


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, bits, given = settings.format, settings.width, settings.activations
    if settings.scheme == "fixed":
        _check_fixed(settings)
        return
    if settings.has_levels:
        _check_levels(settings)
        return
    if bits == 1:
        raise OptionError("1 bit is for --scheme binary or levels: add one of them, or take 2 bits")
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
    if settings.width == 16 and settings.rounding not in ("auto", "nearest"):
        raise OptionError("16 bits lose too little for --rounding: leave it out, or take 8 bits")
    if settings.width == 16 and settings.activations == 8:
        raise OptionError("weights of 16 bits go with activations of 16: leave --activations out")


def _check_levels(settings: QuantizeSettings) -> None:
    scheme, kind, given = settings.scheme, settings.format, settings.activations
    if settings.rounding != "auto":
        raise OptionError(f"--scheme {scheme} has no --rounding: leave one of them out")
    if scheme == "ternary" and settings.bits != "auto":
        raise OptionError("--scheme ternary has no --bits: leave them out")
    if kind not in (*IN_INTEGERS, "weight-only"):
        raise OptionError(f"--scheme {scheme} is for --format weight-only or qdq, not {kind}")
    if (given == "float" and kind == "qdq") or (given in (8, 16) and kind == "weight-only"):
        raise OptionError(f"--activations {given} is not --format {kind}: leave one of them out")
    _levels(settings)


def ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The candidates that fit the settings, by name."""
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    is_float = "float" in (settings.activations, settings.format.replace("weight-only", "float"))
    kind = "weight-only" if is_float else settings.format
    is_wide = settings.activations == 16 and settings.width != 16
    if settings.has_levels or settings.is_rounded or is_wide:
        wanted = _wanted(settings, is_float, piece.is_measured)
        return few_bits.ways(wanted, piece.model, piece.context, piece.has_data)
    return search.candidates(
        *(piece.model, piece.context, kind, ranges, settings.width),
        pow2=settings.scheme == "fixed",
        has_data=piece.has_data,
    )


def _wanted(settings: QuantizeSettings, is_float: bool, is_measured: bool) -> Wanted:
    activations: Activations = "float" if is_float else settings.activations
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    if settings.scheme == "fixed" and activations == "auto":
        activations = 8
    if not settings.has_levels:
        is_asked = settings.rounding != "auto"
        return Wanted(_layers(settings), is_asked, activations, ranges, is_measured)
    if activations == "auto" and settings.format == "qdq":
        activations = 8
    return Wanted(_levels(settings), True, activations, ranges)


def _layers(settings: QuantizeSettings) -> QuantizeLayers:
    bits = settings.width
    assert bits != 1 and bits != 16
    rounding = "descent" if settings.rounding == "auto" else settings.rounding
    return QuantizeLayers(
        *(bits, rounding, settings.keep_ends),
        reconstruct=rounding != "stochastic",
        power_of_two=settings.scheme == "fixed",
    )


def _levels(settings: QuantizeSettings) -> QuantizeLevels:
    """Raises OptionError for bits that the scheme does not have."""
    assert settings.scheme != "affine" and settings.scheme != "fixed"
    return QuantizeLevels(settings.scheme, settings.width, settings.keep_ends, scales="inside")


def rescue(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """What is tried where all else falls short; nothing where something was asked for by name.

    Weights only, which is never slower, and weights rounded for their outputs, which takes longer.
    """
    plain = replace(settings, bits="auto") if settings.bits == 8 else settings
    if plain != QuantizeSettings():
        return {}
    found = search.fallback(piece.has_data)
    if not (piece.has_data and search.operators(piece.model, piece.context, channels=True)):
        return found
    wanted = _wanted(settings, is_float=False, is_measured=piece.is_measured)
    return {**found, **few_bits.ways(wanted, piece.model, piece.context, has_data=True)}
