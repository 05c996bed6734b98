"""Layers for tests of numerics: a weight, and the error that the moments of mixed inputs make."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.sparse import Quadratic, quadratic

Array = NDArray[Any]


def problem(outputs: int, d: int, groups: int = 1, seed: int = 0) -> tuple[Array, Quadratic]:
    """W (groups, outputs, d) and E, of inputs that hang together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, d, d)) / np.sqrt(d) + np.eye(d)
    x = rng.standard_normal((groups, 40 * d, d)) @ mixed
    H = x.swapaxes(1, 2) @ x / x.shape[1]
    return rng.standard_normal((groups, outputs, d)), quadratic([H], count=1e9, least=0)
