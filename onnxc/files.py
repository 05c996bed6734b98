"""Files that appear whole or not at all: temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from onnxc.errors import OptionError


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open files for writing that take their names, in order, when the block ends without error.

    An error or an interruption leaves what was there before, and no temporary file.
    Raises OptionError when a path cannot be written or the disk is full.
    """
    targets = [Path(path) for path in paths]
    temporary = [target.with_name(f".onnxc-{uuid4().hex}.tmp") for target in targets]
    pairs = list(zip(temporary, targets, strict=True))
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(_create(t, at)) for t, at in pairs]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for source, target in pairs:
            source.replace(target)
        _sync_folder(targets[0].parent)
    except OSError as error:
        raise OptionError(_sentence(targets[-1], error)) from error
    finally:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink()


def _create(temporary: Path, target: Path) -> BinaryIO:
    if target.is_dir():
        raise IsADirectoryError(None, "it is a folder; give the name of a file", str(target))
    return temporary.open("xb")


def _sync_folder(folder: Path) -> None:
    """Make the renames durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sentence(target: Path, error: OSError) -> str:
    if not target.parent.is_dir():
        return f"cannot write {target}: there is no folder {target.parent}"
    return f"cannot write {target}: {error.strerror or error}"
