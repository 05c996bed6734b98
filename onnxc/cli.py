"""The command `onnxc`: runs a command, shows its report, and turns errors into exit codes.

0    good
1    the result missed a bound that was asked for
2    bad input: one sentence on standard error, nothing written
130  interrupted, nothing left half-written
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from onnxc import refuse_strangers
from onnxc.errors import OnnxcError

GOOD, MISSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        refuse_strangers()
    except ImportError as error:
        return _say(f"Error: {error}", BAD_INPUT)
    try:
        from onnxc.commands import onnxc  # it imports passes and calib: only after the guard

        result = onnxc.main(arguments, prog_name="onnxc", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _say("Interrupted; nothing was written.", INTERRUPTED)
    except click.ClickException as error:
        return _say(f"Error: {_sentence(error)}", BAD_INPUT)
    except BrokenPipeError:  # the reader of a pipe has left
        sys.stdout = None
        return GOOD
    except MemoryError:
        return _say("Error: there is not enough memory; try --max-memory or --samples", BAD_INPUT)
    except (OnnxcError, OSError) as error:
        return _say(f"Error: {_text(error)}", BAD_INPUT)
    return result if isinstance(result, int) else GOOD


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _sentence(error: click.ClickException) -> str:
    """Click's message, and where to read on."""
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context else message


def _text(error: BaseException) -> str:
    """One line; for the system's errors, what and which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
