"""Commands that are killed, run out of disk or memory, or lose their reader.

The property: at an output there is the old file or the new one, never half of one, and what a
killed process has left beside it is gone after the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    COMMANDS,
    FEW,
    MODEL,
    MODELS,
    OLD,
    OUTPUT,
    Bench,
    Server,
    killed,
    moments,
    serving,
    temporary,
    whole_files,
)

from onnxc import graph
from onnxc.graph import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and sets limits")

QUICK = ("pack", "merge")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as opened:
        yield opened


@pytest.fixture
def bench(server: Server, tmp_path: Path) -> Bench:
    return Bench(server, tmp_path)


def slow_but(*names: str) -> list[Any]:
    marks = {name: () if name in names else pytest.mark.slow for name in COMMANDS}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("name", slow_but(*QUICK))
def test_killed_at_any_change_of_a_file(name: str, bench: Bench) -> None:
    bench.prepare(name)
    whole = bench.command(name)
    assert whole.code == 0 and whole.changes >= 3, whole
    assert temporary(whole) == []
    most = 0
    for at in moments(whole.changes):
        found = bench.command(name, kill_at=at)
        assert found.code == 137, found
        assert found.digest in whole_files(name, whole), found
        most = max(most, len(temporary(found)))
    assert 1 <= most <= 3
    again = bench.command(name)
    assert (again.code, again.digest, again.left) == (0, whole.digest, whole.left)


@pytest.mark.parametrize("name", slow_but("merge"))
def test_interrupted_at_any_change_of_a_file(name: str, bench: Bench) -> None:
    """Ctrl-C: nothing temporary is left, at once."""
    bench.prepare(name)
    whole = bench.command(name)
    for at in moments(whole.changes):
        found = bench.command(name, stop_at=at)
        assert found.code == 130, found
        assert found.err == "Interrupted; no partial file was left.\n"
        assert found.digest in whole_files(name, whole), found
        assert temporary(found) == []


def test_killed_while_weights_get_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any change of a file a model is there, and its weights are its own."""
    monkeypatch.setattr(graph, "SPLIT", 1000)
    old, new, path = load(MODEL), load(MODEL), tmp_path / "out.onnx"
    for tensor in graph.constants(new.graph):
        tensor.values = 1 + graph.values(tensor)
    at, code, found, files = 0, 137, list[bytes](), [path.name, f"{path.name}.data"]
    while code:
        graph.save(old, path)
        assert sorted(p.name for p in tmp_path.iterdir()) == files
        code = killed(lambda: graph.save(new, path), at)
        assert code in (0, 137)
        found.append(graph.to_bytes(load(path)))
        at += 1
    before, after = graph.to_bytes(old), graph.to_bytes(new)
    turn = found.index(after)
    assert found == [before] * turn + [after] * (at - turn)
    assert 2 < turn < at - 5


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_time(name: str, bench: Bench) -> None:
    bench.prepare(name)
    whole = bench.command(name)
    for tenth in range(1, 11):
        found = bench.command(name, kill_after=0.15 * tenth)
        assert found.code in (0, 142), found
        assert found.digest in whole_files(name, whole), found
    again = bench.command(name)
    assert (again.code, again.digest, again.left) == (0, whole.digest, whole.left)


@pytest.mark.parametrize("name", slow_but("pack"))
@pytest.mark.parametrize("room", [1000, 4000])
def test_no_room_for_a_file(name: str, room: int, bench: Bench) -> None:
    bench.prepare(name)
    found = bench.command(name, limits={"RLIMIT_FSIZE": room})
    assert found.code == 2, found
    assert re.fullmatch(r"Error: .*(out\.onnx|temporary).*\n", found.err), found.err
    assert "requested" not in found.err
    assert found.digest == hashlib.sha256(OLD).hexdigest()
    assert temporary(found) == []


@pytest.mark.parametrize("arguments", ["--help", f"inspect {MODEL}", f"inspect {MODEL} --json"])
def test_a_reader_who_has_left_is_no_error(arguments: str, bench: Bench) -> None:
    found = bench.run(*arguments.split(), stdout="closed")
    assert (found.code, found.err) == (0, "")


def test_a_report_that_nobody_reads_changes_no_exit_code(bench: Bench) -> None:
    bound = ("--max-drop", "-1", "-o", OUTPUT)
    found = bench.run(*COMMANDS["quantize"], *bound, "--print-recipe", stdout="closed")
    assert (found.code, found.err) == (1, "")
    assert found.left == [OUTPUT]


def test_a_report_for_which_there_is_no_room(bench: Bench) -> None:
    found = bench.run("inspect", str(MODEL), stdout="/dev/full")
    assert found.code == 2
    assert found.err == "Error: standard output: No space left on device\n"


def limited(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that may take so much address space, from its very start on."""
    limit = f"ulimit -v {size // 1024} && exec "
    command = shlex.join([sys.executable, "-m", "onnxc", *arguments])
    environment = {**os.environ, "PYTHONPATH": str(MODELS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", limit + command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_too_little_memory_for_the_libraries(tmp_path: Path) -> None:
    done = limited(100 << 20, "inspect", str(MODEL))
    assert done.returncode == 2
    assert re.fullmatch(r"Error: ulimit -v allows 105 MB, and .*; allow more\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", range(260, 460, 20))
def test_too_little_memory_for_the_work(megabytes: int, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    some = ("--format", "qdq", "--ranges", "minmax", *FEW, "--quiet", "-o", str(output))
    done = limited(megabytes * 1_000_000, "quantize", str(MODEL), *some)
    assert done.returncode in (0, 2), done.stderr
    assert output.exists() == (done.returncode == 0)
    if done.returncode:
        assert re.fullmatch(r"Error: .*\n", done.stderr)
        assert list(tmp_path.iterdir()) == []
