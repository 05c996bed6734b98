"""How fine the codewords of each layer are, under one budget of bytes for all.

    min Σ_l g_l D_l(f_l)    subject to    Σ_l B(f_l) ≤ rate · N / 8 + Σ_l chain

f_l is the form of a layer: the length of its sub-vectors and the number of its codewords. D_l is
the error at its own outputs, relative to their power, with codes fed forward from k-means; for each
length, ln D is a straight line in the bits of a code between the fewest and the most. B are the
bytes in the file, with the nodes, of which a chain for single values is given to each layer. g_l
is what the outputs of the model lose for an error of that layer alone, by one run on the samples
to choose by; without data it is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.damage import FEW, Judge, felt, judge_of
from onnxc.matrices import Layer, error, layers
from onnxc.numerics.choices import choose
from onnxc.numerics.sparse import Quadratic
from onnxc.numerics.vector_fit import SHARED, Form, start
from onnxc.pipeline import PREPARED, gather
from onnxc.storage.codebooks import OVERHEAD
from onnxc.storage.codewords import overhead
from onnxc.workpiece import Workpiece
from passes.cluster_vectors import ClusterVectors

Array = NDArray[Any]

SPREAD = 2.5  # rates that are tried are within this factor of the one that is asked for
SCALED = 0.03  # of the bytes of a layer: scales are worth it up to that


@dataclass(frozen=True)
class Option:
    """A form of a layer with its bytes and D."""

    form: Form
    bytes: int
    lost: float


def planned(vectors: ClusterVectors, piece: Workpiece, opset: int) -> ClusterVectors:
    """The pass with the forms of all layers that share the budget.

    As it is where the user says what forms are, or there is no budget.
    """
    if vectors.forms or not vectors.rate:
        return vectors
    say, graph = piece.say, piece.model.graph
    stats = gather(piece.model, vectors, piece.context, piece.calibration, say, state=PREPARED)
    plan = Plan(vectors, replace(piece, context=replace(piece.context, stats=stats)), opset)
    found = layers(graph, piece.context.only.names(graph), everything=True)
    free = [layer for layer in found if not vectors.obstacle(layer)]
    options = []
    for number, layer in enumerate(free):
        say(f"cluster: trying codewords {number}/{len(free)}")
        options.append(plan.options(layer))
    pairs = [(layer, some) for layer, some in zip(free, options, strict=True) if some]
    forms = plan.chosen(pairs)
    return replace(vectors, forms=tuple(f"{name}={form}" for name, form in forms.items()))


@dataclass(frozen=True)
class Plan:
    """vectors: what is asked for. opset: that nodes are written for."""

    vectors: ClusterVectors
    piece: Workpiece
    opset: int

    def options(self, layer: Layer) -> list[Option]:
        """The forms of a layer, D of all of them from few."""
        W, E = layer.matrix, error(layer, self.piece.context)
        d, found = W.shape[2], list[Option]()
        for s in self.vectors.lengths(layer, d):
            bits = self._bits(W, s)
            if bits and all(C.shape[1] % s == 0 for C in E.blocks):
                ends = sorted({bits[0], bits[-1]})
                logs = np.interp(bits, ends, [math.log(self._lost(W, E, s, b)) for b in ends])
                found += [self._option(layer, W, s, b, x) for b, x in zip(bits, logs, strict=True)]
        return found

    def _bits(self, W: Array, s: int) -> list[int]:
        """Widths of codes to try with sub-vectors of length s."""
        rate, sums = self.vectors.rate, self.vectors.sums
        return [
            b
            for b in self.vectors.widths(self.opset)
            if 1 / SPREAD <= b * sums / s / rate <= SPREAD and 1 << b <= W.size // s // SHARED
        ]

    def _form(self, W: Array, s: int, bits: int) -> Form:
        rows = W.shape[0] * W.shape[1]
        is_scaled = 2 * rows <= SCALED * self.vectors.rate * W.size / 8
        return Form(s, 1 << bits, self.vectors.sums, is_scaled)

    def _lost(self, W: Array, E: Quadratic, s: int, bits: int) -> float:
        begun = start(W, E, self._form(W, s, bits), self.piece.context.seed)
        return max(E.error(W - begun.weight) / max(E.error(W), 1e-300), FEW)

    def _option(self, layer: Layer, W: Array, s: int, bits: int, log: float) -> Option:
        form, rows = self._form(W, s, bits), W.shape[0] * W.shape[1]
        size = form.size(rows, W.shape[2]) + overhead(form, layer.is_turned, self.opset)
        return Option(form, size, math.exp(log))

    def chosen(self, pairs: Sequence[tuple[Layer, list[Option]]]) -> dict[str, Form]:
        """The form of each layer, by its name."""
        numbers = sum(layer.size for layer, _ in pairs)
        budget = self.vectors.rate * numbers / 8 + len(pairs) * OVERHEAD[False]
        gains = self._gains(pairs)
        costs = [np.array([float(o.bytes) for o in some]) for _, some in pairs]
        losses = [
            gain * np.array([o.lost for o in some])
            for gain, (_, some) in zip(gains, pairs, strict=True)
        ]
        picked = choose(costs, losses, budget)
        each = zip(pairs, picked, strict=True)
        return {layer.name: some[index].form for (layer, some), index in each}

    def _gains(self, pairs: Sequence[tuple[Layer, list[Option]]]) -> list[float]:
        """g of each layer."""
        judge, found = judge_of(self.piece), []
        for number, (layer, some) in enumerate(pairs):
            self.piece.say(f"cluster: measuring {number}/{len(pairs)}")
            found.append(self._gain(judge, layer, some))
        return found

    def _gain(self, judge: Judge | None, layer: Layer, some: Sequence[Option]) -> float:
        W, E = layer.matrix, error(layer, self.piece.context)
        middle = sorted(some, key=lambda option: option.lost)[len(some) // 2].form
        made = start(W, E, middle, self.piece.context.seed).weight
        lost = E.error(W - made) / max(E.error(W), 1e-300)
        return felt(judge, layer, made, lost)
