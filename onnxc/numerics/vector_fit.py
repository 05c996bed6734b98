"""Which sub-vectors a weight is cut into, and how many codewords they share.

A weight of n numbers in rows of d gets the form, of those whose codes, books and scales take no
more than `rate` bits a number, that would lose least if all took the same bytes. With D the error
E / E(0) of a form and B its bytes, the nodes that unpack it included, that is the least

    ln D + 2 ln 2 · 8 B / max(n, n̄)

for at high resolution a bit a number divides D by four; n̄ are the numbers of a layer on average,
for a byte in a small layer is worth no less than elsewhere. A form is a length s, which divides d,
a number of codewords K, the most that fit, and whether rows have scales. Lengths that are rows of
kernels, or whole kernels, often win: what lies there is not independent.

Books are then integers of 8 bits: σ takes the step up, so that this costs K s bytes and no more.
Single values without scales are stored as floats, which takes fewer nodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.packing import bits_for
from onnxc.numerics.sparse import Quadratic
from onnxc.numerics.subvectors import Vectors, descend, feed_forward, fit, measured
from onnxc.numerics.vector_kmeans import kmeans

Floats = NDArray[np.float64]

FLOAT = 4  # bytes
STEPS = 127  # of a book on either side of 0
LEAST = 1e-6  # of the mean scale: that of a row of zeros
NARROW = 2.0**-14  # below it float16 has fewer digits
SHARED = 2  # sub-vectors for each codeword, at least


@dataclass(frozen=True)
class Form:
    """How a weight is put on codewords. length: s. count: K. books: M."""

    length: int
    count: int
    books: int = 1
    is_scaled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is a codebook of single values, which are stored as floats."""
        return self.length == 1 and self.books == 1 and not self.is_scaled

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_for(self.count)

    def __str__(self) -> str:
        return f"{self.length}x{self.count}" + "s" * self.is_scaled

    @classmethod
    def read(cls, text: str, books: int = 1) -> Form:
        """LENGTHxCOUNT, with an s behind it where rows are scaled. Raises ValueError."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(s?)", text)
        if found is None or not 2 <= int(found[2]) <= 256:
            raise ValueError(f"forms are LENGTHxCOUNT of 2 to 256 codewords, not {text!r}")
        return cls(int(found[1]), int(found[2]), books, bool(found[3]))

    def size(self, rows: int, d: int) -> int:
        """Bytes of the codes, books and scales of a weight."""
        codes = -(-rows * (d // self.length) * self.books * self.bits // 8)
        if self.is_plain:
            return codes + FLOAT * self.count
        scales = 2 * rows if self.is_scaled else FLOAT
        return codes + self.books * self.count * self.length + scales


@dataclass(frozen=True)
class Bounds:
    """What forms may be. rate: bits a number, 0 for no bound. widths: bits of a code."""

    rate: float = 2.0
    widths: tuple[int, ...] = tuple(range(1, 9))
    books: int = 1


def forms(rows: int, d: int, lengths: Iterable[int], bounds: Bounds) -> Iterator[Form]:
    """The forms of a weight within bounds, of each length with and without scales the largest."""
    for s in lengths:
        for is_scaled in (False, True) if d % s == 0 else ():
            found = _largest(rows, d, Form(s, 2, bounds.books, is_scaled), bounds)
            if found is not None:
                yield found


def _largest(rows: int, d: int, form: Form, bounds: Bounds) -> Form | None:
    """The form of the most codewords within bounds."""
    most = rows * (d // form.length) // SHARED
    budget = bounds.rate * rows * d / 8 if bounds.rate else math.inf
    for bits in sorted(bounds.widths, reverse=True):
        left = budget - replace(form, count=1 << bits).size(rows, d)
        each = FLOAT if form.is_plain else form.books * form.length
        spare = math.ceil(-left / each) if left < 0 else 0
        count = min((1 << bits) - spare, most)
        if count > 1 << bits >> 1:
            return replace(form, count=count)
    return None


def choose(
    W: Floats,
    E: Quadratic,
    tried: Sequence[Form],
    overhead: Callable[[Form], int],
    typical: float = 0.0,
    seed: int = 0,
) -> tuple[Form, Vectors]:
    """The form of the least score of the module's docstring, and where its fit starts.

    W: (groups, outputs, d). overhead: bytes of the nodes that unpack a form. typical: n̄.
    """
    rows, d, whole = W.shape[0] * W.shape[1], W.shape[2], max(E.error(W), 1e-300)
    scored = []
    for form in tried:
        begun = start(W, E, form, seed)
        lost = max(E.error(W - begun.weight) / whole, 1e-30)
        bits = 8 * (form.size(rows, d) + overhead(form)) / max(W.size, typical)
        scored.append((math.log(lost) + 2 * math.log(2) * bits, form, begun))
    _, form, begun = min(scored, key=lambda found: found[0])
    return form, begun


def start(W: Floats, E: Quadratic, form: Form, seed: int = 0) -> Vectors:
    """Books by k-means, each of what those before it leave, and codes fed forward."""
    s, (groups, outputs, d) = form.length, W.shape
    E = measured(E, groups, d, s)
    sigma = np.sqrt(np.mean(W * W, axis=2))
    level = max(float(np.sqrt(np.mean(W * W))), float(np.finfo(np.float32).tiny))
    sigma = np.maximum(sigma, LEAST * level) if form.is_scaled else np.full_like(sigma, level)
    power = E.diagonal[:, None] * (sigma * sigma)[..., None]
    x, w = (W / sigma[..., None]).reshape(-1, s), power.reshape(-1, s)
    w = w / max(float(w.mean()), 1e-300)
    books = np.zeros((form.books, form.count, s))
    for number in range(form.books):
        found = kmeans(x, w, form.count, seed)
        books[number, : len(found)] = found
        if number + 1 < form.books:
            x = x - _nearest_of(x, w, found)
    codes = np.zeros((form.books, groups, outputs, d // s), np.intp)
    return feed_forward(W, E, Vectors(books, codes, sigma))


def _nearest_of(x: Floats, w: Floats, c: Floats) -> Floats:
    """The codeword of each vector."""
    costs = w @ (c * c).T - 2 * ((w * x) @ c.T)
    return np.asarray(c[np.argmin(costs, axis=1)])


def finish(W: Floats, E: Quadratic, begun: Vectors, is_scaled: bool) -> Vectors:
    """The vectors fitted from a start, on books of integers and scales of half precision."""
    E = measured(E, W.shape[0], W.shape[2], begun.length)
    fine = snapped(fit(W, E, begun, is_scaled))
    best = fit(W, E, fine, is_scaled, is_own=False)
    best = replace(best, scale=halved(best.scale, is_scaled))
    return descend(W, E, best)


def snapped(v: Vectors) -> Vectors:
    """The same with integers from −127 to 127 in the books; scales take the step up."""
    step = max(float(np.abs(v.books).max(initial=0)) / STEPS, 1e-300)
    return replace(v, books=np.rint(v.books / step), scale=v.scale * step)


def halved(scale: Floats, is_scaled: bool) -> Floats:
    """Scales as numbers of half precision where these are fine enough; else of single."""
    is_half = is_scaled and scale.min() >= NARROW and scale.max() < np.finfo(np.float16).max
    return np.asarray(scale.astype(np.float16 if is_half else np.float32), np.float64)
