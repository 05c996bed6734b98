"""Files that are given and files to be written: checked before any long work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxc.errors import ModelError, OptionError


def existing(model: str | Path) -> Path:
    """The path of a model file. Raises ModelError when there is no such file."""
    path = Path(model)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a model file")
    if not path.is_file():
        raise ModelError(f"{path} does not exist; give a model file")
    return path


def default_output(model: Path, suffix: str) -> Path:
    """MODEL with a suffix such as .int8.onnx, beside it."""
    return model.with_name(f"{model.stem}.{suffix}.onnx")


def check_output(output: str | Path, *inputs: Any) -> Path:
    """The output path, if a file can be written there without losing one of the inputs.

    inputs: whatever is read; what is no path to a file is passed over. Raises OptionError.
    """
    path = Path(output)
    if path.is_dir():
        raise OptionError(f"output {path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise OptionError(f"output {path}: there is no folder {path.parent}; create it first")
    if path.exists() and not path.is_file():
        raise OptionError(f"output {path} is a device, not a file; give another name")
    beside = (path.with_name(f"{path.name}.{end}") for end in ("data", "new.data"))
    for taken in (path, *beside):  # weights of a large model
        if taken.exists() and any(_is_same(taken, source) for source in inputs):
            raise OptionError(f"output {taken} is the input itself; give another name")
    is_open = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not is_open:
        raise OptionError(f"output {path} is not writable; give another place")
    return path


Stamp = tuple[int, int, int, int]


def stamps(*inputs: Any) -> dict[Path, Stamp]:
    """How the files among these are now; what is no path to a file is passed over."""
    paths = [Path(source) for source in inputs if isinstance(source, str | Path)]
    return {path: _stamp(path) for path in paths if path.is_file()}


def check_unchanged(before: Mapping[Path, Stamp], left: str = "nothing was written") -> None:
    """Raise ModelError where a file is not what it was: what was read of it may be of both.

    left: the part of a sentence that says what is on disk then.
    """
    for path, stamp in before.items():
        if not path.is_file():
            raise ModelError(f"{path} went away while it was read; {left}")
        if _stamp(path) != stamp:
            raise ModelError(f"{path} changed while it was read; {left}: try again")


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_same(path: Path, source: Any) -> bool:
    """Whether both are one file, also through a link."""
    is_path = isinstance(source, str | Path)
    return is_path and Path(source).is_file() and path.samefile(source)


def check_folder(folder: Path) -> Path:
    """The folder, if it can be made or is empty. Raises OptionError."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; give a folder for the vectors")
    if not folder.parent.is_dir():
        raise OptionError(f"{folder}: there is no folder {folder.parent}; create it first")
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty; give a new folder for the vectors")
    if not os.access(folder.parent, os.W_OK):
        raise OptionError(f"{folder} is not writable; give another place")
    return folder
