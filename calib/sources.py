"""Where arrays come from: .npy, .npz, folders of them, ONNX test_data_set folders, memory.

Each file or set is a **block**: headers (shape and type) that are read at once, and arrays that are
read when a sample is asked for. Uncompressed arrays are memory-mapped, so that at most one block is
held in memory. Nothing is ever unpickled.
"""

from __future__ import annotations

import bisect
import itertools
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.lib import format as npy

from calib.inputs import (
    Array,
    Axes,
    Feed,
    InputSpec,
    Reading,
    agree,
    check_dtype,
    conform,
    reading,
    sample_axes,
)
from onnxc.elements import is_float
from onnxc.errors import DataError

LABELS = "labels"
BROKEN: tuple[type[Exception], ...] = (  # what reading a damaged file may raise
    *(OSError, ValueError, EOFError, KeyError, SyntaxError, TypeError, RuntimeError),
    *(MemoryError, OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
    struct.error,
)


class Source(Protocol):
    """Samples by number. `skipped` grows when a sample turns out to be unreadable."""

    labels: Array | None
    notes: list[str]
    skipped: dict[int, str]
    axes: Axes  # the sample axis of each input
    rows: int  # rows of one sample along it

    def __len__(self) -> int: ...
    def feed(self, index: int) -> Feed | None: ...
    def content(self, index: int) -> Iterator[bytes]: ...
    def file(self, index: int) -> Path | None: ...


@dataclass(frozen=True)
class Header:
    """Shape and type of an array that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"] = "C"


@dataclass(frozen=True)
class Block:
    """Named arrays of one file, set or item. `whole`: a complete feed that must not be split.

    file: the full path of the file or set, None for arrays that lie in none.
    """

    origin: str
    headers: dict[str, Header]
    load: Callable[[str], Array]
    whole: bool = False
    file: Path | None = None


class Blocks:
    """A source over blocks whose arrays fit the inputs of a model.

    Raises DataError naming the block, the array and what the input expects when one does not fit.
    """

    def __init__(self, inputs: Sequence[InputSpec], blocks: Sequence[Block]) -> None:
        self.notes: list[str] = []
        self.skipped: dict[int, str] = {}
        self._inputs = {i.name: i for i in inputs}
        self._blocks = blocks
        self.axes = sample_axes(inputs)
        self._fits = [Fit.of(block, inputs) for block in blocks]
        self._starts = list(itertools.accumulate((f.count for f in self._fits), initial=0))
        self._loaded: tuple[int, dict[str, Array]] = (-1, {})
        self.rows = max(r.rows for r in self._fits[0].readings.values())
        self.labels = self._read_labels()
        self._note_bytes()

    def __len__(self) -> int:
        return self._starts[-1]

    def feed(self, index: int) -> Feed:
        """Arrays of one sample by input name, in the types of the model."""
        number = bisect.bisect_right(self._starts, index) - 1
        fit, offset = self._fits[number], index - self._starts[number]
        arrays = self._arrays(number)
        where = f"sample {offset} of {self._blocks[number].origin}"
        return {
            name: conform(spec, fit.readings[name].cut(arrays[name], offset), f"{where}, {name!r},")
            for name, spec in self._inputs.items()
        }

    def content(self, index: int) -> Iterator[bytes]:
        for name, array in self.feed(index).items():
            yield f"{name}{array.dtype}{array.shape}".encode()
            yield str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()

    def file(self, index: int) -> Path | None:
        return self._blocks[bisect.bisect_right(self._starts, index) - 1].file

    def __getstate__(self) -> dict[str, Any]:
        """It travels without what it has read of files."""
        return {**vars(self), "_loaded": (-1, {})}

    def _arrays(self, number: int) -> dict[str, Array]:
        loaded = self._loaded  # of this thread's turn: others may load in between
        if loaded[0] != number:
            names, load = self._fits[number].names, self._blocks[number].load
            loaded = self._loaded = (number, {name: load(source) for name, source in names.items()})
        return loaded[1]

    def _read_labels(self) -> Array | None:
        carriers = [b for b, f in zip(self._blocks, self._fits, strict=True) if f.has_labels]
        if not carriers:
            return None
        if len(carriers) < len(self._blocks):
            some = f"{len(carriers)} of {len(self._blocks)}"
            self.notes.append(f"labels are ignored: only {some} files have them")
            return None
        pairs = zip(self._blocks, self._fits, strict=True)
        return np.concatenate([_labels(block, fit.count) for block, fit in pairs])

    def _note_bytes(self) -> None:
        """Say so where raw pixels, it seems, go to a float input as they are."""
        for name, spec in self._inputs.items():
            source = self._fits[0].names[name]
            kind = self._blocks[0].headers[source].dtype
            if is_float(spec.dtype) and kind == np.uint8 and self._arrays(0)[name][:64].max() > 1:
                self.notes.append(
                    f"the uint8 values of {source or name!r} go to the {spec.dtype.name} input "
                    f"{name!r} as they are, 0..255: scale them first if the model expects 0..1"
                )


@dataclass(frozen=True)
class Fit:
    """How a block feeds the inputs: array and reading by input name, and the number of samples."""

    names: dict[str, str]
    readings: dict[str, Reading]
    count: int
    has_labels: bool

    @classmethod
    def of(cls, block: Block, inputs: Sequence[InputSpec]) -> Fit:
        names, axes = _match(block, inputs), sample_axes(inputs)
        whole = block.whole or _is_feed(block, inputs, names)
        readings = {}
        for spec in inputs:
            header = block.headers[names[spec.name]]
            where = f"array {names[spec.name] or spec.name!r} of {block.origin}"
            check_dtype(spec, header.dtype, where)
            readings[spec.name] = reading(spec, axes[spec.name], header.shape, where, whole)
        has_labels = LABELS in block.headers and LABELS not in names.values()
        return cls(names, readings, agree(inputs, readings, block.origin), has_labels)


def _match(block: Block, inputs: Sequence[InputSpec]) -> dict[str, str]:
    """The name of each input's array. A model with one input takes any name."""
    expected = [i.name for i in inputs]
    found = [name for name in block.headers if name in expected or name != LABELS]
    if len(found) == len(inputs) == 1:
        return {expected[0]: found[0]}
    if set(found) == set(expected):
        return {name: name for name in expected}
    have = ", ".join(map(repr, found)) or "none"
    raise DataError(
        f"{block.origin}: the model's inputs are {', '.join(map(repr, expected))}, "
        f"but the arrays are {have}; name them after the inputs"
    )


def _is_feed(block: Block, inputs: Sequence[InputSpec], names: Mapping[str, str]) -> bool:
    """Whether a block is one complete feed: a batch with a state whose sample axis has no name."""
    axes = sample_axes(inputs)
    shapes = {i.name: block.headers[names[i.name]].shape for i in inputs}
    if any(i.shape is None or len(i.shape) != len(shapes[i.name]) for i in inputs):
        return False
    rows = {shapes[name][axis] for name, axis in axes.items() if axis is not None}
    states = [i for i in inputs if i.shape and axes[i.name] is None and None in i.shape]
    free = [
        {n for n, d in zip(shapes[i.name], i.shape or (), strict=True) if d is None} for i in states
    ]
    return bool(states) and all(sizes & rows for sizes in free)


def _labels(block: Block, count: int) -> Array:
    labels = np.atleast_1d(np.asarray(block.load(LABELS)))
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels of {block.origin} must be integers, but are {labels.dtype.name}")
    if len(labels) != count:
        raise DataError(f"{block.origin} has {len(labels)} labels for {count} samples")
    return labels.astype(np.int64)


def numpy_file(path: Path) -> Block:
    """A .npy or .npz file as a block; DataError when it is corrupted or holds Python objects."""
    try:
        headers = _npz_headers(path) if path.suffix == ".npz" else {"": _npy_header(path)}
    except BROKEN as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    for name, header in headers.items():
        if header.dtype.hasobject:
            raise DataError(
                f"array {name!r} of {path} holds Python objects, which are never unpickled: "
                "save it as numbers, one file a sample where the shapes differ"
            )
    if not headers:
        raise DataError(f"{path} holds no arrays")
    full = path.absolute()
    return Block(str(path), headers, partial(_load, full), file=full)


def _npy_header(path: Path) -> Header:
    with path.open("rb") as file:
        return _header(file)


def _npz_headers(path: Path) -> dict[str, Header]:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if m.endswith(".npy")]
        headers = {}
        for member in members:
            with archive.open(member) as file:
                headers[member.removesuffix(".npy")] = _header(file)
        return headers


def _header(file: IO[bytes]) -> Header:
    """The header of a .npy file; the file is left where its values begin."""
    is_first = npy.read_magic(file) == (1, 0)
    read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    return Header(shape, dtype, "F" if is_fortran else "C")


def _load(path: Path, name: str) -> Array:
    try:
        if path.suffix != ".npz":
            return _plain(np.load(path, mmap_mode="r", allow_pickle=False))
        mapped = _map_member(path, f"{name}.npy")
        if mapped is not None:
            return mapped
        with np.load(path, allow_pickle=False) as archive:
            return _plain(archive[name])
    except BROKEN as error:
        raise DataError(f"cannot read array {name!r} of {path}: {reason(error)}") from error


def _map_member(path: Path, member: str) -> Array | None:
    """An uncompressed member of a .npz, mapped where it lies in the file; None if compressed."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(info.header_offset + 26)  # the lengths of name and extra field, then both
        lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
        file.seek(sum(lengths), 1)
        h = _header(file)
        return _plain(np.memmap(path, h.dtype, "r", file.tell(), h.shape, h.order))


def _plain(array: Array) -> Array:
    """The array as a plain ndarray: slices of a np.memmap cost several times more."""
    return array.view(np.ndarray)


def onnx_set(folder: Path, inputs: Sequence[InputSpec]) -> Block:
    """A folder with input_0.pb, input_1.pb, ... (TensorProto) in the order of the inputs."""
    files = sorted(folder.glob("input_*.pb"), key=lambda f: (len(f.name), f.name))
    if len(files) != len(inputs):
        wanted = ", ".join(repr(i.name) for i in inputs)
        raise DataError(f"{folder} has {len(files)} input_*.pb files for the inputs {wanted}")
    tensors = [_tensor(file) for file in files]
    given = [t.name for t in tensors]
    expected = [i.name for i in inputs]
    names = given if set(given) == set(expected) else expected
    paths = {name: file.absolute() for name, file in zip(names, files, strict=True)}
    arrays = dict(zip(names, map(onnx.numpy_helper.to_array, tensors), strict=True))
    headers = {name: Header(a.shape, a.dtype) for name, a in arrays.items()}
    load = partial(_from_set, paths)
    return Block(str(folder), headers, load, whole=True, file=folder.absolute())


def _from_set(paths: Mapping[str, Path], name: str) -> Array:
    array: Array = onnx.numpy_helper.to_array(_tensor(paths[name]))
    return array


def _tensor(path: Path) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        onnx.numpy_helper.to_array(tensor)
    except (OSError, ValueError, TypeError, KeyError, DecodeError) as error:
        raise DataError(f"{path} is not an ONNX tensor: {reason(error)}") from error
    return tensor


def mapping(arrays: Mapping[str, Any], origin: str) -> Block:
    """Arrays in memory as a block."""
    held = {name: _array(value, f"{name!r} of {origin}") for name, value in arrays.items()}
    headers = {name: Header(a.shape, a.dtype) for name, a in held.items()}
    return Block(origin, headers, held.__getitem__)


def _array(value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is not an array: {reason(error)}") from error
    if array.dtype.hasobject and not all(isinstance(v, str) for v in array.flat):
        raise DataError(f"{where} is not an array of numbers, but {type(value).__name__}")
    return array.astype(str) if array.dtype.hasobject else array


def reason(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
