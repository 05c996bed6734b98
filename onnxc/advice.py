"""What would help a quantized file, layer by layer: read off the graph, or measured beside it.

A row says what is seen, in how many layers, and what changing it is worth at their outputs. Layers
whose own error is beyond ENOUGH dB need no advice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from statistics import median

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.blame import WIDE, Examined
from onnxc.fidelity import decibel
from onnxc.graph import values
from onnxc.kernels import Coverage
from onnxc.numerics.affine import Grid, dequantize, quantize, weight_scales
from onnxc.ops import knowledge, weight_of
from onnxc.report import Advice
from onnxc.targets import Target
from onnxc.twins import HEAVY, INTEGRAL

ENOUGH = 40.0  # dB of its own error that a layer may have
LEAST = 3.0  # dB below which a change is not worth a word
GRID = Grid(8, signed=True, narrow=True)


def advise(
    layers: Iterable[Examined], graph: gs.Graph, coverage: Coverage, target: Target
) -> tuple[Advice, ...]:
    """Advice on a quantized file, what is worth most first. graph: the original, prepared."""
    known = list(layers)
    nodes = {node.name: node for node in graph.nodes}
    rows: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for layer in known:
        for what, gain in _of_layer(layer, nodes.get(layer.twin.node)):
            rows[what].append((layer.twin.node, gain))
    found = [
        Advice(what, tuple(n for n, _ in _sorted(pairs)), median(g for _, g in pairs))
        for what, pairs in rows.items()
    ]
    found.sort(key=lambda a: -(a.gain or 0.0) * len(a.nodes))
    return (*found, *_of_whole(known, coverage, target))


def _sorted(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])


def _of_layer(layer: Examined, node: gs.Node | None) -> Iterator[tuple[str, float]]:
    """What would help a layer, and by how many dB."""
    own = layer.own
    if own is None or own >= ENOUGH:
        return
    if layer.saturating is not None:
        yield (
            "sums of 8-bit products saturate on this processor: weights of 7 bits do not "
            "(onnxc quantize --target x86)",
            _without(own, layer.saturating),
        )
    if layer.clipping is not None and (gain := _without(own, layer.clipping)) >= LEAST:
        yield "ranges cut large values off: ranges by mse or minmax do so less", gain
    steps = layer.steps
    if steps is not None and layer.fit is None and layer.rounding is not None:
        share = (layer.high - layer.low) / max(steps.high - steps.low, 1e-30)
        if 0 < share < WIDE and layer.rounding < own + LEAST:
            yield (
                "ranges are wider than the values, as a few large ones make them: ranges by mse",
                -20 * np.log10(share),
            )
    split = None if node is None else _per_channel(layer, node)
    if split is not None and split >= LEAST:
        yield "weights have one scale: one for each channel makes their error smaller", split


def _without(own: float, part: float) -> float:
    """dB that an error gets smaller by when a part of it goes."""
    whole, less = 10 ** (-own / 10), 10 ** (-part / 10)
    return decibel(whole, max(whole - less, whole * 1e-3))


def _per_channel(layer: Examined, node: gs.Node) -> float | None:
    """What a scale for each channel is worth to the weight; None where it has them."""
    weight, carrier = weight_of(node), layer.twin.carrier
    axis = knowledge(node).out_axis
    if weight is None or carrier is None or axis is None or not _has_one_scale(carrier):
        return None
    W = values(weight).astype(np.float64)
    one, many = (_noise(W, None), _noise(W, axis(node)))
    return decibel(one, many) if many > 0 else None


def _noise(W: np.ndarray[tuple[int, ...], np.dtype[np.float64]], axis: int | None) -> float:
    scale = weight_scales(W, axis, GRID)
    held = dequantize(quantize(W, scale, 0, GRID, axis), scale, 0, axis)
    return float(((W - held) ** 2).sum())


def _has_one_scale(carrier: gs.Node) -> bool:
    row = INTEGRAL.get(carrier.op)
    if row is not None:
        return _is_one(carrier.inputs[row.operands[1][1]])
    position = HEAVY.get(carrier.op, 1)
    weight = carrier.inputs[position] if position < len(carrier.inputs) else None
    maker = weight.inputs[0] if weight is not None and weight.inputs else None
    return maker is not None and maker.op == "DequantizeLinear" and _is_one(maker.inputs[1])


def _is_one(scale: gs.Tensor) -> bool:
    return isinstance(scale, gs.Constant) and int(np.prod(scale.shape)) == 1


def _of_whole(layers: Iterable[Examined], coverage: Coverage, target: Target) -> Iterator[Advice]:
    """What concerns the speed of the file: types of activations, and what runs in float."""
    signed = [x.twin.node for x in layers if x.steps is not None and x.steps.kind == "int8"]
    if signed and target.activations == "uint8":
        yield Advice(
            f"activations are int8: kernels of target {target.name} are faster on uint8",
            tuple(signed),
        )
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for kernel in coverage.left_float:
        reasons[kernel.reason].append(kernel.node)
    for reason, nodes in reasons.items():
        yield Advice(f"runs in float: {reason}", tuple(nodes))
