"""Sections on single layers and tensors: what was done to them, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from onnxc.core import Change
from onnxc.html import figures
from onnxc.html.parts import Bar, Cell, Fold, Gallery, Group, Part, Picture, Prose, Strip, Table
from onnxc.report import Report, Validation
from onnxc.spans import Span
from onnxc.words import by_reason, kind_of, left_alone, nodes_text, percent

SPANS_SHOWN = 12
BLAMED = 40  # layers in the picture
WORST = 5  # layers that are named

# How much of a layer a change says that it leaves: (pattern, what the share is of)
SHARES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^(?P<out>\d+) of (?P<all>\d+) channels out"), "channels"),
    (re.compile(r", (?P<percent>\d+)% of its MACs"), "MACs"),
)

# What changes of one kind have in common, where the words differ from node to node
GISTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^\d+ channels (\w+), .*"), r"channels \1"),
    (re.compile(r"^\d+ of \d+ channels out by (\w+).*"), r"channels out by \1"),
    (re.compile(r"^(\w+) \S+ (folded|merged) in$"), r"\1 \2 in"),
    (re.compile(r"^factors .* merged in$"), "factors merged in"),
    (re.compile(r"^(reads|shares) .*"), r"\1 what another node has"),
    (re.compile(r"^(\S+) of rank .*"), r"\1 of low rank"),
    (re.compile(r"^\d+ values, codes"), "codes"),
)


def changes(report: Report) -> Iterator[Part]:
    """What was done to which nodes, by kind; what was left alone, by reason."""
    done = by_reason(map(_gist, report.changes))
    if done:
        total = len({change.node for change in report.changes})
        yield Prose(f"Changed: {nodes_text(total)}.")
        yield from _groups(done)
    skipped = _skipped(report)
    if skipped:
        yield Prose(f"Left alone: {nodes_text(len({node for node, _ in skipped}))}.")
        yield from _groups(by_reason(skipped))


def _gist(change: Change) -> tuple[str, str]:
    """A node, with what was done to it where that says more, and what many have in common."""
    text = kind_of(change.what)
    for pattern, common in GISTS:
        text = pattern.sub(common, text)
    return (change.node if text == change.what else f"{change.node}: {change.what}"), text


def _skipped(report: Report) -> list[tuple[str, str]]:
    """Nodes that nothing changed, each with the first reason."""
    changed = {change.node for change in report.changes}
    reasons = {s.node: s.reason for s in reversed(report.skips) if s.node not in changed}
    return list(reversed(reasons.items()))


def _groups(found: Iterable[tuple[str, list[str]]]) -> Iterator[Part]:
    for text, nodes in found:
        yield Group(len(nodes), text, tuple(nodes))


def cuts(report: Report) -> Iterator[Part]:
    """Groups of channels and ranks: what is left of each."""
    rows = [row for change in report.done if (row := _cut(change)) is not None]
    if rows:
        yield Prose(f"{report.aim.done.capitalize()}: {nodes_text(len(rows))}.")
        yield Table(("layer", "how", "left"), tuple(rows), names=2)


def _cut(change: Change) -> tuple[Cell, ...] | None:
    for pattern, what in SHARES:
        found = pattern.search(change.what)
        if found:
            share = _share(found.groupdict())
            return change.node, change.what, Bar(f"{100 * share:.0f} % of {what}", share)
    return None


def _share(found: dict[str, str]) -> float:
    if "percent" in found:
        return int(found["percent"]) / 100
    return 1 - int(found["out"]) / int(found["all"])


def blame(report: Report | Validation) -> Iterator[Part]:
    """Which layers make the error."""
    rows = report.blame
    if not rows:
        return
    known = [row for row in rows if row.own is not None]
    worst = sorted(known or rows, key=lambda r: r.sqnr if r.own is None else r.own)[:WORST]
    what = "own error" if known else "error"
    names = ", ".join(row.node for row in worst)
    yield Prose(f"The layers with the largest {what}: {names}.")
    kept = {row.node for row in sorted(rows, key=lambda r: r.sqnr)[:BLAMED]}
    shown = [row for row in rows if row.node in kept]
    caption = "Error of each layer's output in the result, in the order of the graph."
    yield Picture(figures.blame(shown), caption)
    heads = ("layer", "op", "dB of its output", "dB of its own")
    cells = ((r.node, r.op, _decibel(r.sqnr), _decibel(r.own)) for r in rows)
    yield Fold("All figures", (Table(heads, tuple(cells), names=2),))


def _decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def ranges(report: Report) -> Iterator[Part]:
    """What calibration saw of quantized tensors, and which part the integers reach."""
    rows = report.spans
    if not rows:
        return
    order = sorted(rows, key=lambda row: -row.clipped)
    most = order[0].clipped
    clips = f"at most {percent(most)} of a tensor's values" if most else "no value"
    yield Prose(
        f"{len(rows)} tensors were quantized by what calibration saw of them; the integers clip "
        f"{clips}."
    )
    drawn = [row for row in order[:SPANS_SHOWN] if len(row.counts) > 1]
    if drawn:
        yield Prose("Histograms with logarithmic counts; grey: what the integers reach.", "dim")
        yield Gallery(tuple(Picture(figures.span(row), _span_text(row)) for row in drawn))
    yield Fold(f"All {len(rows)} tensors", (_spans(rows),))


def _span_text(row: Span) -> str:
    clipped = f", {percent(row.clipped)} clipped" if row.clipped else ""
    return f"{row.tensor}: {row.type}{clipped}"


def _spans(rows: Iterable[Span]) -> Table:
    heads = ("tensor", "type", "scale", "zero", "integers reach", "values seen", "clipped")
    cells = (
        (
            *(row.tensor, row.type, f"{row.scale:.4g}", str(row.zero_point)),
            *(_from_to(row.low, row.high), _from_to(row.least, row.most), percent(row.clipped)),
        )
        for row in rows
    )
    return Table(heads, tuple(cells), names=2)


def _from_to(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def kernels(report: Report | Validation) -> Iterator[Part]:
    """Which heavy nodes run in integers, and why others do not."""
    found = report.coverage
    if found is None or not found.total:
        return
    yield Prose(
        f"{found.integer} of {found.total} heavy nodes run in integer kernels, read back from the "
        "graph that ONNX Runtime makes."
    )
    cells = tuple(
        ("b" if kernel.integer else "a", f"{kernel.node}: {kernel.op}") for kernel in found.kernels
    )
    yield Strip(cells, "One cell a heavy node, in order; blue: integers, grey: float.")
    yield from _groups(by_reason(left_alone(report)))
    if found.orphans:
        yield Prose(
            f"{found.orphans} of the {found.boundaries} Q/DQ nodes left quantize nothing.", "bad"
        )
