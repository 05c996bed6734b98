"""Quantize one model file: read, prepare, choose by measurement, prove, write.

    load -> prepare -> build candidates -> measure on held-out samples -> choose -> prove -> save

A part of the samples is held out: no statistic ever sees it, and every figure of the report is
measured on it, or on validation data where the user gives some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from calib.data import Dataset
from onnxc import search
from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage, coverage
from onnxc.core import Change, Context, Pass, Skip
from onnxc.cost import file_bytes, quantized_as
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, copy, opset, to_bytes, unfinite
from onnxc.pipeline import Calibration, Progress, Step, prepare
from onnxc.runtime import Runtime
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import Target
from passes.quantize import Ranges

HELD_OUT = 0.2  # share of the samples that judge the result
MOST_HELD_OUT = 64
THREADS = 2  # of calibration


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize; the options of `onnxc quantize` besides data, target and nodes.

    format: how the integers are written; auto chooses for each layer by what it measures.
    scheme: affine (scale and zero point), or fixed point (scales that are powers of two).
    bits: of the weights; 4 is for weight-only, 16 for fixed point.
    ranges: how activation ranges are chosen from the statistics.
    """

    format: Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"] = "auto"
    scheme: Literal["affine", "fixed"] = "affine"
    bits: Literal[4, 8, 16] = 8
    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"


@dataclass(frozen=True)
class Quantized:
    """The chosen model with its proof."""

    model: Model
    passes: tuple[Pass, ...]
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    comparison: Comparison
    coverage: Coverage
    before: Latency
    after: Latency
    ratio: Ratio


def check_input(model: Model, path: str) -> None:
    """Refuse what must not be quantized. Raises ModelError with one sentence."""
    kind = quantized_as(model.graph)
    if kind is not None:
        raise ModelError(f"{path} is already quantized ({kind}); it is left alone")
    bad = unfinite(model)
    if bad:
        raise ModelError(f"{path}: weight {bad[0]!r} holds NaN or infinity; repair it and export again")


def split(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Calibration samples and held-out ones, every fifth; both the same where there is only one."""
    count = len(dataset)
    if count < 2:
        return dataset, dataset
    step = max(round(1 / HELD_OUT), -(-count // MOST_HELD_OUT), 2 if count < 5 else 0)
    held = [i for i in range(count) if i % step == step - 1] or [count - 1]
    kept = [i for i in range(count) if i not in set(held)]
    return dataset.subset(kept), dataset.subset(held)


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
) -> Quantized:
    """Quantize a model, choosing among the candidates that fit `settings`, or with given passes.

    The model is prepared in place; the result is another one. judge: samples that no statistic saw.
    """
    feed = next(iter(judge.batches(1)))
    prepared = prepare(model, feed, progress=progress)
    infer(model, feed)
    context = Context(opset(model.graph), target, seed=seed, only=only)
    ranges: Ranges = "mse" if settings.ranges == "auto" else settings.ranges
    ways = (
        {"recipe": tuple(passes)}
        if passes
        else search.candidates(
            model, context, settings.format, ranges, settings.bits, settings.scheme == "fixed"
        )
    )
    built = {
        name: search.build(model, way, context, calibration, feed, progress)
        for name, way in ways.items()
    }
    if progress is not None:
        progress("measuring")
    found, latency = search.trials(model, built, judge, runtime)
    chosen = search.best(found)
    steps = (*prepared, *chosen.steps)
    changes, skips = _results(steps)
    tried = tuple(f"tried {t.summary}" for t in found) if len(found) > 1 else ()
    failed = tuple(f"{s.name} was undone: {p}" for s in steps for p in s.problems)
    return Quantized(
        chosen.model,
        ways[chosen.name],
        changes,
        skips,
        (*tried, *failed, *calibration.notes),
        chosen.comparison,
        coverage(chosen.model, runtime),
        latency,
        chosen.latency,
        chosen.ratio,
    )


def _results(steps: Sequence[Step]) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
    """All changes, and what was skipped, but for nodes that one way of quantizing left to another."""
    changes = tuple(change for step in steps for change in step.changes)
    quantizing = [step for step in steps if step.name.startswith("quantize")]
    done = {change.node for step in quantizing for change in step.changes}
    skips = [
        skip for step in steps for skip in step.skips if step not in quantizing or skip.node not in done
    ]
    return changes, tuple(dict.fromkeys(skips))
