"""The map step: run a model over data once, and stream its tensors into observers.

Memory is planned. With w the bytes of the weights, t those of the taps and l those of the largest
set of live activations of one sample, a run of b samples takes about

    BASE + WEIGHT_COPIES * w + ARENA * b * (t + l).

Where that exceeds `max_memory` for b = 1, the taps are split into segments: groups, each with its
own session on the part of the model that its taps need, and the data is read once a segment.
Where the bound cannot be met, segments no smaller than l are used, since less would gain little.
Observers stream, so nothing grows with the number of samples; the plan depends on shapes alone, not
on what the machine has free, so the same call makes the same plan everywhere.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto

from calib import tap
from calib.data import Dataset
from calib.inputs import Feed, fixed_batch
from calib.observers import OBSERVERS, HistogramObserver, Streaming
from onnxc.core import Key
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, to_proto
from onnxc.runtime import Runtime, run, session

MIB = 1 << 20
BASE = 160 * MIB  # Python with the libraries, before any model
WEIGHT_COPIES = 3  # the exported model, its bytes, and the session's own
ARENA = 1.5  # bytes that ONNX Runtime's arena takes for a byte of activations
CHUNK = 48 * MIB  # of taps in one run: more is no faster, for it leaves the caches
LARGEST_BATCH = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Collected:
    """Statistics and what gathering them took.

    notes: sentences for the report. binned: share of the values that the histograms hold; minimum
    and maximum saw all. samples: seen in each segment. estimate: planned bytes of the
    process. peak_rss: largest resident bytes of the process up to now; rss: those now.
    """

    stats: dict[Key, Streaming]
    notes: tuple[str, ...]
    samples: int
    batch: int
    segments: int
    estimate: int
    peak_rss: int
    rss: int
    binned: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Samples in a run, the taps of each segment, and the bytes that they are expected to take."""

    batch: int
    segments: tuple[tuple[str, ...], ...]
    estimate: int
    notes: tuple[str, ...] = ()


def collect(
    model: Model,
    keys: Iterable[Key],
    dataset: Dataset,
    *,
    max_memory: int | None = None,
    threads: int = 1,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Gather the statistics that `keys` name by running the model over the whole dataset.

    max_memory: bytes that the process may take, or None. threads: of ONNX Runtime, 0 for all
    cores; one is best where others use the machine, for idle threads spin. batch: samples in a run;
    None: as many as are fast and fit. progress: called with (samples done, samples in all).

    A key whose tensor cannot be observed (inside a body, constant, holding infinity as an attention
    mask does) is left out with a note. Raises OptionError for an unknown tensor or statistic,
    DataError naming the tensor that holds NaN, ModelError when the model does not run.
    """
    wanted = sorted(set(keys), key=lambda key: (key.name, key.what, str(key.axis)))
    proto = to_proto(model)
    _add_differences(proto, wanted)
    usable, notes = observable(proto, wanted)
    direct = {i.name for i in proto.graph.input}
    taps = [n for n in _in_order(proto) if n in {k.name for k in usable} and n not in direct]
    plan = plan_runs(proto, taps, dataset, max_memory, batch)
    try:
        stats = _gather(proto, plan, usable, dataset, threads, progress)
    except ModelError:
        if plan.batch == 1 or fixed_batch(dataset.inputs, dataset.source.axes):
            raise
        note = f"the model does not run on {plan.batch} samples at once, so it was run on one"
        plan = replace(plan, batch=1, notes=(*plan.notes, note))
        stats = _gather(proto, plan, usable, dataset, threads, progress)
    stats, infinite = _finite(stats, direct)
    notes = (*notes, *plan.notes, *infinite)
    samples, segments = len(dataset), len(plan.segments)
    shape = (samples, plan.batch, segments, plan.estimate)
    return Collected(stats, notes, *shape, *resident(), _binned(stats))


def _add_differences(proto: ModelProto, keys: Sequence[Key]) -> None:
    """Let the model compute what keys with `minus` observe."""
    for key in keys:
        if key.minus is not None:
            inputs = [key.tensor, key.minus]
            proto.graph.node.append(onnx.helper.make_node("Sub", inputs, [key.name]))


def observable(proto: ModelProto, keys: Sequence[Key]) -> tuple[list[Key], tuple[str, ...]]:
    """The keys whose tensors can be tapped, and why the others cannot.

    Raises OptionError for a statistic that is not in OBSERVERS and a tensor that is nowhere.
    """
    known = tap.produced(proto.graph) | {i.name for i in proto.graph.input}
    constants = {i.name for i in proto.graph.initializer}
    nested = tap.inner(proto.graph)
    usable, notes = [], []
    for key in keys:
        if key.what not in OBSERVERS:
            raise OptionError(
                f"statistic {key.what!r} is unknown; use one of {', '.join(OBSERVERS)}"
            )
        if key.name in known:
            usable.append(key)
        elif key.tensor in nested:
            notes.append(f"tensor {key.tensor!r} is inside a nested body, so it was not observed")
        elif key.tensor in constants:
            notes.append(f"tensor {key.tensor!r} is constant, so it was not observed")
        else:
            raise OptionError(f"tensor {key.tensor!r} is not in the model; check the key's name")
    return usable, tuple(notes)


def plan_runs(
    proto: ModelProto,
    taps: Sequence[str],
    dataset: Dataset,
    max_memory: int | None,
    batch: int | None = None,
) -> Plan:
    """Choose batch and segments so that the estimate stays below `max_memory`."""
    if not taps:
        return Plan(batch or 1, ((),), BASE)
    feed = next(iter(dataset.batches(1)))
    group = fixed_batch(dataset.inputs, dataset.source.axes)
    layouts = tap.layouts(proto, feed)
    bytes_of = {n: int(ARENA * x.nbytes) // (group or 1) for n, x in layouts.items()}
    live = tap.peak(tap.needed(proto.graph, taps), bytes_of, ())
    tapped = sum(bytes_of[n] for n in taps)
    fixed = BASE + WEIGHT_COPIES * tap.weight_bytes(proto.graph)
    room = sys.maxsize if max_memory is None else max(max_memory - fixed, 0)
    fitting = min(
        CHUNK // max(tapped, 1), room // max(tapped + live, 1), LARGEST_BATCH, len(dataset)
    )
    size = group or batch or max(fitting, 1)
    largest = max(bytes_of[n] for n in taps)
    spare = room // size - live
    segments = _split(taps, bytes_of, spare if spare >= largest else max(live, largest))
    widest = max(sum(bytes_of[n] for n in segment) for segment in segments)
    estimate = fixed + size * (widest + live)
    notes = _memory_notes(estimate, max_memory, len(segments))
    return Plan(size, segments, estimate, notes)


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: the peak, and now (the peak where /proc is missing)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak, peak
    return peak, int(statm.read_text().split()[1]) * resource.getpagesize()


def _in_order(proto: ModelProto) -> list[str]:
    return [name for node in proto.graph.node for name in node.output]


def _split(
    taps: Sequence[str], bytes_of: Mapping[str, int], room: int
) -> tuple[tuple[str, ...], ...]:
    """Consecutive taps, as many to a segment as there is room for, but one at least."""
    segments: list[list[str]] = []
    used = 0
    for name in taps:
        if not segments or used + bytes_of[name] > room:
            segments.append([])
            used = 0
        segments[-1].append(name)
        used += bytes_of[name]
    return tuple(tuple(segment) for segment in segments)


def _memory_notes(estimate: int, max_memory: int | None, segments: int) -> tuple[str, ...]:
    if max_memory is not None and estimate > max_memory:
        need, asked = -(-estimate // MIB), max_memory // MIB
        return (
            f"calibration needs about {need} MiB, more than the {asked} MiB that were asked for",
        )
    if segments > 1:
        return (f"calibration read the data {segments} times, to stay within the memory asked for",)
    return ()


def _gather(
    proto: ModelProto,
    plan: Plan,
    keys: Sequence[Key],
    dataset: Dataset,
    threads: int,
    progress: Progress | None,
) -> dict[Key, Streaming]:
    """Run every segment over the dataset into fresh observers."""
    stats = {key: OBSERVERS[key.what](key.axis) for key in keys}
    tapped = {name for segment in plan.segments for name in segment}
    fed = tuple(sorted({key.name for key in keys} - tapped))
    axes = dataset.source.axes
    total = len(dataset) * len(plan.segments)
    done = 0
    for segment in plan.segments:
        observers = {n: [stats[k] for k in keys if k.name == n] for n in (*fed, *segment)}
        opened = _open(proto, segment, threads)
        for feed in dataset.batches(plan.batch):
            rows = rows_of(feed, axes)
            _observe(opened, feed, observers, rows)
            done += rows
            if progress is not None:
                progress(min(done, total), total)
        fed = ()  # the first segment has seen the inputs
    return stats


def _open(proto: ModelProto, taps: Sequence[str], threads: int) -> ort.InferenceSession | None:
    if not taps:
        return None
    return session(tap.tapped(proto, taps).SerializeToString(), Runtime(threads, lean=True))


def _observe(
    opened: ort.InferenceSession | None,
    feed: Feed,
    observers: Mapping[str, Sequence[Streaming]],
    rows: int,
) -> None:
    """One run; each tensor is given free as soon as its observers have seen it."""
    tensors = {name: feed[name] for name in feed if name in observers}
    if opened is not None:
        tensors |= run(opened, {i.name: feed[i.name] for i in opened.get_inputs()})
    while tensors:
        name, x = tensors.popitem()
        for observer in observers[name]:
            observer.update(x, rows)


def rows_of(feed: Feed, axes: Mapping[str, int | None]) -> int:
    """Samples in a feed."""
    return next((x.shape[a] for n, x in feed.items() if (a := axes[n]) is not None), 1)


def _finite(
    stats: Mapping[Key, Streaming], fed: Collection[str]
) -> tuple[dict[Key, Streaming], tuple[str, ...]]:
    """The statistics without those of infinite tensors, and a sentence for each of these."""
    for key, observer in stats.items():
        if observer.has_nan or (not observer.is_finite and key.tensor in fed):
            raise DataError(
                f"tensor {key.tensor!r} holds NaN or infinity on this data: "
                "check the preprocessing and the weights"
            )
    infinite = sorted({key.tensor for key, observer in stats.items() if not observer.is_finite})
    notes = (f"tensor {n!r} holds infinite values, so it has no statistics" for n in infinite)
    return {k: o for k, o in stats.items() if o.is_finite}, tuple(notes)


def _binned(stats: Mapping[Key, Streaming]) -> float:
    histograms = [o for o in stats.values() if isinstance(o, HistogramObserver)]
    seen, binned = sum(o.count for o in histograms), sum(o.binned for o in histograms)
    return binned / seen if seen else 1.0
