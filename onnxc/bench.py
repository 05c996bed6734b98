"""Latency of several models in one process, taken in turn: A B C A B C …

On a busy machine the speed drifts by tens of percent within seconds. Taken in turn, every model
sees the same drift, so the **ratio** of two models holds where their milliseconds do not:

    ratio = median over rounds r of  t_reference[r] / t_candidate[r]      (above 1: faster)

with the quartiles of the paired ratios as its spread. A run that takes a millisecond takes ten when
the scheduler gives its core to another process meanwhile. Rounds in which that happened do not
count (the system counts the involuntary context switches of a thread), as long as enough others are
left: on two cores with a load of 8 this tells 1.55 to 1.65x of ResNet-20 where all rounds tell 1.4
to 1.8x, with quartiles that lie 0.2 apart in place of 2 to 5.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxc.errors import OptionError
from onnxc.pairs import Subject, open_whole
from onnxc.runtime import Runtime, run

Feed = dict[str, NDArray[Any]]

WARM_UP = 3
LEAST = 9  # rounds, of however slow a model
MORE = 5  # times as many rounds as are wanted are taken at most, where they are interrupted
QUANTILES = 21  # of the rounds, from the shortest to the longest, that reports keep
LONG = 10.0  # seconds of timing after which LEAST rounds are enough


@dataclass(frozen=True)
class Latency:
    """Latency of one model, in milliseconds a run; `spread` = (p75 - p25) / p50."""

    p10: float
    p50: float
    p90: float
    spread: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> Latency:
        """Summary of the times of all rounds, given in seconds."""
        ms = np.asarray(seconds, np.float64) * 1e3
        p10, p25, p50, p75, p90 = (float(q) for q in np.percentile(ms, (10, 25, 50, 75, 90)))
        return cls(p10, p50, p90, (p75 - p25) / p50, tuple(ms.tolist()))

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The shortest round, 5 %, 10 %, … of all rounds, the longest."""
        ends = np.linspace(0, 100, QUANTILES)
        return tuple(map(float, np.percentile(self.samples, ends))) if self.samples else ()


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference: median and quartiles of the paired rounds."""

    median: float
    low: float
    high: float

    @property
    def is_slower(self) -> bool:
        """Slower beyond the spread: even the upper quartile is below 1."""
        return self.high < 1.0


def speedup(reference: Latency, candidate: Latency) -> Ratio:
    """Ratio of two models timed in the same rounds. Raises OptionError if they were not."""
    if len(reference.samples) != len(candidate.samples):
        raise OptionError("the two models were not timed in the same rounds; time them together")
    paired = np.asarray(reference.samples) / np.asarray(candidate.samples)
    low, median, high = (float(q) for q in np.percentile(paired, (25, 50, 75)))
    return Ratio(median, low, high)


@dataclass(frozen=True)
class Length:
    """How long to go on timing: rounds without interruption, and seconds, that are enough."""

    repeats: int
    min_time: float = 0.0
    max_time: float = math.inf
    least: int = LEAST

    def is_over(self, calm: int, rounds: int, seconds: float) -> bool:
        """Whether this many rounds, some of them without interruption, are enough."""
        is_enough = calm >= self.repeats or rounds >= MORE * self.repeats
        if is_enough and seconds >= self.min_time:
            return True
        return rounds >= self.least and seconds >= self.max_time


@dataclass(frozen=True)
class Round:
    """seconds: of each model. is_calm: whether no run was interrupted."""

    seconds: tuple[float, ...]
    is_calm: bool


def time_interleaved(
    models: Mapping[str, Subject | str],
    feeds: Feed | Sequence[Feed],
    runtime: Runtime = Runtime(),
    repeats: int = 40,
    min_time: float = 0.0,
    max_time: float = LONG,
) -> dict[str, Latency]:
    """Latency of each model over the same feeds, one run of each a round.

    feeds: one feed, or several that are taken in turn. repeats: least number of rounds; more are
    taken until `min_time` seconds have passed or where some are interrupted, and fewer, though
    never fewer than LEAST, once `max_time` seconds have. Raises ModelError when a model does not
    load or run.
    """
    if repeats < 1 or not models:
        raise OptionError("timing needs at least one model and one round")
    several = [feeds] if isinstance(feeds, dict) else list(feeds)
    sessions = {name: open_whole(model, runtime) for name, model in models.items()}
    for feed in itertools.islice(itertools.cycle(several), WARM_UP):
        for opened in sessions.values():
            run(opened, feed)
    rounds = list(_rounds(list(sessions.values()), several, Length(repeats, min_time, max_time)))
    calm = [r for r in rounds if r.is_calm]
    counted = calm if len(calm) >= min(LEAST, repeats) else rounds
    return {name: Latency.of([r.seconds[i] for r in counted]) for i, name in enumerate(sessions)}


def _rounds(
    sessions: Sequence[ort.InferenceSession], feeds: Sequence[Feed], length: Length
) -> Iterator[Round]:
    """One run of each model a round, until they are enough."""
    start, calm = time.perf_counter(), 0
    for count, feed in enumerate(itertools.cycle(feeds)):
        if length.is_over(calm, count, time.perf_counter() - start):
            return
        before = interruptions()
        seconds = tuple(_time(opened, feed) for opened in sessions)
        is_calm = interruptions() == before
        calm += is_calm
        yield Round(seconds, is_calm)


def _time(opened: ort.InferenceSession, feed: Feed) -> float:
    start = time.perf_counter()
    opened.run(None, feed)
    return time.perf_counter() - start


def interruptions() -> int:
    """How often another process was given the core of this thread; 0 where nobody counts it."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
