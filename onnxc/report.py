"""Reports: what was done to a model and what it is worth, as data, as JSON, and on the console.

A report is a plain dataclass; `to_json` writes any of them, and each `render…` function turns one
into a rich renderable. Rendering decides nothing: the verdict is computed from the report alone.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage
from onnxc.core import Change, Skip
from onnxc.cost import HeavyNode, Inspection, Port
from onnxc.runtime import Runtime

TOLERATED_DROP = 0.01  # share of top-1 that a result may lose before the verdict turns red
NAMES_SHOWN = 4  # nodes named for each reason; the JSON report names all


@dataclass(frozen=True)
class Measure:
    """One model as measured. bytes: of the file with its external data."""

    bytes: int
    latency: Latency | None = None


@dataclass(frozen=True)
class Report:
    """What a writing command did to a model, and the proof.

    headline: said before anything else, such as "made without data: the input is synthesized".
    speedup: original over result, None where neither could be timed. missed: bounds that the user
    asked for and the result does not meet. memory_peak: bytes. recipe: TOML that replays it all.
    """

    model: str
    output: str | None
    before: Measure
    after: Measure
    target: str = ""
    headline: str = ""
    speedup: Ratio | None = None
    comparison: Comparison | None = None
    coverage: Coverage | None = None
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: str = ""
    memory_peak: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Validation:
    """A candidate against its reference."""

    reference: str
    candidate: str
    before: Measure
    after: Measure
    comparison: Comparison
    speedup: Ratio | None = None
    coverage: Coverage | None = None
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """Latencies taken in turn; ratios are against the first model."""

    runtime: Runtime
    latencies: dict[str, Latency]
    ratios: dict[str, Ratio]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """Statistics that were gathered and written."""

    model: str
    output: str
    samples: int
    tensors: int
    memory_peak: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()


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
    speedup = report.speedup
    facts = [*_size_fact(report), *_speed_fact(speedup), *_accuracy_facts(report.comparison)]
    bad = list(report.missed)
    bad += ["slower than the original"] if speedup and speedup.is_slower else []
    top1 = report.comparison.top1 if report.comparison else None
    if top1 and top1[0] - top1[1] > TOLERATED_DROP:
        bad.append(f"top-1 drops by more than {100 * TOLERATED_DROP:.0f} point")
    text = ", ".join(facts) or "nothing was measured"
    return not bad, f"{text}. Not met: {'; '.join(bad)}" if bad else text


def _size_fact(report: Report | Validation) -> Iterator[str]:
    ratio = report.before.bytes / max(report.after.bytes, 1)
    if round(ratio, 2) == 1:
        yield "same size"
    else:
        yield f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"


def _speed_fact(speedup: Ratio | None) -> Iterator[str]:
    if speedup is None:
        return
    if speedup.low <= 1 <= speedup.high:
        yield "as fast within the spread"
    else:
        yield f"{speedup.median:.2f}x {'faster' if speedup.low > 1 else 'the speed'}"


def _accuracy_facts(comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        return
    if comparison.top1:
        yield f"top-1 {100 * (comparison.top1[1] - comparison.top1[0]):+.2f} points"
    if comparison.agreement is not None:
        share = 100 * comparison.agreement
        yield f"agrees with the original on {share:.1f} % of {comparison.samples} samples"
    else:
        yield f"SQNR {comparison.sqnr:.1f} dB over {comparison.samples} samples"


def render(report: Report) -> RenderableType:
    """A report for somebody who has two minutes: one table, the verdict, what was left, notes."""
    where = escape(report.output or "nothing written")
    title = Text.from_markup(f"[bold]{escape(report.model)}[/] → [bold]{where}[/]")
    head = [Text(report.headline, style="yellow")] if report.headline else []
    parts: list[RenderableType] = [*head, title, _measures(report), _verdict(report)]
    parts += _grouped("left alone", ((s.node, s.reason) for s in report.skips))
    parts += _kernel_reasons(report.coverage)
    parts += _notes(report.notes)
    parts += _effort(report.seconds, report.memory_peak)
    return Group(*parts)


def render_validation(report: Validation) -> RenderableType:
    """The table of a comparison, one line for each output, and the verdict."""
    title = Text.from_markup(
        f"[bold]{escape(report.candidate)}[/] against [bold]{escape(report.reference)}[/]"
    )
    outputs = Table("output", "SQNR", "cosine", "max error", "agreement", box=None, pad_edge=False)
    for name, fidelity in report.comparison.outputs.items():
        outputs.add_row(
            escape(name),
            f"{fidelity.sqnr:.1f} dB",
            f"{fidelity.cosine:.6f}",
            f"{fidelity.max_abs_error:.3g}",
            _percent(fidelity.agreement),
        )
    notes = (*report.comparison.notes, *report.notes)
    parts: list[RenderableType] = [title, _measures(report), "", outputs, _verdict(report)]
    return Group(*parts, *_kernel_reasons(report.coverage), *_notes(notes))


def render_benchmark(report: Benchmark) -> RenderableType:
    """One line a model: p10, p50, p90, the spread, and the ratio with its quartiles."""
    runtime = report.runtime
    title = f"latency in ms a run · {runtime.provider}, threads {runtime.threads or 'all'}"
    table = Table("model", box=None, pad_edge=False, title_justify="left")
    for heading in ("p10", "p50", "p90", "spread", "speed", "quartiles"):
        table.add_column(heading, justify="right")
    for name, latency in report.latencies.items():
        ratio = report.ratios.get(name)
        times = (f"{t:.3f}" for t in (latency.p10, latency.p50, latency.p90))
        speed = (f"{ratio.median:.2f}x", f"{ratio.low:.2f} to {ratio.high:.2f}") if ratio else ()
        table.add_row(escape(name), *times, f"{100 * latency.spread:.0f} %", *speed)
    level = f", optimization level {runtime.level}, taken in turn"
    return Group(Text(title + level, style="dim"), table, *_notes(report.notes))


def render_inspection(report: Inspection, name: str) -> RenderableType:
    """What a model is made of and what can be compressed."""
    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(report):
        facts.add_row(Text(label, style="dim"), Text(value))
    able = [node for node in report.heavy if node.can]
    parts: list[RenderableType] = [Text(name, style="bold"), facts]
    if report.quantized:
        parts.append(Text(f"already quantized ({report.quantized})", style="yellow"))
    parts += [_heavy(able)] if able else [Text("no node can be compressed", style="yellow")]
    left = ((n.name, n.reason) for n in report.heavy if not n.can)
    return Group(*parts, *_grouped("cannot be compressed", left), *_notes(report.notes))


def render_calibrated(report: Calibrated) -> RenderableType:
    """Two lines about a statistics file."""
    text = f"statistics of {report.tensors} tensors over {report.samples} samples"
    head = Text.from_markup(f"[bold]{escape(report.output)}[/]: {text}")
    return Group(head, *_notes(report.notes), *_effort(report.seconds, report.memory_peak))


def _measures(report: Report | Validation) -> Table:
    table = Table("", box=None, pad_edge=False)
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right")
    for row in (*_cost_rows(report), *_quality_rows(report.comparison)):
        table.add_row(*row)
    if report.coverage is not None:
        table.add_row("int8 kernels", "", f"{report.coverage.integer}/{report.coverage.total}", "")
    return table


def _cost_rows(report: Report | Validation) -> Iterator[tuple[str, ...]]:
    before, after = report.before, report.after
    shrink = f"{before.bytes / max(after.bytes, 1):.2f}x"
    yield "file", size_text(before.bytes), size_text(after.bytes), shrink
    if before.latency and after.latency:
        ratio = f"{report.speedup.median:.2f}x" if report.speedup else ""
        yield "latency p50", f"{before.latency.p50:.3f} ms", f"{after.latency.p50:.3f} ms", ratio


def _quality_rows(comparison: Comparison | None) -> Iterator[tuple[str, ...]]:
    if comparison is None:
        return
    for label, pair in (("top-1", comparison.top1), ("top-5", comparison.top5)):
        if pair:
            yield label, _percent(pair[0]), _percent(pair[1]), f"{100 * (pair[1] - pair[0]):+.2f}"
    if comparison.perplexity:
        first, second = comparison.perplexity
        yield "perplexity", f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}"
    if comparison.agreement is not None:
        yield "agreement", "", _percent(comparison.agreement), ""
    yield "SQNR", "", f"{comparison.sqnr:.1f} dB", ""


def _verdict(report: Report | Validation) -> RenderableType:
    good, sentence = verdict(report)
    mark, style = ("good", "bold green") if good else ("not good", "bold red")
    text = Text.assemble((f"{mark}: ", style), (sentence, "green" if good else "red"))
    return Group("", text, "")


def _grouped(title: str, pairs: Iterable[tuple[str, str]]) -> list[RenderableType]:
    """Nodes by reason, the most frequent reason first; a few names of each."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for node, reason in pairs:
        groups[reason].append(node)
    if not groups:
        return []
    total = sum(map(len, groups.values()))
    lines = Table.grid(padding=(0, 0, 0, 2))
    lines.add_column(justify="right")
    for reason, nodes in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.add_row(Text(str(len(nodes))), Text(f"{reason}: {_some(nodes)}"))
    return [Text(f"{title}: {total} node{'s'[: total != 1]}", style="bold"), lines]


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _kernel_reasons(coverage: Coverage | None) -> list[RenderableType]:
    if coverage is None:
        return []
    return _grouped("run in float", ((k.node, k.reason) for k in coverage.left_float))


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [Text(f"· {note}", style="dim") for note in dict.fromkeys(notes)]


def _effort(seconds: float | None, memory_peak: int | None) -> list[RenderableType]:
    spent = [f"{seconds:.1f} s"] if seconds is not None else []
    spent += [f"peak memory {size_text(memory_peak)}"] if memory_peak is not None else []
    return [Text(", ".join(spent), style="dim")] if spent else []


def _heavy(nodes: list[HeavyNode]) -> Table:
    """The nodes with the most weight bytes, then the most MACs."""
    shown = sorted(nodes, key=lambda n: (-n.weight, -(n.macs or 0), n.name))[: 3 * NAMES_SHOWN]
    table = Table("can be compressed", "op", "weight", box=None, pad_edge=False)
    for heading in ("bytes", "MACs"):
        table.add_column(heading, justify="right")
    for node in shown:
        shape = "x".join(map(str, node.shape or ()))
        macs = "?" if node.macs is None else count_text(node.macs)
        table.add_row(escape(node.name), node.op, shape, size_text(node.weight), macs)
    rest = len(nodes) - len(shown)
    if rest:
        table.add_row(f"and {rest} more", "", "", size_text(sum(n.weight for n in nodes)), "")
    return table


def _facts(report: Inspection) -> Iterator[tuple[str, str]]:
    if report.bytes is not None:
        yield "file", size_text(report.bytes)
    yield "weights", ", ".join(f"{k} {size_text(v)}" for k, v in report.bytes_by_type.items())
    yield "parameters", count_text(report.parameters)
    yield "MACs", "?" if report.macs is None else count_text(report.macs)
    yield "opset", str(report.opset)
    yield "ops", ", ".join(f"{op} {count}" for op, count in report.ops.items())
    yield "inputs", ", ".join(map(_port_text, report.inputs))
    yield "outputs", ", ".join(map(_port_text, report.outputs))


def _port_text(port: Port) -> str:
    dims = (
        "any shape"
        if port.shape is None
        else ", ".join("?" if d is None else str(d) for d in port.shape)
    )
    return f"{port.name} {port.dtype} [{dims}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def size_text(count: int) -> str:
    """Bytes in words: "13.9 MB" (powers of 1000)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """A large count: "3.5 M"."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def _scaled(count: int, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, (len(str(abs(count))) - 1) // 3)
    number = f"{count}" if power == 0 else f"{count / 1000**power:.1f}"
    return f"{number} {units[power]}"
