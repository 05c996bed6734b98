"""Weights travel beside the graph: the graph library never sees their bytes.

At load every large tensor becomes an array, or a mapped piece of its external file, and leaves a
**stub** in the protobuf: same name, type and shape, and a number in place of the data. At save the
numbers are filled in again. A skeleton, a protobuf with stubs, is small whatever the model weighs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxc import elements
from onnxc.errors import ModelError
from onnxc.files import TemporaryFolder

LARGE = 1 << 17  # bytes from which on a value of a big model goes to disk
PIECE = 8 << 20  # bytes that are read at once
KEEP = 1024  # bytes: tensors up to this size stay in a skeleton, for shape inference
DIGITS = 19  # of a place in a file, at most
_MARK = "onnxc:"
_ALIGN = 4096


class ExternalValues(LazyValues):  # type: ignore[misc]
    """A tensor in an external file: mapped when read, and forgotten after."""

    def __init__(self, path: Path, offset: int, tensor: onnx.TensorProto) -> None:
        self.path, self.offset = path, offset
        self.shape = tuple(tensor.dims)
        self.dtype = elements.dtype(tensor.data_type)
        self.nbytes = stored_bytes(tensor)

    def load(self) -> NDArray[Any]:
        """The values, a read-only view of the file where the type allows it."""
        try:
            return elements.unpacked(self._mapped(), self.dtype, self.shape)
        except OSError as error:
            raise ModelError(f"cannot read external data {self.path}: {error.strerror}") from error
        except ValueError as error:  # it was long enough when the model was opened
            raise ModelError(f"external data {self.path} was cut off meanwhile") from error

    def _mapped(self) -> NDArray[np.uint8]:
        if not self.nbytes:  # nothing cannot be mapped
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,)))


Values = NDArray[Any] | ExternalValues


class Scratch:
    """Values that do not fit in memory: each in a temporary file that lives as long as they do."""

    def __init__(self) -> None:
        self.folder = TemporaryFolder()
        self.count = 0

    def keep(self, values: NDArray[Any]) -> ExternalValues:
        """The same values on disk. Raises OSError when that is full."""
        self.count += 1
        path = Path(self.folder.name) / str(self.count)
        with path.open("wb") as file:
            write(values, file)
        kind = elements.number(values.dtype)
        kept = ExternalValues(path, 0, onnx.TensorProto(data_type=kind, dims=values.shape))
        weakref.finalize(kept, _forget, path, self.folder)
        return kept


def _forget(path: Path, folder: TemporaryFolder) -> None:
    """Remove the file of values that nobody holds any more; the folder outlives them all."""
    path.unlink(missing_ok=True)


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of this type and shape takes in a file; low-bit types are packed.

    Raises ModelError when there is no such type or shape, or when texts are meant.
    """
    try:
        kind = elements.dtype(tensor.data_type)
    except ValueError as error:
        raise ModelError(
            f"initializer {tensor.name!r} is damaged: its type {tensor.data_type} has no fixed size"
        ) from error
    if min(tensor.dims, default=0) < 0:
        raise ModelError(
            f"initializer {tensor.name!r} is damaged: it has the shape {list(tensor.dims)}"
        )
    return elements.size(kind, int(prod(tensor.dims)))


def to_array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Values of a tensor that holds its data; low-bit and 8-bit floats as ml_dtypes, read-only.

    Raises ModelError when the data does not fill the shape.
    """
    try:
        if tensor.data_type == onnx.TensorProto.STRING:
            texts = np.empty(len(tensor.string_data), object)
            texts[:] = list(tensor.string_data)
            return texts.reshape(tensor.dims)
        array = _read(tensor)
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"initializer {tensor.name!r} is damaged: its data does not fit "
            f"type {tensor.data_type} and shape {list(tensor.dims)}"
        ) from error
    array = array.reshape(tensor.dims)
    array.flags.writeable = False
    return array


def _read(tensor: onnx.TensorProto) -> NDArray[Any]:
    if not tensor.HasField("raw_data"):
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    data = np.frombuffer(tensor.raw_data, np.uint8)
    return elements.unpacked(data, elements.dtype(tensor.data_type), tuple(tensor.dims))


def to_tensor(name: str, values: Values) -> onnx.TensorProto:
    """A tensor protobuf that holds the values, any type that ONNX knows."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "OUS":
        return onnx.numpy_helper.from_array(values.astype(object), name)
    kind = elements.number(values.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
    tensor.raw_data = b"".join(pieces(values))
    return tensor


def pieces(values: Values) -> Iterator[bytes | memoryview]:
    """The bytes in a file, a few at a time. Raises ModelError when they cannot be read."""
    if not isinstance(values, ExternalValues):
        yield elements.packed(values).data
        return
    try:
        with values.path.open("rb") as file:
            file.seek(values.offset)
            for start in range(0, values.nbytes, PIECE):
                yield file.read(min(PIECE, values.nbytes - start))
    except OSError as error:
        raise ModelError(f"cannot read external data {values.path}: {error.strerror}") from error


def write(values: Values, file: BinaryIO) -> None:
    """The same into a file."""
    file.writelines(pieces(values))


def size(values: Values) -> int:
    """Bytes in a file."""
    if isinstance(values, ExternalValues):
        return values.nbytes
    if values.dtype.kind in "OUS":
        return sum(len(text) for text in values.astype(object).flat)
    return elements.size(values.dtype, values.size)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and values of Constant nodes, nested bodies included."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield from current.initializer
        for node in current.node:
            pending += (a.g for a in node.attribute if a.HasField("g"))
            if node.op_type == "Constant":
                yield from (a.t for a in node.attribute if a.HasField("t"))


def detach(graph: onnx.GraphProto, base: Path | None) -> list[Values]:
    """Take large and external weights out of a graph, leaving stubs.

    base: folder of the external files. Raises ModelError for data that is missing or damaged.
    """
    weights: list[Values] = []
    for tensor in tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            weights.append(_external(tensor, base))
        elif tensor.data_type != onnx.TensorProto.STRING and stored_bytes(tensor) > KEEP:
            weights.append(to_array(tensor))
        else:
            continue
        _hollow(tensor, len(weights) - 1)
    return weights


def attach(constants: Iterable[gs.Constant], weights: list[Values]) -> None:
    """Give constants that were imported from a skeleton their values."""
    for constant in constants:
        lazy = constant._values
        if isinstance(lazy, LazyValues) and not isinstance(lazy, ExternalValues):
            number = _number(lazy.tensor)
            constant._values = to_array(lazy.tensor) if number is None else weights[number]
            constant.data_location = None


def stub(name: str, values: Values, weights: list[Values]) -> onnx.TensorProto:
    """A tensor for a skeleton: small values whole, others appended to `weights`."""
    if isinstance(values, np.ndarray) and (values.nbytes <= KEEP or values.dtype.kind in "OUS"):
        return to_tensor(name, values)
    kind = elements.number(values.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
    weights.append(values)
    _hollow(tensor, len(weights) - 1)
    return tensor


def fill(graph: onnx.GraphProto, weights: list[Values]) -> None:
    """Put the values back in place of the stubs."""
    _fill(tensors(graph), weights)


def fill_bodies(graph: onnx.GraphProto, weights: list[Values]) -> None:
    """The same for nested bodies and nodes, without the initializers of the graph itself."""
    _fill(islice(tensors(graph), len(graph.initializer), None), weights)


def _fill(stubs: Iterable[onnx.TensorProto], weights: list[Values]) -> None:
    for tensor in stubs:
        values = of_stub(tensor, weights)
        if values is not None:
            tensor.CopyFrom(to_tensor(tensor.name, values))


def of_stub(tensor: onnx.TensorProto, weights: list[Values]) -> Values | None:
    """What belongs in the place of a stub; None for a tensor that holds its values."""
    number = _number(tensor)
    return None if number is None else weights[number]


def empty(graph: onnx.GraphProto) -> None:
    """Make every stub a valid tensor without elements, as a structural check needs."""
    for tensor in tensors(graph):
        if _number(tensor) is not None:
            tensor.CopyFrom(
                onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0])
            )


def spill(graph: onnx.GraphProto, weights: list[Values], file: BinaryIO, location: str) -> None:
    """Write the weights to an external file, one at a time, and refer to them from the stubs."""
    places: dict[int, tuple[int, int]] = {}
    for tensor in tensors(graph):
        number = _number(tensor)
        if number is None:
            continue
        if number not in places:
            places[number] = _append(file, weights[number])
        refer_to(tensor, location, *places[number])


def refer(graph: onnx.GraphProto, weights: list[Values], scratch: Scratch | None) -> Path | None:
    """Let the stubs of a part of a skeleton refer to the files that the weights are in.

    Arrays are put in, large ones by way of `scratch` where there is one. Returns the folder that
    the references start from; None where there are none.
    """
    stubs = [(t, n) for t in tensors(graph) if (n := _number(t)) is not None]
    for tensor, number in stubs:
        held = weights[number]
        if isinstance(held, np.ndarray) and scratch is not None and held.nbytes >= LARGE:
            weights[number] = scratch.keep(held)
        elif isinstance(held, np.ndarray):
            tensor.CopyFrom(to_tensor(tensor.name, held))
    far = [(t, v) for t, n in stubs if isinstance(v := weights[n], ExternalValues)]
    if not far:
        return None
    root = Path(os.path.commonpath([values.path.absolute().parent for _, values in far]))
    for tensor, values in far:
        location = values.path.absolute().relative_to(root).as_posix()
        refer_to(tensor, location, values.offset, values.nbytes)
    return root


def _append(file: BinaryIO, values: Values) -> tuple[int, int]:
    offset = -(-file.tell() // _ALIGN) * _ALIGN
    file.write(b"\0" * (offset - file.tell()))
    write(values, file)
    return offset, file.tell() - offset


def _hollow(tensor: onnx.TensorProto, number: int) -> None:
    name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, kind
    tensor.dims.extend(dims)
    refer_to(tensor, f"{_MARK}{number}")


def refer_to(tensor: onnx.TensorProto, location: str, offset: int = 0, length: int = 0) -> None:
    """Make a tensor a reference to external data."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    if length:
        tensor.external_data.add(key="offset", value=str(offset))
        tensor.external_data.add(key="length", value=str(length))


def locations(tensors: Iterable[onnx.TensorProto]) -> set[str]:
    """The names of the files that hold tensors."""
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


def move(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Refer to a file by its new name."""
    for entry in (entry for tensor in tensors(graph) for entry in tensor.external_data):
        if (entry.key, entry.value) == ("location", old):
            entry.value = new


def _number(tensor: onnx.TensorProto) -> int | None:
    places = (e.value for e in tensor.external_data if e.key == "location")
    mark = next((place for place in places if place.startswith(_MARK)), None)
    return None if mark is None else int(mark.removeprefix(_MARK))


def _external(tensor: onnx.TensorProto, base: Path | None) -> ExternalValues:
    stored_bytes(tensor)  # of a type and shape that there are
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise ModelError(
            f"weight {tensor.name!r} is in the external file {location!r}; "
            f"open the model by its path, so that onnxc finds the file"
        )
    if not location or not is_inside(location):
        raise ModelError(
            f"weight {tensor.name!r} refers to external data {location!r}, outside the folder "
            f"of the model; onnxc reads none but files beside the model"
        )
    values = ExternalValues(base / location, _integer(entries, "offset", tensor), tensor)
    _check_length(values, _integer(entries, "length", tensor), tensor.name)
    return values


def is_inside(location: str) -> bool:
    path = Path(os.path.normpath(location.replace("\\", "/")))
    return not path.is_absolute() and path.parts[:1] != ("..",)


def _integer(entries: dict[str, str], key: str, tensor: onnx.TensorProto) -> int:
    text = entries.get(key, "0")
    if not text.isdecimal() or len(text) > DIGITS:
        shown = text if len(text) <= DIGITS else f"of {len(text)} characters"
        raise ModelError(f"weight {tensor.name!r}: external data has a bad {key} {shown!r}")
    return int(text)


def _check_length(values: ExternalValues, declared: int, name: str) -> None:
    try:
        held = values.path.stat().st_size if values.path.is_file() else None
    except (OSError, ValueError) as error:  # no name of a file
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"external data of weight {name!r} cannot be read: {reason}") from error
    if held is None:
        raise ModelError(f"external data {values.path} of weight {name!r} is missing")
    if declared and declared != values.nbytes:
        raise ModelError(
            f"weight {name!r} needs {values.nbytes} bytes, but its external data has {declared}"
        )
    if values.offset + values.nbytes > held:
        raise ModelError(f"external data {values.path} is too short for weight {name!r}")
