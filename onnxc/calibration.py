"""Statistics alone, in a file: gathered from data, or merged from files of parts of it.

The model is prepared first, as `quantize` does it, so that the tensors are those that passes see.
Then what passes may want of it is gathered in one run over the data:

    histogram   float tensors, but for those between a layer and the activation that its kernel
                takes in, which no range is ever chosen for; and differences before a clamped sum
    range       minimum and maximum of the same tensors
    mean        mean of each channel of the same tensors
    peak        of the channels that `Equalize` may scale
    moments     of the inputs of all heavy layers

Samples run one by one: kernels round differently for other batches, and parts of the data would not
merge to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from calib import merge, statistics
from calib.collect import collect
from calib.data import Preprocess, open_data
from calib.moments import MomentsObserver
from calib.observers import HistogramObserver
from calib.statistics import Made, Statistics
from onnxc.core import Context, Key, Skip
from onnxc.cost import FLOATS, external_files, type_name
from onnxc.errors import OptionError
from onnxc.graph import bound, captured, load, opset, walk
from onnxc.moments import moments_keys, why_no_moments
from onnxc.ops import knowledge
from onnxc.paths import check_output, check_unchanged, existing, stamps
from onnxc.pipeline import prepare
from onnxc.placement import behind_activation, differences
from onnxc.report import Calibrated
from onnxc.request import (
    THREADS,
    ModelPath,
    Progress,
    counting,
    enough_memory,
    input_specs,
    naming,
    peak_memory,
    try_out,
)
from onnxc.runtime import Runtime
from onnxc.shapes import infer
from onnxc.targets import Target
from onnxc.workpiece import silent
from passes.equalize import Equalize

if TYPE_CHECKING:
    from distributed import Client

KINDS = ("range", "histogram", "mean", "peak", "moments")
WHAT = ("histogram", "peak", "moments")


def calibrate(
    model: ModelPath,
    *,
    data: Any,
    output: ModelPath,
    what: Sequence[str] = WHAT,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    progress: Progress | None = None,
    client: Client | None = None,
) -> Calibrated:
    """Gather what passes may want of a model, and write it to a file, to merge or reuse.

    what: of KINDS. client: of a Dask cluster, whose workers then run the model. Raises ModelError,
    DataError, OptionError or ClusterError; nothing is written then.
    """
    start, path, say = time.perf_counter(), existing(model), progress or silent
    _check_what(what)
    place = check_output(output, path, data)
    say("loading")
    files = stamps(path, data)
    opened = load(path)
    memory = max_memory or enough_memory(path)
    opened = bound(opened, memory)
    beside = external_files(path)
    check_output(place, *beside)
    files |= stamps(*beside)
    dataset = open_data(data, input_specs(path), preprocess, samples, seed)
    try_out(path, dataset, Runtime(), memory)
    digest, feed = merge.digest(opened), next(iter(dataset.batches(1)))
    with naming(path):
        prepare(opened, feed, progress=say)
        graph = statistics.structure(opened.graph)
        infer(opened, feed)
        keys = wanted_keys(opened.graph, what)
        found = collect(
            *(opened, keys, dataset),
            max_memory=memory,
            threads=THREADS,
            batch=1,
            progress=counting(say, "calibrating"),
            client=client,
        )
    made = (Made.here(found.batch),)
    digests = tuple(sorted(dataset.digests()))
    lost = frozenset(keys) - found.stats.keys()
    gathered = Statistics(found.stats, digest, graph, digests, made, dataset.preparation, lost)
    say("writing")
    check_unchanged(files)
    statistics.save(gathered, place)
    skips = tuple(_without_moments(opened.graph)) if "moments" in what else ()
    notes = (*opened.notes, *dataset.notes, *found.notes)
    return _report(gathered, place, (str(path),), start, notes, skips)


def merge_statistics(files: Iterable[ModelPath], *, output: ModelPath) -> Calibrated:
    """Make one statistics file of several that saw different parts of the data.

    Raises DataError or OptionError naming the files that do not go together; nothing is written
    then.
    """
    start, paths = time.perf_counter(), [Path(file) for file in files]
    if len(paths) < 2:
        raise OptionError("there is nothing to merge: give two statistics files or more")
    place = check_output(output)  # which may be one of them: they are read first
    merged = merge.merge(paths)
    statistics.save(merged, place)
    return _report(merged, place, tuple(map(str, paths)), start, tuple(_differences(merged)))


def wanted_keys(graph: gs.Graph, what: Iterable[str]) -> list[Key]:
    """What passes may want of a prepared graph with shapes, of these kinds."""
    context = Context(opset(graph), Target("any"))
    tensors = list(_tensors(graph))
    ranks = {t.name: None if t.shape is None else len(t.shape) for t in tensors}
    kinds: dict[str, Iterable[Key]] = {
        "range": (Key(name, "range") for name in ranks),
        "histogram": (*(Key(name, "histogram") for name in ranks), *differences(graph)),
        "mean": (Key(n, "mean", 1 if (rank or 0) > 1 else None) for n, rank in ranks.items()),
        "peak": Equalize().wants(graph, context),
        "moments": moments_keys(graph).values(),
    }
    return list(dict.fromkeys(key for kind in what for key in kinds[kind]))


def _check_what(what: Sequence[str]) -> None:
    odd = next((kind for kind in what if kind not in KINDS), None)
    if odd is not None or not what:
        raise OptionError(f"--what {odd or 'nothing'} is unknown: choose from {', '.join(KINDS)}")


def _tensors(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """Float inputs and activations of the main graph that a range may be chosen for, in order."""
    pinned = {t.name for t in graph.outputs} | captured(graph)
    produced = (t for node in graph.nodes for t in node.outputs if t.name)
    for tensor in (*graph.inputs, *produced):
        is_float = type_name(tensor.dtype) in FLOATS
        if is_float and behind_activation(tensor, pinned) is tensor:
            yield tensor


def _without_moments(graph: gs.Graph) -> Iterator[Skip]:
    """Layers whose input has no moments, with the reason."""
    for body in walk(graph):
        for node in (n for n in body.nodes if knowledge(n).window is not None):
            reason = why_no_moments(node) if body is graph else "it is inside a nested body"
            if reason:
                yield Skip(node.name, reason)


def _differences(merged: Statistics) -> Iterator[str]:
    """What was not the same on all machines, and may show in the last digits."""
    names = {"runtime": "versions of ONNX Runtime", "onnxc": "versions of onnxc"}
    for field, name in {**names, "provider": "providers"}.items():
        values = sorted({getattr(made, field) for made in merged.made})
        if len(values) > 1:
            yield f"the parts were made with different {name}: {', '.join(values)}"


def _report(
    found: Statistics,
    place: Path,
    sources: tuple[str, ...],
    start: float,
    notes: tuple[str, ...],
    skips: tuple[Skip, ...] = (),
) -> Calibrated:
    histograms = [o for o in found.stats.values() if isinstance(o, HistogramObserver)]
    moments = [o for o in found.stats.values() if isinstance(o, MomentsObserver)]
    blocks = sum(o.block is not None for o in moments)
    note = f"of {blocks} wide layer inputs only blocks of the moments were kept"
    return Calibrated(
        sources=sources,
        output=str(place),
        samples=len(found.samples),
        tensors=len({key.tensor for key in found.stats}),
        statistics={kind: n for kind in KINDS if (n := _count(found, kind))},
        binned=_share(sum(o.binned for o in histograms), sum(o.count for o in histograms)),
        rows=_share(sum(o.count for o in moments), sum(o.available for o in moments)),
        bytes=place.stat().st_size,
        memory_peak=peak_memory(),
        seconds=time.perf_counter() - start,
        skips=skips,
        notes=(*notes, *([note] if blocks else [])),
    )


def _count(found: Statistics, kind: str) -> int:
    return sum(key.what == kind for key in found.stats)


def _share(part: int, whole: int) -> float:
    return float(np.divide(part, whole)) if whole else 1.0
