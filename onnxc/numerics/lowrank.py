"""Factors of low rank for the weight W of a linear layer, y = W x, fitted on its input.

Of each structure (`onnxc.numerics.lowrank_structures`) a closed form gives the first factors in the
metric H, the second moments of x, and alternating least squares then improve them:

    min E‖(W − Ŵ) x‖² = min tr (W − Ŵ) H (W − Ŵ)ᵀ

Without data H is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxc.numerics.lowrank_structures import (
    MANY_SWEEPS,
    STRUCTURES,
    SWEEPS,
    Stage,
    halves,
    seen,
)
from onnxc.numerics.multilinear import STEPS, Floats, compose, error, refine

Ints = tuple[int, ...]

WORK = 4e9  # multiply-adds that sweeps over one layer may take
RIDGE = 1e-7  # λ against diverging components
FILL = 1 / 1024  # of sketched weights


@dataclass(frozen=True)
class Factors:
    """Layers in place of one. made: Ŵ, like W. error: E‖(W − Ŵ) x‖² / E‖W x‖²."""

    stages: tuple[Stage, ...]
    made: Floats
    error: float


def why_not(method: str, shape: Ints) -> str:
    """Why a structure is not for weights (groups, o, c, *kernel); empty where it is."""
    row, (_, o, c, *kernel) = STRUCTURES[method], shape
    wide = sum(k > 1 for k in kernel)
    if o == 1 or c * math.prod(kernel) == 1:
        return "it makes one output of each group, which has no smaller rank"
    if row.kernel and not wide:
        return f"{method} is for kernels, and it has none"
    if not row.kernel and wide:
        return f"{method} is for matrices, and it has a kernel"
    if row.kernel and row.parts > wide:
        return f"{method} splits a kernel of two axes or more, and it has one"
    prime = next((n for n in (o, c) if row.splits and 1 in halves(n)), None)
    if prime is not None:
        return f"{method} takes both sizes apart, and {prime} is a prime"
    return "" if ranks(method, shape) else f"{method} has no rank for its shape"


def is_quick(method: str, shape: Ints) -> bool:
    """Whether there is a closed form to start from, or the layer is small enough without one."""
    _, o, *rest = shape
    once = 2.0 * o * math.prod(rest) ** 2 * STEPS
    return STRUCTURES[method].sweeps <= SWEEPS or once * MANY_SWEEPS <= WORK


def ranks(method: str, shape: Ints, multiple: int = 1) -> list[Ints]:
    """The ranks of a structure for weights (groups, o, c, *kernel), growing.

    multiple: of channels that kernels work in. Large ranks keep to it, smaller ones to the power of
    two that is an eighth of the largest.
    """
    row, found = STRUCTURES[method], STRUCTURES[method].ladder(_dims(method, shape))
    if not found:
        return []
    steps = [_step(multiple, found[-1][i]) if i in row.counts else 1 for i in range(len(found[-1]))]
    whole = (tuple(max(n - n % s, s) for n, s in zip(r, steps, strict=True)) for r in found)
    return list(dict.fromkeys(whole))


def has_ranks(method: str, shape: Ints, wanted: Ints) -> bool:
    """Whether a structure that is for weights of this shape may have these ranks."""
    found = ranks(method, shape)
    if len(wanted) != len(found[-1]) or (len(wanted) > 1 and not STRUCTURES[method].counts):
        return wanted in found  # numbers of groups, which divide channels
    most = (max(r[i] for r in found) for i in range(len(wanted)))
    return all(1 <= n <= top for n, top in zip(wanted, most, strict=True))


def _step(multiple: int, most: int) -> int:
    """The largest power of two up to a multiple, and up to an eighth of the largest rank."""
    return 1 << max(min(multiple, most // 8), 1).bit_length() - 1


def pick(
    method: str,
    shape: Ints,
    share: float,
    strides: Ints = (),
    multiple: int = 1,
    unit: str = "macs",
) -> Ints | None:
    """The largest ranks that cost at most a share; None where there are none.

    unit: of the cost, "params" for the number of weights, anything else for MACs. None take more
    MACs than the layer.
    """
    best: tuple[Ints | None, float] = (None, 0.0)
    for found in ranks(method, shape, multiple):
        work = macs(method, shape, found, strides)
        cost = parameters(method, shape, found) if unit == "params" else work
        if best[1] < cost <= share and work <= 1:
            best = found, cost
    return best[0]


def macs(method: str, shape: Ints, ranks: Ints, strides: Ints = ()) -> float:
    """Multiply-accumulates of the layers over those of the one that they replace."""
    _, o, c, *kernel = shape
    total, width = 0.0, c
    done: set[int] = set()
    for stage in _empty(method, shape, ranks):
        done |= set(stage.axes)
        ahead = math.prod(s for axis, s in enumerate(strides) if axis not in done)
        times = width // stage.sample[0] if stage.sample else 1
        total += stage.weight.size * ahead * times
        width = times * len(stage.weight)
    return total / (o * c * math.prod(kernel))


def parameters(method: str, shape: Ints, ranks: Ints) -> float:
    """Weights of the layers over those of the one that they replace."""
    _, o, c, *kernel = shape
    sizes = (stage.weight.size for stage in _empty(method, shape, ranks))
    return sum(sizes) / (o * c * math.prod(kernel))


def sketch(method: str, shape: Ints, ranks: Ints) -> tuple[Stage, ...]:
    """The layers for weights of this shape, filled with a number: what can be timed."""
    stages = _empty(method, shape, ranks)
    whole = (_side_by_side([stage] * shape[0]) for stage in stages)
    return tuple(replace(s, weight=np.full(s.weight.shape, FILL)) for s in whole)


def factorize(method: str, W: Floats, H: Floats | None, ranks: Ints) -> Factors:
    """Layers of these ranks in place of W, (groups, o, c, *kernel).

    H: (groups, d, d) of the rows that W multiplies, d = c · kernel; None without data.
    """
    metric = _metric(W, H)
    each = [_factors(method, w, h, ranks) for w, h in zip(W, metric, strict=True)]
    kernel = tuple(W.shape[3:])
    stages = [STRUCTURES[method].stages(factors, kernel) for factors, _ in each]
    made = np.stack([made for _, made in each])
    lost = relative_error(W, made, H)
    return Factors(tuple(map(_side_by_side, zip(*stages, strict=True))), made, lost)


def relative_error(W: Floats, made: Floats, H: Floats | None) -> float:
    """E‖(W − Ŵ) x‖² / E‖W x‖²; 0 where W gives nothing."""
    triples = list(zip(W, made, _metric(W, H), strict=True))
    power = sum(error(w, h) for w, _, h in triples)
    return sum(error(w - m, h) for w, m, h in triples) / power if power > 0 else 0.0


def _metric(W: Floats, H: Floats | None) -> Floats:
    d = math.prod(W.shape[2:])
    return np.broadcast_to(np.eye(d), (len(W), d, d)) if H is None else H


def _factors(method: str, W: Floats, H: Floats, ranks: Ints) -> tuple[Sequence[Floats], Floats]:
    """Factors of one group's W, (o, c, *kernel), and what they make."""
    row, d = STRUCTURES[method], len(H)
    viewed = W.reshape(row.view(seen(row.parts, W.shape), ranks))
    factors = row.start(viewed, H, ranks)
    if row.sweeps:
        once = 2.0 * len(W) * d * d * STEPS * len(factors)
        sweeps = int(np.clip(WORK // once, 1, row.sweeps))
        factors = refine(row.spec, factors, viewed, H, sweeps, RIDGE)
    return factors, compose(row.spec, factors).reshape(W.shape)


def _empty(method: str, shape: Ints, ranks: Ints) -> list[Stage]:
    """The layers of one group, of zeros that take no memory."""
    shapes = STRUCTURES[method].shapes(_dims(method, shape), ranks)
    zeros = [np.broadcast_to(np.float64(0), shape) for shape in shapes]
    return STRUCTURES[method].stages(zeros, shape[3:])


def _dims(method: str, shape: Ints) -> Ints:
    return seen(STRUCTURES[method].parts, shape[1:])


def _side_by_side(stages: Sequence[Stage]) -> Stage:
    """The same layer of several groups as one."""
    weight = np.concatenate([stage.weight for stage in stages])
    return replace(stages[0], weight=weight, groups=len(stages) * stages[0].groups)
