"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxc import files
from onnxc.errors import OptionError
from onnxc.files import replacing


def failing(error: BaseException) -> Callable[[int], None]:
    def fail(handle: int) -> None:
        raise error

    return fail


def test_files_get_their_names_when_the_block_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with replacing(first, second) as (one, two):
        one.write(b"1")
        two.write(b"2")
        assert not first.exists()
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = tmp_path / "a"
    old.write_bytes(b"old")
    monkeypatch.setattr(files.os, "fsync", failing(error))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OptionError
    with pytest.raises(expected), replacing(old, tmp_path / "b") as (one, two):
        one.write(b"new")
        two.write(b"new")
    assert old.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as (file,):
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", failing(full))
    with pytest.raises(OptionError) as caught, replacing(tmp_path / "a") as (file,):
        file.write(b"x")
    assert str(caught.value) == f"cannot write {tmp_path / 'a'}: No space left on device"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no folder .*gone"):
        replacing(tmp_path / "gone" / "a").__enter__()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="it is a folder; give the name of a file"):
        replacing(tmp_path).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OptionError, match="Permission denied"):
        replacing(tmp_path / "a").__enter__()
