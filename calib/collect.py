"""Statistics of a model: run it over data once, and stream its tensors into observers.

`calib.plan` decides how, `calib.observe` does it for one part of the data, and this module puts the
parts together. Observers stream, so nothing grows with the number of samples.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import ModelProto

from calib import remote, tap
from calib.cluster import Crew
from calib.data import Dataset
from calib.inputs import fixed_batch
from calib.observe import Stats, Work, merged, observe_part, observing, open_segment
from calib.observers import OBSERVERS, Streaming
from calib.plan import Plan, plan_runs
from calib.staged import gather, stage_work
from onnxc.boundary import release
from onnxc.core import Key
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, bound, skeleton, to_proto
from onnxc.stages import Source

if TYPE_CHECKING:
    from distributed import Client

Progress = Callable[[int, int], None]
ALONE = "the model ran in stages, which no worker of the cluster takes part in"


@dataclass(frozen=True)
class Collected:
    """Statistics and what gathering them took.

    notes: sentences for the report. samples: seen in each segment. estimate: planned bytes of the
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


def collect(
    model: Model,
    keys: Iterable[Key],
    dataset: Dataset,
    *,
    max_memory: int | None = None,
    threads: int = 1,
    batch: int | None = None,
    progress: Progress | None = None,
    client: Client | None = None,
) -> Collected:
    """Gather the statistics that `keys` name by running the model over the whole dataset.

    max_memory: bytes that the process may take, or None. threads: of ONNX Runtime, 0 for all
    cores; one is best where others use the machine, for idle threads spin. batch: samples in a run;
    None: as many as are fast and fit. progress: called with (samples done, samples in all).
    client: of a Dask cluster, whose workers then run the model; max_memory and threads are those of
    each. The statistics are the same, to the last bit.

    A key whose tensor cannot be observed (inside a body, constant, holding infinity as an attention
    mask does) is left out with a note. Raises OptionError for an unknown tensor or statistic,
    DataError naming the tensor that holds NaN, ModelError when the model does not run, ClusterError
    when the workers are lost.
    """
    dataset = dataset.subset(slice(None))  # parts are the same whatever turns out to be unreadable
    wanted = sorted(set(keys), key=lambda key: (key.name, key.what, str(key)))
    release()  # what preparing the model took and gave back
    model = bound(model, max_memory or model.memory)
    source = Source(*skeleton(model), model.scratch)
    _add_differences(source.proto, wanted)
    usable, notes = observable(source.proto, wanted)
    direct = {i.name for i in source.proto.graph.input}
    names = {k.name for k in usable} - direct
    taps = [n for n in _in_order(source.proto) if n in names]
    if model.scratch is not None and taps:
        memory = model.memory or 0
        staged = stage_work(source, taps, usable, dataset, memory, batch, threads)
        if staged is not None:
            stats = gather(staged, _counting(staged.plan, dataset, progress))
            notes += () if client is None else (ALONE,)
            return _collected(stats, direct, notes, staged.plan, len(dataset))
    proto = _with_types(model)
    _add_differences(proto, wanted)
    plan = plan_runs(proto, taps, usable, dataset, max_memory, batch)
    work = Work(proto, tuple(usable), plan, dataset, threads)
    crew = None if client is None else Crew(client)
    try:
        stats = _gather(work, progress, crew)
    except ModelError:
        if plan.batch == 1 or fixed_batch(dataset.inputs, dataset.source.axes):
            raise
        note = f"the model does not run on {plan.batch} samples at once, so it was run on one"
        plan = plan_runs(proto, taps, usable, dataset, max_memory, 1)
        plan = replace(plan, notes=(*plan.notes, note))
        stats = _gather(replace(work, plan=plan), progress, crew)
    notes += () if crew is None else crew.notes
    return _collected(stats, direct, notes, plan, len(dataset))


def _collected(
    stats: Stats, fed: Collection[str], notes: tuple[str, ...], plan: Plan, samples: int
) -> Collected:
    stats, infinite = _finite(stats, fed)
    notes = (*notes, *plan.notes, *infinite)
    shape = (samples, plan.batch, len(plan.segments), plan.estimate)
    return Collected(stats, notes, *shape, *resident())


def _with_types(model: Model) -> ModelProto:
    """The model with what is known of the shapes inside it, which saves a run to observe them."""
    proto = to_proto(model)
    typed, _ = skeleton(model)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(typed.graph.value_info)
    return proto


def _add_differences(proto: ModelProto, keys: Sequence[Key]) -> None:
    """Let the model compute what keys with `minus` observe."""
    types = {value.name: value.type for value in proto.graph.value_info}
    for key in keys:
        if key.minus is not None:
            inputs = [key.tensor, key.minus]
            proto.graph.node.append(onnx.helper.make_node("Sub", inputs, [key.name]))
            if key.tensor in types:
                proto.graph.value_info.add(name=key.name, type=types[key.tensor])


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


def _gather(work: Work, progress: Progress | None, crew: Crew | None = None) -> Stats:
    """Run every segment over every part of the data, here or by a crew, and merge in order."""
    seen = _counting(work.plan, work.dataset, progress)
    if crew is not None:
        return remote.gather(crew, work, seen)
    stats: Stats = {}
    with observing(work.threads) as pool:
        for segment in range(len(work.plan.segments)):
            opened = open_segment(work, segment)
            for part in work.plan.parts:
                merged(stats, observe_part(work, segment, part, opened, pool, seen))
    return stats


def _counting(plan: Plan, dataset: Dataset, progress: Progress | None) -> Callable[[int], None]:
    """A function that is told of samples run, and tells how many of all runs are done."""
    total = len(dataset) * len(plan.segments)
    done = 0

    def seen(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(min(done, total), total)

    return seen


def _finite(stats: Mapping[Key, Streaming], fed: Collection[str]) -> tuple[Stats, tuple[str, ...]]:
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
