"""How many bits the weights of each layer get, under one average for all (`onnxc.numerics.bits`).

    min Σ_l g_l D_l(b_l)    subject to    Σ_l n_l b_l ≤ b Σ_l n_l

D_l is what rounding to b_l bits takes from the outputs of layer l, relative to their power. It is
measured where bits are few (each column making up for those before, on the moments of its input)
and divided by four for each bit more (Lin 2016). g_l is what the outputs of the model lose for an
error of that layer alone, by one run on the samples to choose by; without data it is 1. The first
and the last layer do not share in it where they keep 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.core import Context, Pass
from onnxc.damage import FEW, felt, judge_of
from onnxc.ends import ends
from onnxc.graph import copy, opset
from onnxc.matrices import Layer, error, layers
from onnxc.numerics.bits import best
from onnxc.numerics.rounding import rounded
from onnxc.pipeline import PREPARED, compress, gather
from onnxc.workpiece import Workpiece
from passes.quantize_layers import QuantizeLayers

Array = NDArray[Any]

WIDTHS = (2, 3, 4, 5, 6, 8)
TRIED = (2, 3, 4)  # bits at which layers are rounded to be measured
JUDGED = 3  # bits at which the outputs of the model are looked at


def planned(
    quantize: QuantizeLayers, average: float, piece: Workpiece, start: Sequence[Pass] = ()
) -> QuantizeLayers:
    """The pass with the bits of all layers that share the average. start: what goes before it."""
    key = ("bits of layers", quantize, tuple(start))
    found = piece.once(key, lambda: _found(quantize, piece, start))
    if not found:
        return quantize
    names, noise, sizes = zip(*found, strict=True)
    widths = best(list(noise), list(sizes), np.array(WIDTHS, np.float64), average)
    pairs = zip(names, widths, strict=True)
    return replace(quantize, widths=tuple(f"{name}={bits}" for name, bits in pairs))


def _found(
    quantize: QuantizeLayers, piece: Workpiece, start: Sequence[Pass]
) -> list[tuple[str, Array, float]]:
    """Each layer whose bits are not settled: its name, g D at all WIDTHS, and its weights."""
    begun = _after(start, piece)
    state = None if piece.has_data else PREPARED
    stats = gather(begun.model, quantize, begun.context, piece.calibration, piece.say, state)
    plan = Plan(quantize, replace(begun, context=replace(begun.context, stats=stats)))
    free = plan.free()
    pairs = zip(free, plan.noise(free), strict=True)
    return [(layer.name, noise, float(layer.size)) for layer, noise in pairs]


def _after(start: Sequence[Pass], piece: Workpiece) -> Workpiece:
    """The model behind the passes that a way begins with."""
    model = copy(piece.model)
    compress(model, start, piece.context, piece.calibration, piece.feed, piece.say)
    context = replace(piece.context, opset=opset(model.graph))
    return replace(piece, model=model, context=context)


@dataclass(frozen=True)
class Plan:
    """quantize: what the bits are for. piece: the model that they are sought on, with moments."""

    quantize: QuantizeLayers
    piece: Workpiece

    @property
    def context(self) -> Context:
        return self.piece.context

    def free(self) -> list[Layer]:
        """Layers whose bits are not settled."""
        graph = self.piece.model.graph
        kept = ends(graph) if self.quantize.keep_ends else frozenset[str]()
        return [
            layer
            for layer in layers(graph, self.context.only.names(graph))
            if not any(node.name in kept for node in layer.nodes)
            and not self.quantize.obstacle(layer, self.context)
        ]

    def noise(self, free: Sequence[Layer]) -> list[Array]:
        """g_l D_l of each layer at all WIDTHS."""
        judge, found = judge_of(self.piece, is_noise=True), []
        for number, layer in enumerate(free):
            self.piece.say(f"quantize: trying bits {number}/{len(free)}")
            lost, made = self._lost(layer)
            found.append(felt(judge, layer, made, lost[JUDGED]) * self._curve(layer, lost))
        return found

    def _lost(self, layer: Layer) -> tuple[dict[int, float], Array]:
        """D at the bits that are TRIED, and the weight that is JUDGED."""
        W, E = layer.matrix, error(layer, self.context)
        made = {b: self._rounded(layer, W, E, b) for b in TRIED}
        power = max(E.error(W), 1e-300)
        return {b: max(E.error(W - X) / power, FEW) for b, X in made.items()}, made[JUDGED]

    def _rounded(self, layer: Layer, W: Array, E: Any, bits: int) -> Array:
        return rounded(W, E, self.quantize.wish(layer, bits, self.context), "gptq").weight

    def _curve(self, layer: Layer, lost: dict[int, float]) -> Array:
        """D at all WIDTHS, never growing."""
        last = TRIED[-1]
        wishes = {b: self.quantize.wish(layer, b, self.context) for b in WIDTHS}
        widths = {b: wish.grid.width for b, wish in wishes.items()}
        curve = [lost.get(b, lost[last] * 4.0 ** (last - widths[b])) for b in WIDTHS]
        return np.minimum.accumulate(curve)
