"""The report of `onnxc analyze` on the console: the verdict first, then the layers, then advice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxc.console import (
    Parts,
    blame_table,
    effort,
    ending,
    grouped,
    notes_of,
    some,
)
from onnxc.report import Advice, Analysis, Kept, Sensitivity
from onnxc.sensitivity import OTHERS
from onnxc.words import count_text, percent, size_text

TOP = 10  # rows of a table
NAME = 30  # characters of the first column
QUANTIZED = {"weights": "weights", "activations": "activations", "both": "both"}


def render_analysis(report: Analysis, top: int = TOP) -> RenderableType:
    """Where a model is sensitive, or where a quantized file goes wrong."""
    whole = report.quantized or report.model
    title = f"[bold]{escape(whole)}[/]"
    if report.quantized:
        title += f" against [bold]{escape(report.model)}[/]"
    judged = f"target {report.target}, {report.samples} sample{'s'[: report.samples != 1]}"
    parts: Parts = [Text.from_markup(f"{title}  [dim]({judged})[/]")]
    parts += [Text(report.verdict, style="bold"), ""]
    if report.exclude:
        parts += [Text("onnxc quantize " + Path(report.model).name + " … " + report.exclude), ""]
    parts += _choice(report)
    parts += _quantized(report.layers, top)
    for name, done in OTHERS.items():
        parts += _other(name, done, report.layers, max(top // 2, 1))
    parts += blame_table(report.blame, top)
    parts += _advised(report.advice)
    parts += grouped("not compared", ((s.node, s.reason) for s in report.unmatched))
    parts += grouped("not tried", ((s.node, s.reason) for s in report.skips))
    return Group(*parts, *notes_of(report.notes), *effort(report.seconds, report.memory_peak))


def _choice(report: Analysis) -> Parts:
    """The quantized model, with more and more layers left float."""
    rows = [("all quantized", report.plain)] if report.plain else []
    rows += [("those float", report.best)] if report.best else []
    parts: Parts = []
    if rows:
        table = _table("as onnxc quantize does", "agreement", "SQNR", "file", "speed")
        for name, kept in rows:
            size = "" if kept.bytes is None else size_text(kept.bytes)
            speed = "" if kept.speed is None else f"{kept.speed.median:.2f}x"
            table.add_row(name, percent(kept.agreement), f"{kept.sqnr:.1f} dB", size, speed)
        parts += [table, ""]
    if len(report.kept) > 1:
        table = _table("left float, one by one", "agreement", "SQNR")
        for kept in report.kept:
            table.add_row(_last(kept), percent(kept.agreement), f"{kept.sqnr:.1f} dB")
        parts += [table, Text("agreement as expected from the error", style="dim"), ""]
    return parts


def _last(kept: Kept) -> Text:
    return ending(kept.nodes[-1]) if kept.nodes else Text("none")


def _quantized(layers: Sequence[Sensitivity], top: int) -> Parts:
    """The layers by what quantizing them alone costs for what it gains."""
    mine = [x for x in layers if x.what in QUANTIZED]
    order = list(dict.fromkeys(x.node for x in mine))
    if not order:
        return []
    told = {(x.node, x.what): x for x in mine}
    kinds = [what for what in QUANTIZED if any(x.what == what for x in mine)]
    names = ("acts" if kind == "activations" else kind for kind in kinds)
    table = _table("quantized alone: dB", *names, "loss", "bytes", "MACs")
    for node in order[:top]:
        found = {what: told[node, what] for what in kinds if (node, what) in told}
        worst = found.get("both") or next(iter(found.values()))
        levels = (f"{found[w].sqnr:.1f}" if w in found else "" for w in kinds)
        saved = max(x.bytes for x in found.values())
        work = max(x.macs for x in found.values())
        sizes = (size_text(saved) if saved else "", count_text(work) if work else "")
        table.add_row(ending(node), *levels, percent(worst.loss), *sizes)
    return [table, *_rest(len(order), top)]


def _other(name: str, done: str, layers: Sequence[Sensitivity], top: int) -> Parts:
    """The same of another pass."""
    mine = [x for x in layers if x.what == name]
    if not mine:
        return []
    table = _table(f"{done}: dB", "outputs", "loss", "bytes", "MACs")
    for x in mine[:top]:
        sizes = size_text(x.bytes) if x.bytes else "", count_text(x.macs) if x.macs else ""
        table.add_row(ending(x.node), f"{x.sqnr:.1f}", percent(x.loss), *sizes)
    return [table, *_rest(len(mine), top)]


def _rest(count: int, top: int) -> Parts:
    more = count - top
    return (
        [Text(f"and {more} less sensitive; --json names them", style="dim"), ""]
        if more > 0
        else [""]
    )


def _advised(advice: Iterable[Advice]) -> Parts:
    """What would help, and where."""
    lines = Table.grid(padding=(0, 0, 0, 2))
    lines.add_column(justify="right")
    lines.add_column(overflow="fold")
    for row in advice:
        gain = "" if row.gain is None else f" ({row.gain:+.1f} dB there)"
        where = f": {some(list(row.nodes))}" if row.nodes else ""
        lines.add_row(Text(str(len(row.nodes) or "")), Text(f"{row.what}{gain}{where}"))
    return [Text("what would help", style="bold"), lines, ""] if lines.row_count else []


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True, min_width=NAME)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
