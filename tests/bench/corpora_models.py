"""Every command on the zoo and every pass on ONNX's own models, in RESULTS.md: hours of work.

    python tests/bench/corpora_models.py [LOG]

Outcomes are added to LOG model by model, so that another call goes on where one was stopped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sections import put_section

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend import MODULES, PACKAGED, every_pass, one_operator, packaged, with_weights
from corpora import VARIANTS, judged
from outcomes import Outcome, faults, row, tables
from zoo import entries, quick, subject, with_options

HEADING = "## Corpora"
NOTE = (
    "Commands run as a user calls them, on models of many makers with made-up samples; what they "
    "write is valid, runs, and has the interface of the original. Heavy nodes are those that "
    "`onnxc inspect` lists: each is quantized, or the report says why not. Passes run on models "
    "of `onnx.backend.test`, as they are and with constants in place of inputs; lossless ones keep "
    "60 dB, those of 8 bits 15 dB on layers of a few numbers, others stay finite. `undone` is a "
    "rewrite that its own check took back."
)
REASONS = 15  # rows of a table, the most frequent first

Units = dict[str, Callable[[], Iterable[Outcome]]]


def main() -> None:
    """Run what the log does not hold, print a line for each, and put the tables into RESULTS.md."""
    log = Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp()) / "outcomes.jsonl"
    log.touch()
    known = dict(map(json.loads, log.read_text(encoding="utf-8").splitlines()))
    for name, unit in units().items():
        if name not in known:
            known[name] = list(unit())
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
            print(name, *faults(Outcome(*o) for o in known[name]), sep="\n  ", flush=True)
    outcomes = [Outcome(*o) for found in known.values() for o in found]
    put_section(HEADING, "\n".join((NOTE, "", *summary(outcomes), "", *tables(outcomes, REASONS))))


def units() -> Units:
    """What is run at once, by name: a model, an option, a folder or a module of ONNX's models."""
    found: Units = {f"zoo/{e['name']}": lambda e=e: of_zoo(e) for e in entries()}
    found |= {f"options/{x.name}": lambda n=n: of_options(n) for n, x in enumerate(VARIANTS)}
    found |= {f"packaged/{f}": lambda f=f: of_folder(f) for f in PACKAGED}
    return found | {m.rpartition(".")[2]: lambda m=m: of_module(m) for m in MODULES}


def of_zoo(entry: dict[str, str]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        yield from judged(subject(entry, Path(folder)), out)


def of_options(turn: int) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        yield from with_options(turn, quick(), Path(folder))


def of_folder(folder: str) -> Iterator[Outcome]:
    for case in packaged(folder):
        yield from every_pass("packaged models", case)


def of_module(module: str) -> Iterator[Outcome]:
    for case in one_operator(module):
        yield from every_pass("one-operator models", case)
        weighted = with_weights(case)
        if weighted is not None:
            yield from every_pass("one-operator models with weights", weighted)


def summary(outcomes: list[Outcome]) -> list[str]:
    """A line a corpus: models, runs, and how they ended."""
    lines = [row("corpus", "models", "runs", "refused", "faults", "late")]
    lines.append(row("---", *["---:"] * 5))
    for corpus in dict.fromkeys(o.corpus for o in outcomes):
        of = [o for o in outcomes if o.corpus == corpus]
        counts = (sum(o.ending == ending for o in of) for ending in ("refused", "late"))
        refused, late = counts
        broken = sum(o.is_fault for o in of)
        lines.append(row(corpus, len({o.subject for o in of}), len(of), refused, broken, late))
    return lines


if __name__ == "__main__":
    main()
