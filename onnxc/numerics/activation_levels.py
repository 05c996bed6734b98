"""Levels and ranges for activations, from a few statistics or a histogram of them.

**ACIQ** (Banner 2019, "Post-training 4-bit quantization"): a range that ends at α clips what lies
beyond and rounds what lies within, to 2^b levels. Where x is Laplace with E|x − μ| = β, or Gauss
with the deviation σ, the sum of both errors is least at

    laplace    α = β W(3 · 4^b),       on one side: β W(12 · 4^b)
    gauss      α / σ = z:   z (1 − erf(z / √2)) − √(2/π) e^(−z²/2) + z / k = 0,
               k = 3 · 4^b,            on one side: 12 · 4^b

with W of Lambert, W e^W = its argument. One side is what ReLU leaves, in [0, α]. A Gauss has
E|x| / σ = √(2/π) and a Laplace 1/√2: whichever is nearer is taken for what numbers are.

**HWGQ** (Cai 2017, "half-wave Gaussian quantization"): what ReLU makes of a Gauss is, above 0, half
a Gauss of σ² = E[x² | x > 0]. The levels 0, s, 2s, … up to 2^b − 1 steps leave the error

    Σ_i ∫ (x − i s)² φ(x) dx,   from (i − ½) s to (i + ½) s, the last one to ∞

in closed form, which has its minimum at one s for each b. (Cai keeps the level 0 for x ≤ 0 alone,
with s = 0.538 for 2 bits; here it takes what is nearest to it, as QuantizeLinear does.)

**LQ-Nets** (Zhang 2018): levels Σ_i v_i e_i, e in {0, 1}^b, so that products are sums of b bit-wise
ones. v and the levels that numbers take are fitted in turn,

    v <- argmin Σ n (x − vᵀ e(x))²        e(x) <- the nearest level
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from math import erf, exp, log, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.kmeans import Points, nearest

Floats = NDArray[np.float64]

STEPS = 100  # of LQ-Nets, of Newton and of halving
NEAR = 1e-12
FINENESS = 400  # steps s that are compared
MANY = 8  # bits beyond which half waves are not summed level by level
GAUSSIAN = (sqrt(2 / pi) + sqrt(1 / 2)) / 2  # E|x| / σ above which numbers are taken for a Gauss


def laplace(beta: float, bits: int, one_side: bool = False) -> float:
    """α of ACIQ, from the mean of |x − μ|."""
    return beta * _lambert(_parts(bits, one_side))


def gauss(sigma: float, bits: int, one_side: bool = False) -> float:
    """α of ACIQ, from the standard deviation; on one side, from the root mean square of x > 0."""
    k = _parts(bits, one_side)

    def slope(z: float) -> float:
        return z * (1 - erf(z / sqrt(2))) - sqrt(2 / pi) * exp(-z * z / 2) + z / k

    return sigma * _root(slope, 0.0, 20.0)


def _parts(bits: int, one_side: bool) -> float:
    return (12.0 if one_side else 3.0) * 4.0**bits


def _lambert(x: float) -> float:
    """W e^W = x, for x above e, by Newton."""
    w = log(x) - log(log(x))
    for _ in range(STEPS):
        step = (w - x * exp(-w)) / (1 + w)
        w -= step
        if abs(step) < NEAR * w:
            break
    return w


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f, below 0 at low and above 0 at high, is 0."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def aciq(points: Points, bits: int, symmetric: bool = False) -> tuple[float, float]:
    """The range (low, high) of ACIQ for numbers of a histogram; symmetric: about 0.

    Where 0 is no number of the range but its end, on one side.
    """
    x, n = points.x, points.n
    low, high = bool(x.min() < 0), bool(x.max() > 0)
    if not (low and high):
        end = _clip(np.abs(x[x != 0]), n[x != 0], bits - symmetric, one_side=True)
        return -end if low or symmetric else 0.0, end if high or symmetric else 0.0
    mu = 0.0 if symmetric else float(np.average(x, weights=n))
    end = _clip(np.abs(x - mu), n, bits, one_side=False)
    return mu - end, mu + end


def _clip(size: Floats, n: Floats, bits: int, one_side: bool) -> float:
    """α for sizes |x − μ|, by the law that they are nearer to; 0 where there are none."""
    if not len(size):
        return 0.0
    beta = float(np.average(size, weights=n))
    sigma = sqrt(float(np.average(size**2, weights=n)))
    is_gauss = beta > GAUSSIAN * sigma
    return gauss(sigma, bits, one_side) if is_gauss else laplace(beta, bits, one_side)


def hwgq(points: Points, bits: int, symmetric: bool = False) -> tuple[float, float]:
    """The range of HWGQ; where numbers lie on both sides of 0, each is a half wave of its own."""
    flipped = Points(-points.x, points.w, points.n)
    if symmetric:
        both = Points(np.abs(points.x), points.w, points.n)
        end = half_wave(both, bits - 1)
        return -end, end
    is_both = bool(points.x.min() < 0 < points.x.max())
    return -half_wave(flipped, bits - is_both), half_wave(points, bits - is_both)


@cache
def half_wave_step(bits: int) -> float:
    """s of HWGQ for σ = 1; of many levels that of ACIQ, which takes x for even within each."""
    if bits > MANY:
        return gauss(1.0, bits, one_side=True) / float(2**bits - 1)
    widest = 4.0 / max(2**bits - 1, 1)
    low, high = 0.1 * widest, 2 * widest
    for _ in range(4):
        tried = np.linspace(low, high, FINENESS)
        at = int(np.argmin([half_wave_error(s, bits) for s in tried]))
        low, high = tried[max(at - 1, 0)], tried[min(at + 1, FINENESS - 1)]
    return float((low + high) / 2)


def half_wave_error(s: float, bits: int) -> float:
    """E[(x − q(x))² | x > 0] of levels s apart, x half a Gauss of σ = 1."""
    i = np.arange(2**bits)
    low, high = np.maximum((i - 0.5) * s, 0), (i + 0.5) * s
    high[-1] = np.inf
    return float(2 * np.sum(_moment(high, i * s) - _moment(low, i * s)))


def _moment(x: Floats, c: Floats) -> Floats:
    """∫ (x − c)² φ, from −∞ up to x, less (1 + c²) of all of it: what differences are made of."""
    phi = np.exp(-x * x / 2) / sqrt(2 * pi)
    finite = np.where(np.isfinite(x), x, 0)
    below = np.array([0.5 * (1 + erf(v / sqrt(2))) for v in x])
    return np.asarray((1 + c * c) * below - (finite - 2 * c) * phi)


def half_wave(points: Points, bits: int) -> float:
    """The end of the range [0, α] of HWGQ for numbers of a histogram; 0 where none is above 0.

    points: zeros are a point of their own.
    """
    above = points.x > 0
    if not above.any():
        return 0.0
    sigma = sqrt(float(np.average(points.x[above] ** 2, weights=points.n[above])))
    return float(sigma * half_wave_step(bits) * (2**bits - 1))


def basis(points: Points, bits: int, step: float | None = None) -> Floats:
    """v of LQ-Nets, (bits,), for numbers of a histogram, from a uniform grid from 0 on.

    step: of that grid; by default it reaches the largest number.
    """
    e = np.array(list(product((0.0, 1.0), repeat=bits)))
    widest = float(np.abs(points.x).max(initial=0)) / (2**bits - 1)
    v = (widest if step is None else step) * 2.0 ** np.arange(bits)[::-1]
    best, least = v, np.inf
    for _ in range(STEPS):
        levels = e @ v
        order = np.argsort(levels, kind="stable")
        codes = e[order][nearest(points.x, levels[order])]
        error = float(points.n @ (points.x - codes @ v) ** 2)
        if not error < least * (1 - NEAR):
            break
        best, least = v, error
        root = np.sqrt(points.n)
        v = np.linalg.lstsq(root[:, None] * codes, root * points.x, rcond=None)[0]
    return np.asarray(best)
