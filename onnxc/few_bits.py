"""Ways to quantize weights to few bits, rounded layer after layer (`passes.quantize_layers`).

    static        on few integers in front of DequantizeLinear, for kernels that compute in 8 bits
    rounded       the same integers with their scales in a Mul; the model computes in float
    weight-only   4 bits in blocks that have a scale of their own
    MatMulNBits   the same, multiplied as they are

Blocks are rounded layer after layer, too, where the model was seen at work; if not, or where that
is asked for, each weight to the nearest.

Integers are stored in as many bits as they have, and unpacked as ONNX Runtime loads the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onnxc.codebooks import NIBBLE, NIBBLE_OPSET, least_opset
from onnxc.core import Context, Pass
from onnxc.graph import Model
from onnxc.ops import bounds, is_absorbed
from onnxc.search import AUTO_RANGES, BLOCK, WIDE_OPSET, blocks_of_four, operators
from passes.equalize import Equalize
from passes.quantize import Quantize, Ranges
from passes.quantize_constants import QuantizeConstants
from passes.quantize_layers import WIDEST, QuantizeLayers
from passes.quantize_weights import QuantizeWeights
from passes.share_constants import ShareConstants
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

Activations = Literal["auto", 8, 16, "float"]
LEAST = 1024  # bytes of a weight that is worth a chain of nodes


@dataclass(frozen=True)
class Wanted:
    """What is asked for. is_asked: whether the rounding was. ranges: None for the usual rule.

    is_measured: whether samples are real, not made up.
    """

    layers: QuantizeLayers
    is_asked: bool
    activations: Activations
    ranges: Ranges | None
    is_measured: bool = True


def ways(
    wanted: Wanted, model: Model, context: Context, has_data: bool
) -> Mapping[str, tuple[Pass, ...]]:
    """The ways worth trying for a model, by name."""
    convolves = bool(operators(model, context, channels=True))
    is_wide = wanted.layers.bits == WIDEST
    if wanted.activations != "float" and (convolves or is_wide or wanted.activations != "auto"):
        is_smoothed = is_wide and not convolves
        return _in_integers(wanted, has_data, is_smoothed or _is_clipped(model))
    found = {"rounded": _in_float(wanted)} if convolves or wanted.layers.bits != NIBBLE else {}
    is_cut = wanted.layers.bits == NIBBLE and not (convolves and wanted.is_asked)
    return {**found, **(blocks_of_four(model, context, *_in_blocks(wanted)) if is_cut else {})}


def _in_blocks(wanted: Wanted) -> tuple[Pass, ...]:
    """What rounds weights ahead of storing them in blocks."""
    layers = replace(wanted.layers, block=BLOCK, smallest=LEAST)
    return (layers,) if wanted.is_measured and layers.rounding != "nearest" else ()


def _opset(bits: int) -> int:
    return NIBBLE_OPSET if bits == NIBBLE else least_opset(bits)


def _in_float(wanted: Wanted) -> tuple[Pass, ...]:
    layers = replace(wanted.layers, scales="apart", smallest=LEAST)
    return (UpgradeOpset(_opset(layers.bits)), layers, StoreCodebooks())


def _is_clipped(model: Model) -> bool:
    """Whether activations are cut off above.

    Equalizing what they share a range with gains there (MobileNetV2, 0.3 dB at 4 bits). Elsewhere
    layers that are rounded for their outputs lose by it (ResNet-20, SqueezeNet, up to 0.3 dB; a
    small Llama 0.5 dB at 4 bits), but for products with weights of 8 bits (the Llama gains 0.9 dB).
    """
    nodes = (node for node in model.graph.nodes if is_absorbed(node))
    return any(math.isfinite(bounds(node)[1]) for node in nodes)


def _in_integers(
    wanted: Wanted, has_data: bool, is_equalized: bool
) -> Mapping[str, tuple[Pass, ...]]:
    """Activations first, so that layers are rounded for what the runtime will give them.

    Statistics that were gathered before are not of quantized tensors: then layers come first.
    """
    is_wide = wanted.activations == 16
    opset = max(_opset(wanted.layers.bits), WIDE_OPSET if is_wide else 0)
    start: tuple[Pass, ...] = (
        UpgradeOpset(opset),
        *((Equalize(),) if has_data and is_equalized else ()),
    )
    bits: Literal[8, 16] = 16 if is_wide else 8
    quantize = Quantize(wanted.ranges or AUTO_RANGES[0], activation_bits=bits)
    integers: tuple[Pass, ...] = (replace(wanted.layers, reconstruct=False), quantize)
    if has_data:
        integers = (replace(quantize, weights=False), wanted.layers, QuantizeConstants())
    return {"static": (*start, *integers, QuantizeWeights(), StoreCodebooks(), ShareConstants())}
