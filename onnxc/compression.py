"""Carry out a task on one model: prepare, build what may do it, choose by measurement, prove.

    load -> prepare -> build candidates -> measure on held-out samples -> choose -> prove -> save

A part of the samples is held out: no statistic ever sees it, and candidates are chosen by it. The
figures of the report are measured on it too, or on validation data where the user gives some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from calib.data import Dataset
from calib.statistics import structure
from onnxc import search
from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage, compare, coverage
from onnxc.core import Change, Context, Pass, Skip
from onnxc.cost import inspect, quantized_as
from onnxc.errors import ModelError, OptionError
from onnxc.graph import Model, copy, opset, unfinite
from onnxc.pairs import excess
from onnxc.pipeline import Calibration, Progress, Step, prepare
from onnxc.runtime import Runtime
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import Target
from onnxc.tasks import Settings, Task, Ways
from onnxc.workpiece import Workpiece, silent
from onnxc.zeros import Zeros, count_zeros


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model. passes: those of a recipe, in place of what settings say."""

    task: Task
    settings: Settings
    target: Target
    only: Selector = Selector()
    passes: tuple[Pass, ...] = ()
    seed: int = 0

    def ways(self, piece: Workpiece) -> Ways:
        """The passes to try on a prepared model, by name."""
        if self.passes:
            return {"recipe": self.passes}
        return self.task.ways(self.settings, piece)

    def rescue(self, piece: Workpiece) -> Ways:
        """What to try where all of these fall short."""
        return {} if self.passes else self.task.rescue(self.settings, piece)

    def is_meant(self, step: Step) -> bool:
        """Whether a step does what was asked for, and not only helps."""
        return self.task.is_meant(step.name)


@dataclass(frozen=True)
class Compressed:
    """The chosen model with its proof. way: name of the candidate.

    done: the changes that were asked for. zeros, macs: before and after; zeros where they were
    sought, None where the MACs are not known.
    """

    model: Model
    passes: tuple[Pass, ...]
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    comparison: Comparison
    coverage: Coverage | None
    before: Latency | None
    after: Latency | None
    ratio: Ratio | None
    way: str
    done: tuple[Change, ...]
    zeros: tuple[Zeros, Zeros] | None = None
    macs: tuple[int | None, int | None] = (None, None)


def check_input(model: Model, path: str) -> None:
    """Refuse what must not be rewritten. Raises ModelError with one sentence."""
    kind = quantized_as(model.graph)
    if kind is not None:
        raise ModelError(f"{path} is already quantized ({kind}); it is left alone")
    bad = unfinite(model)
    if bad:
        raise ModelError(
            f"{path}: weight {bad[0]!r} holds NaN or infinity; repair it and export again"
        )


def check_prepared(model: Model, calibration: Calibration) -> None:
    """Raise OptionError where statistics are of the model as another onnxc prepares it."""
    known = calibration.known
    if known is not None and known.graph != structure(model.graph):
        makers = ", ".join(sorted({made.onnxc for made in known.made}))
        raise OptionError(
            f"statistics {known.path} are of this model as another onnxc prepares it ({makers}): "
            "calibrate again"
        )


@dataclass(frozen=True)
class Attempt:
    """Every way of doing a task that is worth trying, carried out.

    piece: the prepared model and what is known of it. prepared: what was done before, the same for
    all. ways: passes by name.
    """

    plan: Plan
    piece: Workpiece
    prepared: tuple[Step, ...]
    ways: Ways
    built: Mapping[str, search.Built]

    def results(self, name: str) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
        """All changes on one way, preparation included, and what was left alone."""
        steps = (*self.prepared, *self.built[name][1])
        return tuple(change for step in steps for change in step.changes), self.skips(name, steps)

    def skips(self, name: str, steps: Iterable[Step]) -> tuple[Skip, ...]:
        """What steps of a way left alone, not to another of those that do what was asked for.

        First the reasons of these, then those of steps that help them.
        """
        done, is_meant = {change.node for change in self.meant(name)}, self.plan.is_meant
        found = (
            skip
            for step in sorted(steps, key=lambda step: not is_meant(step))
            for skip in step.skips
            if not (is_meant(step) and skip.node in done)
        )
        return tuple(dict.fromkeys(found))

    def meant(self, name: str) -> tuple[Change, ...]:
        """The changes on one way that were asked for."""
        steps = (step for step in self.built[name][1] if self.plan.is_meant(step))
        return tuple(change for step in steps for change in step.changes)


def begin(
    plan: Plan,
    model: Model,
    calibration: Calibration,
    judge: Dataset,
    runtime: Runtime = Runtime(),
    progress: Progress | None = None,
) -> tuple[Workpiece, tuple[Step, ...]]:
    """The model, prepared in place, with what may be measured of it, and what was done to it."""
    feed = next(iter(judge.batches(1)))
    prepared = prepare(model, feed, progress=progress)
    check_prepared(model, calibration)
    calibration = replace(calibration, original=model)
    infer(model, feed)
    context = Context(opset(model.graph), plan.target, seed=plan.seed, only=plan.only)
    piece = Workpiece(model, context, calibration, feed, runtime, progress or silent, judge)
    return piece, tuple(prepared)


def attempt(
    plan: Plan,
    model: Model,
    calibration: Calibration,
    judge: Dataset,
    runtime: Runtime = Runtime(),
    progress: Progress | None = None,
) -> Attempt:
    """Build every candidate of a plan.

    The model is prepared in place; each candidate is another one. judge: samples that no statistic
    sees.
    """
    piece, prepared = begin(plan, model, calibration, judge, runtime, progress)
    ways = plan.ways(piece)
    known = piece.calibration
    built = search.build(model, ways, piece.context, known, piece.feed, progress)
    return Attempt(plan, piece, prepared, ways, built)


def compress_model(
    plan: Plan,
    model: Model,
    calibration: Calibration,
    judge: Dataset,
    runtime: Runtime = Runtime(),
    progress: Progress | None = None,
    validation: Dataset | None = None,
) -> Compressed:
    """Carry a plan out on a model; of several candidates, measurement chooses.

    The model is prepared in place; the result is another one. judge: samples that no statistic saw;
    candidates are chosen by them. validation: samples that no choice saw either; the verdict is
    given on them, or on `judge` where there are none.
    """
    original = copy(model)
    tried = attempt(plan, model, calibration, judge, runtime, progress)
    return proven(tried, original, judge, validation)


def proven(
    tried: Attempt, original: Model, judge: Dataset, validation: Dataset | None
) -> Compressed:
    """The best candidate with its proof. original: the model before it was prepared."""
    piece, plan = tried.piece, tried.plan
    model, runtime, calibration = piece.model, piece.runtime, piece.calibration
    piece.say("measuring")
    found, latency = search.trials(original, tried.built, judge, runtime, client=calibration.client)
    chosen = search.best(found)
    safe = plan.rescue(piece) if search.falls_short(chosen) else {}
    if safe.keys() - tried.ways.keys():
        more = search.build(model, safe, piece.context, calibration, piece.feed, piece.say)
        tried = replace(tried, ways={**tried.ways, **safe}, built={**tried.built, **more})
        found, latency = search.trials(
            original, tried.built, judge, runtime, client=calibration.client
        )
        chosen = search.best(found)
    comparison = chosen.comparison
    if validation is not None:
        comparison = compare(original, chosen.model, validation, runtime)
    changes, skips = tried.results(chosen.name)
    needed = excess([original, chosen.model], dict(piece.feed))
    untimed = (search.untimed(needed, model.memory),) if needed else ()
    seeks = plan.task.aim.seeks
    return Compressed(
        chosen.model,
        tried.ways[chosen.name],
        changes,
        skips,
        (*_choice(found, chosen), *untimed, *_failed(tried, chosen), *calibration.notes),
        comparison,
        coverage(chosen.model, runtime) if seeks == "integers" or plan.task.is_search else None,
        latency,
        chosen.latency,
        chosen.ratio,
        chosen.name,
        tried.meant(chosen.name),
        (count_zeros(model), count_zeros(chosen.model)) if seeks == "zeros" else None,
        (inspect(model).macs, inspect(chosen.model).macs) if seeks == "speed" else (None, None),
    )


def _choice(found: Sequence[search.Trial], chosen: search.Trial) -> tuple[str, ...]:
    """One sentence on what was measured, where there was a choice."""
    if len(found) < 2:
        return ()
    tried = "; ".join(trial.summary for trial in found)
    return (f"chosen by measurement: {chosen.name} ({tried})",)


def _failed(tried: Attempt, chosen: search.Trial) -> tuple[str, ...]:
    """A sentence for each step that was undone."""
    steps = (*tried.prepared, *chosen.steps)
    return tuple(f"{step.name} was undone: {p}" for step in steps for p in step.problems)
