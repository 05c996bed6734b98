"""A weight on few shared vectors, fitted to the outputs of its layer.

The rows of W (groups, outputs, d) are cut into sub-vectors of s columns. Each becomes a codeword
of a book c of K rows, times the scale σ of its row; of M books, a sum of codewords:

    ŵ_ob = σ_o Σ_m c_m[a_mob],      b = 1 … d/s

With M = 1 that is product quantization on one book (Jégou 2011; Gong 2015; Wu 2016, "Quantized
CNN"), with M > 1 residual quantization (Gong 2015). With C the second moments of the rows of the
layer's input (`onnxc.numerics.sparse`) all is fitted to

    E(a, c, σ) = tr (W − Ŵ) C (W − Ŵ)ᵀ,    Δ = W − Ŵ.

**Start**, with the books given: sub-vectors b in turn. With C = U D Uᵀ, U unit upper triangular and
D diagonal in blocks of s columns, E = Σ_b (ΔU)_b D_b (ΔU)_bᵀ, so that each one makes up for those
before it, as `onnxc.numerics.codebook` has it for s = 1:

    a_b <- argmin_k ‖g − σ c_k‖²_{D_b},      g = w_b + Σ_{i<b} Δ_i U_ib

**Codes**, by coordinate descent in blocks: with all others as they are,

    a_b <- argmin_k ‖g − σ c_k‖²_{C_bb},     g C_bb = ŵ_b C_bb + (Δ C)_b

**Books**, with the codes given, are linear least squares of all M books together, solved by
conjugate gradients. **Scales** are closed: σ_o = (u C wᵀ) / (u C uᵀ), with u the row on codewords
alone. Each step lowers E; they are repeated until that is little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.sparse import Quadratic

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

ROUNDS, SETTLED = 20, 3e-3  # of all steps in turn; a gain in E that ends them
SWEEPS = 2  # of the codes in a round
WIDTH = 64  # columns whose changes are multiplied out together, about
SOLVED, STEPS = 1e-3, 60  # ‖residual‖ of the books, of the first one; most steps
CHUNK = 1 << 22  # costs that are compared at once
LEAST = 1e-9  # of the mean scale: what a scale is at least


@dataclass(frozen=True)
class Vectors:
    """books: c, (M, K, s). codes: a, (M, groups, outputs, d / s). scale: σ, (groups, outputs)."""

    books: Floats
    codes: Codes
    scale: Floats

    @property
    def length(self) -> int:
        """s."""
        return int(self.books.shape[2])

    @property
    def unit(self) -> Floats:
        """The rows before they are scaled, (groups, outputs, d)."""
        found = sum(book[a] for book, a in zip(self.books, self.codes, strict=True))
        return np.asarray(found).reshape(*self.codes.shape[1:3], -1)

    @property
    def weight(self) -> Floats:
        """Ŵ."""
        return self.scale[..., None] * self.unit


def measured(E: Quadratic, groups: int, d: int, s: int) -> Quadratic:
    """E as it is, or of C = I in blocks, where nothing is known of the input."""
    if E.blocks:
        return E
    width = max(WIDTH // s, 1) * s
    widths = [min(width, d - begin) for begin in range(0, d, width)]
    return Quadratic(tuple(np.broadcast_to(np.eye(n), (groups, n, n)) for n in widths))


def fit(
    W: Floats, E: Quadratic, start: Vectors, is_scaled: bool = True, is_own: bool = True
) -> Vectors:
    """The vectors of least E that the steps above find from a start.

    W: (groups, outputs, d). E: measured, with blocks that s divides. is_scaled: scales may change.
    is_own: books may change.
    """
    best, value = start, E.error(W - start.weight)
    now = start
    for _ in range(ROUNDS):
        now = solve_books(W, E, now) if is_own else now
        now = solve_scales(W, E, now) if is_scaled else now
        for _ in range(SWEEPS):
            now = descend(W, E, now)
        found = E.error(W - now.weight)
        if not found < value:
            break
        is_settled = found > (1 - SETTLED) * value
        best, value = now, found
        if is_settled:
            break
    return best


def _parts(E: Quadratic, s: int) -> Iterator[tuple[Floats, slice, slice]]:
    """Each block of C with its columns and its sub-vectors."""
    begin = 0
    for C in E.blocks:
        end = begin + C.shape[1]
        yield C, slice(begin, end), slice(begin // s, end // s)
        begin = end


def feed_forward(W: Floats, E: Quadratic, start: Vectors) -> Vectors:
    """Codes of the start: sub-vectors in turn, each making up for those before it."""
    codes = np.empty_like(start.codes)
    for C, columns, blocks in _parts(E, start.length):
        codes[..., blocks] = _forward(W[..., columns], C, start)
    return replace(start, codes=codes)


def _forward(W: Floats, C: Floats, v: Vectors) -> Codes:
    s, (groups, outputs, d) = v.length, W.shape
    power = np.mean(np.diagonal(C, axis1=1, axis2=2), axis=0).reshape(-1, s).sum(axis=1)
    order = np.argsort(-power, kind="stable")
    columns = (order[:, None] * s + np.arange(s)).reshape(-1)
    w, (U, D) = W[..., columns], _block_factors(C[:, columns[:, None], columns], s)
    codes, delta = np.zeros((len(v.books), groups, outputs, d // s), np.intp), np.zeros_like(w)
    sigma = v.scale[..., None]
    for b, place in enumerate(order):
        here = slice(b * s, b * s + s)
        goal = w[..., here] + delta[..., : b * s] @ U[:, : b * s, here]
        rest = goal / sigma
        for book, a in zip(v.books, codes, strict=True):
            a[..., place] = _nearest(rest @ D[:, b], _norms(book, D[:, b]), book)
            rest = rest - book[a[..., place]]
        delta[..., here] = w[..., here] - goal + sigma * rest
    return codes


def _block_factors(C: Floats, s: int) -> tuple[Floats, Floats]:
    """U (groups, d, d) and the blocks D (groups, d / s, s, s) of C = U D Uᵀ."""
    groups, d, _ = C.shape
    R = np.linalg.cholesky(C[:, ::-1, ::-1])[:, ::-1, ::-1]  # upper, C = R Rᵀ
    at = np.arange(d // s)
    corner = R.reshape(groups, d // s, s, d // s, s)[:, at, :, at].swapaxes(0, 1)
    inverse = np.linalg.inv(corner)
    U = np.einsum("gibj,gbjk->gibk", R.reshape(groups, d, d // s, s), inverse)
    return U.reshape(groups, d, d), corner @ corner.swapaxes(2, 3)


def _norms(book: Floats, B: Floats) -> Floats:
    """c B cᵀ of each codeword, (groups, K)."""
    return np.asarray(np.sum((book @ B) * book, axis=-1))


def _nearest(line: Floats, norms: Floats, book: Floats) -> Codes:
    """argmin_k of c_k B c_kᵀ − 2 line c_kᵀ, (groups, outputs)."""
    step, found = max(1, CHUNK // norms.size), []
    for begin in range(0, line.shape[1], step):
        costs = norms[:, None] - 2 * (line[:, begin : begin + step] @ book.T)
        found.append(np.argmin(costs, axis=2))
    return np.concatenate(found, axis=1)


def descend(W: Floats, E: Quadratic, v: Vectors) -> Vectors:
    """The same with codes after one sweep of coordinate descent over all sub-vectors and books."""
    codes = v.codes.copy()
    for C, columns, blocks in _parts(E, v.length):
        _sweep(W[..., columns], C, replace(v, codes=codes[..., blocks]))
    return replace(v, codes=codes)


def _sweep(W: Floats, C: Floats, v: Vectors) -> None:
    """Change codes in place; R = Δ C is kept up to date in groups of sub-vectors."""
    s, sigma = v.length, v.scale[..., None]
    R = (W - v.weight) @ C
    width = max(WIDTH // s, 1) * s
    for begin in range(0, W.shape[2], width):
        end = min(begin + width, W.shape[2])
        inside, moved = R[..., begin:end].copy(), np.zeros((*W.shape[:2], end - begin))
        near = C[:, begin:end, begin:end]
        for b in range((end - begin) // s):
            here, place = slice(b * s, b * s + s), begin // s + b
            B = near[:, here, here]
            for book, a in zip(v.books, v.codes, strict=True):
                now = book[a[..., place]]
                line = now @ B + inside[..., here] / sigma
                a[..., place] = _nearest(line, _norms(book, B), book)
                step = sigma * (book[a[..., place]] - now)
                inside -= step @ near[:, here]
                moved[..., here] += step
        R[..., end:] -= moved @ C[:, begin:end, end:]  # what is behind is not read again


def solve_scales(W: Floats, E: Quadratic, v: Vectors) -> Vectors:
    """The same with the best scale of each row; that of a row of zeros stays, as one below 0."""
    unit = v.unit
    image = E.times(unit)
    above, below = (np.sum(image * other, axis=2) for other in (W, unit))
    found = np.divide(above, below, out=v.scale.copy(), where=below > 0)
    least = LEAST * float(np.abs(v.scale).mean())
    return replace(v, scale=np.where(found > least, found, v.scale))


def solve_books(W: Floats, E: Quadratic, v: Vectors) -> Vectors:
    """The same with the best books for these codes; codewords that nothing takes stay."""
    sigma, shape = v.scale[..., None], v.books.shape

    def gathered(G: Floats) -> Floats:
        """Sums of σ G over where each codeword is, (M, K, s)."""
        rows = (sigma * G).reshape(-1, shape[2])
        return np.stack([_sums(a.reshape(-1), rows, shape[1]) for a in v.codes])

    power = np.concatenate([np.diagonal(C, axis1=1, axis2=2) for C in E.blocks], axis=1)[:, None]
    scale = gathered(sigma * np.broadcast_to(power, W.shape))
    scale = np.divide(1, scale, out=np.zeros(shape), where=scale > 0)
    books, residual = v.books.copy(), gathered(E.times(W - v.weight))
    direction = scale * residual
    size = first = float(np.sum(residual * direction))
    for _ in range(min(v.books.size, STEPS)):
        if size <= SOLVED**2 * first or first <= 0:
            break
        image = gathered(E.times(replace(v, books=direction).weight))
        bend = float(np.sum(direction * image))
        if bend <= 0:
            break
        books, residual = books + size / bend * direction, residual - size / bend * image
        last, size = size, float(np.sum(residual * scale * residual))
        direction = scale * residual + size / last * direction
    return replace(v, books=books)


def _sums(a: Codes, rows: Floats, count: int) -> Floats:
    """Rows summed up by their codes, (count, s)."""
    order = np.argsort(a, kind="stable")
    codes, starts = np.unique(a[order], return_index=True)
    found = np.zeros((count, rows.shape[1]))
    found[codes] = np.add.reduceat(rows[order], starts, axis=0)
    return found
