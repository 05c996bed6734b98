"""How statistics are gathered: batch, segments, parts and blocks, so that memory stays bounded.

With w the bytes of the weights, s those of the statistics, t those of the taps and l those of the
largest set of live activations of one sample, a run of b samples takes about

    BASE + WEIGHT_COPIES · w + 2 s + r + ARENA · b · (t + l),

r being the rows of layers that wait to be multiplied.

* **Segments**: where that exceeds the bound for b = 1, the taps are split into groups, each with a
  session of its own on the part of the model that its taps need; the data is read once a segment.
  Where the bound cannot be met, segments no smaller than l are used: less would gain little.
* **Blocks**: of layers with very many inputs (`onnxc.moments`) only blocks on the diagonal of the
  moments are kept; where the moments take more than half of what weights and one run leave, those
  of the widest layers are halved until all fit.
* **Parts**: the samples are cut into a few parts; each part's statistics are gathered alone and
  merged in order. Parts depend on the number of samples and the batch, not on who gathers them, so
  one process and many workers add the same numbers in the same order: equal to the last bit.

The plan depends on shapes alone, not on what the machine has free, so the same call makes the same
plan everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from onnx import ModelProto

from calib import moments, tap
from calib.data import Dataset
from calib.inputs import fixed_batch
from calib.observers import BINS
from onnxc.core import Key
from onnxc.moments import BLOCK, is_wide
from onnxc.numerics.patches import Window, length

MIB = 1 << 20
BASE = 160 * MIB  # Python with the libraries, before any model
WEIGHT_COPIES = 3  # the exported model, its bytes, and the session's own
ARENA = 1.5  # bytes that ONNX Runtime's arena takes for a byte of activations
CHUNK = 48 * MIB  # of taps in one run: more is hardly faster
LARGEST_BATCH = 64
PART = 32  # least samples of a part
MOST_PARTS = 16
NARROWEST = 32  # columns of a block of moments

Layouts = Mapping[str, tap.Layout]


@dataclass(frozen=True)
class Plan:
    """Samples in a run, the taps of each segment, and the bytes that they are expected to take.

    blocks: columns of the blocks of moments that are not kept whole. parts: positions of samples.
    """

    batch: int
    segments: tuple[tuple[str, ...], ...]
    estimate: int
    notes: tuple[str, ...] = ()
    blocks: Mapping[Key, int] = field(default_factory=dict)
    parts: tuple[slice, ...] = ()


def plan_runs(
    proto: ModelProto,
    taps: Sequence[str],
    keys: Collection[Key],
    dataset: Dataset,
    max_memory: int | None = None,
    batch: int | None = None,
) -> Plan:
    """Choose batch, segments and blocks so that the estimate stays below `max_memory`.

    taps: tensors to observe, in order. batch: samples in a run; None: as many as are fast and fit.
    """
    group = fixed_batch(dataset.inputs, dataset.source.axes)
    if not taps:
        size = group or batch or 1
        return Plan(size, ((),), BASE, parts=parts(len(dataset), size))
    feed = next(iter(dataset.batches(1)))
    layouts = tap.layouts(proto, feed)
    run = _Run(proto, layouts, taps, group or 1)
    fixed = BASE + WEIGHT_COPIES * tap.weight_bytes(proto.graph)
    fixed += sum(waiting_bytes(key, layouts) for key in keys)
    room = sys.maxsize if max_memory is None else max(max_memory - fixed, 0)
    blocks = blocks_within(keys, layouts, (room - run.least) // 2)
    held = 2 * sum(held_bytes(key, layouts, blocks.get(key)) for key in keys)
    room = max(room - held, 0)
    fitting = min(CHUNK // max(run.tapped, 1), room // max(run.tapped + run.live, 1), LARGEST_BATCH)
    size = group or batch or max(min(fitting, len(dataset)), 1)
    spare = room // size - run.live
    segments = _split(run.bytes_of, spare if spare >= run.largest else run.least - run.live)
    widest = max(sum(run.bytes_of[n] for n in segment) for segment in segments)
    estimate = fixed + held + size * (widest + run.live)
    notes = (*_block_notes(blocks, layouts), *_notes(estimate, max_memory, len(segments)))
    return Plan(size, segments, estimate, notes, blocks, parts(len(dataset), size))


class _Run:
    """Bytes of a run of one sample: taps by name, all taps, and the largest set of live tensors."""

    def __init__(
        self, proto: ModelProto, layouts: Layouts, taps: Sequence[str], group: int
    ) -> None:
        sizes = {n: int(ARENA * x.nbytes) // group for n, x in layouts.items()}
        self.bytes_of = {n: sizes[n] for n in taps}
        self.tapped = sum(self.bytes_of.values())
        self.largest = max(self.bytes_of.values())
        self.live = tap.peak(tap.needed(proto.graph, taps), sizes, ())

    @property
    def least(self) -> int:
        """Bytes below which segments gain little."""
        return self.live + max(self.live, self.largest)


def parts(samples: int, batch: int) -> tuple[slice, ...]:
    """Equal parts in whole batches: one for every PART samples, but at most MOST_PARTS."""
    runs = -(-samples // batch)
    count = max(min(samples // PART, MOST_PARTS, runs), 1)
    edges = [runs * i // count * batch for i in range(count)] + [samples]
    return tuple(slice(a, b) for a, b in pairwise(edges))


def held_bytes(key: Key, layouts: Layouts, block: int | None = None) -> int:
    """Bytes of a statistic."""
    if key.what == "histogram":
        return 8 * BINS
    if key.what != "moments" or key.name not in layouts:
        return 0
    return moments.bytes_of(layouts[key.name].shape, *_cut(key), block)


def waiting_bytes(key: Key, layouts: Layouts) -> int:
    """Bytes of the rows of a layer that wait to be multiplied."""
    if key.what != "moments" or key.name not in layouts:
        return 0
    return moments.waiting(layouts[key.name].shape, *_cut(key))


def _cut(key: Key) -> tuple[int, Window]:
    return (1 if key.axis is None else key.axis), key.window or Window()


def blocks_within(keys: Iterable[Key], layouts: Layouts, room: int) -> dict[Key, int]:
    """Columns of the blocks of the layers whose moments are too wide to be kept whole."""
    sized = [key for key in keys if key.what == "moments" and key.name in layouts]
    columns = {key: length(layouts[key.name].shape, *_cut(key)) for key in sized}
    never_whole = [key for key in sized if is_wide(_cut(key)[1].groups, columns[key])]
    blocks = {key: BLOCK for key in never_whole if columns[key] > BLOCK}
    bytes_of = {key: held_bytes(key, layouts, blocks.get(key)) for key in sized}
    while sum(bytes_of.values()) > room:
        wide = [key for key in sized if blocks.get(key, columns[key]) > NARROWEST]
        if not wide:
            break
        widest = max(wide, key=lambda key: (bytes_of[key], key.name))
        blocks[widest] = -(-blocks.get(widest, columns[widest]) // 2)
        bytes_of[widest] = held_bytes(widest, layouts, blocks[widest])
    return blocks


def _split(bytes_of: Mapping[str, int], room: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive taps, as many to a segment as there is room for, but one at least."""
    segments: list[list[str]] = []
    used = 0
    for name, size in bytes_of.items():
        if not segments or used + size > room:
            segments.append([])
            used = 0
        segments[-1].append(name)
        used += size
    return tuple(tuple(segment) for segment in segments)


def _block_notes(blocks: Mapping[Key, int], layouts: Layouts) -> tuple[str, ...]:
    if not blocks:
        return ()
    key = max(blocks, key=lambda key: length(layouts[key.name].shape, *_cut(key)))
    d = length(layouts[key.name].shape, *_cut(key))
    return (
        f"moments of {len(blocks)} wide layer(s) are kept in blocks, for memory: {key.name!r} in "
        f"blocks of {blocks[key]} of its {d} columns",
    )


def _notes(estimate: int, max_memory: int | None, segments: int) -> tuple[str, ...]:
    if max_memory is not None and estimate > max_memory:
        need, asked = -(-estimate // MIB), max_memory // MIB
        return (
            f"calibration needs about {need} MiB, more than the {asked} MiB that were asked for",
        )
    if segments > 1:
        return (f"calibration read the data {segments} times, to stay within the memory asked for",)
    return ()
