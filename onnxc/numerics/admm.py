"""Weights on few values by ADMM (Leng 2018, "Extremely low bit neural network").

    min E(X)   so that   X = Ŵ,  Ŵ a weight of codes and numbers      (`onnxc.numerics.coded`)

where Leng has the loss of the network, E is the error of the layer's outputs. Steps, with one
eigendecomposition of C for all of them (`onnxc.numerics.sparse`):

    X <- (W C + ρ Ŵ − V) (C + ρ I)⁻¹
    Ŵ <- the values nearest to Z = X + V/ρ, with numbers that fit Z
    V <- V + ρ (X − Ŵ)

with ρ growing, until the codes rest. All columns move at once, so that it comes to other weights
than columns in turn do, mostly better ones where bits are few, and at a much higher price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from onnxc.numerics.coded import Coded, Family, best_of, solved
from onnxc.numerics.columns import Floats
from onnxc.numerics.sparse import Quadratic, damped, spectrum

STEPS = 60
FIRST, GROWTH = 0.03, 1.1  # ρ at first, of the mean eigenvalue, and its growth from step to step
RESTING = 1e-4  # share of codes that still change at the end
LEAST = 1e-6  # of the mean eigenvalue
SMALLER = 0.8  # of the numbers that it starts from: they grow again as weights lean on each other


def joined(W: Floats, E: Quadratic, family: Family, starts: Iterable[Coded]) -> Iterator[Coded]:
    """Starts, and what ADMM makes of the best of them, where moments are known."""
    found = list(starts)
    yield from found
    if E.blocks:
        yield admm(W, E, family, best_of(W, E, found)[0].t)


def admm(W: Floats, E: Quadratic, family: Family, t: Floats) -> Coded:
    """A weight after the steps above, from numbers t. E has blocks."""
    unit, level = _unit(np.abs(W).max(initial=0)), _unit(E.diagonal.max(initial=0))
    spectra = [spectrum(block / level) for block in E.blocks]
    rho = FIRST * max(float(np.mean(np.concatenate([e.reshape(-1) for e, _ in spectra]))), LEAST)
    goal = (E.times(W) / (unit * level)).astype(np.float32)
    t = SMALLER * t / unit
    now, V = Coded(t, *family.nearest(W / unit, t)), np.zeros(W.shape, np.float32)
    for _ in range(STEPS):
        D = now.weight.astype(np.float32)
        X = damped(goal + np.float32(rho) * D - V, spectra, np.float32(rho))
        last, now = now, projected(X + V / np.float32(rho), family, now)
        V += np.float32(rho) * (X - now.weight.astype(np.float32))
        rho *= GROWTH
        if np.count_nonzero(now.codes != last.codes) <= RESTING * now.codes.size:
            break
    t = family.snap(unit * now.t)
    return Coded(t, now.codes, family.spread(t, now.codes))


def _unit(peak: float) -> float:
    """A power of two near a size, so that float32 holds what is divided by it; 1 for 0."""
    return float(2.0 ** np.frexp(peak)[1]) if peak > 0 else 1.0


def projected(Z: Floats, family: Family, now: Coded) -> Coded:
    """A weight near Z: the best numbers for the codes as they are, then the nearest family."""
    plain = Quadratic()
    t = solved(Z, plain, family, now, Z - now.weight)[0].t if family.is_free else now.t
    return Coded(t, *family.nearest(Z, t))
