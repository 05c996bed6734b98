"""Files that appear whole or not at all: temporary file in the same folder, fsync, rename.

What is temporary is locked as long as the process lives that made it. A process that is killed
cannot clean up behind itself, but its locks go with it: the next one that writes into the same
folder sees that the file is nobody's, and removes it. Locks of another machine may not be seen
here, so what one left is removed when it is a day old.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from onnxc.errors import OptionError, why

fcntl: Any = None
with suppress(ImportError):  # there is none on Windows, where nothing is swept
    import fcntl

HERE = f"onnxc-{zlib.crc32(platform.node().encode()):08x}-"
END = ".tmp"
OURS = re.compile(r"\.?(onnxc-[0-9a-f]{8}-)\w{8,32}\.tmp")
OLD = 24 * 3600.0  # seconds


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open files for writing that take their names, in order, when the block ends without error.

    An error or an interruption leaves what was there before, and no temporary file.
    Raises OptionError when a path cannot be written or the disk is full.
    """
    targets = [Path(path) for path in paths]
    folders = {target.parent for target in targets}
    for folder in folders:
        sweep(folder)
    temporary = [_beside(target, uuid4().hex) for target in targets]
    pairs = list(zip(temporary, targets, strict=True))
    try:
        with ExitStack() as locks:
            with ExitStack() as stack:
                files = [stack.enter_context(_create(t, at)) for t, at in pairs]
                for file in files:
                    _keep_lock(file, locks)
                yield files
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
            for source, target in pairs:
                source.replace(target)
            for folder in folders:
                _sync(folder)
    except OSError as error:
        raise OptionError(_sentence(targets[-1], error)) from error
    finally:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink()


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A folder that goes with its block, with the object, or with the process.

    beside: the folder that it is made in, by default the system's one for temporary files.
    """

    def __init__(self, beside: Path | None = None) -> None:
        folder = Path(tempfile.gettempdir()) if beside is None else beside
        hidden = "" if beside is None else "."
        sweep(folder)
        super().__init__(END, f"{hidden}{HERE}", folder)
        if fcntl is not None:
            weakref.finalize(self, os.close, _claimed(self.name))


@contextmanager
def alone(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Be the only one that writes a path, for the time of the block, among those who ask for it.

    wait: for another one who is; else raises OptionError. So does a folder that cannot be written.
    """
    if fcntl is None:
        yield
        return
    target = Path(path)
    place = _beside(target, f"{zlib.crc32(target.name.encode()):08x}")
    try:
        with _sole_writer(target, place, wait):
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
    finally:  # where an interruption came before its end
        with suppress(OSError):
            _remove(place, is_of_here=True)


def _sole_writer(target: Path, place: Path, wait: bool) -> BinaryIO:
    try:
        return _sole(place, wait)
    except BlockingIOError as error:
        raise OptionError(
            f"another run writes {target}: wait for its end, or give another output"
        ) from error
    except OSError as error:
        raise OptionError(_sentence(target, error)) from error


def link(source: Path, target: Path) -> None:
    """Give a file a second name, at once, in place of what had it; a copy where there are no links.

    Raises OptionError when it cannot be written.
    """
    temporary = _beside(target, uuid4().hex)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise OptionError(_sentence(target, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what processes that live no more have left in a folder."""
    if fcntl is None or not folder.is_dir():
        return
    for path in folder.iterdir():
        found = OURS.fullmatch(path.name)
        if found:
            with suppress(OSError):  # it is locked, or was removed by another sweep
                _remove(path, found[1] == HERE)


def _remove(path: Path, is_of_here: bool) -> None:
    """Remove what is nobody's. Raises OSError where it is somebody's."""
    if not is_of_here and time.time() - path.lstat().st_mtime < OLD:
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        shutil.rmtree(path) if is_folder else path.unlink()
    finally:
        os.close(handle)


def _beside(target: Path, mark: str) -> Path:
    """The name of a temporary file in the folder of a target, which `sweep` knows."""
    return target.with_name(f".{HERE}{mark}{END}")


def _create(temporary: Path, target: Path) -> BinaryIO:
    """Open a new file, locked; once more where a sweep came in between."""
    if target.is_dir():
        raise IsADirectoryError(None, "it is a folder; give the name of a file", str(target))
    file = temporary.open("xb")
    _lock(file.fileno())
    if temporary.exists():
        return file
    file.close()
    return _create(temporary, target)


def _sole(place: Path, wait: bool) -> BinaryIO:
    """A file of that name, opened and locked; once more where another one removed it meanwhile.

    Raises BlockingIOError where it is locked already, and is not to be waited for.
    """
    file = place.open("ab")
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # a file system without locks: nobody is waited for
        return file
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), place.stat()):
            return file
    file.close()
    return _sole(place, wait)


def _claimed(folder: str) -> int:
    """A handle on a folder that was just made, locked; it is made again where it was swept."""
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY)
        _lock(handle)
        if Path(folder).exists():
            return handle
        os.close(handle)
    Path(folder).mkdir(mode=0o700)
    return _claimed(folder)


def _lock(handle: int) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(handle, fcntl.LOCK_EX)


def _keep_lock(file: BinaryIO, stack: ExitStack) -> None:
    """Let the lock of a file last beyond its end: until it has its name."""
    if fcntl is not None:  # Windows renames no open file
        stack.callback(os.close, os.dup(file.fileno()))


def _sync(folder: Path) -> None:
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
    return f"cannot write {target}: {why(error)}"
