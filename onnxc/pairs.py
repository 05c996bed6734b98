"""Two models on the same batches: side by side where memory holds both, else one after the other.

In turn, a group of batches goes through the first model, stage by stage where it must, and its
outputs wait on disk for those of the second; a group is as large as GROUP bytes of outputs allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from calib.data import Dataset
from onnxc.boundary import Boundary
from onnxc.cuts import ARENA, BASE
from onnxc.errors import ModelError
from onnxc.graph import Model, runnable
from onnxc.runtime import Runtime, run, session
from onnxc.stages import Staged, open_stages

GROUP = 2 << 30  # bytes of one model's outputs that wait on disk
COPIES = 8  # of a batch of outputs, while they are compared in float64

Subject = Model | Path | bytes
Feed = dict[str, Any]
Outputs = dict[str, Any]
Opened = ort.InferenceSession | Staged


class Pairing:
    """Two models ready to run on the batches of a dataset; names: the outputs of the first."""

    def __init__(
        self, first: Subject, second: Subject, dataset: Dataset, runtime: Runtime, batch: int
    ) -> None:
        self.dataset, self.runtime, self.batch = dataset, runtime, batch
        bounded = [m for m in (first, second) if isinstance(m, Model) and m.scratch is not None]
        if bounded:
            self.batch = min(_batch(model, dataset, batch) for model in bounded)
        self.models = self._open(first, second)
        self.names = _shared_outputs(*self.models)

    def outputs(self) -> Iterator[tuple[Feed, Outputs, Outputs]]:
        """(feed, outputs of the first, outputs of the second) by batch. Raises ModelError."""
        first, second = self.models
        if isinstance(first, Staged) or isinstance(second, Staged):
            yield from self._in_turn()
            return
        for feed in self.dataset.batches(self.batch):
            yield feed, run(first, feed), run(second, feed)

    def _open(self, *subjects: Subject) -> list[Opened]:
        """Sessions, or stages of all where memory does not hold all."""
        feed = next(iter(self.dataset.batches(self.batch)))
        staged = [
            open_stages(m, feed, self.runtime)
            for m in subjects
            if isinstance(m, Model) and m.scratch is not None
        ]
        bound = min(
            (m.memory or 0 for m in subjects if isinstance(m, Model) and m.scratch), default=0
        )
        if not staged or BASE + sum(one.bytes - BASE for one in staged) <= bound:
            return [_session(subject, self.runtime) for subject in subjects]
        pending = iter(staged)
        return [
            next(pending) if isinstance(m, Model) and m.scratch else _session(m, self.runtime)
            for m in subjects
        ]

    def _in_turn(self) -> Iterator[tuple[Feed, Outputs, Outputs]]:
        groups = self._groups()
        for feeds in groups:
            with Boundary() as kept:
                for side, model in enumerate(self.models):
                    for index, found in _run_all(model, feeds):
                        for name in self.names:
                            if isinstance(found.get(name), np.ndarray):
                                kept.put(index, f"{side} {name}", found[name])
                        del found
                for index, feed in enumerate(feeds()):
                    yield feed, *(self._kept(kept, index, side) for side in (0, 1))

    def _kept(self, kept: Boundary, index: int, side: int) -> Outputs:
        names = {name: f"{side} {name}" for name in self.names}
        return {n: kept.get(index, key) for n, key in names.items() if key in kept}

    def _groups(self) -> Iterator[Callable[[], Iterator[Feed]]]:
        """Functions that give the batches of a group, again and again."""
        total = sum(1 for _ in self.dataset.batches(self.batch))
        written = max(m.facts.leaving() for m in self.models if isinstance(m, Staged))
        size = max(1, GROUP // max(written, 1))
        for start in range(0, total, size):
            stop = start + size
            yield lambda a=start, b=stop: islice(self.dataset.batches(self.batch), a, b)


def _run_all(model: Opened, feeds: Callable[[], Iterator[Feed]]) -> Iterator[tuple[int, Outputs]]:
    if isinstance(model, Staged):
        yield from ((index, found) for _, index, found in model.run(feeds))
        return
    for index, feed in enumerate(feeds()):
        yield index, run(model, feed)


def _batch(model: Model, dataset: Dataset, most: int) -> int:
    """Samples in a run whose activations and outputs take a third of what there is, at most."""
    room = ((model.memory or 0) - BASE) // 3
    size = most
    while size > 1:
        feed = next(iter(dataset.batches(size)))
        facts = open_stages(model, feed).facts
        if ARENA * facts.live() + COPIES * facts.leaving() <= room:
            break
        size //= 2
    return size


def _session(subject: Subject, runtime: Runtime) -> ort.InferenceSession:
    if not isinstance(subject, Model):
        return session(subject, runtime)
    if subject.scratch is not None:
        return open_stages(subject, None, runtime).opened()
    with runnable(subject) as source:
        return session(source, runtime)


def _shared_outputs(reference: Opened, candidate: Opened) -> list[str]:
    names = _names(reference)
    missing = set(names) - set(_names(candidate))
    if missing:
        raise ModelError(f"the candidate has no output {min(missing)!r}, which the reference has")
    return names


def _names(model: Opened) -> list[str]:
    if isinstance(model, Staged):
        return [value.name for value in model.source.proto.graph.output]
    return [port.name for port in model.get_outputs()]
