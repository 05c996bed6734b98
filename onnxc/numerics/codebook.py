"""A weight on few shared levels, fitted to the outputs of its layer.

With levels c_1 < … < c_K and a code a for each weight, ŵ_ij = c[a_ij], and C the second moments of
the rows of the layer's input (`onnxc.numerics.sparse`),

    E(a, c) = tr (W − Ŵ) C (W − Ŵ)ᵀ.

**Start**, with the levels given: columns j in turn, of large C_jj first, each on the level nearest
to what makes up for the columns before it (`onnxc.numerics.columns`). **Codes**, by coordinate
descent: column j of the best weight, all others as they are, is

    w*_j = ŵ_j + (Δ C)_j / C_jj,  Δ = W − Ŵ,      a_j <- argmin C_jj (w*_j − c_a)² + λ b_a

with b_a = −log₂ of the share of weights on level a (λ is 0 unless code length has a price).
**Levels**, with the codes given, are linear least squares: with A the matrix of zeros and ones that
spreads c over the weight,

    (Aᵀ C A) c = Aᵀ C W

solved by conjugate gradients. Each step lowers E; they are repeated until that is little.

A level may be pinned at 0, and weights that are 0 may be kept there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.columns import forward, sweep, triangles, upright
from onnxc.numerics.kmeans import nearest
from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]
Mask = NDArray[np.bool_]

ROUNDS, SETTLED = 30, 3e-3  # of codes and levels in turn; a gain in E that ends them
SWEEPS = 2  # of the codes in a round
SOLVED = 1e-3  # ‖residual‖ of the levels, of the first one
CHUNK = 1 << 22  # costs that are compared at once
STEPS = 127  # of a grid of integers on either side of 0
PINNED = 0.1  # share of zeros of a weight from which on they stay zeros


@dataclass(frozen=True)
class Codebook:
    """levels: sorted, (K,). codes: of the weight, (groups, outputs, d). pinned: index of a 0."""

    levels: Floats
    codes: Codes
    pinned: int | None = None

    @property
    def weight(self) -> Floats:
        """Ŵ."""
        return self.levels[self.codes]

    @property
    def shares(self) -> Floats:
        """Of the weights on each level."""
        counts = np.bincount(self.codes.reshape(-1), minlength=len(self.levels))
        return counts / max(self.codes.size, 1)

    @property
    def entropy(self) -> float:
        """Bits a weight when codes are entropy-coded."""
        p = self.shares[self.shares > 0]
        return float(-(p @ np.log2(p)))


def pin_of(levels: Floats) -> int | None:
    """The index of a level that is exactly 0."""
    found = np.flatnonzero(levels == 0)
    return int(found[0]) if len(found) else None


def plain(W: Floats, levels: Floats, pinned: int | None = None) -> Codebook:
    """Each weight on the nearest level."""
    return Codebook(levels, nearest(W, levels), pinned)


def snap(levels: Floats) -> Floats:
    """Levels on the nearest multiples of max |c| / 127."""
    peak = float(np.abs(levels).max(initial=0))
    scale = float(np.float32(peak / STEPS))
    return np.asarray(np.rint(levels / scale) * scale) if scale else levels


def fit(
    W: Floats,
    E: Quadratic,
    start: Codebook,
    price: float = 0.0,
    snap: Callable[[Floats], Floats] | None = None,
) -> Codebook:
    """The codebook of least E that the steps above find from a start.

    W: (groups, outputs, d). price: λ, in units of E for a bit. snap: moves levels to where they are
    allowed, each time that they are solved for.
    """
    kept = (W == 0) if start.pinned is not None else np.zeros(W.shape, bool)
    best, value = start, cost(W, E, start, price)
    now = start
    for _ in range(ROUNDS):
        now = solve_levels(W, E, now, snap)
        for _ in range(SWEEPS):
            now = replace(now, codes=descend(W, E, now, kept, price))
        found = cost(W, E, now, price)
        if not found < value:
            break
        is_settled = found > (1 - SETTLED) * value
        best, value = now, found
        if is_settled:
            break
    return best


def cost(W: Floats, E: Quadratic, book: Codebook, price: float) -> float:
    """E and what codes cost at a price for each bit of their entropy."""
    return E.error(W - book.weight) + price * book.codes.size * book.entropy


def feed_forward(W: Floats, E: Quadratic, book: Codebook) -> Codebook:
    """Codes of the start: columns in turn, each making up for those before it."""
    if not E.blocks:
        return plain(W, book.levels, book.pinned)
    kept = W == 0 if book.pinned is not None else np.zeros(W.shape, bool)

    def choose(j: int, goal: Floats, power: Floats) -> tuple[Codes, Floats]:
        a = np.where(kept[..., j], book.pinned or 0, nearest(goal, book.levels))
        return a, book.levels[a]

    codes, _ = forward(W, triangles(E), choose)
    return replace(book, codes=np.ascontiguousarray(codes))


def descend(W: Floats, E: Quadratic, book: Codebook, kept: Mask, price: float = 0.0) -> Codes:
    """Codes after one sweep of coordinate descent over all columns."""
    cheapest = _cheapest(book, price)
    if not E.blocks:
        return np.where(kept, book.codes, cheapest(W, np.ones((1, 1, 1))))
    codes, values, is_free = upright(book.codes), upright(book.weight), not kept.any()

    def choose(j: int, goal: Floats, power: Floats) -> tuple[Codes, Floats]:
        a = cheapest(goal, power)
        a = a if is_free else np.where(kept[..., j], codes[..., j], a)
        return a, book.levels[a]

    sweep(E, codes, values, upright(E.times(W - values)), choose)
    return np.ascontiguousarray(codes)


def _cheapest(book: Codebook, price: float) -> Callable[[Floats, Floats], Codes]:
    """What gives the codes of w*_j and C_jj."""
    if not price:
        edges = (book.levels[1:] + book.levels[:-1]) / 2
        return lambda goal, power: edges.searchsorted(goal, side="right")
    lengths = price * -np.log2(np.maximum(book.shares, 1 / (2 * book.codes.size)))

    def cheapest(goal: Floats, power: Floats) -> Codes:
        flat, scale = goal.reshape(-1), np.broadcast_to(power, goal.shape).reshape(-1)
        step, parts = max(1, CHUNK // len(lengths)), []
        for begin in range(0, len(flat), step):
            part = slice(begin, begin + step)
            gap = flat[part, None] - book.levels
            parts.append(np.argmin(scale[part, None] * gap * gap + lengths, axis=1))
        return np.concatenate(parts).reshape(goal.shape)

    return cheapest


def solve_levels(
    W: Floats, E: Quadratic, book: Codebook, snap: Callable[[Floats], Floats] | None = None
) -> Codebook:
    """The best levels for these codes, sorted; levels that no weight has stay."""
    K, codes = len(book.levels), book.codes
    free = np.bincount(codes.reshape(-1), minlength=K) > 0
    if book.pinned is not None:
        free[book.pinned] = False

    def gathered(G: Floats) -> Floats:
        """Aᵀ G, for the levels that may move."""
        return np.where(free, np.bincount(codes.reshape(-1), G.reshape(-1), K), 0)

    power = E.diagonal[:, None] if E.blocks else np.ones((1, 1, 1))
    scale = gathered(np.broadcast_to(power, W.shape))
    scale = np.divide(1, scale, out=np.zeros(K), where=scale > 0)
    levels, residual = book.levels.copy(), gathered(E.times(W - book.weight))
    direction = scale * residual
    size = first = float(residual @ direction)
    for _ in range(K):
        if size <= SOLVED**2 * first or first <= 0:
            break
        image = gathered(E.times(direction[codes]))
        bend = float(direction @ image)
        if bend <= 0:
            break
        levels, residual = levels + size / bend * direction, residual - size / bend * image
        last, size = size, float(residual @ (scale * residual))
        direction = scale * residual + size / last * direction
    return _sorted(replace(book, levels=levels if snap is None else snap(levels)))


def _sorted(book: Codebook) -> Codebook:
    order = np.argsort(book.levels, kind="stable")
    place = np.empty(len(order), np.intp)
    place[order] = np.arange(len(order))
    pinned = None if book.pinned is None else int(place[book.pinned])
    return Codebook(book.levels[order], place[book.codes], pinned)
