"""A checked request: everything that can be told at once is told before the long work starts.

The cheapest checks come first: names, paths, the model, the nodes, the data, one run on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import statistics
from calib.data import Dataset, InputSpec, Preprocess, open_data, synthesize
from calib.merge import digest
from calib.statistics import Statistics
from onnxc import graph, typed
from onnxc import recipe as recipes
from onnxc.compression import Plan, check_input
from onnxc.cost import external_files, file_bytes
from onnxc.cuts import BASE
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.fidelity import check_labels
from onnxc.graph import OUTLINED, Model, bound, load
from onnxc.paths import Stamp, check_output, default_output, existing, stamps
from onnxc.pipeline import Calibration
from onnxc.recipe import Recipe
from onnxc.runtime import LEVELS, Runtime, dtype_of, provider_name, run, session
from onnxc.samples import OF_VALIDATION, Samples, choose_samples
from onnxc.stages import open_stages
from onnxc.storage.package import plain
from onnxc.targets import choose as choose_target
from onnxc.targets import misjudged
from onnxc.tasks import Settings, Task
from onnxc.workpiece import silent

if TYPE_CHECKING:
    from distributed import Client

ModelPath = str | Path
Progress = Callable[[str], None]

LEAST_MEMORY = 400_000_000  # bytes of the process during calibration, where none are asked for
HELD_COPIES = 5  # of a file, at most, that one session takes: 8-bit weights become float
FILE_COPIES = 6  # or this many times the model, for large ones
FEEDS = 8  # made-up samples for a comparison or a benchmark
THREADS = 2  # of calibration
OVERRIDES = ("target", "seed", "include", "exclude", "samples", "max_memory", "preprocess")
NO_DATA = "made without data: {what} come from synthesized input and fit no real one; give --data"


@dataclass(frozen=True)
class Request:
    """What a writing command is asked for.

    model: the file. data: what `calib.data.open_data` takes; without it the input is synthesized
    and the headline of the report says so. val: samples that the result is judged by; by default a
    part of `data` that calibration never sees. stats: a file of `calibrate`, from which passes take
    what it holds of the prepared model; without `data` they get nothing else. Samples that it saw
    judge nothing. output: the file to write, by default MODEL with a suffix that names the task.
    recipe: what to do; where it names no passes, `settings` choose them; None: the defaults of the
    task. runtime: how models are run and timed.
    max_drop: points of top-1 (without labels: of disagreement) that may be lost; with `strict` a
    result that loses more is not written. blame: whether the report tells the error of each layer,
    which takes some seconds. progress: told what is being done. client: of a Dask
    cluster, whose workers then gather the statistics and compare the candidates; they are timed
    here. override: what goes before the keys of the recipe: target, seed, include, exclude,
    samples, max_memory, preprocess.
    """

    model: ModelPath
    data: Any = None
    val: Any = None
    stats: ModelPath | None = None
    output: ModelPath | None = None
    recipe: Recipe | None = None
    settings: Settings | None = None
    runtime: Runtime = Runtime()
    max_drop: float | None = None
    strict: bool = False
    blame: bool = False
    progress: Progress | None = None
    client: Client | None = None
    override: Mapping[str, Any] = field(default_factory=dict)

    @property
    def say(self) -> Progress:
        return self.progress or silent


def asked(task: Task, model: ModelPath, given: Mapping[str, Any]) -> Request:
    """A request from keyword arguments: fields of Request, of the task's settings, or overrides.

    Raises TypeError for any other name, OptionError for a setting of a wrong type. Single settings
    go before `settings`.
    """
    chosen = {key: given[key] for key in typed.keys(task.settings) if key in given}
    override = {key: given[key] for key in OVERRIDES if key in given}
    rest = {key: given[key] for key in given if key not in {**chosen, **override}}
    if chosen:
        rest["settings"] = typed.build(task.settings, chosen, f"the settings of {task.name}")
    return Request(model, **rest, override=override)


@dataclass(frozen=True)
class Job:
    """A checked request: nothing long has been done yet.

    source: the data, as given or as the recipe says. recipe: with the options in place. samples:
    what makes statistics, chooses and judges. files: that are read, as they were at the start.
    """

    path: Path
    output: Path
    model: Model
    plan: Plan
    recipe: Recipe
    source: Any
    calibration: Calibration
    samples: Samples
    runtime: Runtime = Runtime()
    say: Progress = silent
    files: Mapping[Path, Stamp] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """What is missing for a result to trust; empty if nothing is."""
        known, validation = self.calibration.known, self.samples.validation
        if self.source is not None or (known is not None and validation is not None):
            return ""
        what = "ranges" if self.plan.task.aim.seeks == "integers" else "statistics"
        if known is None:
            return NO_DATA.format(what=what)
        return (
            f"{what} come from statistics {known.path} ({len(known.samples)} samples), the verdict "
            "from synthesized input: give --val"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the model and the data; complete once all samples were read."""
        kept, validation = self.samples.kept, self.samples.validation
        told = () if kept is None else kept.notes
        if validation is not None:
            told += tuple(f"validation data: {note}" for note in validation.notes)
        if self.samples.left_out:
            told += (f"{self.samples.left_out} samples did not judge: the statistics saw them",)
        is_exact = self.runtime.level == "none" or self.plan.task.aim.seeks != "integers"
        doubt = "" if is_exact else misjudged(self.plan.target)
        told += (doubt,) if doubt else ()
        return (self._counts(), *self.model.notes, *told)

    def _counts(self) -> str:
        """How many samples made statistics, chose, and judged."""
        kept, judge, validation = self.samples.kept, self.samples.judge, self.samples.validation
        known = self.calibration.known
        made = (
            []
            if known is None
            else [f"the {len(known.samples)} samples of statistics {known.path}"]
        )
        made += [] if kept is None else [f"{len(kept)} samples"]
        task = "judged" if validation is None else "chosen"
        whose = self.samples.whose
        counts = f"calibrated on {' and '.join(made)}, {task} on {len(judge)} {whose}"
        if validation is None:
            return counts
        others = "others of it" if whose == OF_VALIDATION else self.samples.judges
        return f"{counts}, judged on {len(validation)} {others}"


def checked(task: Task, request: Request) -> Job:
    """Check everything that can be checked at once, the cheapest first."""
    path = existing(request.model)
    check_runtime(request.runtime)
    settings = request.settings or task.settings()
    given = recipes.override(
        request.recipe or Recipe(),
        data=_text(request.data),
        val=_text(request.val),
        stats=_text(request.stats),
        **request.override,
    )
    row, wanted = choose_target(given.target), given.calibration
    source = request.data if request.data is not None else wanted.data
    val = request.val if request.val is not None else wanted.val
    output = request.output or default_output(path, settings.suffix)
    place = check_output(output, path, source, val, wanted.stats)
    request.say("loading")
    files = stamps(path, source, val, wanted.stats)
    opened = load(path)
    beside = external_files(path)
    memory = wanted.max_memory or enough_memory(path)
    opened = bound(opened, memory)
    check_output(place, *beside)
    check_input(opened, str(path))
    only = given.only.resolve(opened.graph)
    known = None if wanted.stats is None else statistics.load(wanted.stats, digest(opened))
    samples = _samples(path, source, val, given, request.runtime, known, task.is_search)
    exact = replace(given, target=row.name, calibration=replace(wanted, max_memory=memory))
    plan = Plan(task, settings, row, only, given.passes, given.seed)
    calibration = Calibration(
        *(samples.kept, memory, THREADS),
        known=known,
        client=request.client,
        runtime=request.runtime,
    )
    files |= stamps(*beside)
    rest = (plan, exact, source, calibration, samples, request.runtime, request.say, files)
    return Job(path, place, opened, *rest)


def enough_memory(model: Path) -> int:
    """Bytes that the process may take, where none are asked for; never those of a big model."""
    size = file_bytes(plain(model))
    return graph.enough_memory(size) or max(LEAST_MEMORY, FILE_COPIES * size)


def subject(path: Path, memory: int | None = None) -> Path | Model:
    """What is run in so much memory: the file, or the model that is to be run in stages."""
    memory = memory or enough_memory(path)
    if BASE + HELD_COPIES * file_bytes(plain(path)) <= memory:
        return path
    return bound(load(path), memory)


def _samples(
    path: Path,
    source: Any,
    val: Any,
    recipe: Recipe,
    runtime: Runtime,
    known: Statistics | None,
    is_search: bool,
) -> Samples:
    """Samples to calibrate on, to choose by and to validate with; the model was run on some."""
    specs, wanted, seed = input_specs(path), recipe.calibration, recipe.seed
    memory = wanted.max_memory

    def opened(given: Any, count: int | None) -> Dataset:
        dataset = open_data(given, specs, wanted.preprocess, count, seed)
        try_out(path, dataset, runtime, memory)
        return dataset

    found = choose_samples(specs, source, val, known, opened, wanted.samples, seed, is_search)
    if source is None:
        try_out(path, found.judge, runtime, memory)
    return found


def try_out(path: Path, dataset: Dataset, runtime: Runtime, memory: int | None = None) -> None:
    """Run the model once, so that data which do not fit it are told before the long work."""
    feed = next(iter(dataset.batches(1)))
    with naming(path):
        model = subject(path, memory)
        try:
            outputs = _run_once(model, feed, runtime)
        except ModelError as error:
            expected = "; ".join(spec.expects for spec in dataset.inputs)
            raise DataError(f"{path} does not run on the data: {error} ({expected})") from error
    if dataset.labels is not None:
        check_labels(dataset.labels, outputs)


def _run_once(model: Path | Model, feed: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    if isinstance(model, Model):
        return open_stages(model, feed, replace(runtime, packs=False)).once(feed)
    return run(session(model, replace(runtime, lean=True)), feed)


def input_specs(model: Path) -> list[InputSpec]:
    """What a model takes. Raises ModelError, naming the file, when that is not only tensors."""
    with naming(model):
        ports = _mapped(model).get_inputs()
    specs = []
    for port in ports:
        dtype = dtype_of(port.type)
        if dtype is None:
            raise ModelError(f"{model}: input {port.name!r} is {port.type}, which cannot be fed")
        specs.append(InputSpec(port.name, dtype, tuple(port.shape)))
    return specs


def _mapped(model: Path) -> Any:
    """A session that reads no weights, if it can be."""
    runtime = Runtime(level="none", packs=False)
    if plain(model).stat().st_size < OUTLINED:
        return session(model, runtime)
    return open_stages(load(model), None, runtime).opened()


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def counting(say: Progress, task: str) -> Callable[[int, int], None]:
    """Progress of a task that counts samples."""
    return lambda done, total: say(f"{task} {done}/{total}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with a model."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def check_runtime(runtime: Runtime) -> None:
    """Raise OptionError for a provider or an optimization level that there is not."""
    provider_name(runtime.provider)
    if runtime.level not in LEVELS:
        raise OptionError(f"level {runtime.level!r} is unknown; choose {', '.join(LEVELS)}")


def _text(source: Any) -> str | None:
    return str(source) if isinstance(source, str | Path) else None


def open_feeds(
    model: Path, data: Any, preprocess: Preprocess | None, samples: int | None, seed: int
) -> Dataset:
    """The data for a model, or made-up ones where there are none."""
    specs = input_specs(model)
    if data is None:
        return synthesize(specs, samples or FEEDS, seed)
    return open_data(data, specs, preprocess, samples, seed)


def check_same_inputs(first: Path, other: Path) -> None:
    """Raise DataError, naming an input, where what fits one model does not fit the other."""
    mine, theirs = ({spec.name: spec for spec in input_specs(path)} for path in (first, other))
    names = dict.fromkeys((*mine, *theirs))
    odd = next((n for n in names if not _is_alike(mine.get(n), theirs.get(n))), None)
    if odd is not None:
        says = ", but ".join(_says(p, s.get(odd)) for p, s in ((first, mine), (other, theirs)))
        raise DataError(f"the models do not take the same inputs ({odd!r}): {says}")


def _is_alike(mine: InputSpec | None, theirs: InputSpec | None) -> bool:
    """Equal type and rank, and equal sizes where both are fixed."""
    if mine is None or theirs is None or mine.dtype != theirs.dtype:
        return False
    if mine.shape is None or theirs.shape is None or len(mine.shape) != len(theirs.shape):
        return mine.shape is None or theirs.shape is None
    pairs: Iterable[tuple[Any, Any]] = zip(mine.shape, theirs.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _says(path: Path, spec: InputSpec | None) -> str:
    return f"{path} has no such input" if spec is None else f"{path} says: {spec.expects}"
