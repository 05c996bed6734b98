"""Statistics files: what is written comes back, and nothing else is taken."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from texts import normal

from calib import statistics
from calib.archive import HEADER
from calib.moments import MomentsObserver
from calib.observers import OBSERVERS, is_equal, observer_of
from calib.statistics import Made, Statistics, load, save
from onnxc.core import Key
from onnxc.errors import DataError, OptionError
from onnxc.numerics.patches import Window

Array = NDArray[Any]
IMAGES = normal(5, 4, 6, 6)
WINDOW = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), groups=2)
KEYS = (
    Key("x", "histogram"),
    Key("y", "histogram", minus="x"),
    Key("x", "range"),
    Key("x", "range", 1),
    Key("x", "mean", 1),
    Key("x", "peak", 1),
    Key("x", "zeros", 1),
    Key("x", "moments", 1, window=WINDOW),
    Key("x", "moments", 1, window=Window()),
    Key("x", "moments", 1, window=Window(groups=2)),
    Key("nothing was seen", "histogram"),
    Key("nor here", "moments", 1, window=Window()),
)


def observed(key: Key) -> Any:
    observer: Any = observer_of(key)
    if key.tensor in ("x", "y"):
        observer.update(IMAGES, 5)
    return observer


def some(keys: tuple[Key, ...] = KEYS) -> Statistics:
    blocks = MomentsObserver(1, Window(), block=2)
    blocks.update(IMAGES, 5)
    stats = {
        **{key: observed(key) for key in keys},
        Key("b", "moments", 1, window=Window()): blocks,
    }
    samples = tuple(sorted(bytes([i]) * 16 for i in range(5)))
    lost = frozenset({Key("mask", "histogram")})
    return Statistics(stats, "m" * 64, "g" * 64, samples, (Made.here(1),), "as it is", lost)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(some(), tmp_path / "s.stats")
    return tmp_path / "s.stats"


def test_what_was_saved_comes_back(file: Path) -> None:
    saved, found = some(), load(file, "m" * 64)
    assert found.path == str(file)
    assert replace(found, stats={}) == replace(saved, stats={})
    assert list(found.stats) == sorted(saved.stats, key=statistics.order_of)
    for key, observer in saved.stats.items():
        if isinstance(observer, MomentsObserver):
            observer.settle()
        assert is_equal(found.stats[key], observer), key


def test_every_statistic_can_be_kept() -> None:
    assert {key.what for key in KEYS} == set(OBSERVERS)


def test_what_came_back_goes_on_as_if_it_had_never_left(file: Path) -> None:
    for key, observer in load(file).stats.items():
        more, whole = normal(3, 4, 6, 6, seed=2), some().stats.get(key)
        if whole is None:
            continue
        observer.update(more, 3)
        whole.update(more, 3)
        for one in (observer, whole):
            if isinstance(one, MomentsObserver):
                one.settle()
        if key.what in ("histogram", "range"):
            assert is_equal(observer, whole)
        assert vars(observer).keys() == vars(whole).keys()


def test_the_same_statistics_are_the_same_bytes_in_whatever_order(
    file: Path, tmp_path: Path
) -> None:
    found = load(file)
    backwards = dict(reversed(found.stats.items()))
    save(replace(found, stats=backwards), tmp_path / "t.stats")
    assert (tmp_path / "t.stats").read_bytes() == file.read_bytes()


def test_other_tools_can_read_the_arrays(file: Path) -> None:
    header = json.loads(zipfile.ZipFile(file).read(HEADER))
    index = next(i for i, key in enumerate(header["keys"]) if key["tensor"] == "b")
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays[f"{index}.total"].shape == (1, 4)
        assert arrays["samples"].shape == (5, 16)
    assert header["format"] == statistics.VERSION
    assert header["made"][0].keys() == {"onnxc", "runtime", "provider", "batch"}


def test_wide_moments_are_written_and_read_in_a_moment(tmp_path: Path) -> None:
    observer = MomentsObserver(1, Window())
    observer.count = observer.available = 1
    observer.total, observer.products = np.ones((1, 2500)), np.ones((1, 1, 2500, 2500))
    start = time.perf_counter()
    save(
        replace(some(()), stats={Key("x", "moments", 1, window=Window()): observer}), tmp_path / "s"
    )
    assert (tmp_path / "s").stat().st_size > 50e6
    load(tmp_path / "s")
    assert time.perf_counter() - start < 3  # 0.3 s on an idle machine


def test_a_write_that_fails_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    monkeypatch.setattr("calib.archive._write", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OptionError, match=r"cannot write .*s\.stats"):
        save(some(), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# --- hostile files


def rewritten(
    file: Path,
    edit: Callable[[dict[str, Any]], Any],
    arrays: dict[str, Array | bytes] | None = None,
) -> None:
    """The file with its header edited and entries replaced; the checksums are right."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(entries[HEADER])
    changed = edit(header)
    entries[HEADER] = json.dumps(header if changed is None else changed).encode()
    for name, value in (arrays or {}).items():
        entries[f"{name}.npy"] = value if isinstance(value, bytes) else packed(value)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def packed(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def number_of(file: Path, **wanted: Any) -> int:
    keys = json.loads(zipfile.ZipFile(file).read(HEADER))["keys"]
    return next(i for i, key in enumerate(keys) if wanted.items() <= key.items())


def refused(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(file)
    told = str(caught.value)
    assert file.name in told and "\n" not in told and "onnxc calibrate" in told
    return told


def test_what_is_no_statistics_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
    (tmp_path / "empty").write_bytes(b"")
    assert "do not exist" in refused(tmp_path / "missing")
    assert "do not exist" in refused(tmp_path)
    assert "no statistics file" in refused(tmp_path / "arrays.npz")
    for name in ("text", "empty"):
        assert "no statistics file" in refused(tmp_path / name)


def test_another_version_and_another_model_say_so(file: Path) -> None:
    with pytest.raises(OptionError, match=r"s\.stats are of another model: calibrate this one"):
        load(file, "n" * 64)
    rewritten(file, lambda header: header.update(format=7))
    told = refused(file)
    assert f"were written in format version 7, and this onnxc reads {statistics.VERSION}" in told


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_is_damaged(data: st.DataObject, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("cut") / "s.stats"
    save(some(KEYS[:3]), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(4, len(whole) - 1))])
    assert "are damaged" in refused(file)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_wrong_bit_is_told_or_changes_nothing(data: st.DataObject, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("bit") / "s.stats"
    saved = some(KEYS[:8])
    save(saved, file)
    broken = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(broken) - 1))
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(broken)
    try:
        found = load(file)
    except DataError as error:
        assert file.name in str(error)
        return
    assert found.samples == saved.samples
    assert all(is_equal(found.stats[key], saved.stats[key]) for key in saved.stats)


def npy_header(shape: str, dtype: str = "<f8") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "entry",
    [
        npy_header("(1000000000000,)"),
        npy_header("(1, 1000000000000)"),
        npy_header("(-1, -4)") + bytes(32),
        npy_header("(4,)", "|O") + bytes(32),
        npy_header("(1, 4)", "<f4") + bytes(16),
        npy_header("(1, 4)")[:-9],
        b"no array",
    ],
)
def test_an_array_that_is_not_what_it_says(file: Path, entry: bytes) -> None:
    index = number_of(file, tensor="b")
    rewritten(file, lambda header: None, {f"{index}.total": entry})
    assert "are damaged" in refused(file)


def test_a_bomb_is_not_unpacked(file: Path) -> None:
    index = number_of(file, tensor="b")
    zeros = npy_header("(1, 16777216)") + bytes(1 << 27)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries[f"{index}.total.npy"] = zeros
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert file.stat().st_size < 1 << 20
    assert "larger than the file" in refused(file)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda header: [header],
    "no keys": lambda header: header.pop("keys") and None,
    "no model": lambda header: header.pop("model") and None,
    "no version": lambda header: header.pop("format") and None,
    "keys of another kind": lambda header: header.update(keys=3),
    "a key of another kind": lambda header: header["keys"].__setitem__(0, "x"),
    "an unknown statistic": lambda header: header["keys"][0].update(what="mood"),
    "an unknown part": lambda header: header["keys"][0].update(colour="red"),
    "an unknown number": lambda header: header["keys"][0]["numbers"].update(colour=1),
    "a count that is none": lambda header: header["keys"][0]["numbers"].update(count="many"),
    "a negative count": lambda header: header["keys"][0]["numbers"].update(count=-1),
    "an endless count": lambda header: header["keys"][0]["numbers"].update(count=10**30),
    "a key twice": lambda header: header["keys"].append(header["keys"][0]),
    "a key less": lambda header: header["keys"].pop() and None,
    "a model that is none": lambda header: header.update(model=7),
    "other samples": lambda header: header.update(data="0" * 64),
    "made by nobody": lambda header: header.update(made=[{"runtime": "1"}]),
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_header_that_does_not_make_sense(file: Path, name: str) -> None:
    rewritten(file, HEADERS[name])
    assert "are damaged" in refused(file)


def test_numbers_that_are_not_finite_are_refused(file: Path) -> None:
    index = number_of(file, tensor="x", what="histogram")
    rewritten(file, lambda h: h["keys"][index]["numbers"].update(low=float("nan")))
    assert "low is no finite number" in refused(file)


def bad_arrays() -> Iterator[tuple[dict[str, Any], dict[str, Array], str]]:
    """Entries of right checksums that no data leave, and what is said of them."""
    histogram = {"tensor": "x", "what": "histogram"}
    moments = {"tensor": "b", "what": "moments"}
    counts = observed(Key("x", "histogram")).counts
    yield histogram, {"counts": counts[:-1]}, "wrong number of bins"
    yield histogram, {"counts": -counts}, "a wrong count"
    yield histogram, {"counts": counts * 3}, "more values than there were"
    yield histogram, {"counts": counts.astype(float)}, "no such numbers"
    yield moments, {"total": np.zeros((1, 5))}, "not square"
    yield moments, {"total": np.zeros((2, 4))}, "do not fit the layer"
    yield moments, {"total": np.zeros(4)}, "wrong shape"
    yield moments, {"total": np.full((1, 4), np.inf)}, "no such numbers"
    yield moments, {"products": np.zeros((1, 1, 4, 4))}, "not square"
    yield moments, {"products": np.arange(8.0).reshape(1, 2, 2, 2)}, "not symmetric"
    yield moments, {"products": -np.ones((1, 2, 2, 2))}, "squares is negative"
    yield {"what": "range", "axis": 1}, {"low": np.full(4, 99.0)}, "above its maximum"
    yield {"what": "range", "axis": 1}, {"low": np.zeros((4, 1))}, "wrong shape"
    yield {"what": "mean"}, {"total": np.zeros(())}, "wrong shape"
    yield {"what": "peak"}, {"total": -np.ones(4)}, "a peak is negative"


@pytest.mark.parametrize(("wanted", "arrays", "told"), list(bad_arrays()))
def test_statistics_that_no_data_leave(
    file: Path, wanted: dict[str, Any], arrays: dict[str, Array], told: str
) -> None:
    index = number_of(file, **wanted)
    rewritten(file, lambda header: None, {f"{index}.{n}": x for n, x in arrays.items()})
    assert told in refused(file)


def test_bins_that_do_not_fit_the_extremes(file: Path) -> None:
    index = number_of(file, tensor="x", what="histogram")
    rewritten(file, lambda header: header["keys"][index]["numbers"].update(high=1e6))
    assert "do not fit the extremes" in refused(file)


@pytest.mark.parametrize(
    "window", [{"kernel": [0, 3]}, {"groups": -1}, {"samples": 5}, {"auto_pad": "FAR"}, 3]
)
def test_windows_of_no_layer(file: Path, window: Any) -> None:
    index = number_of(file, tensor="b")
    rewritten(file, lambda header: header["keys"][index].update(window=window))
    assert "are damaged" in refused(file)


def test_samples_that_are_no_digests(file: Path) -> None:
    rewritten(file, lambda header: None, {"samples": np.zeros((5, 8), np.uint8)})
    assert "digests" in refused(file)
