"""Covariances of few rows, shrunk towards a multiple of I.

Moments of n rows promise more than other rows keep: C of fewer rows than columns says that some
inputs follow from others exactly. With

    C <- (1 − λ) C + λ (tr C / d) I,
    λ = ((1 − 2/d) tr C² + (tr C)²) / ((n + 1 − 2/d) (tr C² − (tr C)² / d))

the squared error is the least that is known for Gaussian rows (OAS, Chen 2010). λ is about 0.01
where rows are many, and near 1 where they are fewer than what C has of dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_SHRINKAGE = 0.002  # λ


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
