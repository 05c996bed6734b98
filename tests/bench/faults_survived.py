"""Faults that commands survive, damaged files, and long chains, in RESULTS.md: half an hour.

    python tests/bench/faults_survived.py [LOG]

LOG: what `make fuzz` has printed, for its table. Each command runs over an old file and is killed,
or interrupted as by Ctrl-C, before changes of files, all of them or MOST, and at moments of its
time. Then it runs once more, undisturbed.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from sections import put_section

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import COMMANDS, OLD, Bench, Server, moments, serving, temporary, whole_files
from outcomes import row
from test_chains import FEED, SHAPES
from texts import context

from onnxc.graph import load, save
from onnxc.pipeline import apply_pass, prepare
from passes.quantize_weights import QuantizeWeights

HEADING = "## Faults, damaged files, long chains"
NOTE = (
    "At the output of a command that is killed (`kill -9`) or interrupted (Ctrl-C) before one of "
    "its changes of files, or killed after 0.15 to 1.5 s, is the old file or the whole new one; "
    "what a killed process leaves beside it is removed by the next run. *left* counts files after "
    "that run. `compress` has the best model so far at its output, at first the original."
)
FUZZ = (
    "`make fuzz`: inputs under 1 MB, each within 10 s and 1 GB; every input ends in a model or a "
    "sentence."
)
CHAINS = (
    "Seconds to load, prepare, quantize (4-bit weights of each fiftieth node, where there are any) "
    "and save a chain, each step checked as a command does, on one core of a shared machine."
)
TIMES = range(1, 11)
NODES = (25_000, 50_000, 100_000)
LINE = re.compile(r"^(\w[\w-]*) +(\d+) inputs in (\d+) s, peak (\d+) MB, (\w+)", re.MULTILINE)


def main() -> None:
    lines = [NOTE, "", *of_faults(), ""]
    if sys.argv[1:]:
        lines += [FUZZ, "", *of_fuzzing(Path(sys.argv[1]).read_text(encoding="utf-8")), ""]
    put_section(HEADING, "\n".join((*lines, CHAINS, "", *of_chains())))


def of_faults() -> Iterator[str]:
    yield row("command", "killed", "interrupted", "old file", "new file", "neither", "left")
    yield row("---", *["---:"] * 6)
    with serving() as server:
        for name in COMMANDS:
            yield of_command(name, server)
            print(name, flush=True)


def of_command(name: str, server: Server) -> str:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(server, Path(folder))
        bench.prepare(name)
        whole = bench.command(name)
        at = moments(whole.changes)
        killed = [bench.command(name, kill_at=each) for each in at]
        killed += [bench.command(name, kill_after=0.15 * tenth) for tenth in TIMES]
        stopped = [bench.command(name, stop_at=each) for each in at]
        ended = [x for x in (*killed, *stopped) if x.code]
        again = bench.command(name)
    assert (again.code, again.digest) == (0, whole.digest), again
    old = hashlib.sha256(OLD).hexdigest()
    new = whole_files(name, whole) - {old}
    found = [sum(x.digest in some for x in ended) for some in ({old}, new)]
    left = len(temporary(again)) + len(set(again.left) - set(whole.left))
    died = [x for x in killed if x.code]
    return row(f"`{name}`", len(died), len(stopped), *found, len(ended) - sum(found), left)


def of_fuzzing(log: str) -> Iterator[str]:
    yield row("read", "inputs", "seconds", "peak", "found")
    yield row("---", *["---:"] * 4)
    for name, inputs, seconds, peak, ending in LINE.findall(log):
        told = "nothing" if ending == "good" else "a fault"
        yield row(name, f"{int(inputs):,}", seconds, f"{peak} MB", told)


def of_chains() -> Iterator[str]:
    yield row("chain of", "nodes", "load", "prepare", "quantize", "save", "sum")
    yield row("---", *["---:"] * 6)
    for name in ("Identity", "MatMul"):
        for count in NODES:
            taken = seconds(name, count)
            yield row(name, f"{count:,}", *(f"{x:.1f}" for x in (*taken, sum(taken))))
            print(name, count, flush=True)


def seconds(name: str, count: int) -> list[float]:
    """Of each step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        path.write_bytes(SHAPES[name](count).SerializeToString())
        times = [time.perf_counter()]
        model = load(path)
        times.append(time.perf_counter())
        last = prepare(model, FEED)[-1].after
        times.append(time.perf_counter())
        apply_pass(model, QuantizeWeights(smallest=64), context(model), FEED, last)
        times.append(time.perf_counter())
        save(model, Path(folder) / "out.onnx")
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


if __name__ == "__main__":
    main()
