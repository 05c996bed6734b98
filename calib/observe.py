"""The map step: run the tapped model over one part of the data into fresh observers.

All that it needs is in a `Work`, which travels as it is; what it returns depends on nothing else,
neither on the process that runs it nor on the parts before. Tensors of one run are observed side by
side in threads, each tensor by one thread with one BLAS thread, so that sums keep their order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import onnxruntime as ort
from onnx import ModelProto
from threadpoolctl import threadpool_limits

from calib import tap
from calib.data import Dataset
from calib.inputs import Array, Feed
from calib.moments import MomentsObserver
from calib.observers import Streaming, observer_of
from calib.plan import Plan
from onnxc.core import Key
from onnxc.runtime import Runtime, run, session

Opened: TypeAlias = ort.InferenceSession | None  # none where only the model's inputs are observed
Stats = dict[Key, Streaming]
Seen = Callable[[int], None]  # told how many samples a run had


@dataclass(frozen=True)
class Work:
    """A model, what to observe of it, on which data, how."""

    proto: ModelProto
    keys: tuple[Key, ...]
    plan: Plan
    dataset: Dataset
    threads: int = 1

    def keys_of(self, segment: int) -> tuple[Key, ...]:
        """Keys that are observed in a segment; those of the model's inputs are in the first."""
        here = self.plan.segments[segment]
        tapped = {name for taps in self.plan.segments for name in taps}
        return tuple(
            k for k in self.keys if k.name in here or (not segment and k.name not in tapped)
        )


def open_segment(work: Work, segment: int) -> Opened:
    """A session on the part of the model that the taps of a segment need."""
    taps = work.plan.segments[segment]
    if not taps:
        return None
    cut = tap.tapped(work.proto, taps)
    return session(cut.SerializeToString(), Runtime(work.threads, lean=True))


class Pool(ThreadPoolExecutor):
    """Threads for observers, this one among them."""

    def __init__(self, threads: int) -> None:
        self.workers = threads or os.cpu_count() or 1
        super().__init__(self.workers)


@contextmanager
def observing(threads: int) -> Iterator[Pool]:
    """The threads; while they are there, BLAS takes one thread a call."""
    with Pool(threads) as pool, threadpool_limits(1, user_api="blas"):
        yield pool


def observe_part(
    work: Work, segment: int, part: slice, opened: Opened, pool: Pool, seen: Seen | None = None
) -> Stats:
    """Statistics of one part of the samples, for the keys of one segment."""
    stats = {key: empty(key, work.plan.blocks) for key in work.keys_of(segment)}
    by_name: dict[str, list[Streaming]] = {}
    for key, observer in stats.items():
        by_name.setdefault(key.name, []).append(observer)
    axes = work.dataset.source.axes
    for feed in work.dataset.part(part).batches(work.plan.batch):
        rows = rows_of(feed, axes)
        _observe(opened, feed, by_name, rows, pool)
        if seen is not None:
            seen(rows)
    waiting = [o for o in stats.values() if isinstance(o, MomentsObserver)]
    list(pool.map(MomentsObserver.settle, waiting))
    return stats


def merged(total: Stats, more: Stats) -> Stats:
    """Both, merged key by key, so that no third copy of all is held; both arguments are used up."""
    for key in list(more):
        observer = more.pop(key)
        total[key] = total[key].merge(observer) if key in total else observer
    return total


def rows_of(feed: Feed, axes: Mapping[str, int | None]) -> int:
    """Samples in a feed."""
    return next((x.shape[a] for n, x in feed.items() if (a := axes[n]) is not None), 1)


def empty(key: Key, blocks: Mapping[Key, int]) -> Streaming:
    """A fresh observer; blocks: those of moments that are not kept whole."""
    observer = observer_of(key)
    if key in blocks and isinstance(observer, MomentsObserver):
        observer.block = blocks[key]
    return observer


def _observe(
    opened: Opened,
    feed: Feed,
    observers: Mapping[str, Sequence[Streaming]],
    rows: int,
    pool: Pool,
) -> None:
    tensors = {name: feed[name] for name in feed if name in observers}
    if opened is not None:
        tensors |= run(opened, {i.name: feed[i.name] for i in opened.get_inputs()})
    observe(tensors, observers, rows, pool)


def observe(
    tensors: Feed, observers: Mapping[str, Sequence[Streaming]], rows: int, pool: Pool
) -> None:
    """What one run gave; each tensor is given free as soon as its observers have seen it."""
    waiting = deque(sorted(tensors, key=lambda name: -tensors[name].size))

    def see() -> None:
        while waiting:
            try:
                name = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            _see(observers[name], tensors.pop(name), rows)

    jobs = [pool.submit(see) for _ in range(pool.workers - 1)]
    see()
    for job in jobs:
        job.result()


def _see(observers: Sequence[Streaming], x: Array, rows: int) -> None:
    for observer in observers:
        observer.update(x, rows)
