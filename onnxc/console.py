"""Reports on the console, for somebody who has two minutes.

Each `render…` function turns a report into a rich renderable: the headline, a table of before and
after, the verdict, what was left as it was by reason, notes. It decides nothing by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxc.check import Comparison
from onnxc.cost import HeavyNode, Inspection, Port
from onnxc.front_view import front_table
from onnxc.report import (
    Benchmark,
    Blame,
    Calibrated,
    Effect,
    Packed,
    Preview,
    Report,
    Validation,
    verdict,
)
from onnxc.words import (
    Row,
    by_reason,
    compared,
    count_text,
    kind_of,
    left_alone,
    measures,
    nodes_text,
    percent,
    size_text,
    untold,
    zeros_notes,
)

NAMES_WIDTH = 60  # characters of the node names given for each reason; the JSON names all
NAME_WIDTH = 30  # characters of a node's name in a table
REASONS_SHOWN = 6
NODES_SHOWN = 12  # rows of an inspection
OUTPUTS_SHOWN = 12
BLAMED = 5  # layers of a validation
USED = {"histogram": "values", "moments": "rows of layer inputs"}  # what a share is of

Parts = list[RenderableType]
Pairs = tuple[tuple[str, str], ...]  # of a node and what is said of it


def render(report: Report) -> RenderableType:
    """What was made of a model, and the proof."""
    table, result = _measures(report), _verdict(report)
    parts: Parts = [*_headline(report.headline), _title(report), table, result]
    parts += [*front_table(report.points), *_done(report)]
    title = "left alone" if report.coverage is None else "run in float"
    parts += grouped(title, left_alone(report))
    notes = (*compared(report), *report.notes, *zeros_notes(report), *untold(report))
    parts += notes_of(notes)
    return Group(*parts, *effort(report.seconds, report.memory_peak))


def _done(report: Report) -> Parts:
    """What was done to which node, where that differs from node to node."""
    if not report.done:
        return []
    lines = Table.grid(padding=(0, 0, 0, 2))
    lines.add_column(overflow="fold")
    lines.add_column(overflow="fold")
    for change in report.done[:NODES_SHOWN]:
        lines.add_row(Text(change.node), Text(change.what))
    rest = len(report.done) - NODES_SHOWN
    if rest > 0:
        lines.add_row(Text(f"{rest} more"), Text("--json names them"))
    title = f"{report.aim.done}: {nodes_text(report.count or 0)}"
    return [Text(f"\n{title}", style="bold"), lines]


def render_preview(report: Preview) -> RenderableType:
    """What each way would change and leave alone."""
    title = f"[bold]{escape(report.model)}[/] → [bold]{escape(report.output)}[/], not written"
    parts: Parts = [Text.from_markup(f"{title}  [dim](target {report.target})[/]")]
    parts += grouped("prepared", ((c.node, kind_of(c.what)) for c in report.prepared))
    alike: defaultdict[tuple[Pairs, Pairs], list[str]] = defaultdict(list)
    word = report.aim.done
    for name, effect in report.ways.items():
        alike[_effects(effect)].append(name)
    for (done, left), names in alike.items():
        parts.append(Text("\nway: " + "; ".join(names), style="bold green"))
        parts += grouped(word, done) or [Text(f"no node is {word}", style="yellow")]
        parts += grouped("left alone", left)
    if len(report.ways) > 1:
        parts.append(Text("\nAll of these ways are measured, and the best one is written."))
    return Group(*parts, *notes_of(report.notes))


def _effects(effect: Effect) -> tuple[Pairs, Pairs]:
    """What is done to which nodes, and what is left alone, each node with the first reason."""
    done = tuple((change.node, kind_of(change.what)) for change in effect.done)
    names = {node for node, _ in done}
    reasons = {s.node: s.reason for s in reversed(effect.skips) if s.node not in names}
    return done, tuple(reversed(reasons.items()))


def render_validation(report: Validation) -> RenderableType:
    """A candidate against its reference, output by output where there are several."""
    names = f"[bold]{escape(report.candidate)}[/] against [bold]{escape(report.reference)}[/]"
    parts: Parts = [*_headline(report.headline), Text.from_markup(names), _measures(report)]
    if len(report.comparison.outputs) > 1:
        parts += ["", _outputs(report.comparison)]
    written = [f"test vectors are in {report.vectors}"] if report.vectors else []
    notes = notes_of((*report.comparison.notes, *report.notes, *written))
    blamed, left = blame_table(report.blame, BLAMED), grouped("run in float", left_alone(report))
    return Group(*parts, _verdict(report), *blamed, *left, *notes)


def blame_table(blame: Iterable[Blame], top: int) -> Parts:
    """The layers that add most error, the worst first."""
    known = [layer for layer in blame if layer.own is not None and math.isfinite(layer.own)]
    worst = sorted(known, key=lambda layer: (layer.own, layer.sqnr))[:top]
    if not worst:
        return []
    table = Table(box=None, pad_edge=False)
    table.add_column("error starts here", no_wrap=True, min_width=NAME_WIDTH - 2)
    table.add_column("op")
    for heading in ("own", "so far"):
        table.add_column(heading, justify="right")
    table.add_column("most of it by", overflow="fold")
    for x in worst:
        values = (f"{x.own:.1f} dB", f"{x.sqnr:.1f} dB")
        table.add_row(ending(x.node), x.op, *values, Text(x.cause))
    return [table, ""]


def render_benchmark(report: Benchmark) -> RenderableType:
    """One line a model: p10, p50, p90, the spread, and the speed with its quartiles."""
    runtime = report.runtime
    what = f"milliseconds a run of {report.batch} sample{'s'[: report.batch != 1]}, taken in turn"
    how = f"{runtime.provider}, threads {runtime.threads or 'all'}, level {runtime.level}"
    table = Table("model", box=None, pad_edge=False)
    for heading in ("p10", "p50", "p90", "spread", "speed", "quartiles"):
        table.add_column(heading, justify="right")
    for name, latency in report.latencies.items():
        ratio = report.ratios.get(name)
        times = (f"{t:.3f}" for t in (latency.p10, latency.p50, latency.p90))
        speed = (f"{ratio.median:.2f}x", f"{ratio.low:.2f} to {ratio.high:.2f}") if ratio else ()
        style = "red" if ratio and ratio.is_slower else None
        table.add_row(escape(name), *times, f"{100 * latency.spread:.0f} %", *speed, style=style)
    return Group(Text(f"{what} ({how})", style="dim"), table, *notes_of(report.notes))


def render_inspection(report: Inspection, name: str) -> RenderableType:
    """What a model is made of and what can be compressed."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    for label, value in _facts(report):
        facts.add_row(Text(label, style="dim"), Text(value))
    parts: Parts = [Text(name, style="bold")]
    if report.quantized:
        sentence = f"already quantized ({report.quantized}): onnxc quantize leaves it alone"
        parts.append(Text(sentence, style="bold yellow"))
    able = [node for node in report.heavy if node.can]
    parts += [facts, _heavy(able)] if able else [facts, Text("no node can be compressed")]
    left = ((n.name, n.reason) for n in report.heavy if not n.can)
    return Group(*parts, *grouped("cannot be compressed", left), *notes_of(report.notes))


def render_calibrated(report: Calibrated) -> RenderableType:
    """What a statistics file holds, of how much of the data."""
    text = f"statistics of {report.tensors} tensors over {report.samples} samples"
    head = Text.from_markup(f"[bold]{escape(report.output)}[/]: {text}")
    facts = Table.grid(padding=(0, 2))
    for kind, count in report.statistics.items():
        share = {"histogram": report.binned, "moments": report.rows}.get(kind)
        used = f"of {percent(share)} of the {USED[kind]}" if share is not None else ""
        facts.add_row(Text(kind, style="dim"), Text(str(count), justify="right"), Text(used))
    facts.add_row(Text("file", style="dim"), Text(size_text(report.bytes), justify="right"))
    merged = [f"merged from {some(list(report.sources))}"] if len(report.sources) > 1 else []
    left = grouped("no moments", ((s.node, s.reason) for s in report.skips))
    notes = notes_of((*merged, *report.notes))
    return Group(head, facts, *left, *notes, *effort(report.seconds, report.memory_peak))


def render_packed(report: Packed) -> RenderableType:
    """Bytes before and after, in all and by the way that tensors are coded."""
    table = Table("", box=None, pad_edge=False)
    for heading in ("tensors", "before", "after", "ratio"):
        table.add_column(heading, justify="right")
    for way, tally in report.ways.items():
        table.add_row(way, str(tally.tensors), *_sizes(tally.before, tally.after))
    table.add_row("in all" if report.ways else "file", "", *_sizes(report.before, report.after))
    parts: Parts = [Text(f"{report.source} -> {report.output}", style="bold"), table]
    return Group(*parts, *effort(report.seconds, None))


def _sizes(before: int, after: int) -> Row:
    return size_text(before), size_text(after), f"{before / max(after, 1):.2f}x"


def _headline(sentence: str) -> Parts:
    return [Text(sentence, style="bold yellow")] if sentence else []


def _title(report: Report) -> Text:
    where = escape(report.output or "nothing written")
    made = ", ".join(w for w in (report.way, report.target and f"target {report.target}") if w)
    title = f"[bold]{escape(report.model)}[/] → [bold]{where}[/]"
    return Text.from_markup(f"{title}  [dim]({made})[/]" if made else title)


def _measures(report: Report | Validation) -> Table:
    table = Table("", box=None, pad_edge=False)
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("change")
    for row in measures(report):
        table.add_row(*row)
    return table


def _outputs(comparison: Comparison) -> Table:
    table = Table("output", box=None, pad_edge=False)
    for heading in ("SQNR", "cosine", "largest error", "agreement"):
        table.add_column(heading, justify="right")
    worst = sorted(comparison.outputs.items(), key=lambda item: item[1].sqnr)[:OUTPUTS_SHOWN]
    for name, f in comparison.outputs.items() if len(comparison.outputs) <= len(worst) else worst:
        error, agreement = f"{f.max_abs_error:.3g}", percent(f.agreement)
        table.add_row(escape(name), f"{f.sqnr:.1f} dB", f"{f.cosine:.5f}", error, agreement)
    rest = len(comparison.outputs) - len(worst)
    if rest:
        table.add_row(f"and {rest} better ones")
    return table


def _verdict(report: Report | Validation) -> RenderableType:
    is_good, sentence = verdict(report)
    mark, style = ("good", "bold green") if is_good else ("not good", "bold red")
    text = Text.assemble((f"{mark}: ", style), (sentence, "green" if is_good else "red"))
    return Group("", text, "")


def grouped(title: str, pairs: Iterable[tuple[str, str]]) -> Parts:
    """Nodes by reason, the most frequent reason first; a few names of each."""
    order = by_reason(pairs)
    if not order:
        return []
    lines = Table.grid(padding=(0, 0, 0, 2))
    lines.add_column(justify="right")
    lines.add_column(overflow="fold")
    for reason, nodes in order[:REASONS_SHOWN]:
        lines.add_row(Text(str(len(nodes))), Text(f"{reason}: {some(nodes)}"))
    rest = order[REASONS_SHOWN:]
    if rest:
        count = len({node for _, nodes in rest for node in nodes})
        lines.add_row(Text(str(count)), Text(f"for {len(rest)} other reasons; --json names them"))
    total = len({node for _, nodes in order for node in nodes})
    return [Text(f"{title}: {nodes_text(total)}", style="bold"), lines]


def some(names: list[str]) -> str:
    """The first name, more while there is room, and how many are left."""
    lengths = accumulate(len(name) + 2 for name in names)
    shown = max(1, sum(length <= NAMES_WIDTH for length in lengths))
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")


def notes_of(notes: Iterable[str]) -> Parts:
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column()
    lines.add_column(overflow="fold")
    for note in dict.fromkeys(notes):
        lines.add_row(Text("·", style="dim"), Text(note, style="dim"))
    return [lines] if lines.row_count else []


def effort(seconds: float | None, memory_peak: int | None) -> Parts:
    spent = [f"{seconds:.1f} s"] if seconds is not None else []
    spent += [f"peak memory {size_text(memory_peak)}"] if memory_peak is not None else []
    return [Text(", ".join(spent), style="dim")] if spent else []


def _heavy(nodes: list[HeavyNode]) -> Table:
    """The nodes with the most weight bytes, then the most MACs."""
    shown = sorted(nodes, key=lambda n: (-n.weight, -(n.macs or 0), n.name))[:NODES_SHOWN]
    table = Table("can be compressed", "op", "weight", box=None, pad_edge=False)
    for heading in ("bytes", "MACs"):
        table.add_column(heading, justify="right")
    table.add_column("how")
    for node in shown:
        shape = "x".join(map(str, node.shape or ()))
        macs = "?" if node.macs is None else count_text(node.macs)
        size = size_text(node.weight)
        table.add_row(ending(node.name), node.op, shape, size, macs, node.reason)
    rest = nodes if len(nodes) > len(shown) else []
    if rest:
        size = size_text(sum(n.weight for n in rest))
        table.add_row(f"and {len(nodes) - len(shown)} more; in all", "", "", size)
    return table


def ending(name: str) -> Text:
    """A name, its beginning cut where it is long: endings tell nodes apart."""
    return Text(name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :])


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
    if port.shape is None:
        return f"{port.name} {port.dtype} of any shape"
    dims = ", ".join("?" if d is None else str(d) for d in port.shape)
    return f"{port.name} {port.dtype} [{dims}]"
