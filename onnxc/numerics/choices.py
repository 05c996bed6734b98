"""One option of each layer, under one budget for all: the multiple-choice knapsack.

    min Σ_l loss_l(o_l)    subject to    Σ_l cost_l(o_l) ≤ budget

Layer after layer, the combinations so far that no other one beats in both are kept, in order of
cost. That is exact as long as there are at most MOST of them; beyond, the range of costs is cut
into MOST steps, and of those in one step the one of the least loss is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

MOST = 20_000  # combinations
CLOSE = 1e-9  # relative: a budget is met to rounding


def choose(costs: Sequence[Floats], losses: Sequence[Floats], budget: float) -> list[int]:
    """The option of each layer. costs, losses: of its options, (options,), for each layer.

    Where the budget cannot be met, the cheapest option of each layer, the better one of two.
    """
    cost, loss = np.zeros(1), np.zeros(1)
    came: list[tuple[Indices, Indices]] = []  # for each layer: the combination before, the option
    for c, v in zip(costs, losses, strict=True):
        total = (cost[:, None] + c).reshape(-1)
        lost = (loss[:, None] + v).reshape(-1)
        kept = _frontier(total, lost)
        came.append((kept // len(c), kept % len(c)))
        cost, loss = total[kept], lost[kept]
    within = np.flatnonzero(cost <= budget * (1 + CLOSE))
    at = int(within[-1]) if len(within) else 0
    found = []
    for before, option in reversed(came):
        found.append(int(option[at]))
        at = int(before[at])
    return found[::-1]


def _frontier(cost: Floats, loss: Floats) -> Indices:
    """Numbers of the combinations that none beats, by growing cost."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    is_new = np.ones(len(order), bool)
    is_new[1:] = best[1:] < best[:-1]
    kept = order[is_new]
    if len(kept) <= MOST:
        return np.asarray(kept)
    span = cost[kept[-1]] - cost[kept[0]]
    step = np.floor((cost[kept] - cost[kept[0]]) / span * MOST)
    is_last = np.append(step[1:] != step[:-1], True)  # of the least loss in its step
    is_last[0] = True  # what is cheapest can always be had
    return np.asarray(kept[is_last])
