"""What is fuzzed: bytes as files of each kind that onnxc reads, through the code that reads them.

A target takes bytes and a folder, and gives nothing: whatever the bytes are, it comes back, or
raises an OnnxcError of one line. `seeds` are valid inputs, made by code. Checksums would hide all
that lies behind them, so two targets read files whose checksums are not compared, or fitting.
"""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google.protobuf.message
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mutants

from calib import statistics
from calib.data import InputSpec, Preprocess, open_data
from calib.moments import MomentsObserver
from calib.observers import observer_of
from calib.statistics import Made, Statistics
from onnxc import graph, recipe
from onnxc.anytime import journal
from onnxc.core import Key
from onnxc.errors import OnnxcError
from onnxc.numerics.patches import Window
from onnxc.storage import coders, package

import onnx  # isort: skip

MODEL, BESIDE = "model.onnx", "w.bin"
LARGEST = 1 << 20  # bytes of an input
PART = 1 << 16  # bytes that are decoded of an entry of a package


@dataclass(frozen=True)
class Target:
    """run: what reads the bytes. seeds: valid ones. change: makes others of some, or None."""

    run: Callable[[bytes, Path], Any]
    seeds: Callable[[Path], Iterator[bytes]]
    change: Callable[[bytes, int, int], bytes] | None = None


def outcome(target: Target, data: bytes, folder: Path) -> str:
    """ "" or the sentence that the bytes are refused with. Raises what must not come."""
    try:
        target.run(data, folder)
    except OnnxcError as error:
        sentence = str(error)
        if not sentence or "\n" in sentence:
            raise AssertionError(f"this is no sentence: {sentence!r}") from error
        return sentence
    return ""


def _model(data: bytes, folder: Path) -> None:
    (folder / MODEL).write_bytes(data)
    loaded = graph.load(folder / MODEL)
    again = graph.load(graph.to_bytes(loaded))
    if len(again.graph.nodes) != len(loaded.graph.nodes):
        raise AssertionError("nodes were lost on the way")


def _packed(data: bytes, folder: Path) -> None:
    """What is packed comes back, byte for byte, whatever it is."""
    (folder / MODEL).write_bytes(data)
    package.write(folder / MODEL, folder / "in.onnxz", False, lambda done, total: None)
    _package((folder / "in.onnxz").read_bytes(), folder)
    if (folder / "out" / MODEL).read_bytes() != data:
        raise AssertionError("another file was unpacked than was packed")


def _models(folder: Path) -> Iterator[bytes]:
    (folder / BESIDE).write_bytes(np.ones(64, np.float32).tobytes())
    yield from (mutants.sound(name).SerializeToString() for name in mutants.NAMES)


def _mutated(data: bytes, most: int, seed: int) -> bytes:
    """A model with fields changed; bytes that are none become one."""
    draw = random.Random(seed)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        mutants.mutate(model, draw)
        changed = model.SerializeToString()
    except (google.protobuf.message.Error, ValueError):
        changed = mutants.mutant(seed).SerializeToString()
    return changed if len(changed) <= most else data


def _package(data: bytes, folder: Path) -> None:
    (folder / "in.onnxz").write_bytes(data)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    for old in [p for p in out.rglob("*") if p.is_file()]:
        old.unlink()
    package.unpack(folder / "in.onnxz", out / MODEL, lambda done, total: None)


def _packages(folder: Path) -> Iterator[bytes]:
    model = mutants.sound("convolution")
    draw = np.random.default_rng(0)
    for name, array in (
        ("few", draw.integers(0, 5, (64, 64)).astype(np.float32)),
        ("zeros", np.where(draw.random((64, 64)) < 0.9, 0, draw.random((64, 64))).astype("f4")),
        ("bytes", draw.integers(-9, 9, (32, 64)).astype(np.int8)),
    ):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (folder / MODEL).write_bytes(model.SerializeToString())
    package.write(folder / MODEL, folder / "made.onnxz", False, lambda done, total: None)
    yield (folder / "made.onnxz").read_bytes()


class Fitting:
    """A checksum that is equal to every other."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


@contextmanager
def trusting() -> Iterator[None]:
    """Packages whose checksums are not compared."""
    kept = package.zlib
    package.zlib = SimpleNamespace(crc32=lambda data, start=0: Fitting())  # type: ignore[assignment]
    try:
        yield
    finally:
        package.zlib = kept


def _contents(data: bytes, folder: Path) -> None:
    """Bytes as payloads and contents of a package: what their first two tell is in front."""
    split = int.from_bytes(data[:2], "little")
    payload, contents = package.MAGIC + data[2 : 2 + split], data[2 + split :]
    packed = coders.zstd(np.frombuffer(contents, np.uint8)).payload
    place = len(payload), len(packed), len(contents)
    end = package._END.pack(*place, 0, package.VERSION, package.MAGIC)
    with trusting():
        _package(payload + packed + package._SEAL.pack(0) + end, folder)


def _split_packages(folder: Path) -> Iterator[bytes]:
    for whole in _packages(folder):
        end = whole[-package._END.size :]
        place, packed, size, *_ = package._END.unpack(end)
        contents = coders.from_zstd(memoryview(whole[place : place + packed]), size)
        payload = whole[len(package.MAGIC) : place]
        yield len(payload).to_bytes(2, "little") + payload + contents


def _statistics(data: bytes, folder: Path) -> None:
    (folder / "s.stats").write_bytes(data)
    statistics.load(folder / "s.stats")


def _some_statistics(folder: Path) -> Iterator[bytes]:
    x = np.random.default_rng(0).random((5, 4, 6, 6), np.float32)
    keys = [Key("x", what, axis) for what, axis in (("histogram", None), ("range", 1), ("mean", 1))]
    keys.append(Key("x", "moments", 1, window=Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))))
    stats: dict[Key, Any] = {key: observer_of(key) for key in keys}
    for observer in stats.values():
        observer.update(x, 5)
    block = MomentsObserver(1, Window(), block=2)
    block.update(x, 5)
    stats[Key("b", "moments", 1, window=Window())] = block
    samples = tuple(sorted(bytes([i] * 16) for i in range(5)))
    found = Statistics(stats, "m" * 64, "g" * 64, samples, (Made("1", "1", "CPU", 4),))
    statistics.save(found, folder / "made.stats")
    yield (folder / "made.stats").read_bytes()


def _header(data: bytes, folder: Path) -> None:
    """Bytes as the header of a statistics file with sound arrays."""
    made = next(iter(_some_statistics(folder))) if not _HEADERS else _HEADERS[0]
    _HEADERS[:] = [made]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            is_header = entry.filename == "header.json"
            new.writestr(entry.filename, data if is_header else old.read(entry))
    _statistics(file.getvalue(), folder)


_HEADERS: list[bytes] = []


def _headers(folder: Path) -> Iterator[bytes]:
    for made in _some_statistics(folder):
        yield zipfile.ZipFile(io.BytesIO(made)).read("header.json")


def _recipe(data: bytes, folder: Path) -> None:
    (folder / "r.toml").write_bytes(data)
    read = recipe.load(folder / "r.toml")
    if recipe.loads(recipe.dump(read)) != read and b"nan" not in data:
        raise AssertionError("a recipe is not what was written of it")


def _recipes(folder: Path) -> Iterator[bytes]:
    yield from (path.read_bytes() for path in recipe.shipped().values())
    yield b'seed = 3\nexclude = ["op:Conv"]\n[calibration]\nsamples = 4\nmean = [0.5]\n'


PORTS = (InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8)),)


def _image(data: bytes, folder: Path) -> None:
    place = folder / "images"
    place.mkdir(exist_ok=True)
    (place / "0.png").write_bytes(data)
    for feed in open_data(place, PORTS, Preprocess(resize="stretch")).batches(2):
        assert feed["x"].shape == (1, 3, 8, 8)


def _images(folder: Path) -> Iterator[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 10, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    for kind, mode in (
        *(("png", "RGB"), ("png", "P"), ("png", "I;16"), ("jpeg", "RGB"), ("jpeg", "CMYK")),
        *(("gif", "P"), ("bmp", "RGB"), ("tiff", "F"), ("tiff", "RGB"), ("webp", "RGB")),
        *(("ppm", "RGB"), ("png", "LA"), ("tiff", "I;16")),
    ):
        file = io.BytesIO()
        made = picture.convert("L").convert("I").convert(mode) if "I" in mode else None
        (made or picture.convert(mode)).save(file, kind)
        yield file.getvalue()


def _array(data: bytes, folder: Path) -> None:
    for suffix in (".npz", ".npy"):
        (folder / f"data{suffix}").write_bytes(data)
        is_zip = data[:2] == b"PK"
        if is_zip == (suffix == ".npz"):
            for _ in open_data(folder / f"data{suffix}", PORTS).batches(2):
                pass


def _arrays(folder: Path) -> Iterator[bytes]:
    x = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    for write in (
        lambda file: np.save(file, x),
        lambda file: np.savez(file, x=x, labels=np.arange(2)),
        lambda file: np.savez_compressed(file, x=x),
    ):
        file = io.BytesIO()
        write(file)
        yield file.getvalue()


def _journal(data: bytes, folder: Path) -> None:
    (folder / f"out{journal.SUFFIX}").write_bytes(data)
    journal.begin(folder / "out", {"model": "m"}, resume=True)


def _journals(folder: Path) -> Iterator[bytes]:
    found = {
        **{
            "plan": "p",
            "estimate": {"drop": 0.1, "low": 0.0, "high": 0.2, "samples": 9},
            "stages": [],
            "ratio": None,
        },
        **{"way": "w", "cost": 0.5, "bytes": 3},
    }
    lines: list[Any] = [{"model": "m"}, [found], {"model": "m"}]
    yield b"".join(json.dumps(line).encode() + b"\n" for line in lines[:2])
    yield json.dumps(lines[2]).encode() + b"\n"


TARGETS: dict[str, Target] = {
    "model": Target(_model, _models),
    "mutant": Target(_model, _models, _mutated),
    "packed": Target(_packed, _models, _mutated),
    "package": Target(_package, _packages),
    "contents": Target(_contents, _split_packages),
    "statistics": Target(_statistics, _some_statistics),
    "header": Target(_header, _headers),
    "recipe": Target(_recipe, _recipes),
    "image": Target(_image, _images),
    "array": Target(_array, _arrays),
    "journal": Target(_journal, _journals),
}
