"""The candidates of a search on the console: those that no other one beats, the smallest first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxc.report import Point
from onnxc.words import size_text

SHOWN = 8


def front_table(points: Sequence[Point]) -> list[RenderableType]:
    """One line a candidate: its size, speed and drop, and whether it is the result."""
    front = sorted((p for p in points if p.on_front or p.is_best), key=lambda p: p.bytes)
    if not front:
        return []
    table = Table(box=None, pad_edge=False)
    table.add_column(f"best of {len(points)} candidates", overflow="fold")
    for heading in ("file", "speed", "drop", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in _nearest(front):
        table.add_row(Text(point.name), *_figures(point), _word(point))
    return ["", table]


def _nearest(front: Sequence[Point]) -> Sequence[Point]:
    """The candidates around the result."""
    at = next((i for i, point in enumerate(front) if point.is_best), 0)
    start = max(0, min(at - SHOWN // 2, len(front) - SHOWN))
    return front[start : start + SHOWN]


def _figures(point: Point) -> tuple[str, ...]:
    speed = "" if point.speed is None else f"{point.speed:.2f}x"
    interval = f"{point.low:.2f} to {point.high:.2f}"
    return size_text(point.bytes), speed, f"{point.drop:.2f}", interval


def _word(point: Point) -> Text:
    if point.is_best:
        return Text("the result", style="bold green")
    return Text("" if point.is_met else "misses the bound", style="red")
