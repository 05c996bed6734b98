"""The functions behind the command line and the façade `import onnxc`.

Each one checks its inputs and its output path before the long work starts, and returns a report.
Memory is in bytes, time in seconds, latency in milliseconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from calib.data import Dataset, Preprocess
from onnxc import recipe as recipes
from onnxc.analysis import analyze
from onnxc.anatomy import Anatomy, anatomy
from onnxc.anytime import journal
from onnxc.anytime.searched import searched
from onnxc.anytime.settings import CompressSettings
from onnxc.bench import Latency, speedup, time_interleaved
from onnxc.blame import examine, examine_files
from onnxc.calibration import calibrate, merge_statistics
from onnxc.check import compare, coverage
from onnxc.compression import Attempt, Compressed, attempt, compress_model
from onnxc.cost import file_bytes, inspect, quantized_as
from onnxc.errors import ModelError, OptionError
from onnxc.execution import Execution, execution
from onnxc.files import alone
from onnxc.fixed_graph import run_in_integers
from onnxc.graph import Model, load, save
from onnxc.graph import size as model_size
from onnxc.html.page import write_html
from onnxc.opening import openings
from onnxc.pairs import Subject, excess
from onnxc.paths import check_folder, check_unchanged, existing
from onnxc.quantization import QuantizeSettings
from onnxc.report import Benchmark, Effect, Measure, Preview, Report, Validation
from onnxc.request import (
    FEEDS,
    Job,
    ModelPath,
    Progress,
    Request,
    asked,
    check_runtime,
    check_same_inputs,
    checked,
    counting,
    enough_memory,
    naming,
    open_feeds,
    peak_memory,
    subject,
    try_out,
)
from onnxc.runtime import Runtime
from onnxc.search import untimed
from onnxc.spans import histograms, spans
from onnxc.storage.package import is_package
from onnxc.storage.packing import check_packing, pack, store, unpack
from onnxc.surroundings import surroundings
from onnxc.tasks import CLUSTER, COMPRESS, FACTORIZE, PRUNE, QUANTIZE, SPARSIFY, Task
from onnxc.vectors import write_vectors
from onnxc.workpiece import silent

__all__ = [
    "QuantizeSettings",
    "analyze",
    "benchmark",
    "calibrate",
    "cluster",
    "compress",
    "factorize",
    "inspect",
    "load",
    "merge_statistics",
    "pack",
    "preview",
    "prune",
    "quantize",
    "run_in_integers",
    "save",
    "sparsify",
    "unpack",
    "validate",
    "write_html",
]

SIDES = ("before", "after")
BOUND, SEARCH = 0.5, 600.0  # points that a search may lose, and seconds that it may take
PREVIEWED = 4  # samples that a preview calibrates on: the effect on nodes needs no good ranges


def quantize(model: ModelPath, **request: Any) -> Report:
    """Make a model smaller and faster in few-bit integers, and prove it.

    request: fields of `onnxc.request.Request`: data, val, stats, output, recipe, max_drop, … ; of
    `QuantizeSettings`; and target, seed, include, exclude, samples, max_memory, preprocess.

    Raises ModelError, DataError, OptionError or ClusterError; nothing is written then.
    """
    return write(QUANTIZE, asked(QUANTIZE, model, request))


def sparsify(model: ModelPath, **request: Any) -> Report:
    """Make weights of a model zero where its outputs feel it least, and prove it.

    Takes and raises what `quantize` does, with the fields of the pass `Sparsify` as settings.
    """
    return write(SPARSIFY, asked(SPARSIFY, model, request))


def prune(model: ModelPath, **request: Any) -> Report:
    """Take out the channels of a model that its outputs miss least, and prove it.

    Takes and raises what `quantize` does, with the fields of `PruneSettings` as settings.
    """
    return write(PRUNE, asked(PRUNE, model, request))


def factorize(model: ModelPath, **request: Any) -> Report:
    """Replace layers of a model by thinner ones of low rank, and prove it.

    Takes and raises what `quantize` does, with the fields of `FactorizeSettings` as settings.
    """
    return write(FACTORIZE, asked(FACTORIZE, model, request))


def cluster(model: ModelPath, **request: Any) -> Report:
    """Let the weights of each layer of a model share few values, and prove it.

    Takes and raises what `quantize` does, with the fields of `ClusterSettings` as settings.
    """
    return write(CLUSTER, asked(CLUSTER, model, request))


def compress(
    model: ModelPath,
    *,
    max_drop: float | None = None,
    max_time: float = SEARCH,
    resume: bool = False,
    **request: Any,
) -> Report:
    """Search for the smallest or fastest model that keeps a bound on accuracy, and prove it.

    Takes and raises what `quantize` does, with the fields of `CompressSettings` as settings. The
    output holds the best model so far at any time; FILE.search beside it is what was found.
    max_drop: points of the metric that may be lost, 0.5 by default. max_time: seconds after which
    no plan is begun. resume: go on with what a search of the same has left. With a recipe that
    names passes nothing is searched: they are carried out.
    """
    wanted = asked(COMPRESS, model, request)
    if wanted.recipe is not None and wanted.recipe.passes:
        return write(replace(COMPRESS, parts=("",)), replace(wanted, max_drop=max_drop))
    start, settings = time.perf_counter(), wanted.settings or CompressSettings()
    assert isinstance(settings, CompressSettings)
    seeks: Literal["size", "speed"] = "size" if settings.minimize == "size" else "speed"
    task = replace(COMPRESS, aim=replace(COMPRESS.aim, seeks=seeks))
    job, bound = checked(task, wanted), BOUND if max_drop is None else max_drop
    check_packing(job.output)
    with naming(job.path), alone(journal.place(job.output), wait=False):
        found = searched(job, settings, bound, max_time, resume)
    report = _report(job, found.result, found.missed, True)
    report = _blamed(report, job, found.result, wanted)
    notes = (*found.notes, *report.notes)
    report = replace(report, points=found.points, notes=notes)
    return replace(report, memory_peak=peak_memory(), seconds=time.perf_counter() - start)


def write(task: Task, request: Request) -> Report:
    """Carry out a task on a file, write the result, and prove it.

    Raises ModelError, DataError, OptionError or ClusterError; nothing is written then.
    """
    start = time.perf_counter()
    say, runtime, max_drop = request.say, request.runtime, request.max_drop
    job = checked(task, request)
    check_packing(job.output)
    if max_drop is not None:  # told now where there are no classes
        same = subject(job.path, job.calibration.max_memory)
        missed_bounds(compare(same, same, job.samples.judge.subset([0]), runtime), max_drop)
    judge, validation = job.samples.judge, job.samples.validation
    with naming(job.path):
        found = compress_model(
            job.plan, job.model, job.calibration, judge, runtime, say, validation
        )
    missed = (*missed_bounds(found.comparison, max_drop), *task.missed(job.plan.settings, found))
    is_written = not (request.strict and missed)
    if is_written:
        say("writing")
        check_unchanged(job.files)
        store(found.model, job.output)
    report = _blamed(_report(job, found, missed, is_written), job, found, request)
    return replace(report, memory_peak=peak_memory(), seconds=time.perf_counter() - start)


def _blamed(report: Report, job: Job, found: Compressed, request: Request) -> Report:
    """With the error of each layer of a quantized result, where that is asked for."""
    if not request.blame or quantized_as(found.model.graph) is None:
        return report
    seen = examine(load(job.path), found.model, job.samples.judge, job.runtime, progress=job.say)
    return replace(report, blame=seen.blames, notes=(*report.notes, *seen.notes))


def preview(model: ModelPath, task: Task = QUANTIZE, **request: Any) -> Preview:
    """What a task would do to which nodes, on each way that it would try; nothing is written.

    Takes and raises what `quantize` does. Nothing is measured, and few samples are read.
    """
    wanted = asked(task, model, request)
    job = checked(task, wanted)
    kept = job.samples.kept
    few = None if kept is None else _few(kept)
    calibration = replace(job.calibration, dataset=few)
    judge = few or job.samples.judge
    with naming(job.path):
        tried = attempt(job.plan, job.model, calibration, judge, wanted.runtime, wanted.say)
    prepared = tuple(change for step in tried.prepared for change in step.changes)
    return Preview(
        model=str(job.path),
        output=str(job.output),
        target=job.plan.target.name,
        prepared=prepared,
        ways={name: _effect(tried, name) for name in tried.ways},
        aim=task.aim,
        notes=(*job.model.notes, *(() if kept is None else kept.notes)),
    )


def _few(dataset: Dataset) -> Dataset:
    count = min(PREVIEWED, len(dataset))
    return dataset.subset([i * len(dataset) // PREVIEWED for i in range(count)])


def _effect(tried: Attempt, name: str) -> Effect:
    meant = tried.meant(name)
    steps, done = tried.built[name][1], {change.node for change in meant}
    helping = tuple(c for step in steps for c in step.changes if c not in meant)
    skips = (skip for skip in tried.skips(name, steps) if skip.node not in done)
    return Effect(meant, helping, tuple(skips))


def _report(job: Job, found: Compressed, missed: tuple[str, ...], is_written: bool) -> Report:
    size = file_bytes(job.output) if is_written else model_size(found.model)
    packed = (is_package(job.path), is_written and is_package(job.output))
    is_opened = is_written and job.plan.task.aim.seeks == "size"
    first, last = openings((job.path, job.output), job.runtime) if is_opened else (None, None)
    return Report(
        model=str(job.path),
        output=str(job.output) if is_written else None,
        before=Measure(file_bytes(job.path), found.before, found.macs[0], first),
        after=Measure(size, found.after, found.macs[1], last),
        target=job.plan.target.name,
        way=found.way,
        aim=job.plan.task.aim,
        count=len({change.node for change in found.done}),
        headline=job.headline,
        speedup=found.ratio,
        comparison=found.comparison,
        execution=_execution(job, found.model, is_written),
        coverage=found.coverage,
        anatomy=anatomy((load(job.path), found.model), (file_bytes(job.path), size), packed),
        spans=spans(found.model, histograms(job.calibration.memo, found.passes)),
        surroundings=surroundings(),
        zeros=found.zeros,
        done=found.done if job.plan.task.aim.seeks != "integers" else (),
        changes=found.changes,
        skips=found.skips,
        missed=missed,
        notes=(*found.notes, *job.notes),
        recipe=recipes.dump(replace(job.recipe, passes=found.passes)),
    )


def _execution(job: Job, result: Model, is_written: bool) -> Execution:
    """Of the file that was written, or of the model where none was."""
    memory, samples = job.calibration.max_memory, job.samples
    judge = samples.judge if samples.validation is None else samples.validation
    made: Subject = subject(job.output, memory) if is_written else result
    return execution(subject(job.path, memory), made, judge, job.runtime)


def _anatomy(first: Path, second: Path) -> Anatomy | None:
    """Of two files; None where one of them can be run, but not rewritten."""
    try:
        models = (load(first), load(second))
    except ModelError:
        return None
    sizes = (file_bytes(first), file_bytes(second))
    return anatomy(models, sizes, (is_package(first), is_package(second)))


def validate(
    reference: ModelPath,
    candidate: ModelPath,
    *,
    data: Any = None,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    runtime: Runtime = Runtime(),
    max_drop: float | None = None,
    save_vectors: ModelPath | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Compare a candidate with its reference over data: accuracy, agreement, SQNR, kernels.

    data: what `calib.data.open_data` takes; without it the input is synthesized, and the headline
    says so. max_memory: bytes that the process may take; models that need more run in stages, and
    are not timed. max_drop: points of top-1 (or, without labels, of disagreement) that may be lost.
    save_vectors: folder for ONNX test_data_set_* with the reference's outputs, beside the candidate
    as model.onnx.

    Raises ModelError, DataError or OptionError; nothing is written then.
    """
    say = progress or silent
    first, second = existing(reference), existing(candidate)
    check_runtime(runtime)
    folder = None if save_vectors is None else check_folder(Path(save_vectors))
    check_same_inputs(first, second)
    dataset = open_feeds(first, data, preprocess, samples, seed)
    memory = max_memory or enough_memory(max(first, second, key=file_bytes))
    for path in (first, second):
        try_out(path, dataset, runtime, memory)
    pair = [subject(path, memory) for path in (first, second)]
    say("comparing")
    with naming(second):
        told = counting(say, "comparing")
        comparison = compare(pair[0], pair[1], dataset, runtime, progress=told)
        seen = examine_files(pair[0], pair[1], dataset, runtime, say)
    say("timing")
    feeds = list(islice(dataset.batches(1), FEEDS))
    needed, times = excess(pair, feeds[0]), dict[str, Latency]()
    if not needed:
        times = time_interleaved(dict(zip(SIDES, pair, strict=True)), feeds, runtime)
    found = Validation(
        reference=str(reference),
        candidate=str(candidate),
        before=Measure(file_bytes(first), times.get(SIDES[0])),
        after=Measure(file_bytes(second), times.get(SIDES[1])),
        headline="" if data is not None else "compared without data, on synthesized input",
        speedup=speedup(*times.values()) if times else None,
        comparison=comparison,
        execution=execution(pair[0], pair[1], dataset, runtime),
        coverage=coverage(pair[1], runtime),
        anatomy=_anatomy(first, second),
        surroundings=surroundings(),
        missed=missed_bounds(comparison, max_drop),
        notes=(*dataset.notes, *([untimed(needed, memory)] if needed else ()), *seen.notes),
        vectors=None if folder is None else str(folder),
        blame=seen.blames,
        unmatched=seen.unmatched,
    )
    if folder is not None:
        say("writing vectors")
        write_vectors(pair[0], second, dataset, folder, runtime)
    return found


def benchmark(
    models: Sequence[ModelPath],
    *,
    data: Any = None,
    preprocess: Preprocess | None = None,
    batch: int = 1,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    repeats: int = 40,
    min_time: float = 1.0,
    progress: Progress | None = None,
) -> Benchmark:
    """Time models in turn on the same inputs; ratios are against the first one.

    Raises OptionError when the models do not take the same inputs, ModelError, DataError.
    """
    paths = [existing(model) for model in models]
    if not paths:
        raise OptionError("there is no model to time")
    check_runtime(runtime)
    for path in paths[1:]:
        check_same_inputs(paths[0], path)
    dataset = open_feeds(paths[0], data, preprocess, batch * max(1, FEEDS // batch), seed)
    for path in paths:
        try_out(path, dataset, runtime)
    (progress or silent)("timing")
    named = dict(zip(_labels(paths), paths, strict=True))
    feeds = list(dataset.batches(batch))
    times = time_interleaved(named, feeds, runtime, repeats, min_time, math.inf)
    base, *others = times
    ratios = {name: speedup(times[base], times[name]) for name in others}
    count = min(batch, len(dataset))
    return Benchmark(runtime, times, ratios, count, dataset.notes, surroundings())


def missed_bounds(comparison: Any, max_drop: float | None) -> tuple[str, ...]:
    """Sentences for the bound, in points, that a comparison does not meet."""
    if max_drop is None:
        return ()
    if comparison.top1 is not None:
        lost, what = comparison.top1[0] - comparison.top1[1], "top-1 drops by"
    elif comparison.agreement is not None:
        lost, what = 1 - comparison.agreement, "disagreement is"
    else:
        raise OptionError("--max-drop needs a model with classes; this one has none")
    is_met = 100 * lost <= max_drop + 1e-9
    return () if is_met else (f"{what} {100 * lost:.2f} points, more than {max_drop:g}",)


def _labels(paths: Sequence[Path]) -> Iterator[str]:
    """The shortest names that tell the files apart."""
    names = [path.name for path in paths]
    is_clear = len(set(names)) == len(names)
    for number, path in enumerate(paths):
        twin = not is_clear and paths.index(path) != number
        yield path.name if is_clear else f"{path} ({number + 1})" if twin else str(path)
