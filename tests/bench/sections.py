"""Tables in the part of models/RESULTS.md on real networks, each under a heading of its own."""

from __future__ import annotations

from pathlib import Path

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
