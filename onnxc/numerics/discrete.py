"""SCHEMES: few levels for each output of a layer, from published starts, fitted to its outputs.

    scheme     bits   levels                  start
    twn        2      −a, 0, a                threshold 0.7 E|w|               Li 2016
    ttq        2      −a, 0, b                threshold 0.05 max |w|           Zhu 2017
    tga        2      −a, 0, b                truncated Gaussian               He 2019
    ternary    2      −a, 0, b                the best of these for each output
    bases      1..4   ± a_1 ± … ± a_M         greedy, then alternating         Guo 2017; Xu 2018
    pow2       2..5   0, ± 2^k                incremental                      Zhou 2017 (INQ)
    admm       2..5   0, ± α 2^k              the best of several α            Leng 2018 (ADMM)
    levels     1..5   any of each output      exact dynamic programming        ZipML 2017
    codebook   1..8   any of the layer        the same                         ZipML 2017

Every scheme starts from the numbers of its paper, on the nearest levels, fed forward, and by ADMM
where numbers are free (`onnxc.numerics.admm`). Each output goes on from what errs least: codes by
descent, numbers in closed form (`onnxc.numerics.coded`). So none ends worse than on its nearest
levels. Greedy bases are those
of XNOR-Net (Rastegari 2016) and HORQ (Li 2017); the levels of pow2 are never solved for.

`codebook` is fitted by `onnxc.numerics.codebook`, for all outputs together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics import codebook, coded, ternary
from onnxc.numerics.admm import joined
from onnxc.numerics.coded import Coded
from onnxc.numerics.columns import Floats
from onnxc.numerics.kmeans import Points, exact
from onnxc.numerics.kmeans_rows import exact_rows
from onnxc.numerics.levels import ASYMMETRIC, TERNARY, Discrete, Levels, powers, signs
from onnxc.numerics.powers import incremental, window
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]

OCTAVES, FINENESS = 4, 4  # factors α below the largest one, and how many in each octave

Starts = Callable[[Floats, Quadratic, Levels], Iterator[Coded]]


@dataclass(frozen=True)
class Scheme:
    """pattern: B for so many bits. starts: weights to go on from. bits: the least and the most."""

    pattern: Callable[[int], Floats]
    starts: Starts
    bits: tuple[int, int]
    is_free: bool = True


def discrete(
    W: Floats, E: Quadratic, scheme: str, bits: int, keeps_zeros: bool = False
) -> Discrete:
    """W (groups, outputs, d) on few levels for each output.

    keeps_zeros: weights that are 0 stay 0, where the scheme has a level 0.
    """
    row = SCHEMES[scheme]
    levels = Levels(row.pattern(bits), row.is_free, (W == 0) if keeps_zeros else None)
    starts = row.starts(W, E, levels)
    found = coded.fit(W, E, levels, joined(W, E, levels, starts) if row.is_free else starts)
    return Discrete(levels.pattern, found.t, found.codes)


def _ternary(*names: str) -> Starts:
    """Starts of these thresholds, whatever the pattern makes of a and b."""

    def starts(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
        numbers = [ternary.STARTS[name](W) for name in names]
        n = levels.pattern.shape[1]
        yield from coded.starts(W, E, levels, [t[..., :n] for t in numbers])

    return starts


def _bases(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
    """Greedy bases, fitted to the weights alone, as they are and for the outputs."""
    left, t = W, []
    for _ in range(levels.pattern.shape[1]):
        t.append(np.abs(left).mean(axis=2))
        left = left - np.where(left < 0, -1, 1) * t[-1][..., None]
    plain = coded.fit(
        W, Quadratic(), levels, coded.starts(W, Quadratic(), levels, [np.stack(t, 2)])
    )
    yield from coded.starts(W, E, levels, [plain.t, np.stack(t, axis=2)])


def _pow2(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
    t = window(W, E, levels)
    yield from coded.starts(W, E, levels, [t])
    yield incremental(W, E, levels, t)


def _scaled(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
    yield from coded.starts(W, E, levels, [factors(W, E, levels)])


def factors(W: Floats, E: Quadratic, levels: Levels) -> Floats:
    """α of each output, of several ones, with the least Σ_j C_jj (w_j − ŵ_j)²."""
    power = E.diagonal[:, None] if E.blocks else np.ones(1)
    peak = np.abs(W).max(axis=2, keepdims=True)
    top = np.where(peak > 0, peak, 1) / levels.pattern.max()
    tried = [top * 2.0 ** (-step / FINENESS) for step in range(OCTAVES * FINENESS + 1)]
    lost = [np.sum(power * (W - levels.nearest(W, t)[1]) ** 2, axis=2) for t in tried]
    best = np.argmin(lost, axis=0)[..., None]
    return np.take_along_axis(np.concatenate(tried, axis=2), best, axis=2)


def _levels(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
    yield from coded.starts(W, E, levels, [exact_levels(W, E, len(levels.pattern))])


def exact_levels(W: Floats, E: Quadratic, count: int) -> Floats:
    """The levels of least Σ_j C_jj (w_j − c)² for each output, (groups, outputs, count)."""
    power = np.broadcast_to(E.diagonal[:, None] if E.blocks else np.ones(1), W.shape)
    d = W.shape[2]
    return exact_rows(W.reshape(-1, d), power.reshape(-1, d), count).reshape(*W.shape[:2], count)


def _codebook(W: Floats, E: Quadratic, levels: Levels) -> Iterator[Coded]:
    """The levels of all outputs together, which stay as they are then."""
    power = np.broadcast_to(E.diagonal[:, None], W.shape) if E.blocks else None
    count = len(levels.pattern)
    book = codebook.plain(W, exact(Points.of(W, power), count))
    if E.blocks:
        book = codebook.fit(W, E, codebook.feed_forward(W, E, book))
    c = np.pad(book.levels, (0, count - len(book.levels)), mode="edge")
    t = levels.snap(np.broadcast_to(c, (*W.shape[:2], count)))
    yield Coded(t, book.codes, levels.spread(t, book.codes))


def _fixed(pattern: Floats) -> Callable[[int], Floats]:
    return lambda bits: pattern


def _any(bits: int) -> Floats:
    return np.eye(2**bits)


SCHEMES: dict[str, Scheme] = {
    "twn": Scheme(_fixed(TERNARY), _ternary("twn"), (2, 2)),
    "ttq": Scheme(_fixed(ASYMMETRIC), _ternary("ttq"), (2, 2)),
    "tga": Scheme(_fixed(ASYMMETRIC), _ternary("tga"), (2, 2)),
    "ternary": Scheme(_fixed(ASYMMETRIC), _ternary("tga", "twn", "ttq"), (2, 2)),
    "bases": Scheme(signs, _bases, (1, 4)),
    "pow2": Scheme(powers, _pow2, (2, 5), is_free=False),
    "admm": Scheme(powers, _scaled, (2, 5)),
    "levels": Scheme(_any, _levels, (1, 5)),
    "codebook": Scheme(_any, _codebook, (1, 8), is_free=False),
}
