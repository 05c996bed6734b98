"""The rank of a matrix under noise, by variational Bayes in closed form.

Of V = B A + noise, V (L, M) with L ≤ M, columns of the factors that the data do not speak for get
no weight. Nakajima 2013 ("Global analytic solution of fully-observed variational Bayesian matrix
factorization") gives the global optimum with empirical priors: singular values γ_h with

    γ_h² > M σ² (1 + τ)(1 + α/τ),      α = L / M,   τ = 2.5129 √α

remain, where σ², the variance of the noise, minimizes the free energy

    Σ_h ψ(x_h),   x_h = γ_h² / (M σ²),
    ψ(x) = x − log x + [x > x̄] (log(τ(x) + 1) + α log(τ(x)/α + 1) − τ(x)),
    τ(x) = (x − (1 + α) + √((x − (1 + α))² − 4 α)) / 2,     x̄ = (1 + τ)(1 + α/τ)

Kim 2016 ("Compression of deep convolutional neural networks for fast and low power mobile
applications") takes it for the ranks of a layer's unfolded weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POINTS = 400  # of the grid that σ² is sought on, and again between the two beside the best
KNEE = 2.5129  # τ / √α: where a component starts to be worth its price


def rank(V: Floats) -> int:
    """How many components of a matrix stand out of noise; 0 for one of zeros."""
    L, M = sorted(V.shape)
    gamma = np.asarray(np.linalg.svd(V, compute_uv=False), np.float64) if L else np.zeros(0)
    power = float(gamma @ gamma)
    if power <= 0:
        return 0
    alpha = L / M
    tau = KNEE * np.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    noise = _noise(gamma, M, alpha, threshold)
    return int((gamma**2 > M * noise * threshold).sum())


def _noise(gamma: Floats, M: int, alpha: float, threshold: float) -> float:
    """σ² of the least free energy."""
    L = len(gamma)
    most = float(gamma @ gamma) / (L * M)
    beyond = min(int(np.ceil(L / (1 + alpha))), L) - 1  # components that may be no noise
    tail = gamma[beyond:] ** 2
    least = max(float(tail[0]) / (M * threshold), float(tail.mean()) / M, 1e-14 * most)
    if least >= most:
        return most
    grid = np.geomspace(least, most, POINTS)
    for _ in range(2):
        best = int(np.argmin([_energy(gamma**2 / (M * s), alpha, threshold) for s in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, POINTS - 1)]
        grid = np.geomspace(low, high, POINTS)
    return float(grid[POINTS // 2])


def _energy(x: Floats, alpha: float, threshold: float) -> float:
    x = np.maximum(x, 1e-300)
    above = x[x > threshold]
    spread = above - (1 + alpha)
    tau = 0.5 * (spread + np.sqrt(np.maximum(spread**2 - 4 * alpha, 0)))
    kept = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float((x - np.log(x)).sum() + kept.sum())
