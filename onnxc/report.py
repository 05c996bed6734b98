"""Reports: what was done to a model and what it is worth, as data and as JSON.

A report is a plain dataclass, and `to_json` writes any of them: its fields are the keys, in order.

    quantize, cluster … Report          --dry-run of these  Preview         inspect    Inspection
    validate            Validation      bench               Benchmark       calibrate  Calibrated
    analyze             Analysis

    aim                 {name, done, seeks}: the task, the word for a node it changed, what counts
    zeros               [{weights, zeros, bits, coded, share}, the same after], or null
    speedup             {median, low, high, is_slower}, original over result
    latency             {p10, p50, p90, spread, quantiles}
    opening             {ms, memory}, where the task seeks a small file
    comparison          {samples, outputs {NAME: {sqnr, cosine, max_abs_error, agreement}},
                        agreement, top1, top5, perplexity: each [reference, candidate], notes,
                        decisions, flips [lost, won], top1_intervals, top5_intervals,
                        change_interval, agreement_interval, sqnr, cosine, max_abs_error}
    execution           {runtime, samples, plain, moved, is_doubtful}
    coverage            {kernels [{node, op, integer, reason}], boundaries, orphans, total, integer,
                        left_float}
    changes, skips      [{node, what, before, after}], [{node, reason}]
    points              [{name, bytes, drop, low, high, speed, is_met, is_best, on_front}]
    anatomy             {layers [{node, op, before, after}], types {NAME: [before, after]}, rest,
                        saved, files}
    spans               [{tensor, type, scale, zero_point, low, high, least, most, clipped, counts,
                        used}]
    surroundings        {versions, system, processor, features, cores}
    blame               [{node, op, tensor, sqnr, own, cause}] in the order of the graph

`onnxc.schema` makes a JSON Schema of them all; docs/report.md says what each key means.
Bytes and seconds are plain numbers, latencies milliseconds, SQNR decibel, shares lie in 0..1. What
is not known or not finite is null.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxc.anatomy import Anatomy
from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage
from onnxc.core import Change, Skip
from onnxc.execution import Execution
from onnxc.opening import Opening
from onnxc.runtime import Runtime
from onnxc.spans import Span
from onnxc.storage.package import Tally
from onnxc.surroundings import Surroundings
from onnxc.zeros import Zeros

# Where a verdict turns red, whatever was asked for
TOLERATED_DROP = 0.01  # share of top-1 lost
LEAST_AGREEMENT = 0.9  # share of decisions that are those of the original
LEAST_SQNR = 15.0  # dB


@dataclass(frozen=True)
class Measure:
    """One model as measured. bytes: of the file with its external data. macs: None if not known.

    opening: time and memory that a session takes, where the aim is a small file.
    """

    bytes: int
    latency: Latency | None = None
    macs: int | None = None
    opening: Opening | None = None


@dataclass(frozen=True)
class Aim:
    """What a writing command is for. name: of the command. done: what it does to a node, in words.

    seeks: what the user gains by it. A result that is slower is no gain, except of zeros and size,
    which are stored smaller whatever their speed.
    """

    name: str
    done: str
    seeks: Literal["integers", "speed", "zeros", "size"] = "speed"


@dataclass(frozen=True)
class Point:
    """A candidate as measured. bytes: of its file. drop: of the metric, in its unit, with bounds.

    speed: float latency over its own, None where it was not timed. is_met: whether it keeps the
    bound. is_best: whether it is the result. on_front: whether no other one is better in one of
    bytes, speed and drop, and as good in the others.
    """

    name: str
    bytes: int
    drop: float
    low: float
    high: float
    speed: float | None = None
    is_met: bool = False
    is_best: bool = False
    on_front: bool = False


@dataclass(frozen=True)
class Blame:
    """A layer's share in the error of a result. tensor: its output, in the original.

    sqnr: dB of that tensor in the result, all error before it included. own: dB where only this
    layer is the result's and its inputs are the original's, None where that is not known. cause: of
    its own error, in words.
    """

    node: str
    op: str
    tensor: str
    sqnr: float
    own: float | None = None
    cause: str = ""


@dataclass(frozen=True)
class Report:
    """What a writing command did to a model, and the proof.

    output: None where nothing was written. way: which candidate was chosen. count: how many nodes
    the task was done to, None if that is not known. headline: said before anything else, such as
    "made without data: the input is synthesized". speedup: None where neither could be timed.
    zeros: before and after, where the aim seeks them. done: the changes that were asked for, which
    are among `changes`. missed: bounds that the user asked for and
    the result does not meet. recipe: TOML that replays it all. points: candidates of a search.
    blame: layers in the order of the graph. spans: ranges of the tensors that were quantized by
    what calibration saw.
    """

    model: str
    output: str | None
    before: Measure
    after: Measure
    target: str = ""
    way: str = ""
    aim: Aim = Aim("quantize", "quantized", "integers")
    count: int | None = None
    headline: str = ""
    speedup: Ratio | None = None
    comparison: Comparison | None = None
    execution: Execution | None = None
    coverage: Coverage | None = None
    zeros: tuple[Zeros, Zeros] | None = None
    done: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: str = ""
    points: tuple[Point, ...] = ()
    blame: tuple[Blame, ...] = ()
    anatomy: Anatomy | None = None
    spans: tuple[Span, ...] = ()
    surroundings: Surroundings | None = None
    memory_peak: int | None = None
    seconds: float | None = None

    @property
    def is_good(self) -> bool:
        return verdict(self)[0]

    @property
    def verdict(self) -> str:
        return verdict(self)[1]


@dataclass(frozen=True)
class Effect:
    """What one way would do to the nodes of a model. helping: what only makes that better."""

    done: tuple[Change, ...]
    helping: tuple[Change, ...]
    skips: tuple[Skip, ...]


@dataclass(frozen=True)
class Preview:
    """What a writing command would do, by the name of each way that it would try.

    prepared: changes that are the same for all, such as folded constants.
    """

    model: str
    output: str
    target: str
    prepared: tuple[Change, ...]
    ways: dict[str, Effect]
    aim: Aim = Aim("quantize", "quantized", "integers")
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Validation:
    """A candidate against its reference. vectors: the folder of test vectors that was written.

    blame: of a quantized candidate, the layers of the reference in order. unmatched: those that
    could not be compared, with reasons.
    """

    reference: str
    candidate: str
    before: Measure
    after: Measure
    comparison: Comparison
    headline: str = ""
    speedup: Ratio | None = None
    execution: Execution | None = None
    coverage: Coverage | None = None
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    vectors: str | None = None
    blame: tuple[Blame, ...] = ()
    anatomy: Anatomy | None = None
    surroundings: Surroundings | None = None
    unmatched: tuple[Skip, ...] = ()

    @property
    def is_good(self) -> bool:
        return verdict(self)[0]

    @property
    def verdict(self) -> str:
        return verdict(self)[1]


@dataclass(frozen=True)
class Benchmark:
    """Latencies taken in turn; ratios are against the first model. batch: samples a run."""

    runtime: Runtime
    latencies: dict[str, Latency]
    ratios: dict[str, Ratio]
    batch: int = 1
    notes: tuple[str, ...] = ()
    surroundings: Surroundings | None = None


@dataclass(frozen=True)
class Calibrated:
    """Statistics that were gathered or merged, and written.

    sources: the model, or the merged files. statistics: how many of each kind. binned: share of the
    values that histograms hold, whose minimum and maximum saw all; rows: share of the rows that
    moments are of. bytes: of the file. skips: layers whose input has no moments.
    """

    sources: tuple[str, ...]
    output: str
    samples: int
    tensors: int
    statistics: dict[str, int]
    binned: float = 1.0
    rows: float = 1.0
    bytes: int = 0
    memory_peak: int | None = None
    seconds: float | None = None
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packed:
    """A model that was packed or unpacked; before, after: bytes, with those of external data.

    ways: what became of tensors, by how they were coded. files: those that were unpacked.
    """

    source: str
    output: str
    before: int
    after: int
    ways: dict[str, Tally] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def ratio(self) -> float:
        return self.before / max(self.after, 1)


@dataclass(frozen=True)
class Sensitivity:
    """What the outputs lose where one thing is done to one layer, and all others stay as they are.

    what: "weights", "activations" or "both" of them in integers, or the name of another pass. sqnr:
    dB of the outputs. loss: share of decisions that are expected to change, None without classes.
    bytes: of weights that it saves. macs: multiply-accumulates that it saves, or makes integer.
    cost: relative noise of the outputs for each share of bytes and MACs of the model that it gains.
    """

    node: str
    op: str
    what: str
    sqnr: float
    loss: float | None
    bytes: int
    macs: int
    cost: float


@dataclass(frozen=True)
class Kept:
    """The quantized model with these nodes left float, as measured on samples no statistic saw.

    bytes: of the file, None where none was built. speed: float latency over its own, None where it
    was not timed.
    """

    nodes: tuple[str, ...]
    sqnr: float
    agreement: float | None
    top1: float | None = None
    bytes: int | None = None
    speed: Ratio | None = None


@dataclass(frozen=True)
class Advice:
    """What would help a quantized file. nodes: empty for what concerns the whole of it.

    gain: dB that it is worth at the node, or at the outputs for the whole; None if not measured.
    """

    what: str
    nodes: tuple[str, ...] = ()
    gain: float | None = None


@dataclass(frozen=True)
class Analysis:
    """Where a model is sensitive, or where a quantized file of it goes wrong.

    quantized: the file, None where onnxc quantized. samples: that judged. layers: sensitivities,
    the highest cost first. plain: the quantized model as it is; kept: what was tried of leaving
    nodes float, measured cheaply; best: the one that is worth it, built as `onnxc quantize` would.
    blame: layers of the quantized model in order. unmatched: those that were not compared.
    """

    model: str
    quantized: str | None
    samples: int
    target: str
    layers: tuple[Sensitivity, ...] = ()
    plain: Kept | None = None
    best: Kept | None = None
    kept: tuple[Kept, ...] = ()
    blame: tuple[Blame, ...] = ()
    advice: tuple[Advice, ...] = ()
    comparison: Comparison | None = None
    skips: tuple[Skip, ...] = ()
    unmatched: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    memory_peak: int | None = None
    seconds: float | None = None

    @property
    def exclude(self) -> str:
        """Options of `onnxc quantize` that leave those nodes float; empty where none is."""
        nodes = () if self.best is None else self.best.nodes
        return " ".join(f"--exclude {shlex.quote(node)}" for node in nodes)

    @property
    def verdict(self) -> str:
        return advised(self)


def to_dict(value: Any) -> Any:
    """JSON-ready data; properties join the fields, fields hidden from repr stay out.

    Numbers that are not finite become None.
    """
    if is_dataclass(value) and not isinstance(value, type):
        shown = [spec.name for spec in fields(value) if spec.repr]
        derived = [n for n, v in vars(type(value)).items() if isinstance(v, property)]
        return {name: to_dict(getattr(value, name)) for name in (*shown, *derived)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_dict(item) for item in items]
    if isinstance(value, np.generic):
        return to_dict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def to_json(report: Any) -> str:
    """Any report as JSON text with a stable order of keys."""
    return json.dumps(to_dict(report), indent=2, ensure_ascii=False)


def verdict(report: Report | Validation) -> tuple[bool, str]:
    """Whether the result is worth having, and one sentence that says why."""
    facts = [*_size_fact(report), *_zeros_fact(report), *_speed_fact(report)]
    facts += _accuracy_facts(report.comparison)
    bad = [*report.missed, *_faults(report)]
    return not bad, f"{'; '.join(bad)} ({', '.join(facts)})" if bad else ", ".join(facts)


def advised(report: Analysis) -> str:
    """One sentence: what to leave float and what that is worth, or where the error starts."""
    if report.quantized is not None:
        return _blamed(report)
    plain, best = report.plain, report.best
    if plain is None:
        return "no layer can be quantized" if not report.layers else _touchiest(report)
    is_poor = plain.sqnr < LEAST_SQNR or (plain.agreement or 1.0) < LEAST_AGREEMENT
    whole = "quantized, it loses too much" if is_poor else "quantize all layers"
    if best is None:
        return f"{whole}: {_quality(plain)}, and no few layers left float are worth their price"
    count = len(best.nodes)
    which = "this layer" if count == 1 else f"these {count} layers"
    points = _points(plain, best)
    told = _change(plain, best, points)
    if points > 0 or plain.agreement is None:
        return f"keep {which} float: {told}"
    return f"{whole}: {_quality(plain)} ({which} left float: {told})"


def _points(plain: Kept, best: Kept) -> float:
    """Points of agreement that leaving nodes float gives back."""
    return 100 * ((best.agreement or 0.0) - (plain.agreement or 0.0))


def _change(plain: Kept, best: Kept, points: float) -> str:
    """What leaving nodes float gives, and its price."""
    told = [] if best.agreement is None else [f"agreement {points:+.1f} points"]
    told.append(f"SQNR {best.sqnr - plain.sqnr:+.1f} dB")
    if plain.bytes is not None and best.bytes is not None:
        more = best.bytes - plain.bytes
        told.append(f"{more / 1e6:+.2f} MB" if abs(more) >= 1e5 else f"{more / 1e3:+.1f} kB")
    if plain.speed is not None and best.speed is not None:
        told.append(f"speed {plain.speed.median:.2f}x -> {best.speed.median:.2f}x")
    return ", ".join(told)


def _quality(found: Kept) -> str:
    if found.agreement is None:
        return f"SQNR {found.sqnr:.1f} dB"
    return f"agreement {100 * found.agreement:.1f} %, SQNR {found.sqnr:.1f} dB"


def _touchiest(report: Analysis) -> str:
    first = report.layers[0]
    return (
        f"the most sensitive for what it gains is {first.node} ({first.what}: {first.sqnr:.1f} dB)"
    )


def _blamed(report: Analysis) -> str:
    known = [x for x in report.blame if x.own is not None and math.isfinite(x.own)]
    if not known:
        return "no layer of both models could be compared"
    worst = min(known, key=lambda x: (x.own, x.sqnr))
    cause = f", most of it by {worst.cause}" if worst.cause else ""
    where = f"the error starts at {worst.node}: {worst.own:.1f} dB of its own{cause}"
    if report.comparison is None:
        return where
    return f"{where} (outputs: {', '.join(_accuracy_facts(report.comparison))})"


def _faults(report: Report | Validation) -> Iterator[str]:
    """What nobody wants, whatever was asked for."""
    if isinstance(report, Report) and report.count == 0:
        yield f"nothing was {report.aim.done}"
    if report.speedup and report.speedup.is_slower and _seeks_speed(report):
        yield f"slower than the original, {report.speedup.median:.2f}x"
    yield from _doubt(report.execution)
    comparison = report.comparison
    if comparison is None:
        return
    top1, agreement = comparison.top1, comparison.agreement
    if top1 and top1[0] - top1[1] > TOLERATED_DROP:
        yield f"top-1 drops by more than {100 * TOLERATED_DROP:.0f} point"
    if agreement is not None and agreement < LEAST_AGREEMENT:
        yield f"agreement below {100 * LEAST_AGREEMENT:.0f} %"
    if comparison.sqnr < LEAST_SQNR:
        yield f"SQNR {comparison.sqnr:.1f} dB, below {LEAST_SQNR:.0f}"


def _doubt(execution: Execution | None) -> Iterator[str]:
    """That the runtime changes more than the rewriting, where it does."""
    if execution is None or not execution.is_doubtful:
        return
    found = execution
    yield (
        f"ONNX Runtime's optimizations change its outputs by more than the rewriting does (SQNR "
        f"{found.moved:.1f} dB with and without them, {found.plain:.1f} dB to the original)"
    )


def _size_fact(report: Report | Validation) -> Iterator[str]:
    ratio = report.before.bytes / max(report.after.bytes, 1)
    if round(ratio, 2) == 1:
        yield "same size"
    else:
        yield f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"


def _seeks_speed(report: Report | Validation) -> bool:
    return not isinstance(report, Report) or report.aim.seeks not in ("zeros", "size")


def _zeros_fact(report: Report | Validation) -> Iterator[str]:
    if isinstance(report, Report) and report.zeros:
        yield f"{100 * report.zeros[1].share:.1f} % zeros"


def _speed_fact(report: Report | Validation) -> Iterator[str]:
    speedup = report.speedup
    if speedup is None or (speedup.is_slower and _seeks_speed(report)):
        return
    if speedup.is_slower:
        yield f"slower, {speedup.median:.2f}x"
    elif speedup.low <= 1 <= speedup.high:
        yield "as fast within the spread"
    else:
        yield f"{speedup.median:.2f}x faster"


def _accuracy_facts(comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        return
    if comparison.top1:
        change = 100 * (comparison.top1[1] - comparison.top1[0])
        yield f"top-1 {change:+.2f} points" if round(change, 2) else "same top-1"
    count = f"over {comparison.samples} sample{'s'[: comparison.samples != 1]}"
    if comparison.agreement is not None:
        yield f"agreement {100 * comparison.agreement:.1f} % {count}"
    else:
        yield f"SQNR {comparison.sqnr:.1f} dB {count}"
