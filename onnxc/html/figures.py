"""The pictures of a report; each function draws one from plain figures and gives its SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from onnxc.anatomy import Layer
from onnxc.html.drawing import (
    AFTER,
    BAD,
    BEFORE,
    DIM,
    GOOD,
    INK,
    LINE,
    TYPES,
    WIDTH,
    canvas,
    clear,
    to_svg,
)
from onnxc.report import Blame, Point
from onnxc.spans import Span

NAME = 26  # characters of a node's name beside a bar
BAR = 0.2  # inches of a row
LONGEST = 0.98  # quantile of times up to which a picture reaches
BINS = 40
CLEAR = 80.0  # dB: what is above is no error that anybody sees

Array = NDArray[Any]
Interval = tuple[float, float]


def ending(name: str) -> str:
    """A name, its beginning cut where it is long: endings tell nodes apart."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def shares(rows: Mapping[str, tuple[float, Interval]], colors: Sequence[str]) -> str:
    """Shares in percent with their intervals, a row each."""
    with canvas(0.55 + 0.22 * len(rows)) as (figure, axes):
        for y, ((share, (low, high)), color) in enumerate(zip(rows.values(), colors, strict=True)):
            axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2)
            axes.plot([100 * share], [y], "o", color=color, markersize=5)
        _named(axes, list(rows))
        axes.set_xlabel("%, with 95 % confidence interval")
        return to_svg(figure)


def change(share: float, interval: Interval) -> str:
    """A change in points with its interval, beside zero."""
    low, high = interval
    color = BAD if high < 0 else GOOD if low > 0 else AFTER
    with canvas(0.75) as (figure, axes):
        axes.axvline(0, color=DIM, linewidth=1, linestyle=":")
        axes.plot([100 * low, 100 * high], [0, 0], color=color, linewidth=2)
        axes.plot([100 * share], [0], "o", color=color, markersize=5)
        _named(axes, ["change"])
        axes.set_xlabel("points of top-1, with 95 % confidence interval")
        return to_svg(figure)


def latencies(times: Mapping[str, Sequence[float]], colors: Sequence[str]) -> str:
    """Histograms of milliseconds, one model below the other on one axis; a mark at the median."""
    top = max(float(np.quantile(taken, LONGEST)) for taken in times.values())
    low = min(min(taken) for taken in times.values())
    edges = np.linspace(low, max(top, low * 1.001), BINS + 1)
    with canvas(0.5 + 0.55 * len(times), rows=len(times)) as (figure, rows):
        panels = [*np.atleast_1d(rows)]
        for axes, (name, taken), color in zip(panels, times.items(), colors, strict=True):
            counts, _ = np.histogram(np.clip(taken, edges[0], edges[-1]), edges)
            axes.stairs(counts, edges, fill=True, color=color)
            axes.axvline(float(np.median(taken)), color=INK, linewidth=1)
            _bare(axes, edges)
            axes.set_title(name, pad=2)
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel("milliseconds a run; the line is the median")
        return to_svg(figure)


def ratios(paired: Sequence[float], quartiles: Interval) -> str:
    """How many times faster, round by round, with the quartiles and the line of no gain."""
    low, high = (float(q) for q in np.quantile(paired, (1 - LONGEST, LONGEST)))
    edges = np.linspace(min(low, 1.0), max(high, 1.0) + 1e-6, BINS + 1)
    counts, _ = np.histogram(np.clip(paired, edges[0], edges[-1]), edges)
    with canvas(1.1) as (figure, axes):
        axes.axvspan(*quartiles, color=LINE, linewidth=0)
        axes.stairs(counts, edges, fill=True, color=AFTER)
        axes.axvline(1, color=BAD, linewidth=1, linestyle=":")
        axes.axvline(float(np.median(paired)), color=INK, linewidth=1)
        _bare(axes, edges)
        axes.set_xlabel("times faster in a round; grey: quartiles, dotted: no gain")
        return to_svg(figure)


def types(kinds: Mapping[str, tuple[int, int]], unit: float, name: str) -> str:
    """Bytes of both files by element type, stacked. unit: bytes of one on the axis."""
    with canvas(1.25) as (figure, axes):
        start = np.zeros(2)
        for number, (kind, both) in enumerate(kinds.items()):
            widths = np.array(both) / unit
            color = TYPES[min(number, len(TYPES) - 1)]
            axes.barh([0, 1], widths, left=start, color=color, height=0.6, label=kind)
            start = start + widths
        _named(axes, ["before", "after"])
        axes.set_xlabel(name)
        figure.legend(loc="outside upper left", ncols=6, handlelength=0.8, columnspacing=1)
        return to_svg(figure)


def layers(rows: Sequence[Layer], unit: float, name: str) -> str:
    """Bytes of layers before and after, in the order of the graph."""
    with canvas(0.5 + BAR * len(rows)) as (figure, axes):
        y = np.arange(len(rows))
        axes.barh(y, [r.before / unit for r in rows], color=BEFORE, height=0.75)
        axes.barh(y, [r.after / unit for r in rows], color=AFTER, height=0.4)
        _named(axes, [ending(r.node) for r in rows])
        axes.set_xlabel(f"{name}; wide bars before, narrow ones after")
        return to_svg(figure)


def blame(rows: Sequence[Blame]) -> str:
    """dB of layers in the order of the graph: all error so far, and a layer's own where known."""
    with canvas(0.5 + BAR * len(rows)) as (figure, axes):
        y = np.arange(len(rows))
        error = [_shown(r.sqnr) for r in rows]
        worst = sorted(error)[: max(1, len(rows) // 10)][-1]
        axes.barh(y, error, color=[BAD if e <= worst else AFTER for e in error], height=0.6)
        own = [(_shown(r.own), at) for at, r in enumerate(rows) if r.own is not None]
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=INK, markersize=3)
        _named(axes, [ending(r.node) for r in rows])
        axes.set_xlabel("dB, less is worse" + ("; dots: own error" if own else ""))
        return to_svg(figure)


def _shown(decibel: float) -> float:
    """Within what can be drawn: equal tensors have no error, lost ones nothing but error."""
    return float(np.clip(np.nan_to_num(decibel, nan=0.0), 0.0, CLEAR))


def span(row: Span) -> str:
    """A histogram of what was seen, log counts, and the range that the integers reach."""
    with canvas(0.85, width=WIDTH / 2) as (figure, axes):
        edges = np.linspace(row.least, row.most, len(row.counts) + 1)
        axes.axvspan(row.low, row.high, color=LINE, linewidth=0)
        axes.stairs(np.log10(1 + np.array(row.counts)), edges, fill=True, color=AFTER)
        for end in (row.low, row.high):
            axes.axvline(end, color=BAD if row.clipped else DIM, linewidth=1)
        _bare(axes, np.array([min(row.least, row.low), max(row.most, row.high)]))
        axes.locator_params(axis="x", nbins=5)
        return to_svg(figure)


def front(points: Sequence[Point], by: str) -> str:
    """Drop against size or speed: the front joined, the result marked. by: "bytes" or "speed"."""

    def at(point: Point) -> float:
        return point.bytes / 1e6 if by == "bytes" else point.speed or 0.0

    with canvas(2.4) as (figure, axes):
        kept = _best(sorted(points, key=at, reverse=by == "speed"))
        axes.plot([at(p) for p in kept], [p.drop for p in kept], color=LINE, linewidth=1.5)
        for point in points:
            color = AFTER if point.is_met else BAD
            x, y = at(point), point.drop
            axes.plot([x, x], [point.low, point.high], color=color, linewidth=0.7)
            axes.plot([x], [y], "o", color=color, markersize=4 if point.on_front else 3)
            if point.is_best:
                axes.plot([x], [y], "o", color=INK, markersize=10, fillstyle="none")
        clear(axes, "y")
        axes.set_ylabel("drop of the metric")
        axes.set_xlabel("MB of the file" if by == "bytes" else "times faster")
        return to_svg(figure)


def _best(points: Sequence[Point]) -> list[Point]:
    """Those that drop less than all before them."""
    found: list[Point] = []
    for point in points:
        if not found or point.drop < found[-1].drop:
            found.append(point)
    return found


def _named(axes: Axes, names: Sequence[str]) -> None:
    """Rows from above to below, with their names."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    clear(axes)


def _bare(axes: Axes, edges: Array) -> None:
    """Counts need no axis."""
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    clear(axes, "")
