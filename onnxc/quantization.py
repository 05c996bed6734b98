"""Quantize one model file: read, prepare, choose by measurement, prove, write.

    load -> prepare -> build candidates -> measure on held-out samples -> choose -> prove -> save

A part of the samples is held out: no statistic ever sees it, and candidates are chosen by it. The
figures of the report are measured on it too, or on validation data where the user gives some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from calib.data import Dataset
from calib.statistics import structure
from onnxc import search
from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage, compare, coverage
from onnxc.core import Change, Context, Pass, Skip
from onnxc.cost import quantized_as
from onnxc.errors import ModelError, OptionError
from onnxc.graph import Model, copy, opset, unfinite
from onnxc.pairs import excess
from onnxc.pipeline import Calibration, Progress, Step, prepare
from onnxc.runtime import Runtime
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import Target
from passes.quantize import Ranges

HELD_OUT = 0.2  # share of the samples that judge the result
MOST_HELD_OUT = 32
THREADS = 2  # of calibration


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize; the options of `onnxc quantize` besides data, target and nodes.

    format: how the integers are written; auto chooses for each layer by what it measures.
    scheme: affine (scale and zero point), or fixed point: scales that are powers of two, zero point
        0, signed Qm.n, or unsigned UQm.n where no value is negative; shifts and standard operators.
    bits: of the weights; 4 is for weight-only, 16 (of activations, too) for fixed point.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed"] = "affine"
    bits: Literal[4, 8, 16] = 8
    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(settings: QuantizeSettings) -> None:
    """Refuse settings that do not go together. Raises OptionError with one sentence."""
    kind, bits = settings.format, settings.bits
    if settings.scheme == "fixed" and kind not in ("auto", "qdq"):
        raise OptionError(f"fixed point is written in standard operators, as qdq, not as {kind}")
    if settings.scheme == "fixed" and bits == 4:
        raise OptionError("fixed point has 8 or 16 bits; 4 bits are for --format weight-only")
    if settings.scheme == "affine" and bits == 16:
        raise OptionError("16 bits are for fixed point: add --scheme fixed, or take 8 bits")
    if bits == 4 and kind not in ("auto", "weight-only"):
        raise OptionError(f"4 bits are for weights alone: use --format weight-only, not {kind}")


@dataclass(frozen=True)
class Quantized:
    """The chosen model with its proof. way: name of the candidate. count: nodes quantized."""

    model: Model
    passes: tuple[Pass, ...]
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    comparison: Comparison
    coverage: Coverage
    before: Latency | None
    after: Latency | None
    ratio: Ratio | None
    way: str
    count: int


def check_input(model: Model, path: str) -> None:
    """Refuse what must not be quantized. Raises ModelError with one sentence."""
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


def split(dataset: Dataset, fresh: Sequence[int] | None = None) -> tuple[Dataset, Dataset]:
    """Calibration samples and held-out ones, every fifth; both the same where there is only one.

    fresh: positions of the samples that may be held out; None for all.
    """
    count = len(dataset)
    if count < 2:
        return dataset, dataset
    step = max(round(1 / HELD_OUT), -(-count // MOST_HELD_OUT), 2 if count < 5 else 0)
    held = [i for i in range(count) if i % step == step - 1] or [count - 1]
    if fresh is not None and not set(held) <= set(fresh):
        wanted = min(len(held), len(fresh))
        held = [fresh[i * len(fresh) // wanted] for i in range(wanted)]
    kept = [i for i in range(count) if i not in set(held)]
    return dataset.subset(kept), dataset.subset(held)


@dataclass(frozen=True)
class Attempt:
    """Every way of quantizing a model that is worth trying, carried out.

    prepared: what was done before, the same for all. ways: passes by name.
    """

    context: Context
    prepared: tuple[Step, ...]
    ways: Mapping[str, tuple[Pass, ...]]
    built: Mapping[str, search.Built]

    def results(self, name: str) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
        """What was changed and what was left alone on one way, preparation included."""
        return _results((*self.prepared, *self.built[name][1]))

    def quantized(self, name: str) -> tuple[Change, ...]:
        """The changes that quantize nodes on one way."""
        steps = (step for step in self.built[name][1] if _is_quantizing(step))
        return tuple(change for step in steps for change in step.changes)


def attempt(
    model: Model,
    calibration: Calibration,
    feed: Mapping[str, Any],
    target: Target,
    settings: QuantizeSettings = QuantizeSettings(),
    only: Selector = Selector(),
    passes: Sequence[Pass] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Attempt:
    """Build the candidates that fit `settings`, or the one of given passes; measure nothing.

    The model is prepared in place; each candidate is another one.
    """
    prepared = prepare(model, feed, progress=progress)
    check_prepared(model, calibration)
    calibration = replace(calibration, original=model)
    infer(model, feed)
    context = Context(opset(model.graph), target, seed=seed, only=only)
    ranges: Ranges | None = None if settings.ranges == "auto" else settings.ranges
    ways = (
        {"recipe": tuple(passes)}
        if passes
        else search.candidates(
            *(model, context, settings.format, ranges, settings.bits),
            pow2=settings.scheme == "fixed",
            has_data=calibration.dataset is not None,
        )
    )
    built = search.build(model, ways, context, calibration, feed, progress)
    return Attempt(context, tuple(prepared), ways, built)


def quantize_model(
    model: Model,
    calibration: Calibration,
    judge: Dataset,
    target: Target,
    settings: QuantizeSettings = QuantizeSettings(),
    only: Selector = Selector(),
    passes: Sequence[Pass] = (),
    runtime: Runtime = Runtime(),
    seed: int = 0,
    progress: Progress | None = None,
    validation: Dataset | None = None,
) -> Quantized:
    """Quantize a model, choosing among the candidates that fit `settings`, or with given passes.

    The model is prepared in place; the result is another one. judge: samples that no statistic saw;
    candidates are chosen by them. validation: samples that no choice saw either; the verdict is
    given on them, or on `judge` where there are none.
    """
    feed, original = next(iter(judge.batches(1))), copy(model)
    tried = attempt(model, calibration, feed, target, settings, only, passes, seed, progress)
    if progress is not None:
        progress("measuring")
    found, latency = search.trials(original, tried.built, judge, runtime, client=calibration.client)
    chosen = search.best(found)
    is_free = settings == QuantizeSettings() and not passes  # nothing was asked for by name
    safe = search.fallback(calibration.dataset is not None)
    if is_free and search.falls_short(chosen) and not safe.keys() & tried.ways.keys():
        more = search.build(model, safe, tried.context, calibration, feed, progress)
        tried = replace(tried, ways={**tried.ways, **safe}, built={**tried.built, **more})
        found, latency = search.trials(
            original, tried.built, judge, runtime, client=calibration.client
        )
        chosen = search.best(found)
    comparison = chosen.comparison
    if validation is not None:
        comparison = compare(original, chosen.model, validation, runtime)
    changes, skips = tried.results(chosen.name)
    steps = (*tried.prepared, *chosen.steps)
    needed = excess([original, chosen.model], feed)
    untimed = (search.untimed(needed, model.memory),) if needed else ()
    failed = tuple(f"{s.name} was undone: {p}" for s in steps for p in s.problems)
    return Quantized(
        chosen.model,
        tried.ways[chosen.name],
        changes,
        skips,
        (*_choice(found, chosen), *untimed, *failed, *calibration.notes),
        comparison,
        coverage(chosen.model, runtime),
        latency,
        chosen.latency,
        chosen.ratio,
        chosen.name,
        len({change.node for change in tried.quantized(chosen.name)}),
    )


def _choice(found: Sequence[search.Trial], chosen: search.Trial) -> tuple[str, ...]:
    """One sentence on what was measured, where there was a choice."""
    if len(found) < 2:
        return ()
    tried = "; ".join(trial.summary for trial in found)
    return (f"chose {chosen.name} by measurement: {tried}",)


def _results(steps: Sequence[Step]) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
    """All changes, and what was skipped, but for nodes that one pass left to another."""
    changes = tuple(change for step in steps for change in step.changes)
    done = _quantized_nodes(steps)
    skips = [
        skip
        for step in steps
        for skip in step.skips
        if not (_is_quantizing(step) and skip.node in done)
    ]
    return changes, tuple(dict.fromkeys(skips))


def _quantized_nodes(steps: Sequence[Step]) -> set[str]:
    return {change.node for step in steps if _is_quantizing(step) for change in step.changes}


def _is_quantizing(step: Step) -> bool:
    return step.name.startswith("quantize")
