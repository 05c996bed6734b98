"""What became of a model under a command or a pass, and tables of that with counts per reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """what: the command or the pass. ending: one word or two; reason: of a refusal or a fault."""

    corpus: str
    subject: str
    what: str
    ending: str
    reason: str = ""
    is_fault: bool = False

    @property
    def command(self) -> str:
        """What was called, without options."""
        return self.what.partition(" ")[0]

    def __str__(self) -> str:
        return f"{self.what} on {self.subject}: {self.ending}, {self.reason}"


def faults(outcomes: Iterable[Outcome]) -> list[str]:
    """What must never be, a line each."""
    return [str(outcome) for outcome in outcomes if outcome.is_fault]


def tables(outcomes: Sequence[Outcome], most: int | None = None) -> list[str]:
    """By corpus: how often each command or pass ended how, then reasons with counts.

    most: rows of reasons, the most frequent first; None for all.
    """
    lines: list[str] = []
    for corpus in dict.fromkeys(o.corpus for o in outcomes):
        of = [o for o in outcomes if o.corpus == corpus]
        subjects = len({o.subject for o in of})
        lines += [f"{corpus}, {subjects} models", "", *_endings(of), "", *_reasons(of, most), ""]
    return lines


def _endings(outcomes: Sequence[Outcome]) -> list[str]:
    endings = sorted({o.ending for o in outcomes})
    lines = [row("", "tried", *endings), row("---", *["---:"] * (1 + len(endings)))]
    for what in dict.fromkeys(o.command for o in outcomes):
        counts = Counter(o.ending for o in outcomes if o.command == what)
        lines.append(row(f"`{what}`", counts.total(), *(counts[e] for e in endings)))
    return lines


def _reasons(outcomes: Sequence[Outcome], most: int | None) -> list[str]:
    counts = Counter((o.ending, plain(o.reason)) for o in outcomes if o.reason)
    if not counts:
        return []
    lines = [row("ending", "reason", "times"), row("---", "---", "---:")]
    lines += [row(*key, count) for key, count in counts.most_common(most)]
    rest = [count for _, count in counts.most_common()[most or len(counts) :]]
    return lines + ([row("", f"{len(rest)} other reasons", sum(rest))] if rest else [])


def row(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def plain(reason: str) -> str:
    """A sentence without names and figures, so that equal reasons count as one."""
    text = re.sub(r"ONNX Runtime (refuses|cannot run) the model: .*", r"ONNX Runtime \1 it", reason)
    text = re.sub(r"\S*/\S+\.\w+:? ?", "", text)
    text = re.sub(r"'[^']*'", "…", text)
    return re.sub(r"-?\d+(\.\d+)?", "n", text).replace("|", "/")[:140]
