"""`onnxc analyze`: where a model is sensitive, and where a quantized file of it goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.data import Dataset, Preprocess, open_data
from onnxc.advice import advise
from onnxc.blame import STAGED, examine
from onnxc.check import compare, coverage
from onnxc.compression import check_input
from onnxc.core import Context
from onnxc.cost import quantized_as
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, bound, copy, is_spilling, load, opset
from onnxc.harm import gauge
from onnxc.keeping import LATE, float_layers, proven, worth
from onnxc.paths import existing
from onnxc.pipeline import Calibration, prepare
from onnxc.report import Analysis, Kept
from onnxc.request import (
    THREADS,
    ModelPath,
    Progress,
    check_runtime,
    check_same_inputs,
    counting,
    enough_memory,
    input_specs,
    naming,
    peak_memory,
    subject,
    try_out,
)
from onnxc.runtime import Runtime
from onnxc.samples import split
from onnxc.selectors import Selector
from onnxc.sensitivity import (
    OTHERS,
    WHATS,
    Sensitivities,
    Wanted,
    other_trials,
    run_trials,
)
from onnxc.shapes import infer
from onnxc.targets import Target
from onnxc.targets import choose as choose_target
from onnxc.workpiece import Workpiece, silent

SECONDS = 300.0  # that an analysis may take, about
JUDGING = 3  # of so many samples, one judges
LEAST_JUDGING = 2 * JUDGING  # samples below which every fifth does
MATCHED = 0.5  # share of the layers below which two models are not of one network


def analyze(
    model: ModelPath,
    *,
    data: Any = None,
    val: Any = None,
    quantized: ModelPath | None = None,
    what: Sequence[str] = WHATS,
    passes: Sequence[str] = ("quantize", *OTHERS),
    bits: int = 8,
    seconds: float = SECONDS,
    target: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    runtime: Runtime = Runtime(),
    progress: Progress | None = None,
) -> Analysis:
    """Find the layers that lose most: of a model, when each is compressed alone, and which of them
    to leave float; or of a quantized file of that model, by any tool, where its error starts.

    data: what `calib.data.open_data` takes; a third of it judges, and no statistic sees that. val:
    samples to judge by in its place. quantized: the file to explain. what: of quantizing, any of
    weights, activations, both. passes: any of quantize, prune, factorize, cluster. bits: of the
    weights. seconds: about how long it may take; fewer samples judge where that is short.

    Raises ModelError, DataError or OptionError; nothing is written.
    """
    start = time.monotonic()
    wanted = _wanted(what, passes, bits, seconds)
    path, row, say = existing(model), choose_target(target), progress or silent
    check_runtime(runtime)
    if data is None:
        raise OptionError("analyze needs samples to run the model on: give --data")
    if quantized is not None:
        check_same_inputs(path, existing(quantized))
    dataset = open_data(data, input_specs(path), preprocess, samples, seed)
    memory = max_memory or enough_memory(path)
    try_out(path, dataset, runtime, memory)
    say("loading")
    opened = bound(load(path), memory)
    check_input(opened, str(path))
    if quantized is not None:
        found = _explained(path, existing(quantized), opened, dataset, row, runtime, memory, say)
    else:
        judged = None if val is None else open_data(val, input_specs(path), preprocess, None, seed)
        only = Selector.parse(include, exclude).resolve(opened.graph)
        desk = Desk(path, opened, row, only, seed, runtime, memory, say)
        with naming(path):
            found = desk.analyzed(dataset, judged, wanted, start + seconds)
    return replace(found, memory_peak=peak_memory(), seconds=time.monotonic() - start)


def _wanted(what: Sequence[str], passes: Sequence[str], bits: int, seconds: float) -> Wanted:
    """Raises OptionError for a name that there is not."""
    kinds = tuple(w for w in WHATS if w in what)
    _check("--what", what, WHATS)
    _check("--passes", passes, ("quantize", *OTHERS))
    if not 2 <= bits <= 8:
        raise OptionError(f"the bits of weights are 2 to 8, not {bits}")
    if not seconds > 0:
        raise OptionError(f"--seconds is more than 0, not {seconds:g}")
    return Wanted(kinds, tuple(passes), bits)


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    odd = next((name for name in given if name not in known), None)
    if odd is not None or not given:
        raise OptionError(f"{option} {odd or ''} is not known: choose of {', '.join(known)}")


@dataclass(frozen=True)
class Desk:
    """A model to analyze, with how it is run. memory: bytes of the process."""

    path: Path
    model: Model
    target: Target
    only: Selector
    seed: int
    runtime: Runtime
    memory: int
    say: Progress

    def analyzed(
        self, dataset: Dataset, val: Dataset | None, wanted: Wanted, deadline: float
    ) -> Analysis:
        """The model is prepared in place. deadline: of `time.monotonic`."""
        kept, judge = thirds(dataset) if val is None else (dataset, val)
        original = copy(self.model)
        if is_spilling(self.model.graph):
            raise OptionError(
                f"{self.path} needs more memory than {self.memory >> 20} MiB to run whole: give "
                "more --max-memory to analyze it"
            )
        piece = self._piece(kept, judge)
        found = Sensitivities()
        whole = deadline - time.monotonic()
        plain: Kept | None = None
        best: Kept | None = None
        tried: tuple[Kept, ...] = ()
        others = [name for name in wanted.passes if name in OTHERS]
        if "quantize" in wanted.passes:
            share = whole * (0.5 if others else 0.3)
            tried = float_layers(piece, wanted, found, share, deadline)
            plain, best = self._proven(original, piece, tried, wanted.bits)
        if others:
            trials, skips = other_trials(piece, wanted)
            found.skips += skips
            end = max(deadline, time.monotonic() + LATE * whole)
            meter = gauge(piece, judge, len(trials), end - time.monotonic())
            found.count(len(meter.samples), len(judge), " of " + " and ".join(others))
            run_trials(piece.model, trials, meter, end, found)
        counts = f"statistics of {len(kept)} samples, judged by {len(judge)} others"
        return Analysis(
            model=str(self.path),
            quantized=None,
            samples=len(judge),
            target=self.target.name,
            layers=found.ranked,
            plain=plain,
            best=best,
            kept=tried,
            skips=tuple(dict.fromkeys(found.skips)),
            notes=(counts, *self.model.notes, *dataset.notes, *found.notes),
        )

    def _piece(self, kept: Dataset, judge: Dataset) -> Workpiece:
        feed = next(iter(judge.batches(1)))
        prepare(self.model, feed, progress=self.say)
        infer(self.model, feed)
        context = Context(opset(self.model.graph), self.target, seed=self.seed, only=self.only)
        calibration = Calibration(kept, self.memory, THREADS, original=self.model)
        return Workpiece(self.model, context, calibration, feed, self.runtime, self.say, judge)

    def _proven(
        self, original: Model, piece: Workpiece, tried: Sequence[Kept], bits: int
    ) -> tuple[Kept | None, Kept | None]:
        """The quantized model without and with layers left float, as a user gets it."""
        names = worth(tried)
        if not tried or bits != 8:
            return next(iter(tried), None), next(
                (k for k in tried if names and k.nodes == names), None
            )
        self.say("analyze: quantizing as onnxc quantize does")
        assert piece.judge is not None
        plain, best = proven(original, piece, names, piece.judge)
        return plain, best if best is not None and best.sqnr > plain.sqnr else None


def thirds(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Samples for statistics, and a third to judge by; every fifth where there are few."""
    count = len(dataset)
    if count < LEAST_JUDGING:
        return split(dataset)
    judging = range(JUDGING - 1, count, JUDGING)
    kept = [i for i in range(count) if i % JUDGING != JUDGING - 1]
    return dataset.subset(kept), dataset.subset(list(judging))


def _explained(
    path: Path,
    other: Path,
    original: Model,
    dataset: Dataset,
    target: Target,
    runtime: Runtime,
    memory: int,
    say: Progress,
) -> Analysis:
    """A quantized file beside its original."""
    try_out(other, dataset, runtime, memory)
    pair = [subject(file, memory) for file in (path, other)]
    if any(isinstance(model, Model) for model in pair):
        raise OptionError(f"{STAGED}: give more")
    result = load(other)
    if quantized_as(result.graph) is None:
        raise ModelError(f"{other} is not quantized: give a file with integers as --quantized")
    say("comparing")
    told = counting(say, "comparing")
    comparison = compare(path, other, dataset, runtime, progress=told)
    with naming(other):
        seen = examine(original, result, dataset, runtime, progress=say)
    heavy = sum(layer.twin.heavy for layer in seen.layers)
    missing = len(seen.unmatched)
    if heavy <= MATCHED * (heavy + missing):
        raise DataError(
            f"{other} is no quantized form of {path}: of {heavy + missing} layers {missing} are "
            f"not found in it (such as {seen.unmatched[0].node}: {seen.unmatched[0].reason})"
        )
    prepare(original, next(iter(dataset.batches(1))))
    advice = advise(seen.layers, original.graph, coverage(other, runtime), target)
    return Analysis(
        model=str(path),
        quantized=str(other),
        samples=len(dataset),
        target=target.name,
        blame=seen.blames,
        advice=advice,
        comparison=comparison,
        unmatched=seen.unmatched,
        notes=(*dataset.notes, *comparison.notes, *seen.notes),
    )
