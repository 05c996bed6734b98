"""The last sections: the candidates, notes, how to do it again, and with what it was made."""

from __future__ import annotations

from collections.abc import Iterator

from onnxc.html import figures
from onnxc.html.parts import Code, Notes, Part, Picture, Prose, Table
from onnxc.report import Benchmark, Report, Validation
from onnxc.words import compared, size_text, zeros_notes


def front(report: Report) -> Iterator[Part]:
    """Candidates of a search: drop against size and speed."""
    points = report.points
    if not points:
        return
    met = sum(point.is_met for point in points)
    yield Prose(
        f"{len(points)} candidates were measured, of which {met} keep the bound; red ones miss it. "
        "Lines join the best in what a picture shows, thin ones are intervals of the drop."
    )
    best = "".join(f" Circle: {point.name}." for point in points if point.is_best)
    yield Picture(figures.front(points, "bytes"), f"Drop against size.{best}")
    timed = [point for point in points if point.speed is not None]
    if timed:
        yield Picture(figures.front(timed, "speed"), f"Drop against speed.{best}")
    heads = ("candidate", "file", "times faster", "drop (interval)", "")
    yield Table(
        heads,
        tuple(
            (
                *(p.name, size_text(p.bytes), "" if p.speed is None else f"{p.speed:.2f}x"),
                f"{p.drop:+.2f} ({p.low:+.2f} to {p.high:+.2f})",
                "the result" if p.is_best else "" if p.is_met else "misses the bound",
            )
            for p in sorted(points, key=lambda p: p.bytes)
        ),
    )


def notes(report: Report | Validation | Benchmark) -> Iterator[Part]:
    """Sentences of the data, the choice, the model."""
    found = list(report.notes)
    if isinstance(report, Report):
        found += (*compared(report), *zeros_notes(report))
    if isinstance(report, Validation):
        found += report.comparison.notes
        found += [f"test vectors are in {report.vectors}"] if report.vectors else []
    if found:
        yield Notes(tuple(dict.fromkeys(found)))


def recipe(report: Report) -> Iterator[Part]:
    """The TOML that replays the result, and the command for it."""
    if not report.recipe:
        return
    yield Prose("Save this as recipe.toml; the same model and data then give the same file:")
    yield Code(f"onnxc {report.aim.name} {report.model} --recipe recipe.toml -o OUTPUT")
    yield Code(report.recipe)


def made_with(report: Report | Validation | Benchmark) -> Iterator[Part]:
    """Versions, machine, effort."""
    found, rows = report.surroundings, list[tuple[str, str]]()
    if found is not None:
        rows += found.versions.items()
        rows += [("system", found.system), ("processor", found.processor)]
        rows += [("instructions", ", ".join(found.features))] if found.features else []
        rows += [("cores", str(found.cores))]
    if isinstance(report, Benchmark):
        runtime = report.runtime
        threads = runtime.threads or "all"
        rows += [("run with", f"{runtime.provider}, threads {threads}, level {runtime.level}")]
    if isinstance(report, Report) and report.seconds is not None:
        rows += [("took", f"{report.seconds:.1f} s")]
        rows += [("peak memory", size_text(report.memory_peak))] if report.memory_peak else []
    if rows:
        yield Table(("", ""), tuple(rows), names=2)
