"""Tables in the part of models/RESULTS.md on real networks, each under a heading of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnxc.check import Comparison

RESULTS = Path(__file__).resolve().parents[2] / "models" / "RESULTS.md"


def put_section(heading: str, text: str) -> None:
    """Write a section of RESULTS.md, in place of the one of that heading."""
    old = RESULTS.read_text(encoding="utf-8")
    head, found, rest = old.partition(f"{heading}\n")
    behind = rest.partition("\n## ")
    after = "".join(behind[1:]) if found else ""
    new = f"{head.rstrip()}\n\n{heading}\n\n{text.rstrip()}\n{after}"
    RESULTS.write_text(new, encoding="utf-8")


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def judged(found: Comparison) -> Iterator[str]:
    """Cells: what judges, the float model, the result, and how often they agree."""
    if found.perplexity is not None:
        yield "perplexity"
        yield from (f"{value:.3f}" for value in found.perplexity)
    else:
        assert found.top1 is not None
        yield "top-1"
        yield from (f"{100 * value:.2f} %" for value in found.top1)
    yield f"{100 * (found.agreement or 0):.2f} %"
