"""Take channels out of what consumes them, so that the rest makes up for it.

A **class** c of channels goes as one; it stands for the columns S of the weight W of each linear
layer y = W x that consumes it. With the covariance of the rows x, damped,

    C = H − mu muᵀ + λ I,      H = E[x xᵀ],      λ = damping · mean diag(H − mu muᵀ),

the weights without the columns S that are best for E‖Wx − Ŵx − b̂‖² are

    Ŵ = W − W_S ([C⁻¹]_SS)⁻¹ [C⁻¹]_S:,      b̂ = (W − Ŵ) mu,
    loss_S = tr(W_S ([C⁻¹]_SS)⁻¹ W_Sᵀ),

which is the optimal brain surgeon (Hassibi 1993) for a set of columns instead of one weight. The
moments are about the mean because the bias takes the mean up: it is the same as a row [x; 1]. After
each step

    C⁻¹ ← C⁻¹ − [C⁻¹]_:S ([C⁻¹]_SS)⁻¹ [C⁻¹]_S:

is the inverse for what is left, so that losses of a sequence of steps add up to the constrained
least-squares error of all the columns that went. The class of the least loss goes first, the loss
of each consumer relative to the variance of its output, tr(W C Wᵀ), and added over consumers.

A step reads only the blocks [C⁻¹]_SS and W_Sᵀ W_S of each class and the columns of the one that
goes; what it takes from C⁻¹ is kept as a factor, C⁻¹ − F Fᵀ, and multiplied out every RANK columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

DAMPING = 0.01  # λ, of the mean variance of an input
RANK = 256  # columns of F at which it is multiplied out


@dataclass(frozen=True)
class Consumer:
    """A linear layer, or one group of a convolution, that consumes the classes.

    W: (outputs, d). H: second moments of its rows, (d, d). mu: their mean, (d,), or None for a
    layer that takes no bias. columns: of W, for each class; empty where it consumes none of it.
    energy: what losses are relative to, None: the variance of its output. The groups of one
    convolution share the sum of theirs.
    """

    W: Floats
    H: Floats
    mu: Floats | None
    columns: Sequence[Indices]
    energy: float | None = None

    @property
    def covariance(self) -> Floats:
        """H − mu muᵀ; H without a mean."""
        return self.H if self.mu is None else self.H - np.outer(self.mu, self.mu)

    @property
    def variance(self) -> float:
        """E‖Wx − E[Wx]‖²; E‖Wx‖² without a mean."""
        return float(np.sum((self.W @ self.covariance) * self.W))


@dataclass(frozen=True)
class Removal:
    """Classes in the order in which they went, and what is left.

    losses: what each step added to the relative squared error, summed over consumers. W, shift: of
    each consumer, (outputs, d) with zeros for what went, and what its bias gains, (outputs,).
    """

    order: Indices
    losses: Floats
    W: tuple[Floats, ...]
    shift: tuple[Floats, ...]

    @property
    def damage(self) -> Floats:
        """Error after 0, 1, … steps, (steps + 1,)."""
        return np.concatenate([[0.0], np.cumsum(self.losses)])


def grouped(
    W: Floats, H: Sequence[Floats], mu: Floats | None, columns: Sequence[Indices]
) -> list[Consumer]:
    """The consumers that the groups of one layer are, with the energy of all of them.

    W: (groups, outputs, d). H: blocks on its diagonal, one after the other, (groups, width, width);
    columns of different blocks make up for nothing of each other. mu: (groups, d). columns: for
    each class, of W seen as (outputs, groups · d).
    """
    d, start, parts = W.shape[2], 0, list[Consumer]()
    for block in H:
        width = block.shape[1]
        cut = slice(start, start + width)
        for g in range(len(W)):
            mean = None if mu is None else mu[g, cut]
            inside = _within(columns, g * d + start, width)
            parts.append(Consumer(W[g][:, cut], block[g], mean, inside))
        start += width
    energy = sum(part.variance for part in parts)
    return [Consumer(p.W, p.H, p.mu, p.columns, energy) for p in parts]


def remove(
    consumers: Sequence[Consumer],
    count: int,
    order: Sequence[int] | Indices | None = None,
    damping: float = DAMPING,
) -> Removal:
    """Take out `count` classes, the one of the least loss first, or in a given order.

    order: as another criterion has it; the update is the same. Classes are numbered as in the
    columns of the consumers, which all have as many. Consumers are left as they are.
    """
    states = [_state(consumer, damping) for consumer in consumers]
    alive = np.ones(len(consumers[0].columns), bool)
    steps = min(count, len(alive) if order is None else len(order))
    gone, losses = np.zeros(steps, np.intp), np.zeros(steps)
    for step in range(steps):
        scores = np.sum([state.scores() for state in states], axis=0)
        chosen = int(np.argmin(np.where(alive, scores, np.inf)) if order is None else order[step])
        gone[step], losses[step], alive[chosen] = chosen, scores[chosen], False
        for state in states:
            state.take(chosen)
    W = tuple(state.W for state in states)
    return Removal(gone, losses, W, tuple(map(_shift, consumers, W)))


def _shift(consumer: Consumer, W: Floats) -> Floats:
    """What the bias gains, (outputs,)."""
    if consumer.mu is None:
        return np.zeros(len(W))
    return np.asarray((consumer.W - W) @ consumer.mu)


def _within(columns: Sequence[Indices], begin: int, d: int) -> list[Indices]:
    inside = ((c >= begin) & (c < begin + d) for c in map(np.asarray, columns))
    return [np.asarray(c)[is_in] - begin for c, is_in in zip(columns, inside, strict=True)]


@dataclass
class _State:
    """One consumer on its way: C⁻¹ = inverse − F Fᵀ, and the blocks that scores are made of.

    count: of all classes. rows: by the number of a class that is consumed, in order. index: columns
    of each of these, (classes, k), filled up where `real` is False. P: blocks of C⁻¹, the identity
    where there is no column. G: blocks of Wᵀ W.
    """

    W: Floats
    inverse: Floats
    count: int
    rows: dict[int, int]
    index: Indices
    real: NDArray[np.bool_]
    energy: float
    F: Floats = field(init=False)
    P: Floats = field(init=False)
    G: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.F = np.zeros((len(self.inverse), 0))
        self._read_blocks()

    def scores(self) -> Floats:
        """loss_S of each class, relative; 0 for one that is gone or not consumed."""
        found = np.zeros(self.count)
        traces = np.trace(np.linalg.solve(self.P, self.G), axis1=1, axis2=2)
        found[list(self.rows)] = np.maximum(traces, 0) / self.energy
        return found

    def take(self, chosen: int) -> None:
        """Take a class out, and let the other columns make up for it."""
        row = self.rows.get(chosen)
        if row is None:
            return
        S = self.index[row][self.real[row]]
        E = self.inverse[:, S] - self.F @ self.F[S].T
        B = np.linalg.inv(E[S])
        A = self.W[:, S] @ B
        self._update_blocks(row, E, E @ np.linalg.cholesky((B + B.T) / 2), A)
        self.W -= A @ E.T
        self.W[:, S] = 0
        if self.F.shape[1] >= RANK:
            self._multiply_out()

    def _update_blocks(self, row: int, E: Floats, F: Floats, A: Floats) -> None:
        e, f, cross = E[self.index], F[self.index], (self.W.T @ A)[self.index]
        both = np.matmul(cross, e.transpose(0, 2, 1))
        self.G += np.matmul(e @ (A.T @ A), e.transpose(0, 2, 1)) - both - both.transpose(0, 2, 1)
        self.P -= np.matmul(f, f.transpose(0, 2, 1))
        self.F = np.concatenate([self.F, F], axis=1)
        self.real[row] = False
        self._blank()

    def _multiply_out(self) -> None:
        self.inverse -= self.F @ self.F.T
        self.F = self.F[:, :0]
        self._read_blocks()

    def _read_blocks(self) -> None:
        self.P = self.inverse[self.index[:, :, None], self.index[:, None, :]]
        taken = self.W.T[self.index]  # (classes, k, outputs)
        self.G = np.matmul(taken, taken.transpose(0, 2, 1))
        self._blank()

    def _blank(self) -> None:
        """What is filled up or gone counts nothing."""
        pairs = self.real[:, :, None] & self.real[:, None, :]
        self.P = np.where(pairs, self.P, np.eye(self.index.shape[1]))
        self.G = np.where(pairs, self.G, 0)


def _state(consumer: Consumer, damping: float) -> _State:
    C = consumer.covariance
    d, tiny = len(C), np.finfo(np.float64).tiny
    share = damping * max(float(np.trace(C)) / max(d, 1), tiny**0.5)
    count, longest = len(consumer.columns), max(map(len, consumer.columns), default=0)
    consumed = [number for number, columns in enumerate(consumer.columns) if len(columns)]
    rows = {number: row for row, number in enumerate(consumed)}
    index = np.zeros((len(rows), longest), np.intp)
    real = np.zeros(index.shape, bool)
    for number, row in rows.items():
        columns = consumer.columns[number]
        index[row, : len(columns)], real[row, : len(columns)] = columns, True
    energy = consumer.variance if consumer.energy is None else consumer.energy
    W = np.array(consumer.W, np.float64)
    inverse = np.asarray(np.linalg.inv(C + share * np.eye(d)), np.float64)
    return _State(W, inverse, count, rows, index, real, max(energy, tiny**0.5))
