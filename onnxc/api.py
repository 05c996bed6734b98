"""The functions behind the command line and the façade `import onnxc`.

Each one checks its inputs and its output path before the long work starts, and returns a report.
Memory is in bytes, time in seconds, latency in milliseconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib import merge
from calib.collect import collect
from calib.data import Dataset, InputSpec, Preprocess, open_data, synthesize
from onnxc.bench import speedup, time_interleaved
from onnxc.check import compare, coverage
from onnxc.core import Key
from onnxc.cost import FLOATS, external_files, file_bytes, inspect, type_name
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, load, save, to_bytes
from onnxc.pipeline import Calibration
from onnxc import recipe as recipes
from onnxc.quantization import THREADS, QuantizeSettings, check_input, quantize_model, split
from onnxc.recipe import Calibration as RecipeCalibration
from onnxc.recipe import Recipe
from onnxc.report import Benchmark, Calibrated, Measure, Report, Validation
from onnxc.runtime import Runtime, dtype_of, run, session
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import choose as choose_target

__all__ = ["benchmark", "calibrate", "inspect", "load", "quantize", "save", "validate"]

ModelPath = str | Path
Progress = Callable[[str], None]

NO_DATA = "made without data: ranges come from synthesized input and fit no real one; give --data"
DEFAULT_MEMORY = 400_000_000  # bytes of the process during calibration

VECTORS = 10  # test_data_set folders written by save_vectors
FEEDS = 8  # samples that a benchmark takes in turn


def quantize(
    model: ModelPath,
    *,
    data: Any = None,
    val: Any = None,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    output: str | Path | None = None,
    target: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    settings: QuantizeSettings = QuantizeSettings(),
    recipe: Recipe | None = None,
    runtime: Runtime = Runtime(),
    max_memory: int | None = None,
    max_drop: float | None = None,
    seed: int = 0,
    dry_run: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make a model smaller and faster in few-bit integers, and prove it.

    data: what `calib.data.open_data` takes; without it the input is synthesized and the headline
    says so. val: samples that the result is judged by; by default a part of `data` that calibration
    never sees. output: the file to write, by default MODEL with the suffix .int8.onnx. recipe: passes
    and settings that take the place of `settings`, `target` and `data`. max_drop: points of top-1
    (without labels: of disagreement) that may be lost; with `strict` a result that loses more is not
    written. dry_run: do all but write.

    Raises ModelError, DataError or OptionError; nothing is written then.
    """
    start, path = time.perf_counter(), _existing(model)
    say = progress or (lambda text: None)
    place = check_output(output or default_output(path), path)
    given = recipe or Recipe(seed=seed, target=target, only=Selector.parse(include, exclude))
    source = data if data is not None else given.calibration.data
    preprocess = preprocess or given.calibration.preprocess
    samples = samples if samples is not None else given.calibration.samples
    row = choose_target(given.target)
    say("loading")
    opened = load(path)
    check_input(opened, str(path))
    only = given.only.resolve(opened.graph)
    dataset = _dataset(path, source, preprocess, samples, given.seed)
    kept, held = split(dataset)
    judge = held if val is None else open_data(val, input_specs(path), preprocess, None, given.seed)
    bound = max_memory if max_memory is not None else given.calibration.max_memory
    calibration = Calibration(kept, bound or DEFAULT_MEMORY, threads=THREADS)
    found = quantize_model(
        opened, calibration, judge, row, settings, only, given.passes, runtime, given.seed, say
    )
    missed = missed_bounds(found.comparison, max_drop)
    is_written = not dry_run and not (strict and missed)
    if is_written:
        say("writing")
        save(found.model, place)
    size = file_bytes(place) if is_written else len(to_bytes(found.model))
    replay = replace(
        given, passes=found.passes, calibration=RecipeCalibration(_text(source), samples, bound, preprocess)
    )
    return Report(
        model=str(path),
        output=str(place) if is_written else None,
        before=Measure(file_bytes(path), found.before),
        after=Measure(size, found.after),
        target=row.name,
        headline="" if source is not None else NO_DATA,
        speedup=found.ratio,
        comparison=found.comparison,
        coverage=found.coverage,
        changes=found.changes,
        skips=found.skips,
        missed=missed,
        notes=(*opened.notes, *dataset.notes, _judged(val, kept, judge), *found.notes),
        recipe=recipes.dump(replay),
        memory_peak=peak_memory(),
        seconds=time.perf_counter() - start,
    )


def _judged(val: Any, kept: Dataset, judge: Dataset) -> str:
    where = "validation samples" if val is not None else "samples held out of the calibration data"
    return f"calibrated on {len(kept)} samples, judged on {len(judge)} {where}"


def _text(source: Any) -> str | None:
    return str(source) if isinstance(source, str | Path) else None


def validate(
    reference: ModelPath,
    candidate: ModelPath,
    *,
    data: Any = None,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    max_drop: float | None = None,
    save_vectors: str | Path | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Compare a candidate with its reference over data: accuracy, agreement, SQNR, kernels.

    data: what `calib.data.open_data` takes; without it the input is synthesized, and a note says
    so. max_drop: points of top-1 (or, without labels, of disagreement) that may be lost.
    save_vectors: folder for ONNX test_data_set_* with the reference's outputs, beside the candidate
    as model.onnx.

    Raises ModelError, DataError or OptionError; nothing is written then.
    """
    say = progress or (lambda text: None)
    first, second = _existing(reference), _existing(candidate)
    if save_vectors is not None:
        _check_folder(Path(save_vectors))
    dataset = _dataset(first, data, preprocess, samples, seed)
    say("comparing")
    comparison = compare(first, second, dataset, runtime)
    say("timing")
    feeds = list(islice(dataset.batches(1), FEEDS))
    times = time_interleaved({"before": first, "after": second}, feeds, runtime)
    if save_vectors is not None:
        say("writing vectors")
        write_vectors(first, second, dataset, Path(save_vectors), runtime)
    return Validation(
        reference=str(reference),
        candidate=str(candidate),
        before=Measure(file_bytes(first), times["before"]),
        after=Measure(file_bytes(second), times["after"]),
        speedup=speedup(times["before"], times["after"]),
        comparison=comparison,
        coverage=coverage(second, runtime),
        missed=missed_bounds(comparison, max_drop),
        notes=dataset.notes,
    )


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
    paths = [_existing(model) for model in models]
    if not paths:
        raise OptionError("there is no model to time")
    for path in paths[1:]:
        _check_same_inputs(paths[0], path)
    dataset = _dataset(paths[0], data, preprocess, FEEDS * batch if data else FEEDS, seed)
    if progress is not None:
        progress("timing")
    named = dict(zip(_labels(paths), paths, strict=True))
    feeds = list(dataset.batches(batch))
    times = time_interleaved(named, feeds, runtime, repeats, min_time)
    base, *others = times
    ratios = {name: speedup(times[base], times[name]) for name in others}
    return Benchmark(runtime, times, ratios, dataset.notes)


def calibrate(
    model: ModelPath,
    *,
    data: Any,
    output: str | Path,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Gather histograms of all float activations of a model and write them, to merge or reuse.

    Raises ModelError, DataError or OptionError; nothing is written then.
    """
    start, path = time.perf_counter(), _existing(model)
    target = check_output(output, path)
    dataset = open_data(data, input_specs(path), preprocess, samples, seed)
    opened = load(path)
    digest = merge.digest(opened)
    infer(opened, next(iter(dataset.batches(1))))
    keys = [Key(name, "histogram") for name in _float_tensors(opened)]
    count = (lambda done, total: progress(f"calibrating {done}/{total}")) if progress else None
    found = collect(opened, keys, dataset, max_memory=max_memory, progress=count)
    seen = (dataset.fingerprint(),)
    merge.save(merge.Statistics(found.stats, digest, seen, found.batch), target)
    return Calibrated(
        model=str(path),
        output=str(target),
        samples=found.samples,
        tensors=len(found.stats),
        memory_peak=found.peak_rss,
        seconds=time.perf_counter() - start,
        notes=(*dataset.notes, *found.notes),
    )


def _float_tensors(model: Model) -> list[str]:
    """Float inputs and activations of the main graph, in order."""
    produced = (t for node in model.graph.nodes for t in node.outputs if t.name)
    tensors = (t for t in (*model.graph.inputs, *produced))
    return [t.name for t in tensors if type_name(t.dtype) in FLOATS]


def default_output(model: Path) -> Path:
    """MODEL with the suffix .int8.onnx, beside it."""
    return model.with_name(f"{model.stem}.int8.onnx")


def check_output(output: str | Path, *inputs: ModelPath) -> Path:
    """The output path, if a file can be written there. Raises OptionError before any long work."""
    path = Path(output)
    if path.is_dir():
        raise OptionError(f"output {path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise OptionError(f"output {path}: there is no folder {path.parent}; create it first")
    for source in map(Path, inputs):
        if path.exists() and source.exists() and path.samefile(source):
            raise OptionError(f"output {path} is the input itself; give another name")
    is_open = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not is_open:
        raise OptionError(f"output {path} is not writable; give another place")
    return path


def input_specs(model: Path) -> list[InputSpec]:
    """What a model takes. Raises ModelError, naming the file, when that is not only tensors."""
    try:
        ports = session(model, Runtime(level="none")).get_inputs()
    except ModelError as error:
        raise ModelError(f"{model}: {error}") from error
    specs = []
    for port in ports:
        dtype = dtype_of(port.type)
        if dtype is None:
            raise ModelError(f"{model}: input {port.name!r} is {port.type}, which cannot be fed")
        specs.append(InputSpec(port.name, dtype, tuple(port.shape)))
    return specs


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


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def write_vectors(
    reference: Path, candidate: Path, dataset: Dataset, folder: Path, runtime: Runtime = Runtime()
) -> None:
    """Write folder/model.onnx (the candidate) and folder/test_data_set_k/{input,output}_i.pb.

    The outputs are the reference's, so that a target's own runtime can be checked against them.
    The folder appears whole or not at all. Raises ModelError for an output that is not a tensor.
    """
    opened, specs = session(reference, runtime), input_specs(reference)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".onnxc-") as temporary:
        made = Path(temporary) / "vectors"
        _copy_model(candidate, made / "model.onnx")
        for number, feed in enumerate(islice(dataset.batches(1), VECTORS)):
            place = made / f"test_data_set_{number}"
            place.mkdir()
            _write_tensors(place, "input", {spec.name: feed[spec.name] for spec in specs})
            _write_tensors(place, "output", run(opened, feed))
        if folder.exists():
            folder.rmdir()  # empty, as checked
        made.rename(folder)


def _copy_model(model: Path, target: Path) -> None:
    """Copy a model with the files of its external data."""
    target.parent.mkdir()
    shutil.copyfile(model, target)
    for file in external_files(model):
        place = target.parent / file.relative_to(model.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _write_tensors(folder: Path, side: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    for number, (name, array) in enumerate(arrays.items()):
        if not isinstance(array, np.ndarray):
            raise ModelError(f"{side} {name!r} is not a tensor, so no vectors can be saved")
        tensor = onnx.numpy_helper.from_array(array, name)
        (folder / f"{side}_{number}.pb").write_bytes(tensor.SerializeToString())


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; give a folder for the vectors")
    if not folder.parent.is_dir():
        raise OptionError(f"{folder}: there is no folder {folder.parent}; create it first")
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty; give a new folder for the vectors")
    if not os.access(folder.parent, os.W_OK):
        raise OptionError(f"{folder} is not writable; give another place")


def _existing(model: ModelPath) -> Path:
    path = Path(model)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a model file")
    if not path.is_file():
        raise ModelError(f"{path} does not exist; give a model file")
    return path


def _dataset(
    model: Path, data: Any, preprocess: Preprocess | None, samples: int | None, seed: int
) -> Dataset:
    specs = input_specs(model)
    if data is None:
        return synthesize(specs, samples or FEEDS, seed)
    return open_data(data, specs, preprocess, samples, seed)


def _check_same_inputs(first: Path, other: Path) -> None:
    mine, theirs = ({s.name: s.expects for s in input_specs(path)} for path in (first, other))
    if mine != theirs:
        odd = min(set(mine.items()) ^ set(theirs.items()))[1]
        raise DataError(f"{first} and {other} do not take the same inputs: only one says: {odd}")


def _labels(paths: Sequence[Path]) -> Iterator[str]:
    """The shortest names that tell the files apart."""
    names = [path.name for path in paths]
    is_clear = len(set(names)) == len(names)
    for number, path in enumerate(paths):
        twin = not is_clear and paths.index(path) != number
        yield path.name if is_clear else f"{path} ({number + 1})" if twin else str(path)
