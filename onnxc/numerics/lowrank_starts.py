"""Closed forms for the factors of W, the best of a rank or near it: where sweeps start.

    W H Wᵀ = U Σ² Uᵀ,    B = U_r Σ_r^½,   A = Σ_r^-½ U_rᵀ W

is the best of rank r for y = W x itself, with no inverse of H (Zhang 2016, §3.2: principal
components of the responses). Where a factor sees a part of the axes of x only, H is replaced by its
share in that part, the trace over the others. With the identity for H, the closed forms are those
of the papers (`onnxc.numerics.lowrank_structures`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxc.numerics import covariance
from onnxc.numerics.multilinear import Floats

Ints = tuple[int, ...]

LETTERS = "abcdefgh"


def _principal(W: Floats, H: Floats, r: int) -> tuple[Floats, Floats]:
    """B (o, r) and A (r, d) of the module's docstring."""
    values, vectors = np.linalg.eigh(W @ H @ W.T)
    U = vectors[:, ::-1][:, :r]
    sigma = np.sqrt(np.maximum(values[::-1][:r], 0))
    root = np.sqrt(np.maximum(sigma, 1e-6 * max(float(sigma[0]), 1e-30)))
    return np.asarray(U * root), np.asarray((U / root).T @ W)


def _share(H: Floats, sizes: Ints, kept: Sequence[int]) -> Floats:
    """H between some axes of the rows, whose sizes are given: the trace over the others."""
    n = len(sizes)
    rows = LETTERS[:n]
    columns = "".join(LETTERS[n + a] if a in kept else rows[a] for a in range(n))
    result = "".join(rows[a] for a in kept) + "".join(columns[a] for a in kept)
    found = np.einsum(f"{rows}{columns}->{result}", H.reshape(*sizes, *sizes))
    count = math.prod(sizes[a] for a in kept)
    return np.asarray(found.reshape(count, count))


def channel(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    B, A = _principal(W.reshape(len(W), -1), H, ranks[0])
    return [A.reshape(-1, *W.shape[1:]), B]


def spatial(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """Rank r of (o j) × (c i)."""
    o, c, i, j = W.shape
    shares = _share(H, (c, i, j), (2,)), _share(H, (c, i, j), (0, 1))
    parted = W.reshape(o, c * i, j).swapaxes(1, 2)[:, None]
    A, B = _parted(parted, *shares, ranks[0])
    return [A.reshape(-1, c, i), B]


def train(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """Rank r of (o1 c1) × (o2 c2)."""
    sizes = W.shape[2:]
    return _parted(W, _share(H, sizes, (0,)), _share(H, sizes, (1,)), ranks[0])


def _parted(W: Floats, S: Floats, T: Floats, r: int) -> list[Floats]:
    """A (r, q, t) and B (p, r, s), the best of rank r for W (p, q, s, t) as (p s) × (q t).

    H is taken for the product of its shares S in s and T in t.
    """
    p, q, s, t = W.shape
    left, right = covariance.root(S), covariance.root(T)
    white = np.einsum("pqst,sk,ta->pkqa", W, left, right, optimize=True)
    U, sigma, Vt = np.linalg.svd(white.reshape(p * s, q * t), full_matrices=False)
    root = np.sqrt(sigma[:r])
    A = (Vt[:r].T * root).T.reshape(-1, t) @ np.linalg.inv(right)
    B = np.einsum("pkr,ks->prs", (U[:, :r] * root).reshape(p, s, -1), np.linalg.inv(left))
    return [A.reshape(-1, q, t), B]


def tucker(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """Principal subspaces of the output and input channels, and the core between them."""
    o, c, k = W.shape
    U, core = _principal(W.reshape(o, -1), H, ranks[1])
    core = core.reshape(-1, c, k)
    root = covariance.root(_share(H, (c, k), (0,)))
    white = np.einsum("ca,sck->ask", root, core).reshape(c, -1)
    V = np.linalg.svd(white, full_matrices=False)[0][:, : ranks[0]]
    V = np.pad(V, ((0, 0), (0, ranks[0] - V.shape[1])))
    encode = np.linalg.solve(root.T, V).T
    return [encode, np.einsum("ar,ca,sck->srk", V, root, core), U]


def cp(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """The largest products of the vectors that components of a spatial split are made of."""
    o, c, i, j = W.shape
    full = min(o * j, c * i)
    A, B = spatial(W, H, (min(full, ranks[0]),))
    parts = []
    for a, b in zip(A, B.transpose(1, 0, 2), strict=True):
        left, right = (np.linalg.svd(m, full_matrices=False) for m in (a, b))
        for p, s in enumerate(left[1]):
            for q, t in enumerate(right[1]):
                vectors = (left[0][:, p], left[2][p], right[2][q], right[0][:, q])
                parts.append((s * t, [v * (s * t) ** 0.25 for v in vectors]))
    parts.sort(key=lambda part: -part[0])
    best = [vectors for _, vectors in parts[: ranks[0]]]
    rows = [np.stack(vectors) for vectors in zip(*best, strict=True)]
    return [*rows[:3], rows[3].T]


def grouped(W: Floats, H: Floats, r: int) -> list[Floats]:
    """Principal components of what each group of input channels gives."""
    o, g, c, k = W.shape
    d = c * k
    found = []
    for index in range(g):
        part = slice(index * d, (index + 1) * d)
        found.append(_principal(W[:, index].reshape(o, -1), H[part, part], r))
    A = np.stack([a.reshape(r, c, k) for _, a in found])
    return [A, np.stack([b for b, _ in found], axis=1)]
