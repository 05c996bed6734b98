"""A report as one file of HTML that needs nothing else: no network, no other file, no script.

    sections (`results`, `details`, `closing`) -> parts (`parts`) -> templates/page.html

Sections without parts are left out. jinja2 and matplotlib are imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxc.errors import OptionError
from onnxc.files import replacing
from onnxc.paths import check_output
from onnxc.report import TOLERATED_DROP, Benchmark, Report, Validation

if TYPE_CHECKING:
    from onnxc.html.parts import Section

Shown = Report | Validation | Benchmark

SUFFIXES = (".html", ".htm")

# key, title, the function that makes the parts, and the reports that it takes
SECTIONS: tuple[tuple[str, str, str, tuple[type[Any], ...]], ...] = (
    ("measured", "Before and after", "results.measured", (Report, Validation)),
    ("accuracy", "Accuracy", "results.accuracy", (Report, Validation)),
    ("latency", "Latency", "results.latency", (Report, Validation)),
    ("benchmark", "Latency", "results.benchmark", (Benchmark,)),
    ("size", "Size", "results.size", (Report, Validation)),
    ("changes", "What was done, and left alone", "details.changes", (Report,)),
    ("blame", "Which layers make the error", "details.blame", (Report, Validation)),
    ("ranges", "Ranges", "details.ranges", (Report,)),
    ("kernels", "Integer kernels", "details.kernels", (Report, Validation)),
    ("cuts", "Groups and ranks", "details.cuts", (Report,)),
    ("front", "Candidates", "closing.front", (Report,)),
    ("notes", "Notes", "closing.notes", (Report, Validation, Benchmark)),
    ("recipe", "Do it again", "closing.recipe", (Report,)),
    ("made", "Made with", "closing.made_with", (Report, Validation, Benchmark)),
)


def check_page(path: str | Path, *inputs: Any) -> Path:
    """The path, if a page can be made and written there.

    inputs: other files of the work, which it must not replace. Raises OptionError.
    """
    page = Path(path)
    if page.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{page} is no name of a page: let it end in .html")
    _templates()
    return check_output(page, *inputs)


def write_html(report: Shown, path: str | Path) -> None:
    """Write a report as a page, whole or not at all. Raises OptionError."""
    place = check_page(path)
    text = to_html(report)
    with replacing(place) as (file,):
        file.write(text.encode())


def to_html(report: Shown) -> str:
    """The page as text. Raises OptionError where jinja2 or matplotlib are missing."""
    found: str = (
        _templates()
        .get_template("page.html")
        .render(
            report=report,
            heading=_heading(report),
            sections=sections(report),
        )
    )
    return found


def sections(report: Shown) -> list[Section]:
    """The sections that have something to say."""
    from onnxc.html.parts import Section

    found = []
    for key, title, place, kinds in SECTIONS:
        module, name = place.split(".")
        if isinstance(report, kinds):
            make = getattr(import_module(f"onnxc.html.{module}"), name)
            found.append(Section(key, title, tuple(make(report))))
    return [section for section in found if section.parts]


def _heading(report: Shown) -> dict[str, Any]:
    """Title, subtitle, verdict and headline."""
    if isinstance(report, Benchmark):
        names = ", ".join(report.latencies)
        return {"title": f"Latency of {names}", "way": f"batches of {report.batch}", "tiles": []}
    if isinstance(report, Validation):
        title, way = f"{report.candidate} against {report.reference}", ""
    else:
        title = f"{report.model} → {report.output or 'nothing written'}"
        way = ", ".join(x for x in (report.way, report.target and f"target {report.target}") if x)
    verdict = {"is_good": report.is_good, "sentence": report.verdict}
    kept = {"headline": report.headline, "tiles": list(_tiles(report))}
    return {"title": title, "way": way, "verdict": verdict, **kept}


def _tiles(report: Report | Validation) -> Iterator[tuple[str, str, str]]:
    """The figures that matter most: value, what it is, tone."""
    ratio = report.before.bytes / max(report.after.bytes, 1)
    size = (f"{ratio:.2f}x", "smaller") if ratio >= 1 else (f"{1 / ratio:.2f}x", "larger")
    yield *size, _tone(ratio, ratio)
    if report.speedup is not None:
        speed = report.speedup
        yield f"{speed.median:.2f}x", "speed", _tone(speed.low, speed.high)
    found = report.comparison
    if found is not None and found.top1 is not None:
        change = found.top1[1] - found.top1[0]
        yield f"{100 * change:+.2f}", "points of top-1", "bad" if -change > TOLERATED_DROP else ""
    if found is not None and found.agreement is not None:
        yield f"{100 * found.agreement:.1f} %", "agreement", ""
    if found is not None:
        yield f"{found.sqnr:.1f} dB", "SQNR", ""
    if report.coverage is not None and report.coverage.total:
        yield f"{report.coverage.integer} of {report.coverage.total}", "integer kernels", ""


def _tone(low: float, high: float) -> str:
    """Of a ratio that is a gain above 1; none where it may be either."""
    return "good" if low > 1 else "bad" if high < 1 else ""


def _templates() -> Any:
    """Jinja's environment. Raises OptionError, naming the extra to install."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            'pages need jinja2 and matplotlib: pip install "onnxc[report]"'
        ) from error
    folder = Path(__file__).with_name("templates")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
