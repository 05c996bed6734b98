"""Which channels a network misses least, from the weights that make and read them and from H.

A channel c stands for the columns S_c of the weights W that read it. With the second moments H of
the rows that W multiplies (about the mean where a bias takes the mean up), taking c out costs

    obs       min over the other columns    tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ),
              after which W ← W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S:  and  H⁻¹ loses S
              (Hassibi 1993, "Optimal brain surgeon", for groups of weights; Frantar 2022, OBC)
    thinet    the others as they are        tr(W_T H_TT W_Tᵀ),  T: all that is out with c
              (Luo 2017, "ThiNet", with moments in place of sampled positions)
    lasso     Σ_c β_c W_c x_c ≈ W x         the channels whose β_c are the last to become zero
              when the penalty λ Σ|β_c| grows (He 2017, "Channel pruning")

of the output's power, summed over all readers, each relative to its own. From the rows w_c of the
weights that make the channels:

    l1, l2    ‖w_c‖_p                       (Li 2017, "Pruning filters for efficient convnets")
    fpgm      Σ_j ‖w_c − w_j‖               (He 2019, "Filter pruning via geometric median")
    bn        the standard deviation of w_c x, which is |γ_c| of the batch norm that was folded
              into w_c (Liu 2017, "Network slimming")

and of its values a: the share of them that are not zero (apoz, Hu 2016), their root mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

DAMPING = 1e-3  # of the mean of diag(H), added to it
STEPS = 128  # rounds of a greedy search; more channels go several at once
PENALTIES = 100  # of a path of λ
SWEEPS = 50  # of coordinate descent for one λ


@dataclass
class Reading:
    """A weight that reads channels: W (M, d), H (d, d), and the columns of each channel.

    weight: what its error counts with; by default that relative to the output's power.
    """

    W: Floats
    H: Floats
    columns: Sequence[Ints]
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            power = float(np.einsum("md,de,me->", self.W, self.H, self.W, optimize=True))
            self.weight = 1 / power if power > 0 else 0.0

    def inverse(self) -> Floats:
        """(H + λI)⁻¹, λ a small share of the mean of its diagonal."""
        d = len(self.H)
        ridge = DAMPING * max(float(np.trace(self.H)) / max(d, 1), np.finfo(np.float64).tiny)
        return np.asarray(np.linalg.inv(self.H + ridge * np.eye(d)))


@dataclass(frozen=True)
class Removal:
    """Channels in the order in which they go, and the error of all so far, after each.

    Errors are those of the readers' outputs relative to their power, summed over the readers.
    """

    order: Ints
    errors: Floats


def obs(readings: Sequence[Reading], gone: Sequence[int], count: int) -> Removal:
    """Take out `count` channels, greedily, each time those that cost least after the update.

    gone: channels that are out already. Returns the rest in order, as many as `count`.
    """
    work = [(r.W.copy(), r.inverse(), r) for r in readings]
    left = [c for c in range(_channels(readings)) if c not in set(gone)]
    for channel in gone:
        _take_out(work, [channel])
    order: list[int] = []
    found: list[float] = []
    error, at_once = 0.0, max(1, -(-count // STEPS))
    while left and len(order) < count:
        costs = sum((_costs(W, P, r, left) for W, P, r in work), np.zeros(len(left)))
        now = min(at_once, count - len(order))
        picked = [left[i] for i in np.argsort(costs, kind="stable")[:now]]
        paid = _take_out(work, picked)
        for number, channel in enumerate(picked, 1):
            left.remove(channel)
            order.append(channel)
            found.append(error + paid * number / len(picked))
        error += paid
    return Removal(np.array(order, np.intp), np.array(found))


def _channels(readings: Sequence[Reading]) -> int:
    return len(readings[0].columns) if readings else 0


def _costs(W: Floats, P: Floats, reading: Reading, left: Sequence[int]) -> Floats:
    """tr(W_S (P_SS)⁻¹ W_Sᵀ) of each channel that is left, P = H⁻¹."""
    costs = np.zeros(len(left))
    widths = np.array([len(reading.columns[c]) for c in left])
    for width in np.unique(widths[widths > 0]):
        which = np.flatnonzero(widths == width)
        S = np.array([reading.columns[left[int(i)]] for i in which])
        blocks = P[S[:, :, None], S[:, None, :]]
        columns = W[:, S].transpose(1, 2, 0)  # (channels, width, M)
        costs[which] = np.einsum("csm,csm->c", columns, np.linalg.solve(blocks, columns))
    assert reading.weight is not None
    return costs * reading.weight


def _take_out(work: Sequence[tuple[Floats, Floats, Reading]], channels: Sequence[int]) -> float:
    """Set the columns of channels to zero, the others to what is then best; the error that adds."""
    paid = 0.0
    for W, P, reading in work:
        S = np.concatenate([reading.columns[c] for c in channels])
        if not len(S):
            continue
        A = np.linalg.solve(P[np.ix_(S, S)], P[S])
        assert reading.weight is not None
        step = W[:, S] @ A
        paid += reading.weight * float(
            np.sum(W[:, S] * np.linalg.solve(P[np.ix_(S, S)], W[:, S].T).T)
        )
        W -= step
        W[:, S] = 0
        P -= P[:, S] @ A
        P[S], P[:, S] = 0, 0
        P[S, S] = 1  # of no effect: what is out has zero weights
    return paid


def overlap(readings: Sequence[Reading]) -> Floats:
    """Q_ij = tr(W_i H_ij W_jᵀ) for channels i and j, relative and summed over the readers."""
    n = _channels(readings)
    Q = np.zeros((n, n))
    for reading in readings:
        owner = np.full(len(reading.H), -1)
        for channel, columns in enumerate(reading.columns):
            owner[columns] = channel
        products = (reading.W.T @ reading.W) * reading.H * (reading.weight or 0.0)
        known = owner >= 0
        np.add.at(Q, (owner[known][:, None], owner[known][None, :]), products[np.ix_(known, known)])
    return Q


def thinet(readings: Sequence[Reading], gone: Sequence[int], count: int) -> Removal:
    """Take out `count` channels, greedily, each time the one that adds least to the error."""
    Q = overlap(readings)
    left = [c for c in range(len(Q)) if c not in set(gone)]
    pull = 2 * Q[:, list(gone)].sum(axis=1)
    order: list[int] = []
    for _ in range(min(count, len(left))):
        channel = left.pop(int(np.argmin(Q[left, left] + pull[left])))
        pull += 2 * Q[:, channel]
        order.append(channel)
    picked = np.array(order, np.intp)
    return Removal(picked, errors(readings, gone, picked))


def errors(readings: Sequence[Reading], gone: Sequence[int], order: Ints) -> Floats:
    """The error after each channel of an order, the others as they are."""
    Q = overlap(readings)
    pull = 2 * Q[:, list(gone)].sum(axis=1)
    found = np.zeros(len(order))
    error = 0.0
    for number, channel in enumerate(order):
        error += float(Q[channel, channel] + pull[channel])
        pull += 2 * Q[:, channel]
        found[number] = error
    return found


def lasso(readings: Sequence[Reading]) -> Floats:
    """The largest λ at which each channel's β is not zero: low ones go first."""
    Q = overlap(readings)
    p = Q.sum(axis=1)
    last = np.zeros(len(Q))
    beta = np.zeros(len(Q))
    for penalty in np.geomspace(1, 1e-4, PENALTIES) * max(float(np.abs(p).max(initial=0)), 1e-300):
        _descend(Q, p, beta, float(penalty))
        fresh = (beta != 0) & (last == 0)
        last[fresh] = penalty * (1 + np.abs(beta[fresh]))
    return last


def _descend(Q: Floats, p: Floats, beta: Floats, penalty: float) -> None:
    """min ½ βᵀQβ − pᵀβ + λ Σ|β|, by coordinates, from where β is."""
    for _ in range(SWEEPS):
        before = beta.copy()
        for c in range(len(Q)):
            rest = p[c] - Q[c] @ beta + Q[c, c] * beta[c]
            size = max(abs(rest) - penalty, 0.0)
            beta[c] = np.sign(rest) * size / Q[c, c] if Q[c, c] > 0 else 0.0
        if np.abs(beta - before).max(initial=0) < 1e-4:
            return


def norms(rows: Floats, order: int) -> Floats:
    """‖w_c‖ of rows (channels, entries)."""
    return np.asarray(np.linalg.norm(rows, ord=order, axis=1))


def distances(rows: Floats) -> Floats:
    """Σ_j ‖w_c − w_j‖ of rows (channels, entries): low near the geometric median."""
    squares = np.einsum("ce,ce->c", rows, rows)
    between = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    return np.asarray(np.sqrt(np.maximum(between, 0)).sum(axis=1))
