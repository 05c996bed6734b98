"""Which weights of a linear layer become zero, and what the others then are.

For rows x of a layer's input, H = E[x xᵀ] and mu = E[x], a weight Ŵ in place of W makes the error

    E(Ŵ) = tr (W − Ŵ) C (W − Ŵ)ᵀ,      C = H − mu muᵀ

where the bias takes in the mean of the difference, (W − Ŵ) mu; without a bias C keeps mu. C of few
rows is shrunk (`onnxc.numerics.covariance`). The criteria rank weights by

    magnitude   w²                      Han 2015
    obd         w² C_jj                 LeCun 1990, the diagonal of the Hessian of a linear layer
    wanda       w² C_jj in each row     Sun 2023
    obs         E itself, below         Hassibi 1993: w² / [C⁻¹]_jj, the others updated

The first three leave the other weights as they are. Removing one weight after the other by OBS
costs d³ a row and takes no choice back. `solve` works on all weights of a layer at once, by ADMM on
min E(X) so that X = D, D having `keep` values (Boyd 2011; ALPS, Meng 2024):

    X <- (W C + ρ D − V) (C + ρ I)⁻¹
    D <- the largest of (X + V/ρ)², the others zero
    V <- V + ρ (X − D)

with ρ growing until D settles; one eigendecomposition of C serves all rows and steps. What stays is
then fitted exactly, min E on the support of D, by conjugate gradients; for a single removed weight
it is the update of OBS.

C may be known in blocks on its diagonal, or is cut into such where it is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.covariance import LEAST_SHRINKAGE, centred, pieces, shrunk

Array = NDArray[Any]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Criterion = Literal["obs", "magnitude", "wanda", "obd"]
Pattern = Callable[[Array], Mask]  # which of these scores, (groups, outputs, d), stay

GRID = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85, 0.9, 0.94, 0.97, 0.99)  # shares of a curve
LEAST_PRICE, HALVINGS = -60.0, 80  # of the log of the price of a zero
FINENESS = 1000  # shares that a layer may get
LEAST, LEAST_SHARE = 1e-12, 1e-3  # of an error, and of zeros, that counts
ROUGH, FINE = 24, 200  # steps of ADMM for a curve and for a result
FIRST, PERIOD = 0.1, 3  # ρ at first, of the mean eigenvalue; steps between its growths
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # where more of the support than this changed
ACCURACY, MOST_STEPS = 1e-9, 400  # of conjugate gradients: of the first residual


@dataclass(frozen=True)
class Quadratic:
    """E as a function of W − Ŵ. blocks: C along its diagonal, each (groups, width, width).

    Without any, C = I: nothing is known of the input.
    """

    blocks: tuple[Floats, ...] = ()

    def times(self, D: Array) -> Array:
        """D C, (groups, outputs, d)."""
        return _by_blocks(D, self.blocks)

    def error(self, D: Array) -> float:
        """E, for D = W − Ŵ (groups, outputs, d)."""
        return float(np.sum(self.times(D) * D))

    @property
    def diagonal(self) -> Floats:
        """C_jj, (groups, d)."""
        return np.concatenate([np.diagonal(b, axis1=1, axis2=2) for b in self.blocks], axis=1)

    @cached_property
    def spectra(self) -> tuple[tuple[Array, Array], ...]:
        """The spectrum of each block, which all shares of zeros have in common."""
        return tuple(spectrum(block) for block in self.blocks)


def quadratic(
    H: Sequence[Floats],
    mu: Floats | None = None,
    count: float = np.inf,
    least: float = LEAST_SHRINKAGE,
) -> Quadratic:
    """E of moments in blocks: H, each (groups, width, width); mu, (groups, d), or None.

    count: rows that the moments are of. least: of λ.
    """
    found = H if mu is None else [centred(block, part) for part, block in pieces(mu, H)]
    return Quadratic(tuple(shrunk(C, count, least) for C in found))


def largest(keep: int) -> Pattern:
    """The `keep` largest scores of a layer; of equal ones, the first."""
    return lambda scores: _top(scores.reshape(1, -1), keep).reshape(scores.shape)


def largest_in_rows(keep: int) -> Pattern:
    """The largest scores of each row, the same number in all rows, `keep` or fewer together."""

    def choose(scores: Array) -> Mask:
        rows = scores.reshape(-1, scores.shape[-1])
        return _top(rows, keep // len(rows)).reshape(scores.shape)

    return choose


def n_of_m(n: int, m: int, offsets: int = 1) -> Pattern:
    """The n largest of each m consecutive channels, for each output and kernel offset.

    Of scores (groups, outputs, channels · offsets), whose channels m divides.
    """

    def choose(scores: Array) -> Mask:
        groups, outputs, d = scores.shape
        cut = scores.reshape(groups, outputs, d // (m * offsets), m, offsets).swapaxes(3, 4)
        chosen = _top(cut.reshape(-1, m), n).reshape(cut.shape).swapaxes(3, 4)
        return chosen.reshape(scores.shape)

    return choose


def scores(W: Floats, E: Quadratic, criterion: Criterion) -> Floats:
    """How much a weight is worth by a criterion; of obs, the first order: w² / [C⁻¹]_jj."""
    if criterion == "magnitude":
        return W**2
    if criterion == "obs":
        inverse = [np.diagonal(np.linalg.inv(b), axis1=1, axis2=2) for b in E.blocks]
        return np.asarray(W**2 / np.concatenate(inverse, axis=1)[:, None])
    return np.asarray(W**2 * E.diagonal[:, None])


def sparse(W: Floats, E: Quadratic, criterion: Criterion, pattern: Pattern) -> Floats:
    """Ŵ, (groups, outputs, d), with zeros where the pattern leaves them."""
    if criterion == "obs":
        D = solve(W, E, pattern)
        return refit(W, E, D != 0, D)
    return np.where(pattern(scores(W, E, criterion)), W, 0)


def solve(W: Floats, E: Quadratic, pattern: Pattern, steps: int = FINE) -> Floats:
    """D of the module's docstring after so many steps, or when its support has settled."""
    spectra = E.spectra
    level = float(np.mean(np.concatenate([e.reshape(-1) for e, _ in spectra])))
    goal, rho = E.times(W).astype(np.float32), np.float32(FIRST * level)
    D = W.astype(np.float32)
    V, support = np.zeros_like(D), np.ones(D.shape, bool)
    changed = 0
    for step in range(1, steps + 1):
        X = damped(goal + rho * D - V, spectra, rho)
        Z = X + V / rho
        mask = pattern(Z * Z)
        D = np.where(mask, Z, np.float32(0))
        V += rho * (X - D)
        changed, support = int(np.count_nonzero(mask != support)), mask
        if step % PERIOD:
            continue
        if not changed:
            break
        share = changed / max(int(np.count_nonzero(mask)), 1)
        rho *= np.float32(next(factor for least, factor in GROWTH if share >= least))
    return D.astype(np.float64)


def refit(
    W: Floats,
    E: Quadratic,
    support: Mask,
    start: Floats | None = None,
    accuracy: float = ACCURACY,
) -> Floats:
    """argmin E(X) over X that is zero outside its support, (groups, outputs, d).

    start: a first guess. accuracy: of the first residual, what may be left of it. Each row is
    solved by itself, with the diagonal of C as preconditioner.
    """
    X = np.where(support, W if start is None else start, 0)
    scale = _ratio(np.ones_like(E.diagonal), E.diagonal)[:, None]
    R = np.where(support, E.times(W - X), 0)
    Z = R * scale
    P, z = Z, _dot(R, Z)
    first = z.copy()
    for _ in range(min(MOST_STEPS, W.shape[-1])):
        if (z <= accuracy**2 * first).all():
            break
        Q = np.where(support, E.times(P), 0)
        step = _ratio(z, _dot(P, Q))
        X, R = X + step * P, R - step * Q
        Z = R * scale
        last, z = z, _dot(R, Z)
        P = Z + _ratio(z, last) * P
    return X


def curve(W: Floats, E: Quadratic, criterion: Criterion, grid: Sequence[float] = GRID) -> Floats:
    """E(Ŵ) / E(0) for each share of zeros of a grid."""
    whole = E.error(W)
    found = []
    for share in grid:
        pattern = largest(round((1 - share) * W.size))
        rough = (
            solve(W, E, pattern, ROUGH) if criterion == "obs" else sparse(W, E, criterion, pattern)
        )
        found.append(E.error(W - rough))
    return np.asarray(found) / whole if whole > 0 else np.zeros(len(found))


def allocate(
    curves: Sequence[Floats], sizes: Sequence[int], share: float, grid: Sequence[float] = GRID
) -> list[float]:
    """Shares of zeros s_l for layers of these sizes, `share` of all weights together.

    They minimise Σ_l E_l(s_l) / E_l(0): at the optimum one more zero costs the same everywhere,
    dE_l / dn_l = const. Between the points of the grid, log E is taken to be linear in log s.
    """
    fine = np.linspace(0, 1, FINENESS + 1)
    costs = np.stack([_interpolated(fine, np.asarray(grid), c) for c in curves] or [fine])
    n = np.asarray(sizes, np.float64)

    def chosen(price: float) -> Floats:
        return np.asarray(fine[np.argmin(costs - np.exp(price) * n[:, None] * fine, axis=1)])

    low, high = LEAST_PRICE, -LEAST_PRICE  # too few zeros, and enough
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_enough = n @ chosen(middle) >= share * n.sum()
        low, high = (low, middle) if is_enough else (middle, high)
    few, enough = chosen(low), chosen(high)
    part = (share * n.sum() - n @ few) / max(n @ (enough - few), 1e-9)
    return [float(s) for s in few + min(part, 1.0) * (enough - few)]


def _interpolated(fine: Floats, grid: Floats, found: Floats) -> Floats:
    """A curve at other shares; below the first s₁ it is E(s₁) (s / s₁)³, as of even densities."""
    rising = np.maximum.accumulate(np.clip(found, LEAST, 1))
    first = rising[0] * (LEAST_SHARE / grid[0]) ** 3
    places = np.log([LEAST_SHARE, *grid, 1])
    costs = np.exp(np.interp(np.log(fine[1:]), places, np.log([first, *rising, 1])))
    return np.concatenate([[0.0], costs])


def _top(rows: Array, keep: int) -> Mask:
    """The `keep` largest of each row; of equal ones, the first."""
    width = rows.shape[1]
    if keep >= width:
        return np.ones(rows.shape, bool)
    if keep <= 0:
        return np.zeros(rows.shape, bool)
    least = np.partition(rows, width - keep, axis=1)[:, width - keep, None]
    mask = rows > least
    ties = rows == least
    missing = keep - np.count_nonzero(mask, axis=1)
    return np.asarray(mask | (ties & (np.cumsum(ties, axis=1) <= missing[:, None])))


def spectrum(block: Floats) -> tuple[Array, Array]:
    """Eigenvalues (groups, width) and eigenvectors of C."""
    e, Q = np.linalg.eigh(block)
    return np.maximum(e, 0).astype(np.float32), Q.astype(np.float32)


def damped(Y: Array, spectra: Sequence[tuple[Array, Array]], rho: Any) -> Array:
    """Y (C + ρ I)⁻¹."""
    parts, start = [], 0
    for e, Q in spectra:
        part = Y[..., start : start + Q.shape[1]]
        parts.append(((part @ Q) / (e + rho)[:, None]) @ Q.swapaxes(1, 2))
        start += Q.shape[1]
    return np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))


def _by_blocks(D: Array, blocks: Sequence[Array]) -> Array:
    if not blocks:
        return np.asarray(D)
    parts = [part @ block for part, block in pieces(D, blocks)]
    return np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))


def _dot(a: Floats, b: Floats) -> Floats:
    """The product of each row with its partner, (groups, outputs, 1)."""
    return np.asarray(np.sum(a * b, axis=-1, keepdims=True))


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.zeros_like(a), where=b > 0))
