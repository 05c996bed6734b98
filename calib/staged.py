"""Statistics of a model that does not fit in memory: stage by stage, each over all the data.

The stages are those of `onnxc.stages`; what is observed of a stage is an output of it. With T the
bytes of the tensors that are observed in one stage, in a run of one batch, a run takes

    the largest stage + ARENA (T + live activations) + 2 × the statistics,

so T is taken from what the stages may use, and the batch is halved while T is more than a third of
it. Parts of the data are observed alone and merged in order, as in a run of the whole model: the
numbers are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from calib import tap
from calib.data import Dataset
from calib.inputs import Feed, fixed_batch
from calib.moments import MomentsObserver
from calib.observe import Pool, Stats, empty, merged, observe, observing, rows_of
from calib.observers import Streaming
from calib.plan import LARGEST_BATCH, Plan, blocks_within, held_bytes, parts, waiting_bytes
from onnxc.core import Key
from onnxc.cuts import ARENA, BASE, Facts
from onnxc.runtime import Runtime
from onnxc.stages import Source, Staged, staged

MIB = 1 << 20
Seen = Callable[[int], None]


@dataclass(frozen=True)
class StagedWork:
    """A model in stages, what to observe of it, on which data, how."""

    model: Staged
    keys: tuple[Key, ...]
    plan: Plan
    dataset: Dataset
    threads: int

    def feeds(self) -> Iterator[Feed]:
        """The batches, part by part."""
        for part in self.plan.parts:
            yield from self.dataset.part(part).batches(self.plan.batch)

    def part_of(self) -> list[int]:
        """The part that each batch is of."""
        spans = ((number, p.stop - p.start) for number, p in enumerate(self.plan.parts))
        return [number for number, size in spans for _ in range(-(-size // self.plan.batch))]


def stage_work(
    source: Source,
    taps: Sequence[str],
    keys: Sequence[Key],
    dataset: Dataset,
    memory: int,
    batch: int | None = None,
    threads: int = 1,
) -> StagedWork | None:
    """How to observe `taps` in so much memory; None where the model fits whole."""
    group = fixed_batch(dataset.inputs, dataset.source.axes)
    size = group or batch or min(LARGEST_BATCH, len(dataset))
    is_free = not group and not batch
    runtime = Runtime(threads, lean=True)
    layouts = _layouts(source, taps, next(iter(dataset.batches(1))))
    blocks = blocks_within(keys, layouts, (memory - BASE) // 6)
    held = 2 * sum(held_bytes(key, layouts, blocks.get(key)) for key in keys)
    held += sum(waiting_bytes(key, layouts) for key in keys)
    while True:
        model, taken = _fitted(source, taps, dataset, size, memory - held, runtime)
        if not is_free or size == 1 or taken <= (memory - BASE) // 3:
            break
        size //= 2
    if model.is_whole:
        return None
    largest = max(stage.bytes for stage in model.stages)
    estimate = BASE + largest + held + taken + int(ARENA * model.facts.live())
    names = tuple(stage.outputs for stage in model.stages)
    notes = _notes(estimate, memory, len(names))
    plan = Plan(size, names, estimate, notes, blocks, parts(len(dataset), size))
    return StagedWork(model, tuple(keys), plan, dataset, threads)


def _layouts(source: Source, taps: Sequence[str], feed: Feed) -> dict[str, tap.Layout]:
    types = Facts(source.proto, taps, feed).types
    return {n: found for n, v in types.items() if (found := tap.declared(v.type, {})) is not None}


def _fitted(
    source: Source, taps: Sequence[str], dataset: Dataset, size: int, memory: int, runtime: Runtime
) -> tuple[Staged, int]:
    """Stages that leave room for what is observed in each of them, and the bytes of that room."""
    feed, taken = next(iter(dataset.batches(size))), 0
    while True:
        model = staged(source, memory, feed, runtime, taps, taken)
        sizes = model.facts.sizes
        needed = max(sum(sizes.get(n, 0) for n in stage.outputs) for stage in model.stages)
        if ARENA * needed <= taken or taken > memory:
            return model, taken
        taken = int(ARENA * needed)


def _notes(estimate: int, memory: int, stages: int) -> tuple[str, ...]:
    notes = [f"the model ran in {stages} stages, to stay within the memory asked for"]
    if estimate > memory:
        need, asked = -(-estimate // MIB), memory // MIB
        notes.append(f"calibration needs about {need} MiB, more than the {asked} MiB allowed")
    return tuple(notes)


def gather(work: StagedWork, seen: Seen | None = None) -> Stats:
    """Statistics of all the data. seen: told how many samples a run had. Raises ModelError."""
    stats: Stats = {}
    part_of, axes = work.part_of(), work.dataset.source.axes
    given: Feed = {}

    def feeds() -> Iterator[Feed]:
        nonlocal given
        for feed in work.feeds():
            given = feed
            yield feed

    now, current = (-1, -1), Stats()
    with observing(work.threads) as pool:
        for stage, index, tensors in work.model.run(feeds):
            if now != (stage, part_of[index]):
                _settle(stats, current, pool)
                now = stage, part_of[index]
                current = {k: empty(k, work.plan.blocks) for k in _keys_of(work, stage)}
            by_name = _by_name(current)
            tensors |= {n: given[n] for n in given if n in by_name}
            rows = rows_of(given, axes)
            observe(tensors, by_name, rows, pool)
            if seen is not None:
                seen(rows)
        _settle(stats, current, pool)
    return stats


def _keys_of(work: StagedWork, stage: int) -> list[Key]:
    """Keys that are observed in a stage; those of the model's inputs are in the first."""
    here = set(work.plan.segments[stage])
    if not stage:
        here |= {spec.name for spec in work.dataset.inputs}
    return [key for key in work.keys if key.name in here]


def _by_name(stats: Stats) -> dict[str, list[Streaming]]:
    by_name: dict[str, list[Streaming]] = {}
    for key, observer in stats.items():
        by_name.setdefault(key.name, []).append(observer)
    return by_name


def _settle(total: Stats, part: Stats, pool: Pool) -> None:
    """Put the statistics of a part with those of the parts before it."""
    waiting = [o for o in part.values() if isinstance(o, MomentsObserver)]
    list(pool.map(MomentsObserver.settle, waiting))
    merged(total, part)
