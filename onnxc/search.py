"""Which way of quantizing a model: by what each one measures, not by what it promises.

    static        Q/DQ pairs, ranges from calibration: convolutions gain most from it
    mixed         static convolutions, other heavy nodes quantized on the fly
    dynamic       activations quantized on the fly, for MatMul, Gemm and LSTM
    weight-only   int8 or int4 weights in the file, float arithmetic: always smaller
    rounded       static, weights rounded for their outputs (`onnxc.few_bits`), if others fall short
    fixed         static with scales that are powers of two

Each candidate is built, run on held-out samples and timed in turn with the float model. Of those
whose output keeps FLOOR dB, the fastest wins; within TIE of it, the more exact one. Models that
memory does not hold together are not timed; then the smallest wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from calib.data import Dataset
from onnxc.bench import Latency, Ratio, speedup, time_interleaved
from onnxc.check import Comparison, Snapshot, snapshot
from onnxc.contest import Contest, compared
from onnxc.core import Context, Pass
from onnxc.cost import free_dimensions, heavy_nodes
from onnxc.graph import Model, copy, to_bytes
from onnxc.graph import size as file_size
from onnxc.integer import weighted_nodes
from onnxc.islands import suspects
from onnxc.ops import knowledge
from onnxc.pairs import Subject, excess
from onnxc.pipeline import (
    PREPARED,
    Calibration,
    Progress,
    Step,
    compress,
    keeps_statistics,
    renewed,
)
from onnxc.runtime import Runtime
from passes.absorb_offsets import AbsorbOffsets
from passes.correct_bias import CorrectBias
from passes.equalize import Equalize
from passes.quantize import Quantize, Ranges
from passes.quantize_dynamic import QuantizeDynamic
from passes.quantize_weights import QuantizeWeights
from passes.share_constants import ShareConstants
from passes.to_qoperator import ToQOperator
from passes.upgrade_opset import UpgradeOpset

if TYPE_CHECKING:
    from distributed import Client

Format = Literal["auto", "qdq", "qoperator", "dynamic", "weight-only"]

FLOOR = 15.0  # dB of output SQNR below which a candidate is no longer the same network
TIE = 0.05  # speeds within this share are one speed on a shared machine
Built = tuple[Model, tuple[Step, ...]]
Way = tuple[Pass, ...]

BLOCK: Literal[32] = 32  # values that share a scale of 4-bit weights
WIDE_OPSET = 21  # of integers of 4 and 16 bits in standard operators

AUTO_RANGES: tuple[Ranges, ...] = ("mse", "minmax")
FEW = 4  # samples in a run: memory stays that of calibration
TIMING = 0.3  # least seconds of timing, for models that run in no time
MINOR = 0.1  # share of the MACs below which MatMul and Gemm do not decide how to quantize


@dataclass(frozen=True)
class Trial:
    """A candidate as built and measured. size: bytes of its file. ratio: float over own latency.

    latency and ratio are None where the models do not fit in memory together.
    """

    name: str
    model: Model
    steps: tuple[Step, ...]
    comparison: Comparison
    size: int
    latency: Latency | None = None
    ratio: Ratio | None = None

    @property
    def speed(self) -> tuple[float, float]:
        """The ratio, with what chance may take from or add to its median: two standard errors.

        1 where it was not measured.
        """
        if self.ratio is None or self.latency is None:
            return 1.0, 1.0
        error = 2 * 0.93 * (self.ratio.high - self.ratio.low) / len(self.latency.samples) ** 0.5
        return self.ratio.median - error, self.ratio.median + error

    @property
    def summary(self) -> str:
        gain = f"{self.ratio.median:.2f}x" if self.ratio else f"{self.size:,} bytes"
        return f"{self.name}: {gain}, {self.comparison.sqnr:.1f} dB"


def candidates(
    model: Model,
    context: Context,
    format_: Format,
    ranges: Ranges | None = None,
    bits: int = 8,
    pow2: bool = False,
    has_data: bool = True,
) -> dict[str, tuple[Pass, ...]]:
    """The ways worth trying for a model, by name.

    ranges: None tries AUTO_RANGES. has_data: whether statistics can be gathered on the way; if not,
    those of the prepared model must do.
    """
    first, *others = AUTO_RANGES if ranges is None else (ranges,)
    if pow2:
        return {"fixed": _fixed(ranges, bits, has_data)}
    if bits == 4:
        return blocks_of_four(model, context)
    rest = (QuantizeWeights(), ShareConstants())
    integers: tuple[Pass, ...] = (ToQOperator(),) if format_ == "qoperator" else ()
    start = _start(has_data)
    convolutions = operators(model, context, channels=True)
    mixed = (
        *_start(has_data, ops=convolutions),
        Quantize(ranges=first, ops=convolutions),
        QuantizeDynamic(),
    )
    ways: dict[str, tuple[Pass, ...]] = {
        "static": (*start, Quantize(ranges=first), *integers, *rest),
        "mixed": (*mixed, *rest),
        "dynamic": (QuantizeDynamic(), *rest),
        **fallback(has_data),
    }
    found = {name: ways[name] for name in _worth_trying(model, context, format_)}
    if "static" in found:
        for rule in others:
            found[f"static, {rule}"] = (*start, Quantize(ranges=rule), *integers, *rest)
        doubtful = suspects(model.graph, context)
        if doubtful and format_ == "auto":
            apart = Quantize(ranges=first, leave=doubtful)
            found["static, without islands"] = (*start, apart, *rest)
    return found


def fallback(has_data: bool = True) -> dict[str, tuple[Pass, ...]]:
    """What is never slower."""
    return {"weight-only": (_bias(has_data), QuantizeWeights(), ShareConstants())}


def _start(has_data: bool, **settings: Any) -> tuple[Pass, ...]:
    """What makes quantizing better; equalized tensors have no longer the statistics of a file."""
    first: tuple[Pass, ...] = (Equalize(), AbsorbOffsets()) if has_data else ()
    return (*first, _bias(has_data, **settings))


def _bias(has_data: bool, **settings: Any) -> CorrectBias:
    return CorrectBias(by="drift" if has_data else "mean", **settings)


def _fixed(ranges: Ranges | None, bits: int, has_data: bool) -> tuple[Pass, ...]:
    """Fixed point. 16 bits round so little that clipping or moving weights only costs."""
    if bits == 16:
        ranges = ranges or "minmax"
        wide = Quantize(ranges=ranges, bits=16, activation_bits=16, power_of_two=True)
        return (UpgradeOpset(WIDE_OPSET), wide)
    narrow = Quantize(ranges=ranges or AUTO_RANGES[0], power_of_two=True)
    return (*_start(has_data, power_of_two=True), narrow)


def blocks_of_four(model: Model, context: Context, *first: Pass) -> dict[str, tuple[Pass, ...]]:
    """Weights of 4 bits in blocks, expanded at load or multiplied as they are.

    first: what is done to them before.
    """
    start = (UpgradeOpset(WIDE_OPSET), *first)
    ways: dict[str, tuple[Pass, ...]] = {
        "weight-only": (*start, QuantizeWeights(bits=4, block=BLOCK)),
        "MatMulNBits": (*start, QuantizeWeights(bits=4, block=BLOCK, form="matmulnbits")),
    }
    if not operators(model, context, channels=False):
        del ways["MatMulNBits"]
    return ways


def _worth_trying(model: Model, context: Context, format_: Format) -> tuple[str, ...]:
    if format_ in ("dynamic", "weight-only"):
        return (format_,)
    if format_ in ("qdq", "qoperator"):
        return ("static",)
    convolutions = operators(model, context, channels=True)
    products = operators(model, context, channels=False)
    if not convolutions and not products:
        return ("dynamic", "weight-only")
    if not convolutions:
        return ("static", "dynamic", "weight-only")
    if _share(model, products) < MINOR:
        return ("static",)
    return ("static", "mixed", "weight-only")


def operators(model: Model, context: Context, channels: bool) -> tuple[str, ...]:
    """Operators of the heavy nodes with integer kernels: convolutions, or the others."""
    nodes = weighted_nodes(model.graph, context)
    return tuple(sorted({n.op for n in nodes if knowledge(n).float_output != channels}))


def _share(model: Model, ops: tuple[str, ...]) -> float:
    """Share of the model's multiply-accumulates in nodes of these operators."""
    free = free_dimensions(model.graph)
    macs = [(node.op, node.macs or 0) for node in heavy_nodes(model.graph, free)]
    total = sum(count for _, count in macs)
    return sum(count for op, count in macs if op in ops) / total if total else float(bool(ops))


class Builder:
    """Makes candidates of one model; what several begin with is done once.

    Statistics are those of the model that a pass gets, or of the last one before that has the same.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        calibration: Calibration,
        feed: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        self.context, self.feed, self.progress = context, feed, progress
        self._made: dict[Way, Built] = {PREPARED: (model, ())}
        self._sources: dict[Way, Way] = {PREPARED: PREPARED}
        self._known: dict[Way, Calibration] = {PREPARED: calibration}

    @cached_property
    def _prepared(self) -> Snapshot:
        model, calibration = self._made[PREPARED][0], self._known[PREPARED]
        return snapshot(model, self.feed, calibration.runtime)

    def built(self, passes: Way) -> Built:
        """The model that passes make, and what each did."""
        for count in range(1, len(passes) + 1):
            if passes[:count] not in self._made:
                self._add(passes[:count])
        return self._made[passes]

    def calibration(self, passes: Way) -> Calibration:
        """What passes behind these may have statistics of."""
        return self._known[passes]

    def forget(self, *kept: Way) -> None:
        """Drop all models but those of these passes, and what they are made of."""
        needed = {way[:count] for way in (PREPARED, *kept) for count in range(len(way) + 1)}
        needed |= {self._sources[way] for way in needed if way in self._sources}
        for table in (self._made, self._sources, self._known):
            for way in table.keys() - needed:
                del table[way]

    def _add(self, path: Way) -> None:
        *start, pass_ = path
        known = self._known[tuple(start)]
        before, steps = self._made[tuple(start)]
        result, last = copy(before), steps[-1].after if steps else self._prepared
        source = self._sources[tuple(start)]
        (step,) = compress(
            *(result, [pass_], self.context, known, self.feed, self.progress, last),
            state=source,
            source=self._made[source][0],
        )
        self._made[path] = result, (*steps, step)
        self._known[path] = renewed(pass_, step, result, known)
        self._sources[path] = source if keeps_statistics(pass_, step) else path


def build(
    model: Model,
    ways: Mapping[str, Way],
    context: Context,
    calibration: Calibration,
    feed: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Built]:
    """Each candidate's model and what each pass did; what candidates begin with is done once."""
    builder = Builder(model, context, calibration, feed, progress)
    return {name: builder.built(passes) for name, passes in ways.items()}


def trials(
    original: Model,
    built: Mapping[str, Built],
    heldout: Dataset,
    runtime: Runtime,
    repeats: int = 30,
    client: Client | None = None,
) -> tuple[list[Trial], Latency | None]:
    """Measure built candidates against the original on held-out samples, timed in turn.

    Models that memory does not hold together are not timed. client: of a Dask cluster, whose
    workers then compare; times are always those of this process.
    """
    subjects = {name: _subject(result) for name, (result, _) in built.items()}
    whole = _subject(original)
    taken = times(whole, subjects, heldout, runtime, repeats)
    contest = Contest(whole, subjects, heldout, runtime, batch=FEW)
    found = []
    for (name, (result, steps)), comparison in zip(
        built.items(), compared(contest, client), strict=True
    ):
        before, after = taken.get(name, (None, None))
        ratio = speedup(before, after) if before and after else None
        found.append(Trial(name, result, steps, comparison, file_size(result), after, ratio))
    return found, next((before for before, _ in taken.values()), None)


def _subject(model: Model) -> Subject:
    """What is opened again and again: bytes where they are not many."""
    return to_bytes(model) if model.scratch is None else model


def times(
    original: Subject,
    candidates: Mapping[str, Subject],
    heldout: Dataset,
    runtime: Runtime,
    repeats: int,
) -> dict[str, tuple[Latency, Latency]]:
    """Latencies of the original and a candidate: all in turn, or in pairs where memory holds two.

    Empty where it does not.
    """
    feeds = [feed for feed, _ in zip(heldout.batches(1), range(4), strict=False)]
    groups = [candidates]
    if excess([original, *candidates.values()], feeds[0]):
        groups = [{name: model} for name, model in candidates.items()]
    if any(excess([original, *group.values()], feeds[0]) for group in groups):
        return {}
    found: dict[str, tuple[Latency, Latency]] = {}
    for group in groups:
        models = {"float": original, **group}
        taken = time_interleaved(models, feeds, runtime, repeats, min_time=TIMING)
        found |= {name: (taken["float"], taken[name]) for name in group}
    return found


def untimed(needed: int, memory: int | None) -> str:
    """Why there is no latency."""
    gib, allowed = needed / 2**30, (memory or 0) / 2**30
    return (
        f"latency was not measured: running the whole models takes about {gib:.1f} GiB, more than "
        f"the {allowed:.1f} GiB of --max-memory; give more to time them"
    )


def falls_short(trial: Trial) -> bool:
    """Slower than the float model, or no longer the same network."""
    return trial.speed[1] < 1 or trial.comparison.sqnr < FLOOR


def best(found: Iterable[Trial]) -> Trial:
    """Of those that keep FLOOR dB, the most exact one that is as fast as the fastest.

    Where none keeps it, the most exact of all; where nothing was timed, as small as the smallest.
    """
    tried = list(found)
    kept = [t for t in tried if t.comparison.sqnr >= FLOOR]
    if not kept:
        return max(tried, key=lambda t: t.comparison.sqnr)
    if any(t.ratio is None for t in kept):
        smallest = min(t.size for t in kept)
        return max(
            (t for t in kept if t.size <= (1 + TIE) * smallest), key=lambda t: t.comparison.sqnr
        )
    fastest = max(t.speed[0] for t in kept)
    tied = [t for t in kept if t.speed[1] >= (1 - TIE) * fastest]
    return max(tied, key=lambda t: t.comparison.sqnr)
