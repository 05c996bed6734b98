"""Ways to quantize weights to few bits, layer after layer.

    static        on few integers in front of DequantizeLinear, for kernels that compute in 8 bits
    rounded       the same integers with their scales in a Mul; the model computes in float
    SCHEME        levels of another scheme than rounding; the model computes in float
    weight-only   4 bits in blocks, where nothing was said about rounding

(`passes.quantize_layers`, `passes.quantize_levels`.) Codes are stored in as many bits as they have,
and unpacked as ONNX Runtime loads the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onnxc.codebooks import NIBBLE, NIBBLE_OPSET, least_opset
from onnxc.core import Context, Pass
from onnxc.errors import OptionError
from onnxc.graph import Model
from onnxc.ops import bounds, is_absorbed
from onnxc.search import AUTO_RANGES, WIDE_OPSET, blocks_of_four, operators
from passes.equalize import Equalize
from passes.quantize import Quantize, Ranges
from passes.quantize_constants import QuantizeConstants
from passes.quantize_layers import QuantizeLayers
from passes.quantize_levels import QuantizeLevels, why_no_integers
from passes.quantize_weights import QuantizeWeights
from passes.share_constants import ShareConstants
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

Activations = Literal["auto", 8, 16, "float"]
IN_FLOAT = ", in float"  # ends the names of ways on levels
FLOATS = ("weight-only", "rounded")
LEAST = 1024  # bytes of a weight that is worth a chain of nodes


@dataclass(frozen=True)
class Wanted:
    """What is asked for. is_asked: whether the rounding was. ranges: None for the usual rule."""

    layers: QuantizeLayers | QuantizeLevels
    is_asked: bool
    activations: Activations
    ranges: Ranges | None


def ways(
    wanted: Wanted, model: Model, context: Context, has_data: bool
) -> Mapping[str, tuple[Pass, ...]]:
    """The ways worth trying for a model, by name.

    Raises OptionError for integers of levels that are none.
    """
    if isinstance(wanted.layers, QuantizeLevels):
        return _of_levels(wanted, wanted.layers, model, context, has_data)
    convolves = bool(operators(model, context, channels=True))
    if wanted.activations != "float" and (convolves or wanted.activations != "auto"):
        return _in_integers(wanted, has_data, _is_clipped(model))
    found = {"rounded": _in_float(wanted)} if convolves or not _has_blocks(wanted) else {}
    return {**found, **(blocks_of_four(model, context) if _has_blocks(wanted) else {})}


def is_in_float(way: str) -> bool:
    """Whether a model computes in float, with only its weights in few bits."""
    return way in FLOATS or way.endswith(IN_FLOAT)


def _of_levels(
    wanted: Wanted, levels: QuantizeLevels, model: Model, context: Context, has_data: bool
) -> Mapping[str, tuple[Pass, ...]]:
    if wanted.activations in ("auto", "float"):
        return {f"{levels.summary}{IN_FLOAT}": _in_float(wanted)}
    reason = why_no_integers(levels, context.target)
    if reason:
        kernels = f"kernels of {context.target.name} do not take: use --activations float"
        raise OptionError(f"{reason}, which {kernels}")
    return _in_integers(wanted, has_data, _is_clipped(model))


def _has_blocks(wanted: Wanted) -> bool:
    return wanted.layers.bits == NIBBLE and not wanted.is_asked


def _opset(bits: int) -> int:
    return NIBBLE_OPSET if bits == NIBBLE else least_opset(bits)


def _in_float(wanted: Wanted) -> tuple[Pass, ...]:
    layers = replace(wanted.layers, scales="apart", smallest=LEAST)
    return (UpgradeOpset(_opset(layers.bits)), layers, StoreCodebooks())


def _is_clipped(model: Model) -> bool:
    """Whether activations are cut off above.

    Equalizing what they share a range with gains there (MobileNetV2, 0.3 dB at 4 bits). Elsewhere
    layers that are rounded for their outputs lose by it (ResNet-20, SqueezeNet, up to 0.3 dB).
    """
    nodes = (node for node in model.graph.nodes if is_absorbed(node))
    return any(math.isfinite(bounds(node)[1]) for node in nodes)


def _in_integers(
    wanted: Wanted, has_data: bool, is_clipped: bool
) -> Mapping[str, tuple[Pass, ...]]:
    """Activations first, so that layers are rounded for what the runtime will give them.

    Statistics that were gathered before are not of quantized tensors: then layers come first.
    """
    is_wide = wanted.activations == 16
    opset = max(_opset(wanted.layers.bits), WIDE_OPSET if is_wide else 0)
    start: tuple[Pass, ...] = (
        UpgradeOpset(opset),
        *((Equalize(),) if has_data and is_clipped else ()),
    )
    bits: Literal[8, 16] = 16 if is_wide else 8
    quantize = Quantize(wanted.ranges or AUTO_RANGES[0], activation_bits=bits)
    integers: tuple[Pass, ...] = (replace(wanted.layers, reconstruct=False), quantize)
    if has_data:
        integers = (replace(quantize, weights=False), wanted.layers, QuantizeConstants())
    return {"static": (*start, *integers, QuantizeWeights(), StoreCodebooks(), ShareConstants())}
