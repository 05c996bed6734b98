"""Collection by the workers of a cluster: each observes parts, and they are merged here in order.

The parts and their order are those of a run in one process, so the statistics are equal to it, to
the last bit. A worker keeps the session of one segment open. Of second moments, which are
symmetric, one triangle travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from calib.cluster import Crew
from calib.data import Dataset
from calib.inputs import Array
from calib.moments import MomentsObserver
from calib.observe import Opened, Stats, Work, merged, observe_part, observing, open_segment
from onnxc.errors import DataError

Seen = Callable[[int], None]


@dataclass(frozen=True)
class Observed:
    """Statistics of one part. samples: in its runs. skipped: images that could not be read."""

    stats: Stats
    samples: int
    skipped: dict[int, str]


def gather(crew: Crew, work: Work, seen: Seen) -> Stats:
    """The statistics of all segments and parts. seen: told how many samples a part had."""
    items = [
        (segment, part)
        for segment in range(len(work.plan.segments))
        for part in range(len(work.plan.parts))
    ]
    stats: Stats = {}
    for found in crew.each(observe, Remote(work), items):
        merged(stats, unpacked(found.stats))
        work.dataset.source.skipped.update(found.skipped)
        seen(found.samples)
    return stats


class Remote:
    """Work on a worker: BLAS is held to one thread for its time, whichever task ends first."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._turn = Lock()
        self._opened: tuple[int, Opened] = (-1, None)
        self._limits: Any = None

    def __reduce__(self) -> tuple[type[Remote], tuple[Work]]:
        return Remote, (self.work,)

    def opened(self, segment: int) -> Opened:
        """The session of a segment, that of another one being closed."""
        with self._turn:
            if self._limits is None:
                self._limits = threadpool_limits(1, user_api="blas")
            number, opened = self._opened
            if number != segment:
                self._opened = (-1, None)  # before the next one takes memory
                opened = open_segment(self.work, segment)
                self._opened = (segment, opened)
            return opened

    def close(self) -> None:
        self._opened = (-1, None)
        if self._limits is not None:
            self._limits.restore_original_limits()


def observe(job: Remote, item: tuple[int, int]) -> Observed:
    """A task: observe one part, for the keys of one segment."""
    work, (segment, number) = job.work, item
    part = work.plan.parts[number]
    check_files(work.dataset.part(part))
    runs: list[int] = []
    with observing(work.threads) as pool:
        stats = observe_part(work, segment, part, job.opened(segment), pool, runs.append)
    return Observed(packed(stats), sum(runs), dict(work.dataset.source.skipped))


def check_files(dataset: Dataset) -> None:
    """In a task: raise DataError, naming the worker, where it cannot read the samples."""
    lost = dataset.unreachable()
    if lost is not None:
        from distributed import get_worker

        raise DataError(
            f"worker {get_worker().address} cannot read {lost}: "
            "data has to be at the same path on every machine"
        )


@dataclass(frozen=True)
class Triangle:
    """Symmetric matrices (..., d, d) as their lower triangles, (..., d (d + 1) / 2)."""

    values: Array
    width: int

    @classmethod
    def of(cls, whole: Array) -> Triangle:
        width = whole.shape[-1]
        return cls(whole[(..., *np.tril_indices(width))], width)

    def whole(self) -> Array:
        whole = np.empty((*self.values.shape[:-1], self.width, self.width), self.values.dtype)
        rows, columns = np.tril_indices(self.width)
        whole[..., rows, columns] = self.values
        whole[..., columns, rows] = self.values
        return whole


def packed(stats: Stats) -> Stats:
    """The statistics as they travel; they are used up."""
    for observer in stats.values():
        if isinstance(observer, MomentsObserver) and _is_symmetric(observer.products):
            observer.products = Triangle.of(observer.products)  # type: ignore[assignment]
    return stats


def unpacked(stats: Stats) -> Stats:
    """The statistics as they were before `packed`."""
    for observer in stats.values():
        if isinstance(observer, MomentsObserver) and isinstance(observer.products, Triangle):
            observer.products = observer.products.whole()
    return stats


def _is_symmetric(products: Array) -> bool:
    return bool(np.array_equal(products, products.swapaxes(-1, -2)))
