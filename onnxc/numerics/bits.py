"""How many bits the weights of each layer get, under one average for the model.

One bit more divides the noise of rounding by four, so that layer l of n_l weights at b_l bits adds

    a_l 4^(−b_l)

to the error of the outputs, in units of their power: 1 / SQNR of the layer, which is 6.02 dB a bit.
Noise of layers adds up (Lin 2016, "Fixed point quantization of deep convolutional networks"), and

    min Σ_l a_l 4^(−b_l)    subject to    Σ_l n_l b_l ≤ b Σ_l n_l

has the **closed form** of water that fills layers to one level c, where no limit is in the way:

    b_l = ½ log₂ (a_l / n_l) − c

Whole bits come from the noise as it was measured at each width, which falls off from the rule where
bits are few. **greedy**: from the fewest bits on, always the step that removes most noise for the
bits it costs, over all steps of a layer and not only the next one. Until a step is too dear for
what is left, no other choice of that cost does better; what then is left may be better spent.
**best**: the knapsack of `onnxc.numerics.choices`, which spends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.choices import choose

Floats = NDArray[np.float64]

HALVINGS = 100  # of the level of the water
CLOSE = 1e-9  # relative: a budget is met to rounding
TINY = 1e-300


def strength(noise: Floats, bits: Floats) -> Floats:
    """a_l of layers from their noise at some bits: the geometric mean over the widths.

    noise: (layers, widths), relative. bits: of the widths.
    """
    logs = np.log(np.maximum(noise, TINY)) + np.log(4) * bits
    return np.asarray(np.exp(logs.mean(axis=1)))


def closed_form(
    a: Floats, sizes: Floats, average: float, low: float = 0.0, high: float = np.inf
) -> Floats:
    """b_l, real numbers from `low` to `high` whose mean over all weights is `average`.

    a, sizes: a_l and n_l. An average beyond the limits is met as far as they allow.
    """
    wanted = np.log2(np.maximum(a, TINY) / sizes) / 2
    share = sizes / sizes.sum()
    floor = wanted.min() - min(high, average + np.ptp(wanted) + 1)
    ceiling = wanted.max() - low
    for _ in range(HALVINGS):
        c = (floor + ceiling) / 2
        is_full = share @ np.clip(wanted - c, low, high) > average
        floor, ceiling = (c, ceiling) if is_full else (floor, c)
    return np.asarray(np.clip(wanted - ceiling, low, high))


def best(
    noise: Sequence[Floats], sizes: Sequence[float], bits: Floats, average: float
) -> list[int]:
    """Bits of each layer of the least noise within the average. noise: at each of the bits."""
    costs = [np.asarray(size * bits, np.float64) for size in sizes]
    found = choose(costs, noise, average * float(np.sum(sizes)))
    return [int(bits[option]) for option in found]


def greedy(
    noise: Sequence[Floats], sizes: Sequence[float], bits: Floats, average: float
) -> list[int]:
    """The same step by step. bits: growing."""
    left = (average - float(bits[0])) * float(np.sum(sizes)) * (1 + CLOSE)
    options = [0] * len(sizes)
    while True:
        steps = [
            (gain, layer, to)
            for layer, size in enumerate(sizes)
            for gain, to in [_best_step(noise[layer], options[layer], size * bits, left)]
            if gain > 0
        ]
        if not steps:
            return [int(bits[option]) for option in options]
        _, layer, to = max(steps, key=lambda step: (step[0], -step[1]))
        left -= sizes[layer] * float(bits[to] - bits[options[layer]])
        options[layer] = to


def _best_step(noise: Floats, at: int, cost: Floats, left: float) -> tuple[float, int]:
    """The most noise that a layer can lose for each unit of cost, and the option that does so."""
    price, gain = cost[at + 1 :] - cost[at], noise[at] - noise[at + 1 :]
    worth = np.where(price <= left, gain / price, 0)
    if not len(worth):
        return 0.0, at
    first = int(np.argmax(worth))
    return float(worth[first]), at + 1 + first
