"""Signals at any moment: no partial file, no temporary one, and the exit code of the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "models" / "digits_cnn_calib.npz"

READY = """
import sys
from onnxc import cli

def handle(handlers, handle=cli._handle):
    handle(handlers)
    print("ready", flush=True)

cli._handle = handle
cli.main(sys.argv[1:])
"""

SLOW_DISK = """
import sys, time
from onnxc import files
from onnxc.cli import main

true_fsync = files.os.fsync

def fsync(handle):
    print("writing", flush=True)
    time.sleep(30)
    true_fsync(handle)

files.os.fsync = fsync
main(sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")


def start(folder: Path, *program: str) -> subprocess.Popen[str]:
    """`onnxc quantize` in a folder of its own, which also holds its temporary files."""
    arguments = ("quantize", str(MODEL), "--data", str(DATA), "-o", str(folder / "out.onnx"))
    temporary = folder / "temporary"
    temporary.mkdir()
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )


def code_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code as a shell sees it, and standard error."""
    _, errors = process.communicate(timeout=60)
    code = process.returncode
    return (128 - code if code < 0 else code), errors


def left_in(folder: Path) -> list[str]:
    """Files of ours: ONNX Runtime keeps a session mark, .ses, in the folder for temporary files."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".ses")
    return sorted(str(p.relative_to(folder)) for p in files)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8, 1.2, 1.6])
def test_a_signal_leaves_no_partial_file(tmp_path: Path, delay: float, number: int) -> None:
    process = start(tmp_path, "-c", READY)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(number)
    code, errors = code_of(process)
    if code == 0:  # it was done by then
        assert left_in(tmp_path) == ["out.onnx"]
        return
    assert code == 128 + number, errors
    assert left_in(tmp_path) == []
    assert errors == "Interrupted; no partial file was left.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_the_file_is_written(tmp_path: Path, number: int) -> None:
    """The disk is made slow, so that the signal comes when all bytes lie in a temporary file."""
    process = start(tmp_path, "-c", SLOW_DISK)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(left_in(tmp_path)) == 1
    process.send_signal(number)
    process.send_signal(number)  # a second one must not cut the cleaning short
    code, errors = code_of(process)
    assert code == 128 + number
    assert errors == "Interrupted; no partial file was left.\n"
    assert left_in(tmp_path) == []


REMOVING = """
import os, signal, sys, time, weakref
from onnxc.cli import stoppable

def remove(number):
    os.kill(os.getpid(), number)
    print("removed", flush=True)

class Folder:
    pass

number = int(sys.argv[1])
with stoppable([number]):
    folder = Folder()
    weakref.finalize(folder, remove, number)
    del folder
    time.sleep(30)
    print("went on", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_files_are_removed_waits_until_they_are(number: int) -> None:
    """A finalizer would swallow it, half way."""
    done = subprocess.run(
        [sys.executable, "-c", REMOVING, str(int(number))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (128 + number, "removed\n")
    assert done.stderr == "Interrupted; no partial file was left.\n"
