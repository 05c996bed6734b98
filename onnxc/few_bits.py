"""Ways to quantize weights to few bits, layer after layer.

    static, rounded   on few integers in front of DequantizeLinear, for kernels of 8 bits
    fixed             the same with scales that are powers of two, and no others in the file
    rounded           integers with their scales in a Mul; the model computes in float
    SCHEME            levels of another scheme than rounding; the model computes in float
    weight-only       4 bits in blocks that have a scale of their own
    MatMulNBits       the same, multiplied as they are

Blocks are rounded layer after layer, too, where the model was seen at work; if not, where it would
take long, or where that is asked for, each weight to the nearest. With an average of bits, each
layer gets its own (`onnxc.bit_plan`).

(`passes.quantize_layers`, `passes.quantize_levels`.) Codes are stored in as many bits as they have,
and unpacked as ONNX Runtime loads the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onnxc.bit_plan import WIDTHS, planned
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.graph import Model
from onnxc.ops import bounds, is_absorbed, knowledge, weight_of
from onnxc.search import AUTO_RANGES, BLOCK, WIDE_OPSET, blocks_of_four, operators
from onnxc.storage.codebooks import NIBBLE, NIBBLE_OPSET, least_opset
from onnxc.workpiece import Workpiece
from passes.absorb_offsets import AbsorbOffsets
from passes.equalize import Equalize
from passes.quantize import Quantize, Ranges
from passes.quantize_constants import QuantizeConstants
from passes.quantize_layers import WIDEST, QuantizeLayers
from passes.quantize_levels import QuantizeLevels, why_no_integers
from passes.quantize_weights import QuantizeWeights
from passes.share_constants import ShareConstants
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

Activations = Literal["auto", 8, 16, "float"]
OfLayers = QuantizeLayers | QuantizeLevels
IN_FLOAT = ", in float"  # ends the names of ways on levels
FLOATS = ("weight-only", "rounded")
RATE = 4e8  # of `_work` a second, for rounding a layer by its outputs, on one core
MOST_WORK = 600 * RATE  # where nobody asked for it
LEAST = 1024  # bytes of a weight that is worth a chain of nodes


@dataclass(frozen=True)
class Wanted:
    """What is asked for. is_asked: whether the rounding was. ranges: None for the usual rule.

    average: bits of a weight, where layers get what they need; None where all get the same.
    """

    layers: OfLayers
    is_asked: bool
    activations: Activations
    ranges: Ranges | None
    average: float | None = None

    @property
    def power_of_two(self) -> bool:
        """Whether scales are powers of two."""
        return isinstance(self.layers, QuantizeLayers) and self.layers.power_of_two


def ways(wanted: Wanted, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The ways worth trying for a model, by name.

    Raises OptionError for integers of levels that are none.
    """
    if isinstance(wanted.layers, QuantizeLevels):
        return _of_levels(wanted, wanted.layers, piece)
    layers, convolves = wanted.layers, _convolves(piece)
    is_fast = convolves or (layers.bits == WIDEST and wanted.average is None)
    if wanted.activations != "float" and (is_fast or wanted.activations != "auto"):
        return _in_integers(wanted, piece)
    has_blocks = layers.bits == NIBBLE and wanted.average is None
    found = _in_float(wanted, piece) if convolves or not has_blocks else {}
    if not has_blocks or (convolves and wanted.is_asked):
        return found
    cut = _in_blocks(layers, wanted.is_asked, piece)
    return {**found, **blocks_of_four(piece.model, piece.context, *cut)}


def is_in_float(way: str) -> bool:
    """Whether a model computes in float, with only its weights in few bits."""
    return way in FLOATS or way.endswith(IN_FLOAT)


def _of_levels(
    wanted: Wanted, levels: QuantizeLevels, piece: Workpiece
) -> Mapping[str, tuple[Pass, ...]]:
    if wanted.activations in ("auto", "float"):
        return _in_float(wanted, piece, f"{levels.summary}{IN_FLOAT}")
    target = piece.context.target
    reason = why_no_integers(levels, target)
    if reason:
        raise OptionError(
            f"{reason}, which kernels of {target.name} do not take: use --activations float"
        )
    return _in_integers(wanted, piece)


def _in_blocks(layers: QuantizeLayers, is_asked: bool, piece: Workpiece) -> tuple[Pass, ...]:
    """What rounds weights ahead of storing them in blocks."""
    if layers.rounding == "nearest" or not piece.is_measured:
        return ()
    work = _work(piece.model)
    if work > MOST_WORK and not is_asked:
        piece.calibration.notes.append(
            f"weights are rounded to the nearest: by the outputs of their layers it takes about "
            f"{work / RATE / 60:.0f} minutes of a processor core; ask for it by --rounding descent"
        )
        return ()
    return (replace(layers, block=BLOCK, smallest=LEAST),)


def _work(model: Model) -> float:
    """Multiplications of all weights W (outputs, d) with the moments (d, d) of their inputs."""
    found = 0.0
    for node in model.graph.nodes:
        weight, row = weight_of(node), knowledge(node)
        if weight is not None and row.window is not None and row.out_axis is not None:
            size, outputs = math.prod(weight.shape), weight.shape[row.out_axis(node)]
            found += size * (size / max(outputs, 1))
    return found


def _opset(wanted: Wanted) -> int:
    """The least one that unpacks the codes."""
    widths = (wanted.layers.bits,) if wanted.average is None else WIDTHS
    return max(NIBBLE_OPSET if bits == NIBBLE else least_opset(bits) for bits in widths)


def _in_float(
    wanted: Wanted, piece: Workpiece, name: str = "rounded"
) -> Mapping[str, tuple[Pass, ...]]:
    layers = replace(wanted.layers, scales="apart", smallest=LEAST)
    start = (UpgradeOpset(_opset(wanted)),)
    name, layers = _planned(name, layers, wanted.average, piece, start)
    return {name: (*start, layers, StoreCodebooks())}


def _planned(
    name: str,
    layers: OfLayers,
    average: float | None,
    piece: Workpiece,
    start: tuple[Pass, ...],
) -> tuple[str, OfLayers]:
    """The pass with the bits of each layer, and the name of the way with how many have which."""
    if average is None or isinstance(layers, QuantizeLevels):
        return name, layers
    found = planned(layers, average, piece, start)
    counts = sorted(Counter(found.of_layers.values()).items())
    told = ", ".join(f"{count} of {bits}" for bits, count in counts)
    return f"{name}, layers of bits: {told}" if told else name, found


def _convolves(piece: Workpiece) -> bool:
    return bool(operators(piece.model, piece.context, channels=True))


def _is_equalized(wanted: Wanted, piece: Workpiece) -> bool:
    """Whether channels are brought to one scale first.

    That gains where activations are cut off above (MobileNetV2, 0.3 dB at 4 bits), and for products
    with weights of 8 bits (a small Llama, 0.9 dB). Elsewhere layers that are rounded for their
    outputs lose by it (ResNet-20, SqueezeNet, up to 0.3 dB; the Llama 0.5 dB at 4 bits).
    """
    nodes = (node for node in piece.model.graph.nodes if is_absorbed(node))
    is_clipped = any(math.isfinite(bounds(node)[1]) for node in nodes)
    return is_clipped or (wanted.layers.bits == WIDEST and not _convolves(piece))


def _in_integers(wanted: Wanted, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """Activations first, so that layers are rounded for what the runtime will give them.

    Statistics that were gathered before are not of quantized tensors: then layers come first.
    """
    is_wide = wanted.activations == 16
    opset = max(_opset(wanted), WIDE_OPSET if is_wide else 0)
    start: tuple[Pass, ...] = (
        UpgradeOpset(opset),
        *((Equalize(),) if piece.has_data and _is_equalized(wanted, piece) else ()),
        *((AbsorbOffsets(),) if piece.has_data else ()),
    )
    bits: Literal[8, 16] = 16 if is_wide else 8
    pow2 = wanted.power_of_two
    quantize = Quantize(wanted.ranges or AUTO_RANGES[0], activation_bits=bits, power_of_two=pow2)
    name, layers = _planned(
        *("fixed" if pow2 else "static, rounded", wanted.layers, wanted.average, piece, start)
    )
    integers: tuple[Pass, ...] = (replace(layers, reconstruct=False), quantize)
    if piece.has_data:
        integers = (replace(quantize, weights=False), layers, QuantizeConstants(pow2))
    rest: tuple[Pass, ...] = () if pow2 else (QuantizeWeights(),)
    return {name: (*start, *integers, *rest, StoreCodebooks(), ShareConstants())}
