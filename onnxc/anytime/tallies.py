"""What a metric has seen of one candidate, and the drop that it tells with an interval.

A drop is the mean of one number a sample, so it has a standard error s, and lies below

    drop + Z s         with a chance of 90 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxc.errors import DataError
from onnxc.fidelity import class_scores
from onnxc.numerics.decisions import Contest, logits

Array = NDArray[Any]
Outputs = Mapping[str, Any]

Z = 1.2816  # standard errors that 90 % of a normal distribution lie below
RESAMPLED = 40  # halves of the samples on which a function of all of them is called


@dataclass(frozen=True)
class Estimate:
    """A drop in points, the bounds of its interval, and on how many samples."""

    drop: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, drops: Array) -> Estimate:
        """From the drop of each sample, shape (N,)."""
        n, mean = len(drops), float(np.mean(drops))
        error = float(np.std(drops, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean, mean - Z * error, mean + Z * error, n)

    @classmethod
    def sum(cls, seen: Array, known: Array) -> Estimate:
        """Of two means, from samples of one candidate and from others."""
        parts = [cls.of(seen), cls.of(known)]
        drop = sum(part.drop for part in parts)
        spread = math.hypot(*(part.high - part.drop for part in parts))
        return cls(drop, drop - spread, drop + spread, len(seen))

    @property
    def least(self) -> float:
        """Three standard errors below the drop."""
        return self.drop - 3 * (self.drop - self.low) / Z

    def is_settled(self, bound: float) -> bool:
        """Whether more samples would hardly tell something else about the bound."""
        return self.high <= bound or self.low > bound


class Tally(Protocol):
    """What a metric has seen of one candidate so far."""

    def update(self, ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs) -> None: ...

    @property
    def estimate(self) -> Estimate: ...


@dataclass
class Drops:
    """A tally of metrics that are a mean over samples.

    drop_of: (n,) points of a batch. link: from the mean to the drop.
    """

    drop_of: Callable[[Outputs, Outputs, Array | None, Outputs], Array]
    link: Callable[[float], float] = float
    parts: list[Array] = field(default_factory=list)

    def update(self, ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs) -> None:
        self.parts.append(self.drop_of(ref, out, labels, feed))

    @property
    def estimate(self) -> Estimate:
        found = Estimate.of(np.concatenate(self.parts))
        drop, low, high = map(self.link, (found.drop, found.low, found.high))
        return Estimate(drop, low, high, found.samples)


@dataclass
class Decided:
    """A tally of top1 and agreement: in expectation, or counted where that is beyond doubt more.

    A sample's drop is the mean over its positions. output: the one with the classes. T: of
    `numerics.decisions`. known: what the original gives for more samples.
    """

    output: str
    is_top1: bool
    T: float
    known: Contest | None
    parts: list[Contest] = field(default_factory=list)
    samples: int = 0

    def update(self, ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs) -> None:
        is_one = labels is not None and labels.ndim == 1
        both = [class_scores(side[self.output], is_one) for side in (ref, out)]
        z, disturbed = (logits(x.reshape(-1, x.shape[-1])) for x in both)
        self.parts.append(Contest.of(z, disturbed, self.T))
        self.samples += len(both[0])

    @property
    def estimate(self) -> Estimate:
        seen, is_top1, known = Contest.joined(self.parts), self.is_top1, self.known
        counted = Estimate.of(self._by_sample(seen.lost if is_top1 else seen.changed))
        if known is None:
            told = seen.expected_drop if is_top1 else seen.disagreement
            found = Estimate.of(self._by_sample(told))
        else:
            rest, typical = seen.beside(known, is_top1)
            found = Estimate.sum(self._by_sample(rest), 100 * typical)
        return counted if counted.least > found.high else found

    def _by_sample(self, shares: Array) -> Array:
        """Points of each sample, the mean over its positions."""
        return np.asarray(100 * shares.reshape(self.samples, -1).mean(axis=1))


@dataclass
class Scored:
    """A tally of a function that is called with all outputs and labels.

    Its interval comes from halves of the samples (jackknife of N/2): the spread over halves is that
    of the mean over all.
    """

    score: Callable[[dict[str, Any], Array | None], float]
    seen: list[tuple[Outputs, Outputs, Array | None]] = field(default_factory=list)

    def update(self, ref: Outputs, out: Outputs, labels: Array | None, feed: Outputs) -> None:
        self.seen.append((ref, out, labels))

    @property
    def estimate(self) -> Estimate:
        ref, out = (_joined([batch[0] for batch in self.seen]), _joined([b[1] for b in self.seen]))
        known = [batch[2] for batch in self.seen]
        labels = None if known[0] is None else np.concatenate([x for x in known if x is not None])
        n = len(next(iter(ref.values())))
        drop = self._drop(ref, out, labels, np.arange(n))
        rng = np.random.default_rng(n)
        halves = [rng.permutation(n)[: n // 2] for _ in range(RESAMPLED if n > 3 else 0)]
        found = [self._drop(ref, out, labels, np.sort(half)) for half in halves]
        error = float(np.std(found)) if found else math.inf
        return Estimate(drop, drop - Z * error, drop + Z * error, n)

    def _drop(
        self, ref: dict[str, Any], out: dict[str, Any], labels: Array | None, rows: Array
    ) -> float:
        some = None if labels is None else labels[rows]
        both = [self.score({n: x[rows] for n, x in side.items()}, some) for side in (ref, out)]
        return float(both[0]) - float(both[1])


def _joined(batches: list[Outputs]) -> dict[str, Any]:
    try:
        return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    except ValueError as error:
        raise DataError(
            "--metric MODULE:FUNCTION needs outputs of one shape for all samples"
        ) from error
