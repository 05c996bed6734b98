"""Covariances of few rows, shrunk towards a multiple of I.

Moments of n rows promise more than other rows keep: C of fewer rows than columns says that some
inputs follow from others exactly. With

    C <- (1 − λ) C + λ (tr C / d) I,
    λ = ((1 − 2/d) tr C² + (tr C)²) / ((n + 1 − 2/d) (tr C² − (tr C)² / d))

the squared error is the least that is known for Gaussian rows (OAS, Chen 2010). λ is about 0.01
where rows are many, and near 1 where they are fewer than what C has of dimensions.

What varies little about a large mean leaves C = H − mu muᵀ with little but rounding, and its least
eigenvalues may come out negative: `root` takes those for 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_SHRINKAGE = 0.002  # λ
TINY = 1e-9  # of the mean eigenvalue, added to each


def shrunk(C: Floats, count: float, least: float = LEAST_SHRINKAGE) -> Floats:
    """C (groups, d, d) of `count` rows, shrunk; least: of λ."""
    d = C.shape[1]
    trace, square = np.trace(C, axis1=1, axis2=2), np.sum(C * C, axis=(1, 2))
    above = (1 - 2 / d) * square + trace**2
    below = (count + 1 - 2 / d) * (square - trace**2 / d)
    shrinkage = np.divide(above, below, out=np.ones(len(C)), where=below > 0)
    share = np.clip(shrinkage, least, 1)[:, None, None]
    power = np.where(trace > 0, trace / d, 1)[:, None, None]
    return np.asarray((1 - share) * C + share * power * np.eye(d))


def centred(H: Floats, mu: Floats | None) -> Floats:
    """H − mu muᵀ, (groups, d, d); H where there is no bias to take mu up."""
    return H if mu is None else np.asarray(H - mu[:, :, None] * mu[:, None, :])


def pieces(W: Floats, blocks: Iterable[Floats]) -> Iterator[tuple[Floats, Floats]]:
    """Columns of W (..., d), each beside its block (groups, width, width) on a diagonal."""
    start = 0
    for block in blocks:
        yield W[..., start : start + block.shape[1]], block
        start += block.shape[1]


def root(C: Floats) -> Floats:
    """Lower triangular L (..., d, d) with L Lᵀ = C and a little on the diagonal."""
    size = np.trace(C, axis1=-2, axis2=-1) / C.shape[-1]
    added = np.where(size > 0, TINY * size, 1.0)[..., None, None] * np.eye(C.shape[-1])
    try:
        return np.asarray(np.linalg.cholesky(C + added))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(C)
        positive = (vectors * np.maximum(values, 0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
        most = np.maximum(values[..., -1:], 1.0)[..., None] * TINY * np.eye(C.shape[-1])
        return np.asarray(np.linalg.cholesky(positive + np.maximum(added, most)))
