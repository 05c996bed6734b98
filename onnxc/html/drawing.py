"""Figures as inline SVG: text stays text, colours are those of the page, bytes never change.

matplotlib draws in the colours of INKS, and `to_svg` puts variables of the page's style in their
place, so that a dark page has a dark figure. What only files need (namespaces, metadata, names of
groups) is left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 4.3  # inches: 310 points, so that a phone shows letters as large as they are
INK, DIM, LINE, BEFORE, AFTER, GOOD, BAD, GROUND = (f"#0{i}0{i}0{i}" for i in range(1, 9))
TYPES = tuple(f"#1{i}1{i}1{i}" for i in range(1, 7))  # one after the other
INKS = {
    **{INK: "--ink", DIM: "--dim", LINE: "--line", BEFORE: "--before", AFTER: "--after"},
    **{GOOD: "--good", BAD: "--bad", GROUND: "--card"},
    **{color: f"--type{i}" for i, color in enumerate(TYPES)},
}

STYLE: Any = {  # of matplotlib
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxc",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": DIM,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

_HEAD = re.compile(
    r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>",
    re.DOTALL,
)
_SIZE = re.compile(r'(<svg)[^>]*?width="([\d.]+)pt"[^>]*?height="([\d.]+)pt"[^>]*?>')
_GROUPS = re.compile(r"<g>\s*</g>")
_TAG = re.compile(r"<[^>]*>")
_IN_TAGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r' id="(?![mph][0-9a-f]{8})[^"]*"'), ""),
    (re.compile(r' transform="rotate\(-0 [^"]*"'), ""),
    (re.compile(r"'DejaVu Sans'[^;\"]*"), "system-ui, sans-serif"),
    (re.compile(r"(\.\d)\d+"), r"\1"),
    (re.compile(r"\s+"), " "),
)


@contextmanager
def canvas(height: float, width: float = WIDTH, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes (one, or an array of one a row), to draw on."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="none")
        yield figure, figure.subplots(rows, 1)


def clear(axes: Axes, grid: str = "x") -> None:
    """No marks at the ticks, and a grid across one axis."""
    axes.set_facecolor("none")
    axes.tick_params(left=False, bottom=False)
    if grid:
        axes.grid(axis="x" if grid == "x" else "y")


def to_svg(figure: Figure) -> str:
    """The drawing as an element of a page. To be called while the canvas is open."""
    file = StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings(action="ignore"):  # of letters that the font has not
        surface: Any = FigureCanvasSVG(figure)  # its writer has no types
        surface.print_svg(file, metadata=nothing)
    text = _SIZE.sub(r'\1 viewBox="0 0 \2 \3">', _HEAD.sub("", file.getvalue()), count=1)
    text = _TAG.sub(_cleared, text)
    while _GROUPS.search(text):
        text = _GROUPS.sub("", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _cleared(tag: re.Match[str]) -> str:
    """A tag in short, its colours those of the page; what stands between tags is left alone."""
    text = tag[0]
    for pattern, short in _IN_TAGS:
        text = pattern.sub(short, text)
    for color, name in INKS.items():
        text = text.replace(color, f"var({name})")
    return text
