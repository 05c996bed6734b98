"""Sections on the result as a whole: what was measured, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnxc.anatomy import Anatomy, Layer
from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison
from onnxc.html import figures
from onnxc.html.drawing import AFTER, BEFORE, TYPES
from onnxc.html.parts import Bar, Fold, Part, Picture, Prose, Table
from onnxc.report import Benchmark, Report, Validation
from onnxc.words import measures, percent, size_text, spread

LAYERS_SHOWN = 40  # in the picture; the table names all
ROUGH = 0.02  # half of an interval: above it, more samples are worth their time
SIDES = ("before", "after")
NARROW = 3  # models in a picture of latencies, beside the first


def measured(report: Report | Validation) -> Iterator[Part]:
    """Before and after, as on the console."""
    yield Table(("", "before", "after", "change"), tuple(measures(report)))


def accuracy(report: Report | Validation) -> Iterator[Part]:
    """Shares with their intervals, and what the change may be."""
    comparison = report.comparison
    if comparison is None:
        return
    yield from _change(comparison)
    yield from _shares(comparison)
    if len(comparison.outputs) > 1:
        yield Fold("Each output", (_outputs(comparison),))


def _shares(comparison: Comparison) -> Iterator[Part]:
    rows: dict[str, tuple[float, figures.Interval]] = {}
    pairs = ((comparison.top1, comparison.top1_intervals, "top-1"),)
    for found, intervals, name in (*pairs, (comparison.top5, comparison.top5_intervals, "top-5")):
        if found and intervals:
            rows |= {f"{name} {s}": (found[i], intervals[i]) for i, s in enumerate(SIDES)}
    colors = [BEFORE, AFTER] * (len(rows) // 2)
    if comparison.agreement is not None and comparison.agreement_interval:
        rows["agreement"] = comparison.agreement, comparison.agreement_interval
        colors.append(AFTER)
    if not rows:
        yield Prose(f"SQNR {comparison.sqnr:.1f} dB; the outputs name no classes", "dim")
        return
    yield Picture(figures.shares(rows, colors), f"Over {comparison.samples} samples.")
    if comparison.change_interval is not None and comparison.top1 is not None:
        share = comparison.top1[1] - comparison.top1[0]
        drawn = figures.change(share, comparison.change_interval)
        yield Picture(drawn, "The change; both models judged the same samples.")
    cells = ((k, percent(s), _from_to(i)) for k, (s, i) in rows.items())
    yield Fold("All figures", (Table(("", "share", "95 % interval"), tuple(cells)),))


def _change(comparison: Comparison) -> Iterator[Part]:
    top1, flips, interval = comparison.top1, comparison.flips, comparison.change_interval
    if top1 is None or flips is None or interval is None:
        return
    lost, won = flips
    share, n = (won - lost) / max(comparison.decisions, 1), comparison.decisions
    low, high = (100 * end for end in interval)
    counts = f"{lost} were lost and {won} were won" if lost or won else "none was lost or won"
    yield Prose(
        f"Of {n} decisions {counts}: top-1 changes by "
        f"{100 * share:+.2f} points, with 95 % confidence between {low:+.2f} and {high:+.2f}."
    )
    if (high - low) / 2 > 100 * ROUGH:
        yield Prose("So few samples cannot tell more: judge by more of them, with --val.", "dim")


def _from_to(interval: figures.Interval) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"


def _outputs(comparison: Comparison) -> Table:
    heads = ("output", "SQNR", "cosine", "largest error", "agreement")
    rows = (
        (n, f"{f.sqnr:.1f} dB", f"{f.cosine:.5f}", f"{f.max_abs_error:.3g}", percent(f.agreement))
        for n, f in comparison.outputs.items()
    )
    return Table(heads, tuple(rows))


def latency(report: Report | Validation) -> Iterator[Part]:
    """The rounds of both models, and the ratio round by round."""
    before, after = report.before.latency, report.after.latency
    if before is None or after is None or report.speedup is None:
        return
    yield from _rounds({"before": before, "after": after}, {"after": report.speedup})


def benchmark(report: Benchmark) -> Iterator[Part]:
    """The rounds of all models; ratios are against the first."""
    yield from _rounds(report.latencies, report.ratios)


def _rounds(times: Mapping[str, Latency], ratios: Mapping[str, Ratio]) -> Iterator[Part]:
    first = next(iter(times.values()))
    yield Prose(
        f"{len(first.samples)} rounds, the models in turn: a ratio holds where the milliseconds "
        "drift."
    )
    heads = ("ms", "p10", "p50", "p90", "spread", "times faster (quartiles)")
    rows = tuple(
        (name, *(f"{t:.3f}" for t in (x.p10, x.p50, x.p90)), f"{100 * x.spread:.0f} %", ratio)
        for name, x in times.items()
        for ratio in [spread(ratios[name]) if name in ratios else ""]
    )
    yield Table(heads, rows)
    if not all(len(x.samples) > 1 for x in times.values()):
        return
    colors = [BEFORE, *[AFTER] * (len(times) - 1)]
    drawn = figures.latencies({name: x.samples for name, x in times.items()}, colors)
    yield Picture(drawn, "How long a run takes, round by round.")
    for name in list(ratios)[:NARROW]:
        pairs = zip(first.samples, times[name].samples, strict=True)
        quartiles = (ratios[name].low, ratios[name].high)
        drawn = figures.ratios([a / b for a, b in pairs], quartiles)
        yield Picture(drawn, f"Speed of {name} in each round, against the first.")


def size(report: Report | Validation) -> Iterator[Part]:
    """Bytes by type and by layer."""
    if report.anatomy is None:
        return
    found = report.anatomy
    before, after = found.files
    unit, name = (1e6, "MB") if max(before, after) >= 10**6 else (1e3, "kB")
    yield Prose(f"{size_text(before)} became {size_text(after)}.")
    kinds = {**found.types, "graph": _graph(found)}
    yield Picture(figures.types(_few(kinds), unit, name), "Bytes by element type, both files.")
    yield Picture(figures.layers(_largest(found), unit, name), _told(found))
    parts = (_types(kinds), _layers(found))
    yield Fold("All figures", tuple(part for part in parts if part.rows))


def _graph(found: Anatomy) -> tuple[int, int]:
    """What is no constant: nodes, names."""
    held = [sum(both[side] for both in found.types.values()) for side in (0, 1)]
    plain = [found.files[side] + found.saved[side] for side in (0, 1)]
    return max(plain[0] - held[0], 0), max(plain[1] - held[1], 0)


def _few(kinds: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The types with the most bytes; those for which there is no colour are one."""
    order = sorted(kinds.items(), key=lambda item: -max(item[1]))
    kept, others = order[: len(TYPES) - 1], [both for _, both in order[len(TYPES) - 1 :]]
    rest = {"others": (sum(b[0] for b in others), sum(b[1] for b in others))} if others else {}
    return {**dict(kept), **rest}


def _largest(found: Anatomy) -> list[Layer]:
    """The largest layers, in the order of the graph, and the rest."""
    order = sorted(found.layers, key=lambda x: -max(x.before, x.after))
    kept = {layer.node for layer in order[:LAYERS_SHOWN]}
    shown = [layer for layer in found.layers if layer.node in kept]
    others = order[LAYERS_SHOWN:]
    rest = Layer(
        "the rest",
        "",
        found.rest[0] + sum(x.before for x in others),
        found.rest[1] + sum(x.after for x in others),
    )
    return [*shown, rest]


def _told(found: Anatomy) -> str:
    count = len(found.layers)
    if count > LAYERS_SHOWN:
        return f"Bytes of the {LAYERS_SHOWN} largest layers of {count}, in the order of the graph."
    return f"Bytes of {count} layers, in the order of the graph; small ones are in the rest."


def _types(kinds: Mapping[str, tuple[int, int]]) -> Table:
    rows = ((name, *map(size_text, both)) for name, both in kinds.items())
    return Table(("type", *SIDES), tuple(rows))


def _layers(found: Anatomy) -> Table:
    most = max((max(x.before, x.after) for x in found.layers), default=1)
    rows = [
        (x.node, x.op, Bar(size_text(x.before), x.before / most, "a"), _after(x, most))
        for x in found.layers
    ]
    first, second = (
        Bar(size_text(count), min(count / most, 1.0), tone)
        for count, tone in zip(found.rest, "ab", strict=True)
    )
    saved = [("saved by packing", "", *map(size_text, found.saved))] if any(found.saved) else []
    files = ("file", "", *map(size_text, found.files))
    return Table(
        ("layer", "op", *SIDES), (*rows, ("the rest", "", first, second), *saved, files), names=2
    )


def _after(layer: Layer, most: int) -> Bar:
    return Bar(size_text(layer.after), layer.after / most)
