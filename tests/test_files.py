"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxc import files
from onnxc.errors import OptionError
from onnxc.files import END, HERE, OLD, TemporaryFolder, alone, link, replacing, sweep


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*given: object) -> None:
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


# --- what processes that were killed have left


ELSEWHERE = "onnxc-0badcafe-"
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="nothing is swept without locks")


def left(folder: Path, name: str, age: float = 0.0) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


@needs_locks
def test_what_is_nobodys_is_removed_by_the_next_run(tmp_path: Path) -> None:
    left(tmp_path, f".{HERE}{'0' * 32}{END}")
    left(tmp_path, f".{ELSEWHERE}{'0' * 32}{END}", OLD + 60)
    folder = tmp_path / f"{HERE}abcdefgh{END}"
    (folder / "deep").mkdir(parents=True)
    left(folder / "deep", "weights")
    with replacing(tmp_path / "a") as (file,):
        file.write(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@needs_locks
def test_what_is_somebodys_stays(tmp_path: Path) -> None:
    kept = [
        left(tmp_path, f".{ELSEWHERE}{'0' * 32}{END}", OLD - 60),
        *(left(tmp_path, name, 2 * OLD) for name in ("onnxc-results.tmp", ".onnxc-1.tmp", "x")),
        left(tmp_path, f"{HERE}abcdefgh{END}.onnx", 2 * OLD),
    ]
    (tmp_path / "elsewhere").mkdir()
    kept.append(left(tmp_path / "elsewhere", "precious"))
    (tmp_path / f"{HERE}abcdefgh{END}").symlink_to(tmp_path / "elsewhere")
    with TemporaryFolder(tmp_path) as folder, replacing(tmp_path / "a") as (file,):
        Path(folder, "b").write_bytes(b"y")
        sweep(tmp_path)
        file.write(b"x")
        assert Path(folder, "b").read_bytes() == b"y"
    assert not Path(folder).exists()
    assert (tmp_path / "a").read_bytes() == b"x"
    assert all(path.read_bytes() == b"half" for path in kept)


@needs_locks
def test_a_sweep_between_making_and_locking_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = files._lock, [0]

    def late(handle: int) -> None:
        times[0] += 1
        if times[0] == 1:
            sweep(tmp_path)
        lock(handle)

    monkeypatch.setattr(files, "_lock", late)
    with replacing(tmp_path / "a") as (file,):
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    times[0] = 0
    with TemporaryFolder(tmp_path) as folder:
        assert Path(folder).is_dir()
    assert times == [2]


@needs_locks
def test_the_lock_lasts_until_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def swept(source: Path, target: Path) -> None:
        sweep(tmp_path)
        replace(source, target)

    monkeypatch.setattr(Path, "replace", swept)
    with replacing(tmp_path / "a", tmp_path / "b") as (one, two):
        one.write(b"1")
        two.write(b"2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_two_that_write_one_file_leave_one_of_them_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as (one,):
        one.write(b"first " * 1000)
        with replacing(tmp_path / "a") as (two,):
            two.write(b"second " * 1000)
        assert (tmp_path / "a").read_bytes() == b"second " * 1000
    assert (tmp_path / "a").read_bytes() == b"first " * 1000


@needs_locks
def test_another_run_of_the_same_output_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    with alone(path), alone(tmp_path / "other.onnx"):
        words = r"another run writes .*out\.onnx: wait for its end"
        with pytest.raises(OptionError, match=words), alone(path, wait=False):
            pass
        sweep(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    with alone(path, wait=False):
        pass


@needs_locks
def test_runs_of_the_same_output_wait_for_each_other(tmp_path: Path) -> None:
    path, order = tmp_path / "out.onnx", []

    def write(name: int) -> None:
        with alone(path):
            order.append(name)
            time.sleep(0.001)
            order.append(name)

    threads = [threading.Thread(target=write, args=[name]) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(8))
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_what_a_killed_run_claimed_is_free(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    with alone(path):
        (left,) = tmp_path.iterdir()
    left.touch()
    with alone(path, wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_what_is_interrupted_before_its_claim_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = files.fcntl.flock, []

    def interrupted(*given: int) -> None:
        calls.append(given)
        if len(calls) == 1:
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt
        lock(*given)

    monkeypatch.setattr(files.fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "out.onnx"):
        pass
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_without_locks_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.fcntl, "flock", failing(OSError(errno.ENOLCK, "No locks")))
    with alone(tmp_path / "out.onnx"), alone(tmp_path / "out.onnx", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_where_nothing_can_be_written_nobody_is_alone(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no folder"), alone(tmp_path / "a" / "b"):
        pass


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_gets_a_second_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", failing(OSError(errno.EPERM, "no links")))
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    link(first, second)
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"1")
    assert first.samefile(second) == has_links and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OptionError, match="cannot write"):
        link(tmp_path / "none", second)
    assert second.read_bytes() == b"1"
