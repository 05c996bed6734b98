"""What `onnxc quantize` may be asked for, and the ways that are worth trying for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxc import search
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.workpiece import Workpiece
from passes.quantize import Ranges


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize; the options of `onnxc quantize` besides data, target and nodes.

    format: how the integers are written; auto chooses for each layer by what it measures.
    scheme: affine (scale and zero point), or fixed point: scales that are powers of two, zero point
        0, signed Qm.n, or unsigned UQm.n where no value is negative; shifts and standard operators.
    bits: of the weights; 4 is for weight-only, 16 (of activations, too) for fixed point.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed"] = "affine"
    bits: Literal[4, 8, 16] = 8
    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return f"int{self.bits}"


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, bits = settings.format, settings.bits
    if settings.scheme == "fixed" and kind not in ("auto", "qdq"):
        raise OptionError(f"fixed point is written in standard operators, as qdq, not as {kind}")
    if settings.scheme == "fixed" and bits == 4:
        raise OptionError("fixed point has 8 or 16 bits; 4 bits are for --format weight-only")
    if settings.scheme == "affine" and bits == 16:
        raise OptionError("16 bits are for fixed point: add --scheme fixed, or take 8 bits")
    if bits == 4 and kind not in ("auto", "weight-only"):
        raise OptionError(f"4 bits are for weights alone: use --format weight-only, not {kind}")


def ways(settings: QuantizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The candidates that fit the settings, by name."""
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    return search.candidates(
        *(piece.model, piece.context, settings.format, ranges, settings.bits),
        pow2=settings.scheme == "fixed",
        has_data=piece.has_data,
    )


def rescue(settings: QuantizeSettings, has_data: bool) -> Mapping[str, tuple[Pass, ...]]:
    """What is tried where all else falls short; nothing where something was asked for by name."""
    return search.fallback(has_data) if settings == QuantizeSettings() else {}
