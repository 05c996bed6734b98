"""Two models on the same batches: side by side where memory holds both, else one after the other.

In turn, a group of batches goes through the first model, stage by stage where it must, and its
outputs wait on disk for those of the second; a group is as large as GROUP bytes of outputs allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from calib.data import Dataset
from onnxc.boundary import Boundary
from onnxc.cuts import ARENA, BASE
from onnxc.errors import ModelError
from onnxc.graph import Model, load, runnable
from onnxc.runtime import Runtime, run, session
from onnxc.stages import Staged, open_stages

GROUP = 2 << 30  # bytes of one model's outputs that wait on disk
COPIES = 8  # of a batch of outputs, while they are compared in float64

Subject = Model | Path | bytes
Feed = dict[str, Any]
Outputs = dict[str, Any]
Feeds = Callable[[], Iterator[Feed]]


class Pairing:
    """Two models ready to run on the batches of a dataset; names: the outputs of the first.

    other: how the second is run, where that is not how the first is.
    """

    def __init__(
        self,
        first: Subject,
        second: Subject,
        dataset: Dataset,
        runtime: Runtime,
        batch: int,
        other: Runtime | None = None,
    ) -> None:
        pair, ways = (first, second), (runtime, other or runtime)
        bounded = [m for m in pair if isinstance(m, Model) and m.scratch is not None]
        self.dataset = dataset
        self.batch = min((_batch(m, dataset, batch) for m in bounded), default=batch)
        self.staged: list[Staged] = []
        self.sessions: list[Any] = []
        if excess(pair, next(iter(dataset.batches(self.batch)))):
            self.staged = [self._staged(*each) for each in zip(pair, ways, strict=True)]
            self.names = _shared([list(model.facts.outputs) for model in self.staged])
        else:
            self.sessions = [open_whole(*each) for each in zip(pair, ways, strict=True)]
            self.names = _shared([[p.name for p in s.get_outputs()] for s in self.sessions])

    def outputs(self) -> Iterator[tuple[Feed, Outputs, Outputs]]:
        """(feed, outputs of the first, outputs of the second) by batch. Raises ModelError."""
        if self.staged:
            for feeds in self._groups():
                yield from self._in_turn(feeds)
            return
        batches = iter(self.dataset.batches(self.batch))
        try:
            found = self._both(next(batches))
        except ModelError:
            if self.batch == 1:
                raise
            batches = iter(self.dataset.batches(1))  # a state of one sample, or the like
            found = self._both(next(batches))
        yield found
        yield from map(self._both, batches)

    def _both(self, feed: Feed) -> tuple[Feed, Outputs, Outputs]:
        first, second = self.sessions
        return feed, run(first, feed), run(second, feed)

    def _staged(self, subject: Subject, runtime: Runtime) -> Staged:
        model = subject if isinstance(subject, Model) else load(subject)
        return open_stages(model, next(iter(self.dataset.batches(self.batch))), runtime)

    def _in_turn(self, feeds: Feeds) -> Iterator[tuple[Feed, Outputs, Outputs]]:
        with Boundary() as first, Boundary() as second:
            for kept, model in zip((first, second), self.staged, strict=True):
                for _, index, found in model.run(feeds):
                    self._keep(kept, index, found)
                    found.clear()
            for index, feed in enumerate(feeds()):
                yield feed, self._kept(first, index), self._kept(second, index)

    def _keep(self, kept: Boundary, index: int, found: Outputs) -> None:
        for name in self.names:
            if isinstance(found.get(name), np.ndarray):
                kept.put(index, name, found[name])

    def _kept(self, kept: Boundary, index: int) -> Outputs:
        return {name: kept.get(index, name) for name in self.names if name in kept}

    def _groups(self) -> Iterator[Feeds]:
        """Functions that give the batches of a group, again and again."""
        total = sum(1 for _ in self.dataset.batches(self.batch))
        size = max(1, GROUP // max(1, *(model.facts.leaving() for model in self.staged)))
        for start in range(0, total, size):
            yield partial(self._group, start, start + size)

    def _group(self, start: int, stop: int) -> Iterator[Feed]:
        return islice(self.dataset.batches(self.batch), start, stop)


def excess(models: Sequence[Subject], feed: Feed) -> int:
    """Bytes that sessions of all these models take, where that is more than they may; else 0."""
    bounded = [m for m in models if isinstance(m, Model) and m.scratch is not None]
    needed = BASE + sum(open_stages(model, feed).bytes - BASE for model in bounded)
    return needed if bounded and needed > min(m.memory or 0 for m in bounded) else 0


def open_whole(subject: Subject | str, runtime: Runtime) -> Any:
    """One session, whatever it takes. Raises ModelError."""
    if not isinstance(subject, Model):
        return session(subject, runtime)
    if subject.scratch is not None:
        return open_stages(subject, None, runtime).opened()
    with runnable(subject) as source:
        return session(source, runtime)


def _batch(model: Model, dataset: Dataset, most: int) -> int:
    """Samples in a run whose activations and outputs take a third of what there is, at most."""
    room = ((model.memory or 0) - BASE) // 3
    size = most
    while size > 1:
        facts = open_stages(model, next(iter(dataset.batches(size)))).facts
        if ARENA * facts.live() + COPIES * facts.leaving() <= room:
            break
        size //= 2
    return size


def _shared(sides: Sequence[list[str]]) -> list[str]:
    """The outputs of the first model. Raises ModelError for one that the second does not have."""
    missing = set(sides[0]) - set(sides[1])
    if missing:
        raise ModelError(f"the candidate has no output {min(missing)!r}, which the reference has")
    return sides[0]
