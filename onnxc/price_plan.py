"""What a bit of code is worth in each layer, under one bound on what all lose (ecsq).

    min Σ_l F_l R_l    subject to    Σ_l g_l D_l ≤ L

D_l is the error at the outputs of layer l, relative to their power, R_l the length of its codes in
bits, F_l its weights. g_l is what the outputs of the model lose for an error of that layer alone
(`onnxc.damage`). A bit less makes D_l four times as large at high resolution (Gish 1968), so at the
optimum each layer has that part of L that is its share of the weights, and a bit costs

    λ_l = 2 ln 2 · L / (g_l Σ F)            in shares of the power of the layer's outputs.

Layers that the model hardly feels get short codes then, and those that it feels long ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnxc.damage import felt, judge_of
from onnxc.matrices import Layer, error, layers
from onnxc.numerics.affine import Grid
from onnxc.numerics.rounding import Wish, rounded
from onnxc.pipeline import PREPARED, gather
from onnxc.workpiece import Workpiece
from passes.cluster import Cluster

LEAST = 1e-4  # of g
TRIED = 4  # bits that a layer alone is rounded to, to see what the model feels


def planned(cluster: Cluster, loss: float, piece: Workpiece) -> Cluster:
    """The pass with the prices of all layers that share a loss."""
    gains = piece.once(("gains", cluster.bits, cluster.smallest), lambda: _gains(cluster, piece))
    weights = sum(layer.size for layer, _ in gains)
    prices = (
        f"{layer.name}={2 * math.log(2) * loss / (max(g, LEAST) * weights):.6g}"
        for layer, g in gains
    )
    return replace(cluster, prices=tuple(prices))


def _gains(cluster: Cluster, piece: Workpiece) -> Sequence[tuple[Layer, float]]:
    """g of each layer that is clustered."""
    graph = piece.model.graph
    stats = gather(piece.model, cluster, piece.context, piece.calibration, piece.say, PREPARED)
    seen = replace(piece, context=replace(piece.context, stats=stats))
    found = layers(graph, piece.context.only.names(graph), everything=True)
    free = [layer for layer in found if not cluster.obstacle(layer)]
    judge, gains = judge_of(seen), []
    for number, layer in enumerate(free):
        piece.say(f"cluster: measuring layers {number}/{len(free)}")
        W, E = layer.matrix, error(layer, seen.context)
        made = rounded(W, E, Wish(Grid(TRIED)), "nearest").weight
        lost = E.error(W - made) / max(E.error(W), 1e-300)
        gains.append((layer, felt(judge, layer, made, lost)))
    return gains
