"""The command `onnxc`: runs a command, shows its report, and turns errors into exit codes.

0           good
1           the result missed a bound that was asked for
2           bad input: one sentence on standard error, nothing written
130, 143    stopped by Ctrl-C or SIGTERM (128 + the signal's number), nothing left half-written
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

import click

from onnxc import refuse_strangers
from onnxc.errors import OnnxcError, why

GOOD, MISSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
GRACE = 1.0  # seconds to clean up in
AGAIN = 0.05  # seconds after which a signal that came while files are removed is sent once more
CLEANING = {weakref.finalize.__call__.__code__, TemporaryDirectory.cleanup.__code__}
LEAST = 256_000_000  # bytes of address space, below which libraries end the process as they load
NO_MEMORY = "Error: there is not enough memory; try --max-memory or --samples, or allow more"
NO_THREAD = "Error: the system gives no further thread; allow more memory (ulimit -v) or more (-u)"
STOPPED = "Interrupted; no partial file was left."
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class StoppedError(BaseException):
    """A signal asked the process to stop; no `except` clause but this module's may catch it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    allowed = _allowed()
    if allowed < LEAST:
        told = f"ulimit -v allows {allowed / 1e6:.0f} MB, and libraries alone take more than"
        sys.exit(_say(f"Error: {told} {LEAST / 1e6:.0f}; allow more", BAD_INPUT))
    former = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [n for n, handler in former.items() if handler is not signal.SIG_IGN]  # not by nohup
    _handle(dict.fromkeys(heeded, _leave))
    with suppress(ImportError, MemoryError, SystemError):  # told by `run`
        refuse_strangers()
        import_module("onnxc.commands")
    with stoppable(heeded):
        code = run(arguments)
    _handle(former)
    sys.exit(code)


def _allowed() -> float:
    """Bytes of address space that the process may take."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: while libraries are loaded there is nothing to clean, and some catch all."""
    _say(STOPPED, 0)
    os._exit(128 + number)


@contextmanager
def stoppable(signals: Iterable[int]) -> Iterator[None]:
    """Unwind the block at the first of these signals, and leave with 128 + its number.

    What unwinds removes its temporary files, so signals that follow within GRACE are ignored.
    """
    received: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_cleaning(frame):  # what is half removed would stay
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True  # a run that has ended by then needs no stop
            again.start()
            return
        now = time.monotonic()
        if not received or now - received[-1][1] > GRACE:
            received.append((number, now))
            raise StoppedError

    _handle(dict.fromkeys(signals, stop))
    try:
        yield
    finally:
        if received:  # whatever libraries made of the exception on its way
            sys.exit(_say(STOPPED, 128 + received[0][0]))


def _is_cleaning(frame: FrameType | None) -> bool:
    """Whether temporary files are being removed."""
    while frame is not None and frame.f_code not in CLEANING:
        frame = frame.f_back
    return frame is not None


def _handle(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        refuse_strangers()
    except ImportError as error:
        return _say(f"Error: {error}", BAD_INPUT)
    try:
        onnxc = import_module("onnxc.commands").onnxc  # only after the guard
    except MemoryError:
        return _say(NO_MEMORY, BAD_INPUT)
    except (ImportError, SystemError) as error:  # also where a library does not fit into memory
        return _say(f"Error: onnxc cannot start: {_text(error)}", BAD_INPUT)
    try:
        result = onnxc.main(arguments, prog_name="onnxc", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _say(STOPPED, INTERRUPTED)
    except click.ClickException as error:
        return _say(f"Error: {_sentence(error)}", BAD_INPUT)
    except SystemExit:  # click leaves so, with 1, where the reader of a help text has left
        return GOOD
    except _of_memory():
        return _say(NO_MEMORY, BAD_INPUT)
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        return _say(NO_THREAD, BAD_INPUT)
    except (OnnxcError, OSError) as error:
        return _say(f"Error: {_text(error)}", BAD_INPUT)
    return result if isinstance(result, int) else GOOD


def _of_memory() -> tuple[type[Exception], ...]:
    """What is raised where memory is short; protobuf has an error of its own for it."""
    protobuf = sys.modules.get("google.protobuf.message")
    return (MemoryError, *([protobuf.EncodeError] if protobuf else []))


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _sentence(error: click.ClickException) -> str:
    """Click's message in one line, and where to read on."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context else message


def _text(error: BaseException) -> str:
    """One line; for the system's errors, which file and what."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the disk'}: {why(error)}"
    return " ".join(str(error).split()) or type(error).__name__
