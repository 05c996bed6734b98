"""One search from its request to its proof: what `onnxc compress` does.

prepare → search (`onnxc.anytime.run`) → prove the best one on samples that no choice saw
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from calib.merge import digest
from onnxc import recipe as recipes
from onnxc.anytime.journal import Found
from onnxc.anytime.journal import begin as begin_journal
from onnxc.anytime.metric import Metric, estimated, open_metric
from onnxc.anytime.moves import ladders
from onnxc.anytime.run import Run
from onnxc.anytime.settings import CompressSettings
from onnxc.anytime.tallies import Estimate
from onnxc.anytime.workshop import Workshop
from onnxc.compression import Attempt, Compressed, begin, proven
from onnxc.cost import file_bytes
from onnxc.graph import Model, copy, to_bytes
from onnxc.layer_times import kept
from onnxc.pairs import Subject
from onnxc.report import Point
from onnxc.request import Job
from onnxc.samples import MOST_HELD_OUT
from onnxc.storage.packing import SUFFIX

PATIENT = 0.1  # share of the time that one task may measure before it chooses


@dataclass(frozen=True)
class Searched:
    """What a search found: the result with its proof, all candidates, and sentences on both."""

    result: Compressed
    points: tuple[Point, ...]
    notes: tuple[str, ...]
    missed: tuple[str, ...]


def searched(
    job: Job, settings: CompressSettings, bound: float, limit: float, resume: bool
) -> Searched:
    """Search for the best model that keeps a bound; it is on disk at the end, and at any time.

    Raises OptionError, ModelError or DataError; only what was there before is on disk then.
    """
    original, chooses = copy(job.model), job.samples.judge
    piece, prepared = begin(job.plan, job.model, job.calibration, chooses, job.runtime, job.say)
    subject: Subject = original if original.scratch is not None else to_bytes(original)
    metric = open_metric(
        *(settings.metric or None, subject, chooses, job.runtime, job.samples.kept)
    )
    steps = ladders(settings.minimize, job.output)
    journal = begin_journal(job.output, _identity(job, original, settings, metric, bound), resume)
    times = kept(job.plan.target.name, job.runtime)
    piece = replace(piece, patience=min(piece.patience, limit * PATIENT), times=times)
    kind = (metric, bound, settings.minimize, job.output.suffix)
    shop = Workshop(piece, subject, chooses, *kind)
    run = Run(job, shop, steps, journal, limit, job.calibration.client)
    best = run.search()
    passes = recipes.loads(best.recipe).passes if best.recipe else ()
    name = f"{best.plan}: {best.way}" if best.way else best.plan
    tried = Attempt(job.plan, piece, prepared, {name: passes}, {name: shop.builder.built(passes)})
    few = chooses.subset(slice(0, MOST_HELD_OUT))
    result = proven(tried, original, few, job.samples.validation)
    run.keep(result.model)
    if run.is_complete:
        journal.remove()
    judged = _judged(run, result)
    notes = [*_notes(run, best), *([] if judged is None else [_verdict(run, judged)])]
    missed = _missed(run, best)
    if judged is not None and judged.drop > bound:
        missed = (*missed, f"{_verdict(run, judged)}, more than {bound:g}")
    return Searched(result, points(run), tuple(notes), tuple(missed))


def _identity(
    job: Job, original: Model, settings: CompressSettings, metric: Metric, bound: float
) -> dict[str, Any]:
    """Whatever decides what a search finds, but time."""
    samples = (job.samples.kept, job.samples.judge)
    only = job.plan.only
    return {
        "model": digest(original),
        "data": [None if some is None else some.fingerprint() for some in samples],
        "metric": metric.name,
        "max_drop": bound,
        "minimize": settings.minimize,
        "packed": job.output.suffix == SUFFIX,
        "target": job.plan.target.name,
        "seed": job.plan.seed,
        "nodes": [list(only.include), list(only.exclude)],
        "versions": {name: version(name) for name in ("onnxc", "onnx", "onnxruntime", "numpy")},
    }


def points(run: Run) -> tuple[Point, ...]:
    """All candidates, the original first, and which of them nothing beats."""
    found = [run.original, *(x for x in run.journal.all() if not x.failure)]
    return tuple(
        Point(
            name=f"{x.plan}: {x.way}" if x.way else x.plan,
            bytes=x.bytes or file_bytes(run.job.path),
            drop=x.estimate.drop,
            low=x.estimate.low,
            high=x.estimate.high,
            speed=_speed(x),
            is_met=x.meets(run.rule.bound),
            is_best=x is run.best,
            on_front=not any(_beats(y, x) for y in found),
        )
        for x in found
    )


def _speed(found: Found) -> float | None:
    if found.plan == "original":
        return 1.0
    return None if found.ratio is None else found.ratio.median


def _beats(one: Found, other: Found) -> bool:
    """Whether one costs less and drops less, or as much of one of both."""
    mine, theirs = ((x.cost, x.estimate.drop) for x in (one, other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def _notes(run: Run, best: Found) -> Iterator[str]:
    count, unit = len(run.journal.found), run.workshop.metric.unit
    chosen, at = best.estimate, run.workshop.bound
    yield (
        f"{count} plans tried in {run.elapsed:.0f} s; the best one drops {chosen.drop:.2f} {unit} "
        f"({chosen.low:.2f} to {chosen.high:.2f}, bound {at:g}) on {chosen.samples} samples that "
        "chose"
    )
    if not run.is_complete:
        yield (
            f"the time was over before all was tried: --resume with a longer --max-time goes on "
            f"from {run.journal.path.name}"
        )
    for some in run.journal.found.values():
        if all(x.failure for x in some):
            yield f"{some[0].plan} was not possible: {some[0].failure}"


def _judged(run: Run, result: Compressed) -> Estimate | None:
    """The drop on the samples that judge, told as on those that chose."""
    judges, made = run.job.samples.validation, result.model
    if judges is None:
        return None
    subject: Subject = made if made.scratch is not None else to_bytes(made)
    shop = run.workshop
    return estimated(shop.metric, shop.original, subject, judges, run.job.runtime)


def _verdict(run: Run, judged: Estimate) -> str:
    return (
        f"on the {judged.samples} samples that judge the drop is {judged.drop:.2f} "
        f"{run.workshop.metric.unit} ({judged.low:.2f} to {judged.high:.2f})"
    )


def _missed(run: Run, best: Found) -> tuple[str, ...]:
    """Where no candidate is better than the original."""
    if best.recipe:
        return ()
    bound, what = run.workshop.bound, run.workshop.objective
    tried = [x for x in run.journal.all() if not x.failure]
    kept = [x for x in tried if x.meets(bound)]
    told = ""
    if kept:
        least = min(kept, key=lambda x: x.cost)
        told = f"; {least.plan} keeps it, at {least.cost:.2f} of the {what}"
    elif tried:
        closest = min(tried, key=lambda x: x.estimate.high)
        told = f"; the closest is {closest.plan}, which drops {closest.estimate.drop:.2f}"
    return (f"nothing better than the original keeps the bound of {bound:g}{told}",)
