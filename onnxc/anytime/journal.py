"""What a search found, on disk beside its output: one line of JSON for each candidate.

The first line says of what: the model, the data, the bound, and whatever else decides what is
found. A line is written whole, or is not counted. As the strategy depends on nothing but what was
found, a search that is started again with its journal goes on where the last one was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxc.anytime.tallies import Estimate
from onnxc.bench import Ratio
from onnxc.errors import OptionError
from onnxc.files import replacing

SUFFIX = ".search"


@dataclass(frozen=True)
class Found:
    """A candidate of a plan as measured. way: which of the plan's, empty where none was made.

    cost: of the objective, relative to the original. recipe: TOML of its passes, stages: how many
    of them each move has. failure: why there is none. elapsed: seconds of the whole search so far;
    seconds: of this plan.
    """

    plan: str
    way: str
    estimate: Estimate
    cost: float
    bytes: int = 0
    ratio: Ratio | None = None
    recipe: str = ""
    stages: tuple[int, ...] = ()
    failure: str = ""
    seconds: float = 0.0
    elapsed: float = 0.0

    def meets(self, bound: float) -> bool:
        """Whether the drop lies below the bound, its interval included."""
        return not self.failure and self.estimate.high <= bound


@dataclass
class Journal:
    """found: of each plan, its candidates in the order of their making."""

    path: Path
    found: dict[str, list[Found]] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds that the search has taken so far."""
        return max((one.elapsed for some in self.found.values() for one in some), default=0.0)

    def add(self, some: list[Found]) -> None:
        """Note the candidates of a plan, at once and for good."""
        self.found[some[0].plan] = some
        with self.path.open("ab") as file:
            file.write(_line([asdict(one) for one in some]))
            file.flush()
            os.fsync(file.fileno())

    def all(self) -> Iterator[Found]:
        yield from (one for some in self.found.values() for one in some)

    def remove(self) -> None:
        """The search is over: there is nothing to go on with."""
        self.path.unlink(missing_ok=True)


def place(output: Path) -> Path:
    """Where the journal of an output lies."""
    return output.with_name(output.name + SUFFIX)


def begin(output: Path, subject: Mapping[str, Any], resume: bool) -> Journal:
    """The journal beside an output: a new one, or what a search of the same subject has left.

    Raises OptionError where it is one of another subject, or not readable.
    """
    path = place(output)
    if resume and path.exists():
        return _resumed(path, dict(subject))
    with replacing(path) as (file,):
        file.write(_line(dict(subject)))
    return Journal(path)


def _resumed(path: Path, subject: dict[str, Any]) -> Journal:
    first, *lines = _whole_lines(path)
    if first != json.loads(json.dumps(subject)):
        keys = [key for key in {**first, **subject} if first.get(key) != subject.get(key)]
        raise OptionError(
            f"{path} is of another search: {', '.join(sorted(keys))} differ; leave --resume out to "
            "start again, or give another output"
        )
    try:
        found = {some[0]["plan"]: [_read(one) for one in some] for some in lines}
    except (LookupError, TypeError, AttributeError) as error:
        raise OptionError(f"cannot go on with {path}: it is damaged; leave --resume out") from error
    with replacing(path) as (file,):  # without a line that was cut off
        file.writelines(_line(line) for line in (first, *lines))
    return Journal(path, found)


def _whole_lines(path: Path) -> list[Any]:
    """Raises OptionError where the first one is none."""
    try:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1].splitlines()
        lines = [json.loads(line) for line in whole]
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"cannot go on with {path}: {error}; leave --resume out") from error
    if not lines or not isinstance(lines[0], dict):
        raise OptionError(f"cannot go on with {path}: it is no journal; leave --resume out")
    return lines


def _read(entry: dict[str, Any]) -> Found:
    ratio = entry["ratio"]
    return Found(
        **{
            **entry,
            "estimate": Estimate(**entry["estimate"]),
            "stages": tuple(entry["stages"]),
            "ratio": None if ratio is None else Ratio(**ratio),
        }
    )


def _line(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
