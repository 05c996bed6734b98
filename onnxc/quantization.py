"""What `onnxc quantize` may be asked for, and the ways that are worth trying for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from onnxc import few_bits, search
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.few_bits import Activations, Wanted
from onnxc.keeping import nodes_to_keep
from onnxc.workpiece import Workpiece
from passes.absorb_offsets import AbsorbOffsets
from passes.equalize import Equalize
from passes.quantize import Quantize, Ranges
from passes.quantize_activations import QuantizeActivations
from passes.quantize_layers import QuantizeLayers
from passes.quantize_levels import QuantizeLevels, Scheme
from passes.split_outliers import SplitOutliers
from passes.upgrade_opset import UpgradeOpset

Width = Literal[1, 2, 3, 4, 5, 6, 8, 16]
Format = Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"]
MOVERS = (UpgradeOpset, Equalize, AbsorbOffsets)  # passes that come before a split
SPEEDLESS = (
    "inputs of layers are on {} levels, by tables: the kernels of this runtime still compute in 8 "
    "bits, so the latency is not what hardware with such tables would have"
)
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
        fixed point, of activations, too. A number with a point, such as 3.5 or 4.0, is an average,
        and each layer gets the bits that its outputs need.
    rounding: of the weights: each to the nearest, or as the outputs of their layer ask for, by
        columns that make up for those before (gptq) or by coordinate descent; auto: nearest for 8
        bits, descent for fewer and for fixed point. admm: from the better of descent and ADMM,
        slow. stochastic: up or down by chance, such that the mean stays.
    activations: bits of the activations, or float, to store weights in few bits and compute in
        float; auto: 8, and float for fewer than 8 bits of weights where nothing convolves, and for
        levels.
    keep_float: how many layers stay float at most: those by which the outputs lose most, as
        measured; of 8 bits rounded to the nearest.
    keep_ends: whether first and last layers keep 8 bits where the others get fewer.
    ranges: how activation ranges are chosen from the statistics.
    split_outliers: share of the channels, such as 0.05, that may be added to split those of the
        largest activations and weights where that makes the error of layers much smaller; static
        ways only.
    activation_levels: bits of a table that puts the inputs of layers on 2^B levels of their 8-bit
        grid, to measure what hardware with such tables or few-bit activations would lose; kernels
        here still compute in 8 bits, and no faster.
    """

    format: Format = "auto"
    scheme: Literal["affine", "fixed", "pow2", "ternary", "binary", "admm", "levels"] = "affine"
    bits: Literal["auto"] | Width | float = "auto"
    rounding: Literal["auto", "nearest", "gptq", "descent", "admm", "stochastic"] = "auto"
    activations: Literal["auto", 8, 16, "float"] = "auto"
    keep_ends: bool = True
    ranges: Literal["auto"] | Ranges = "auto"
    keep_float: int = 0
    split_outliers: float | None = None
    activation_levels: Literal[2, 3, 4, 5, 6] | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return self.scheme if self.has_levels else f"int{self.average or self.width:g}"

    @property
    def has_levels(self) -> bool:
        """Whether weights are put on levels of a scheme."""
        return self.scheme in get_args(Scheme)

    @property
    def average(self) -> float | None:
        """Bits of a weight, where layers get what they need; None where all get the same."""
        return self.bits if isinstance(self.bits, float) else None

    @property
    def width(self) -> Width:
        """Bits of the weights; 4 of layers that get no others from an average."""
        if isinstance(self.bits, float):
            return 4
        return USUAL.get(self.scheme, 8) if self.bits == "auto" else self.bits

    @property
    def is_float(self) -> bool:
        """Whether float activations were asked for."""
        return self.activations == "float" or self.format == "weight-only"

    @property
    def is_rounded(self) -> bool:
        """Whether weights are put on their integers layer after layer."""
        if self.has_levels or self.width == 16:
            return False
        plain = ("nearest",) if self.scheme == "fixed" else ("auto", "nearest")
        return self.width < 8 or self.rounding not in plain


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, average, given = settings.format, settings.average, settings.activations
    if average is not None and not 2 <= average <= 8:
        known = "2, 3, 4, 5, 6, 8 or 16, or an average of 2 to 8"
        raise OptionError(f"the bits of weights are {known}, not {average:g}")
    if settings.keep_float:
        _check_kept(settings)
    if settings.split_outliers is not None:
        _check_split(settings, settings.split_outliers)
    if settings.activation_levels is not None:
        _check_tables(settings)
    if settings.scheme == "fixed":
        _check_fixed(settings)
        return
    if settings.has_levels:
        _check_levels(settings)
        return
    if settings.width == 1:
        raise OptionError("1 bit is for --scheme binary or levels: add one of them, or take 2 bits")
    if settings.width == 16:
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


def _check_split(settings: QuantizeSettings, share: float) -> None:
    if not 0 < share <= 1:
        raise OptionError(f"--split-outliers is a share of the channels, 0.05 or so, not {share:g}")
    if settings.scheme != "affine":
        raise OptionError("--split-outliers goes with --scheme affine: leave one of them out")
    if settings.format not in (*IN_INTEGERS, "qoperator") or settings.activations not in (
        "auto",
        8,
    ):
        raise OptionError(
            "--split-outliers is for static quantization, --format qdq or qoperator with "
            "activations of 8 bits: leave it out"
        )


def _check_tables(settings: QuantizeSettings) -> None:
    if settings.scheme == "fixed":
        raise OptionError("--activation-levels goes with scales of any size: leave out fixed")
    if settings.format not in IN_INTEGERS or settings.activations not in ("auto", 8):
        raise OptionError(
            "--activation-levels puts activations of 8 bits on fewer levels: it is for --format "
            "qdq; leave --activations out"
        )


def _check_kept(settings: QuantizeSettings) -> None:
    plain = replace(QuantizeSettings(), ranges=settings.ranges, format=settings.format)
    if settings.keep_float < 0 or settings.format not in IN_INTEGERS:
        raise OptionError("--keep-float is a number of layers, for --format qdq")
    if replace(settings, keep_float=0, bits=plain.bits) != plain or settings.width != 8:
        raise OptionError(
            "--keep-float is for 8 bits rounded to the nearest: leave it, or the others, out"
        )


def _check_fixed(settings: QuantizeSettings) -> None:
    if settings.format not in IN_INTEGERS:
        raise OptionError(
            f"fixed point is written in standard operators, as qdq, not as {settings.format}"
        )
    if settings.activations == "float":
        raise OptionError("fixed point computes in integers: leave --activations float out")
    if settings.width == 1:
        raise OptionError("fixed point has 2 to 8 bits or 16, not 1")
    if settings.width == 16 and settings.rounding not in ("auto", "nearest"):
        raise OptionError("16 bits lose too little for --rounding: leave it out, or take 8 bits")
    if settings.width == 16 and settings.activations == 8:
        raise OptionError("weights of 16 bits go with activations of 16: leave --activations out")


def _check_levels(settings: QuantizeSettings) -> None:
    scheme, kind, given = settings.scheme, settings.format, settings.activations
    if settings.rounding != "auto":
        raise OptionError(f"--scheme {scheme} has no --rounding: leave one of them out")
    if settings.average is not None:
        raise OptionError(f"--scheme {scheme} has whole bits, the same for all: drop the point")
    if scheme == "ternary" and settings.bits != "auto":
        raise OptionError("--scheme ternary has no --bits: leave them out")
    if kind not in (*IN_INTEGERS, "weight-only"):
        raise OptionError(f"--scheme {scheme} is for --format weight-only or qdq, not {kind}")
    if (given == "float" and kind == "qdq") or (given in (8, 16) and kind == "weight-only"):
        raise OptionError(f"--activations {given} is not --format {kind}: leave one of them out")
    _levels(settings)


def ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The candidates that fit the settings, by name. Raises OptionError."""
    share, levels = settings.split_outliers, settings.activation_levels
    if settings.keep_float:
        return _kept(settings, piece)
    if share is None and levels is None:
        return _ways(settings, piece)
    if not piece.has_data:
        raise OptionError(
            "--split-outliers and --activation-levels look at activations: give --data"
        )
    found = _ways(_static(settings), piece)
    if share is not None:
        bits = settings.width
        assert bits != 1 and bits != 16
        found = {n: _inserted(p, SplitOutliers(share, bits=bits)) for n, p in found.items()}
    if levels is not None:
        told = piece.calibration.notes
        told += {SPEEDLESS.format(2**levels)} - {*told}
        tables = QuantizeActivations(levels, settings.keep_ends)
        found = {f"{n}, {2**levels} levels": _tabled(p, tables) for n, p in found.items()}
    return found


def _kept(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The static ways with some layers left float. Raises OptionError without data."""
    if not piece.is_measured:
        raise OptionError("--keep-float measures what the outputs lose: give --data")
    nodes = nodes_to_keep(piece, settings.keep_float)
    found = search.candidates(piece.model, piece.context, "qdq", _ranges(settings))
    return {
        f"{name}, {len(nodes)} float": tuple(
            replace(p, sensitive=nodes) if isinstance(p, Quantize) else p for p in passes
        )
        for name, passes in found.items()
    }


def _static(settings: QuantizeSettings) -> QuantizeSettings:
    """With activations of 8 bits."""
    wanted = settings.activations if settings.format == "qoperator" else 8
    kind = "qdq" if settings.format == "auto" else settings.format
    return replace(settings, format=kind, activations=wanted)


def _tabled(passes: tuple[Pass, ...], tables: QuantizeActivations) -> tuple[Pass, ...]:
    """Behind the pass that quantizes activations, so that all later ones see few levels."""
    count = next(i for i, pass_ in enumerate(passes, 1) if isinstance(pass_, Quantize))
    return (*passes[:count], tables, *passes[count:])


def _inserted(passes: tuple[Pass, ...], split: SplitOutliers) -> tuple[Pass, ...]:
    """Behind what moves channels, before all that looks at single weights."""
    count = next((i for i, p in enumerate(passes) if not isinstance(p, MOVERS)), len(passes))
    return (*passes[:count], split, *passes[count:])


def _ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    is_wide = settings.activations == 16 and settings.width != 16
    if settings.has_levels or settings.is_rounded or is_wide:
        return few_bits.ways(_wanted(settings), piece)
    kind = "weight-only" if settings.is_float else settings.format
    return search.candidates(
        *(piece.model, piece.context, kind, _ranges(settings), settings.width),
        pow2=settings.scheme == "fixed",
        has_data=piece.has_data,
    )


def _wanted(settings: QuantizeSettings) -> Wanted:
    activations: Activations = "float" if settings.is_float else settings.activations
    if activations == "auto" and (settings.scheme == "fixed" or settings.format == "qdq"):
        activations = 8
    return Wanted(
        _levels(settings) if settings.has_levels else _layers(settings),
        settings.rounding != "auto",
        activations,
        _ranges(settings),
        settings.average,
    )


def _ranges(settings: QuantizeSettings) -> Ranges | None:
    return None if settings.ranges == "auto" else settings.ranges


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
    return {**found, **few_bits.ways(_wanted(settings), piece)}
