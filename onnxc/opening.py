"""What opening a model takes: time, and memory that it holds from then on.

Both are measured in processes of their own, in which nothing else was opened before.

    python -m onnxc.opening MODEL < RUNTIME        prints milliseconds and bytes
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from onnxc.runtime import Runtime, session

ROUNDS = 3
STATUS = Path("/proc/self/statm")  # of Linux; the second number is pages that are resident
PAGE = 4096  # bytes


@dataclass(frozen=True)
class Opening:
    """ms: from the file to a session. memory: bytes that it holds; None where it is not known."""

    ms: float
    memory: int | None


def openings(paths: Sequence[Path], runtime: Runtime = Runtime()) -> list[Opening | None]:
    """What opening each file takes, in turn, the median of ROUNDS; None where that fails."""
    rounds = [[_apart(path, runtime) for path in paths] for _ in range(ROUNDS)]
    return [_middle([found for found in each if found]) for each in zip(*rounds, strict=True)]


def _middle(found: Sequence[Opening]) -> Opening | None:
    if not found:
        return None
    held = [one.memory for one in found if one.memory is not None]
    memory = round(statistics.median(held)) if held else None
    return Opening(statistics.median(one.ms for one in found), memory)


def _apart(path: Path, runtime: Runtime) -> Opening | None:
    """In a new process; None where none can be started or it does not end well."""
    command = [sys.executable, "-m", "onnxc.opening", str(path)]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(runtime)), capture_output=True, text=True, check=True
        )
        return Opening(**json.loads(done.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _here(path: Path, runtime: Runtime) -> Opening:
    before, start = _resident(), time.perf_counter()
    opened = session(path, runtime)
    ms, after = 1e3 * (time.perf_counter() - start), _resident()
    del opened
    return Opening(ms, None if before is None or after is None else max(after - before, 0))


def _resident() -> int | None:
    """Bytes of this process in memory."""
    try:
        return int(STATUS.read_text(encoding="ascii").split()[1]) * PAGE
    except OSError:
        return None


if __name__ == "__main__":
    measured = _here(Path(sys.argv[1]), Runtime(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps(asdict(measured)))
