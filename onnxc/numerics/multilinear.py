"""Weights that are a product of factors, fitted in the metric of a layer's input.

A factorization is written as an Einstein sum over its factors F_1, …, F_n, such as

    rci,orj->ocij      a k×k convolution as k×1 and 1×k

and Ŵ is linear in each one of them. With H = E[x xᵀ] of the rows x that W multiplies,

    min E‖(W − Ŵ) x‖² = min tr (W − Ŵ) H (W − Ŵ)ᵀ

is sought by alternating least squares: for one factor after the other, the others kept,

    Aᵀ(A(F) H) = Aᵀ(W H),        A(F) = Ŵ, Aᵀ its adjoint, again an Einstein sum,

by conjugate gradients from where the factor is, so that no step makes the error larger. A ridge
keeps components from growing against each other, as those of CP do (Phan 2020, "Stable low-rank
tensor decomposition for compression of convolutional neural network").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Operator = Callable[[Floats], Floats]

STEPS = 8  # of conjugate gradients for a factor, each time it has its turn
CLOSE = 1e-8  # ‖residual‖ / ‖right side‖ at which they end
RANK = 1e-12  # relative: directions of the features that count as none
LARGEST = 1 << 26  # numbers between two contractions; by default einsum does all at once instead
SETTLED = 1e-4  # relative fall of the error in a sweep below which sweeps end


def compose(spec: str, factors: Sequence[NDArray[Any]]) -> Floats:
    """Ŵ of some factors."""
    return _sum(spec, *factors)


@lru_cache(maxsize=1024)
def _path(spec: str, shapes: tuple[tuple[int, ...], ...]) -> list[Any]:
    """The order of contractions, which takes longer to find than to follow."""
    zeros = [np.broadcast_to(np.float64(0), shape) for shape in shapes]
    return list(np.einsum_path(spec, *zeros, optimize=("optimal", LARGEST))[0])


def _sum(spec: str, *arrays: NDArray[Any]) -> Floats:
    path = _path(spec, tuple(array.shape for array in arrays))
    return np.asarray(np.einsum(spec, *arrays, optimize=path))


def error(D: Floats, H: Floats) -> float:
    """E‖D x‖² for rows D of d = len(H) columns, whatever the axes that they come in."""
    rows = D.reshape(-1, len(H))
    return max(float(np.einsum("od,od->", rows @ H, rows)), 0.0)


def refine(
    spec: str,
    factors: Sequence[Floats],
    W: Floats,
    H: Floats,
    sweeps: int,
    ridge: float = 0.0,
    steps: int = STEPS,
) -> list[Floats]:
    """Better factors of W, which has the axes of the sum's result, the last ones those of H.

    ridge: λ of λ·‖F‖² · tr(H)/d. The error, with the ridge, never grows.
    """
    found = [np.array(factor) for factor in factors]
    goal, scale = _times(W, H), ridge * float(np.trace(H)) / len(H)
    last = math.inf
    for _ in range(sweeps):
        for index in range(len(found)):
            found[index] = _fitted(spec, found, index, goal, H, scale, steps)
        now = error(W - compose(spec, found), H)
        if now >= (1 - SETTLED) * last:
            break
        last = now
    return found


def _times(D: Floats, H: Floats) -> Floats:
    return np.asarray((D.reshape(-1, len(H)) @ H).reshape(D.shape))


def _fitted(
    spec: str,
    factors: Sequence[Floats],
    index: int,
    goal: Floats,
    H: Floats,
    scale: float,
    steps: int,
) -> Floats:
    """One factor, the others kept; the last at once where each output has its own part of it."""
    if index == len(factors) - 1 and _is_last_alone(spec):
        return _solved_last(spec, factors, goal, H, scale)
    adjoint = _adjoint(spec, factors, index)

    def normal(F: Floats) -> Floats:
        whole = compose(spec, [*factors[:index], F, *factors[index + 1 :]])
        return adjoint(_times(whole, H)) + scale * F

    return _solved(normal, adjoint(goal), factors[index], steps)


def _adjoint(spec: str, factors: Sequence[Floats], index: int) -> Operator:
    """D ↦ Aᵀ(D), which has the shape of the factor."""
    inputs, result = spec.split("->")
    letters = inputs.split(",")
    others = [*letters[:index], *letters[index + 1 :]]
    kept = [*factors[:index], *factors[index + 1 :]]
    back = ",".join((result, *others)) + "->" + letters[index]
    return lambda D: _sum(back, D, *kept)


def _solved(normal: Operator, right: Floats, start: Floats, steps: int) -> Floats:
    """Conjugate gradients; every step lowers the quadratic form that `normal` comes from."""
    x = start
    residual = right - normal(x)
    direction, power = residual, float(np.vdot(residual, residual))
    end = CLOSE**2 * max(float(np.vdot(right, right)), np.finfo(np.float64).tiny)
    for _ in range(steps):
        if power <= end:
            break
        image = normal(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        x = x + power / curvature * direction
        residual = residual - power / curvature * image
        now = float(np.vdot(residual, residual))
        direction, power = residual + now / power * direction, now
    return x


def _solved_last(
    spec: str, factors: Sequence[Floats], goal: Floats, H: Floats, scale: float
) -> Floats:
    """The last factor, (outputs, …), from the second moments of what the others make of x."""
    last = factors[-1]
    count = math.prod(last.shape[1:])
    normal = _moments(spec, factors[:-1], goal.shape, H).reshape(count, count)
    normal = normal + scale * np.eye(count)
    right = _adjoint(spec, factors, len(factors) - 1)(goal).reshape(len(last), count)
    found = right @ np.linalg.pinv(normal, rcond=RANK, hermitian=True)
    return np.asarray(found.reshape(last.shape))


def _moments(spec: str, others: Sequence[Floats], shape: tuple[int, ...], H: Floats) -> Floats:
    """Second moments of the features that the last factor multiplies, axes twice as its own.

    F is what the others make; axes of the result that x does not have are summed over.
    """
    inputs, result = spec.split("->")
    *letters, last = inputs.split(",")
    kept = "".join(dict.fromkeys(n for n in "".join(letters) if n in last[1:] + result))
    F = _sum(",".join(letters) + "->" + kept, *others)
    first = next(a for a in range(1, len(shape)) if math.prod(shape[a:]) == len(H))
    rows = result[first:]
    again = {n: n.upper() for n in rows + last if n not in result[:first]}

    def second(part: str) -> str:
        return "".join(again.get(n, n) for n in part)

    whole = f"{kept},{second(kept)},{rows}{second(rows)}->{last[1:]}{second(last[1:])}"
    return _sum(whole, F, F, H.reshape(shape[first:] * 2))


def _is_last_alone(spec: str) -> bool:
    """Whether the first axis of the result is one of the last factor, and of no other one."""
    inputs, result = spec.split("->")
    *others, last = inputs.split(",")
    return last.startswith(result[0]) and not any(result[0] in letters for letters in others)
