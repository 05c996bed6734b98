"""Columns of a weight in turn, each put on values that it may have, as the others ask for it.

Of a weight W, values Ŵ out of few are sought that make little of

    E = tr (W − Ŵ) C (W − Ŵ)ᵀ         (`onnxc.numerics.sparse`)

**Forward**, columns j of large C_jj first, each on the value nearest to what makes up for the
columns before it. With C = U D Uᵀ, U unit upper triangular, and Δ = W − Ŵ,

    E = Σ_j D_j ‖(Δ U)_j‖²:      ŵ_j <- nearest(w_j + Σ_{i<j} Δ_i U_ij)

which is GPTQ (Frantar 2022) as successive rounding (Chee 2023). **Sweep**, coordinate descent: with
R = Δ C, column j of the best weight, all others as they are, is

    w*_j = ŵ_j + R_j / C_jj,      ŵ_j <- nearest(w*_j)

and no step makes E worse. It is AdaRound's objective (Nagel 2020), exact for a linear layer.

What is nearest is told by a function `choose`. Columns are kept contiguous, and the changes of
WIDTH columns are multiplied out together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.covariance import root
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]
Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

# Of a column's number, w*_j (groups, outputs) and C_jj (groups, 1): codes, and the values of these.
Choose = Callable[[int, Floats, Floats], tuple[Codes, Floats]]

WIDTH = 64  # columns whose changes are multiplied out together
LEAST = 1e-9  # of the mean C_jj, that C_jj of inputs that say nothing is taken for


def upright(array: Array) -> Array:
    """A copy of an array (groups, outputs, d), with columns contiguous in memory."""
    return array.swapaxes(1, 2).copy().swapaxes(1, 2)


@dataclass(frozen=True)
class Triangle:
    """Of the block of C whose columns begin at `first`: the order of columns, U and C_jj."""

    first: int
    order: NDArray[np.intp]
    U: Floats
    power: Floats


def triangles(E: Quadratic) -> tuple[Triangle, ...]:
    """What feeding forward needs of E, whatever the values are; nothing without moments."""
    found = []
    for first, C in _parts(E):
        power = _power(C)
        order = np.argsort(-np.mean(power, axis=0), kind="stable")
        found.append(Triangle(first, order, _unit_upper(C[:, order[:, None], order]), power))
    return tuple(found)


def _parts(E: Quadratic) -> Iterator[tuple[int, Floats]]:
    """The first column of each block, and the block."""
    begin = 0
    for C in E.blocks:
        yield begin, C
        begin += C.shape[1]


def _unit_upper(C: Floats) -> Floats:
    """U of C = U D Uᵀ."""
    U = root(C[:, ::-1, ::-1])[:, ::-1, ::-1]
    return np.asarray(U / np.diagonal(U, axis1=1, axis2=2)[:, None])


def forward(W: Floats, parts: Sequence[Triangle], choose: Choose) -> tuple[Codes, Floats]:
    """Codes of W (groups, outputs, d), and their values Ŵ, columns making up for those before."""
    W = upright(W)
    codes, values = np.zeros_like(W, np.intp), np.zeros_like(W)
    for part in parts:
        _forward(W, part, choose, (codes, values))
    return codes, values


def _forward(W: Floats, part: Triangle, choose: Choose, result: tuple[Codes, Floats]) -> None:
    """Write codes and values of the columns of one block."""
    (codes, values), U, width = result, part.U, len(part.order)
    delta = np.zeros_like(W[..., :width])
    for begin in range(0, width, WIDTH):
        end = min(begin + WIDTH, width)
        before = U[:, :begin, begin:end].swapaxes(1, 2) @ delta[..., :begin].swapaxes(1, 2)
        for place in range(begin, end):
            at = int(part.order[place])
            j, inside = part.first + at, delta[..., begin:place] @ U[:, begin:place, place, None]
            goal = W[..., j] + before[:, place - begin] + inside[..., 0]
            codes[..., j], values[..., j] = choose(j, goal, part.power[:, at, None])
            delta[..., place] = W[..., j] - values[..., j]


def _power(C: Floats) -> Floats:
    """C_jj (groups, width), above 0."""
    power = np.diagonal(C, axis1=1, axis2=2)
    level = power.mean(axis=1, keepdims=True)
    return np.asarray(np.maximum(power, np.where(level > 0, LEAST * level, 1)))


def sweep(E: Quadratic, codes: Codes, values: Floats, R: Floats, choose: Choose) -> None:
    """Change codes, their values and R = (W − Ŵ) C in place, column by column.

    All of them `upright`. With C = I no column asks for another, so that one sweep settles it.
    """
    for begin, C in _parts(E):
        _sweep(C, begin, (codes, values, R), choose)
    if not E.blocks:
        for j in range(values.shape[2]):
            goal = values[..., j] + R[..., j]
            codes[..., j], values[..., j] = choose(j, goal, np.ones((1, 1)))
            R[..., j] = goal - values[..., j]


def _sweep(C: Floats, first: int, state: tuple[Codes, Floats, Floats], choose: Choose) -> None:
    """The same for the columns of one block from `first` on."""
    width, power = C.shape[1], _power(C)[..., None]
    codes, values, R = (part.swapaxes(1, 2)[:, first : first + width] for part in state)
    moved = np.zeros_like(values)
    for begin in range(0, width, WIDTH):
        end = min(begin + WIDTH, width)
        asked = R[:, begin:end] - C[:, begin:end, :begin] @ moved[:, :begin]
        inside = C[:, begin:end, begin:end].swapaxes(1, 2).copy()
        for place, j in enumerate(range(begin, end)):
            asks = asked[:, place] - (inside[:, place, None, :place] @ moved[:, begin:j])[:, 0]
            old, C_jj = values[:, j].copy(), power[:, j]
            codes[:, j], values[:, j] = choose(first + j, old + asks / C_jj, C_jj)
            np.subtract(values[:, j], old, out=moved[:, j])
    R -= C @ moved
