"""Statistics files: what calibration found, with where it comes from, to keep, merge and reuse.

A file is an archive (`calib.archive`) of the observers' arrays under the numbers of their keys. Its
header says which model, prepared in which way, and how samples were read; the entry `samples` holds
16 bytes for each sample that was seen, sorted, so that no sample counts twice and what judges a
result can be told from what made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from calib.archive import DAMAGE, Archive, is_archive, write
from calib.moments import MomentsObserver
from calib.observers import OBSERVERS, Array, Streaming
from calib.restore import arrays, numbers, restored
from onnxc.core import Key
from onnxc.errors import DataError, OptionError
from onnxc.numerics.patches import Window
from onnxc.typed import hints, read

T = TypeVar("T")

VERSION = 1
SAMPLES = "samples"
DIGEST = 16  # bytes for a sample
AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
AGAIN = "make it again with onnxc calibrate"


@dataclass(frozen=True, order=True)
class Made:
    """By which program, on which runtime and provider, in runs of how many samples."""

    onnxc: str
    runtime: str
    provider: str
    batch: int

    @classmethod
    def here(cls, batch: int, provider: str = "CPUExecutionProvider") -> Made:
        return cls(version("onnxc"), onnxruntime.__version__, provider, batch)


@dataclass(frozen=True)
class Statistics:
    """Statistics with their origin.

    model: sha256 of the model; graph: that of its `structure` as prepared, whose tensors these are.
    samples: a digest each, sorted. preparation: of images, empty for arrays. lost: keys that
    were asked for, but whose tensors hold infinity on some sample. path: of the file, for messages.
    """

    stats: Mapping[Key, Streaming]
    model: str
    graph: str
    samples: tuple[bytes, ...]
    made: tuple[Made, ...]
    preparation: str = ""
    lost: frozenset[Key] = frozenset()
    path: str = field(default="", compare=False)

    @cached_property
    def seen(self) -> frozenset[bytes]:
        """The digests of the samples."""
        return frozenset(self.samples)

    @property
    def data(self) -> str:
        """sha256, in hex, over all samples, in whatever order they were seen."""
        return hashlib.sha256(b"".join(self.samples)).hexdigest()


def structure(graph: gs.Graph) -> str:
    """sha256, in hex, of what is computed from what, by name: the same for equal preparations."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        names = [[t.name for t in tensors] for tensors in (node.inputs, node.outputs)]
        digest.update(repr((node.domain or "", node.op, *names)).encode())
    return digest.hexdigest()


def order_of(key: Key) -> tuple[str, ...]:
    """Keys of a file are sorted by this."""
    return key.tensor, key.minus or "", key.what, str(key.axis), repr(key.window)


def save(statistics: Statistics, path: str | Path) -> None:
    """Write a statistics file whole or not at all; the same statistics give the same bytes.

    Raises OptionError when the path cannot be written.
    """
    keys = sorted(statistics.stats, key=order_of)
    observers = [_settled(statistics.stats[key]) for key in keys]
    header = {
        "format": VERSION,
        "model": statistics.model,
        "graph": statistics.graph,
        "data": statistics.data,
        "preparation": statistics.preparation,
        "made": [_to_table(made) for made in statistics.made],
        "lost": [_to_table(key) for key in sorted(statistics.lost, key=order_of)],
        "keys": [
            {**_to_table(key), "numbers": _finite(numbers(o))}
            for key, o in zip(keys, observers, strict=True)
        ],
    }
    write(path, header, _entries(statistics.samples, observers))


def load(path: str | Path, model: str | None = None) -> Statistics:
    """Read a statistics file; `model`: the digest of the model that it is to be used with.

    Raises DataError when the file is missing, damaged, of another version or none of ours, and
    OptionError when it was made from another model.
    """
    if not Path(path).is_file():
        raise DataError(f"statistics {path} do not exist; give a file that onnxc calibrate wrote")
    try:
        found = _read(path) if is_archive(path) else None
    except DataError as error:
        raise DataError(f"statistics {path} {error}; {AGAIN}") from error
    except DAMAGE as error:
        raise DataError(f"statistics {path} are damaged ({_reason(error)}): {AGAIN}") from error
    if found is None:
        raise DataError(f"{path} is no statistics file; give one that onnxc calibrate wrote")
    if model is not None and found.model != model:
        raise OptionError(f"statistics {path} are of another model: calibrate this one")
    return replace(found, path=str(path))


def _read(path: str | Path) -> Statistics | None:
    """What an archive holds; None where it is none of ours."""
    with Archive(path) as archive:
        return _parse(archive) if archive.is_ours else None


def _settled(observer: Streaming) -> Streaming:
    if isinstance(observer, MomentsObserver):
        observer.settle()
    return observer


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The extremes of what saw nothing are infinite, and left out."""
    return {name: value for name, value in values.items() if abs(value) != np.inf}


def _entries(samples: tuple[bytes, ...], observers: list[Streaming]) -> Iterator[tuple[str, Array]]:
    yield SAMPLES, np.frombuffer(b"".join(samples), np.uint8).reshape(-1, DIGEST)
    for index, observer in enumerate(observers):
        if numbers(observer)["count"]:
            yield from ((f"{index}.{name}", x) for name, x in arrays(observer).items())


def _to_table(value: Any) -> dict[str, Any]:
    """A dataclass as a table: what is as by default is left out."""
    kept = {f.name: x for f in fields(value) if (x := getattr(value, f.name)) != f.default}
    return {k: _to_table(v) if isinstance(v, Window) else v for k, v in kept.items()}


def _parse(archive: Archive) -> Statistics:
    header = _table(archive.header())
    if header["format"] != VERSION:
        raise DataError(
            f"were written in format version {header['format']}, and this onnxc reads {VERSION}"
        )
    samples = archive.array(SAMPLES)
    if samples.dtype != np.uint8 or samples.ndim != 2 or samples.shape[1] != DIGEST:
        raise ValueError("the digests of its samples have a wrong shape")
    stats, known = {}, {SAMPLES}
    for index, entry in enumerate(header["keys"]):
        given = _table(_table(entry).pop("numbers"))
        key = _key(entry)
        observer, names = restored(key, given, partial(_array, archive, index))
        known.update(f"{index}.{name}" for name in names)
        stats[key] = observer
    if len(stats) < len(header["keys"]) or archive.names != known:
        raise ValueError("its entries are not those that its header names")
    found = Statistics(
        stats,
        read(header["model"], str, "model"),
        read(header["graph"], str, "graph"),
        tuple(row.tobytes() for row in samples),
        tuple(_from_table(Made, table) for table in header["made"]),
        read(header["preparation"], str, "preparation"),
        frozenset(map(_key, header["lost"])),
    )
    if found.data != header["data"] or list(found.samples) != sorted(found.samples):
        raise ValueError("its samples are not those of its header")
    return found


def _array(archive: Archive, index: int, name: str) -> Array:
    return archive.array(f"{index}.{name}")


def _key(table: Mapping[str, Any]) -> Key:
    """A key as `_to_table` wrote it. Raises ValueError or OptionError."""
    plain = {name: value for name, value in _table(table).items() if name != "window"}
    key = _from_table(Key, plain)
    if "window" in table:
        key = Key(key.tensor, key.what, key.axis, key.minus, _window(table["window"]))
    if key.what not in OBSERVERS:
        raise ValueError(f"{key.what!r} is no statistic")
    return key


def _window(table: Mapping[str, Any]) -> Window:
    window = _from_table(Window, table)
    sizes = (*window.kernel, *window.strides, *window.dilations, window.groups)
    if min(sizes) < 1 or window.samples not in (0, 1) or window.auto_pad not in AUTO_PADS:
        raise ValueError("a window is none of a layer")
    return window


def _from_table(cls: type[T], table: Mapping[str, Any]) -> T:
    kinds = hints(cls)
    if unknown := set(_table(table)) - set(kinds):
        raise ValueError(f"{min(unknown)!r} is unknown")
    return cls(**{name: read(value, kinds[name], name) for name, value in table.items()})


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("its header has another form")
    return value


def _reason(error: Exception) -> str:
    """The first line of what is wrong, or its kind where that is a mere key or nothing."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text and not isinstance(error, LookupError) else "incomplete"
