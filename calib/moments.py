"""Second moments of a layer's input: what every solver over (W, H, mu) needs of the data.

With rows x of the input (`onnxc.numerics.patches`), n of them, for each group of channels

    mu = Σ x / n,    H = Σ x xᵀ / n.

Rows are multiplied and added in float64, in which the product of two float32 values is exact. A
sum of n products is then within n · 2⁻⁵³ of the exact one, relative to Σ |x_i x_j|: whatever the
batches and merges, two sums differ by less than 1e-12. Of each sample at most clip(d/12, 8, 32)
rows are taken, d being their length: neighbours look alike, and a hundred samples then give
several times d of them.

Of a wide layer only the **blocks** on the diagonal of H are kept, each of `block` columns; one
column a block is the diagonal alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxc.errors import OptionError
from onnxc.numerics.patches import Floats, Window, length, rows

Array = NDArray[Any]

SHARE, FEWEST, MOST = 12, 8, 32  # rows of a sample: clip(d / SHARE, FEWEST, MOST)
LEAST_WAITING, MOST_WAITING = 1 << 18, 1 << 20  # bytes of rows that are multiplied at once


def _nothing() -> Floats:
    return np.zeros((0, 0))


def _no_products() -> Floats:
    return np.zeros((0, 0, 0, 0))


def positions(d: int) -> int:
    """Rows of length d that are taken of a sample."""
    return min(max(-(-d // SHARE), FEWEST), MOST)


def widths(d: int, block: int | None) -> tuple[int, int]:
    """Number of blocks, and columns of each; the last one may hold fewer."""
    count = -(-d // block) if block and block < d else 1
    return count, -(-d // count)


def bytes_of(shape: tuple[int, ...], axis: int, window: Window, block: int | None = None) -> int:
    """Bytes of the moments of an input of this shape."""
    d = length(shape, axis, window)
    count, width = widths(d, block)
    return 8 * window.groups * (d + count * width * width)


def waiting(shape: tuple[int, ...], axis: int, window: Window) -> int:
    """Bytes of rows of an input of this shape that wait: about d, for fewer cost as much."""
    return _waiting(window.groups, length(shape, axis, window))


def _waiting(groups: int, d: int) -> int:
    return min(max(4 * groups * d * d, LEAST_WAITING), MOST_WAITING)


@dataclass
class MomentsObserver:
    """Sums over rows of the input of a layer.

    axis: of the channels. block: columns of a block of H, None for all of H. count: rows taken;
    available: rows that there were. total: Σ x, float64 (groups, d). products: Σ x xᵀ, float64
    (groups, blocks, width, width), zero where the last block is narrower.
    """

    axis: int | None = 1
    window: Window = Window()
    block: int | None = None
    count: int = 0
    available: int = 0
    total: Floats = field(default_factory=_nothing)
    products: Floats = field(default_factory=_no_products)

    def __post_init__(self) -> None:
        self._waiting: list[Array] = []

    def update(self, x: Array, samples: int | None = None) -> None:
        """Add the rows of `x`, which holds that many samples; None: as many as its first axis."""
        if not x.size:
            return
        axis = 1 if self.axis is None else self.axis
        wanted = positions(length(x.shape, axis, self.window))
        taken, available = rows(x, axis, self.window, wanted, samples)
        self.count += taken.shape[1]
        self.available += available
        self._waiting.append(taken)
        if sum(part.nbytes for part in self._waiting) >= _waiting(len(taken), taken.shape[2]):
            self.settle()

    def settle(self) -> None:
        """Multiply the rows that wait; after it the sums are complete."""
        if self._waiting:
            with np.errstate(invalid="ignore"):  # infinity is found in the sums, and named there
                self._multiply(np.concatenate(self._waiting, axis=-2, dtype=np.float64))
            self._waiting = []

    def merge(self, other: Self) -> Self:
        """The observer of both data. Raises OptionError when rows or blocks differ."""
        _check_alike(self, other)
        self.settle()
        other.settle()
        return type(self)(
            self.axis,
            self.window,
            self.block,
            self.count + other.count,
            self.available + other.available,
            _sum(self.total.copy(), other.total),
            _sum(self.products.copy(), other.products),
        )

    def _multiply(self, taken: Floats) -> None:
        self.total = _sum(taken.sum(axis=1), self.total)
        self.products = _sum(_products(taken, self.block), self.products)

    @property
    def mean(self) -> Floats:
        """mu, (groups, d)."""
        return self.total / max(self.count, 1)

    @property
    def second(self) -> Floats:
        """H, (groups, d, d); zero outside its blocks."""
        return _assembled(self.products, self.total.shape[1]) / max(self.count, 1)

    def blocks(self, most: int) -> list[Floats]:
        """H along its diagonal, in blocks of at most so many columns, (groups, width, width)."""
        d, width = self.total.shape[1], self.products.shape[2]
        found = []
        for index, start in enumerate(range(0, d, width)):
            size = min(width, d - start)
            whole = self.products[:, index, :size, :size]
            cuts = [(a, min(a + most, size)) for a in range(0, size, most)]
            found += [whole[:, a:b, a:b] / max(self.count, 1) for a, b in cuts]
        return found

    @property
    def diagonal(self) -> Floats:
        """diag(H) = E[x²], (groups, d)."""
        found = np.diagonal(self.products, axis1=2, axis2=3).reshape(len(self.products), -1)
        return found[:, : self.total.shape[1]] / max(self.count, 1)

    @property
    def is_finite(self) -> bool:
        self.settle()
        return bool(np.isfinite(self.total).all())

    @property
    def has_nan(self) -> bool:
        self.settle()
        return bool(np.isnan(self.total).any())


def _products(x: Floats, block: int | None) -> Floats:
    """Σ x xᵀ in blocks; of one array with itself, BLAS computes half of the symmetric matrix."""
    count, width = widths(x.shape[2], block)
    if count == 1:
        return (x.transpose(0, 2, 1) @ x)[:, None]
    products = np.zeros((len(x), count, width, width))
    for index in range(count):
        part = x[..., index * width : (index + 1) * width]
        size = part.shape[2]
        products[:, index, :size, :size] = part.transpose(0, 2, 1) @ part
    return products


def _assembled(products: Floats, d: int) -> Floats:
    groups, count, width, _ = products.shape
    whole = np.zeros((groups, count * width, count * width))
    for block in range(count):
        columns = slice(block * width, (block + 1) * width)
        whole[:, columns, columns] = products[:, block]
    return whole[:, :d, :d]


def _sum(new: Floats, old: Floats) -> Floats:
    """new + old, in the place of `new`; an empty sum has no shape yet."""
    if old.size == 0 or new.size == 0:
        return new if old.size == 0 else old
    new += old
    return new


def _check_alike(a: MomentsObserver, b: MomentsObserver) -> None:
    if (a.axis, a.window) != (b.axis, b.window):
        raise OptionError("moments of differently cut rows cannot be merged")
    if a.block != b.block:
        raise OptionError(
            f"moments in blocks of {a.block or 'all'} and of {b.block or 'all'} columns cannot be "
            "merged: gather both with the same --max-memory"
        )
