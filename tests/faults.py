"""Runs commands in processes of their own that suffer a fault.

The libraries are imported once, by a server that forks for each case, so a case costs what its
command costs. Every action of Python on the file system is an audit event, whoever asks for it;
so "killed before the 7th change of a file" means the same in every run of the same command.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxc.files import OURS, sweep
from onnxc.graph import load, to_bytes

ROOT = Path(__file__).resolve().parents[1]
OLD = b"what was there before"
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR

MODELS = ROOT / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
FEW = ("--data", str(DATA), "--samples", "12")

QUICKLY = (*FEW, "--no-reconstruct")  # what is computed does not matter here
COMMANDS: dict[str, tuple[str, ...]] = {
    "pack": ("pack", str(MODEL)),
    "unpack": ("unpack", "packed.onnxz"),
    "merge": ("calibrate", "--merge", "1.stats", "2.stats"),
    "calibrate": ("calibrate", str(MODEL), *FEW, "--what", "range"),
    "quantize": ("quantize", str(MODEL), "--format", "weight-only", *FEW),
    "prune": ("prune", str(MODEL), "--ratio", "0.2", "--criterion", "l1", *QUICKLY),
    "factorize": ("factorize", str(MODEL), "--method", "svd", "--no-faster", *QUICKLY),
    "sparsify": ("sparsify", str(MODEL), "--criterion", "magnitude", *QUICKLY),
    "cluster": ("cluster", str(MODEL), "--method", "kmeans", "--gains", "never", *QUICKLY),
    "compress": ("compress", str(MODEL), *FEW, "--minimize", "size", "--max-time", "1s"),
}
OUTPUT = "work/out.onnx"
MOST = 16  # moments to be killed at, of a command


@dataclass(frozen=True)
class Case:
    """One command in a folder, and its fault; without one, the changes of files are counted.

    kill_at: number of the change, from 0, before which it is killed. stop_at: before which it is
    interrupted, as by Ctrl-C. kill_after: seconds.
    limits: of resources, by their name in `resource`, in bytes. stdout: a file, or "closed" where
    nobody reads it. patience: seconds after which it is held to hang. output: a file that gets the
    content OLD before.
    """

    folder: str
    arguments: list[str]
    kill_at: int = -1
    stop_at: int = -1
    kill_after: float = 0.0
    limits: dict[str, int] = field(default_factory=dict)
    stdout: str = ""
    patience: float = 120.0
    output: str = ""


@dataclass(frozen=True)
class Outcome:
    """code: as a shell tells it, -1 for a hang. changes: of files, where it was not killed.

    digest: of the output. left: all files in the folder then.
    """

    code: int
    out: str
    err: str
    changes: int
    digest: str
    left: list[str]


class Server:
    """The process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, case: Case) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


class Bench:
    """A folder in which commands run; `work` is for what they write."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        for name in ("work", "temporary"):
            (folder / name).mkdir()

    def run(self, *arguments: str, **fault: Any) -> Outcome:
        return self.server.run(Case(str(self.folder), list(arguments), **fault))

    def command(self, name: str, **fault: Any) -> Outcome:
        """One of COMMANDS, over an old file.

        What a killed one has left is removed before a fault, so that its changes are counted alike.
        """
        for place in ("work", "temporary") if fault else ():
            sweep(self.folder / place)
        arguments = (*COMMANDS[name], "-o", OUTPUT, "--quiet")
        return self.run(*arguments, output=OUTPUT, **fault)

    def prepare(self, name: str) -> None:
        """Write what a command reads."""
        seen = ("--data", str(DATA), "--samples", "4", "--what", "range")
        needed = {
            "unpack": [("pack", str(MODEL), "-o", "packed.onnxz")],
            "merge": [
                ("calibrate", str(MODEL), *seen, "--seed", s, "-o", f"{s}.stats") for s in "12"
            ],
        }.get(name, [])
        assert [self.run(*arguments).code for arguments in needed] == [0] * len(needed)


def moments(changes: int) -> list[int]:
    """All changes of files, or some of them, the last ones among these."""
    if changes <= MOST:
        return list(range(changes))
    some = range(0, changes, -(-2 * changes // MOST))
    return sorted({*some, *range(changes - MOST // 2, changes)})


def whole_files(name: str, whole: Outcome) -> set[str]:
    """Digests of what a command may leave: the old file, the new one, or a search's first best."""
    first = {hashlib.sha256(to_bytes(load(MODEL))).hexdigest()} if name == "compress" else set()
    return {hashlib.sha256(OLD).hexdigest(), whole.digest, *first}


def temporary(found: Outcome) -> list[str]:
    """Files with the name of temporary ones, or in a folder with such a name."""
    return [p for p in found.left if any(map(OURS.fullmatch, Path(p).parts))]


@contextmanager
def serving() -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # files of Python are no changes of a command
    pipe = subprocess.PIPE
    command = [sys.executable, __file__]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield Server(process)


def killed(do: Callable[[], object], at: int) -> int:
    """Do it in a process that is killed before one of its changes of files; its exit code."""
    child = os.fork()
    if child == 0:
        sys.addaudithook(_Counter(at, -1))
        do()
        os._exit(0)
    return _code(child, patience=60)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _outcome(case: Case) -> Outcome:
    logs = Path(tempfile.mkdtemp())  # nothing that a child's end would remove
    files = [logs / name for name in ("out", "err", "changes")]
    output = Path(case.folder) / case.output
    if case.output:
        output.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        _suffer(case, *files)
    code = _code(child, case.patience)
    out, err, changes = (file.read_text() if file.exists() else "" for file in files)
    shutil.rmtree(logs)
    left = [p for p in Path(case.folder).rglob("*") if p.is_file() and p.name != ".ses"]
    names = sorted(str(p.relative_to(case.folder)) for p in left)
    found = digest(output) if output.is_file() else ""
    return Outcome(code, out, err, int(changes or 0), found, names)


def _code(child: int, patience: float) -> int:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _suffer(case: Case, out: Path, err: Path, changes: Path) -> None:
    """In the child: run the command; never returns."""
    is_file = case.stdout not in ("", "closed")
    for number, file in ((1, Path(case.stdout) if is_file else out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), number)
    if case.stdout == "closed":
        end, start = os.pipe()
        os.close(end)
        os.dup2(start, 1)
    from onnxc.cli import main

    os.chdir(case.folder)
    tempfile.tempdir = str(Path("temporary").absolute())
    counter = _Counter(case.kill_at, case.stop_at)
    for name, size in case.limits.items():
        _limit(name, size)
    if case.kill_after:
        signal.setitimer(signal.ITIMER_REAL, case.kill_after)  # SIGALRM, which nobody handles
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    sys.addaudithook(counter)
    code = 0
    try:
        main(case.arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        counter.kill_at = -1
        for name in case.limits:
            _limit(name, resource.RLIM_INFINITY)
    changes.write_text(str(counter.count))
    with suppress(OSError):
        sys.stdout.flush()
    atexit._run_exitfuncs()
    os._exit(code)  # the runtime's threads are not there to be joined


def _limit(name: str, size: int) -> None:
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (size if size >= 0 else hard, hard))


class _Counter:
    """Counts changes of files, and kills or interrupts the process before one of them."""

    def __init__(self, kill_at: int, stop_at: int) -> None:
        self.kill_at, self.stop_at, self.count = kill_at, stop_at, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if event not in CHANGES and not is_open:
            return
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        self.count += 1


def serve() -> None:
    import onnxc.commands  # noqa: F401  before the fork, so that it is done once
    from onnxc import opening

    opening.ROUNDS = 1
    for line in sys.stdin:
        found = _outcome(Case(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
