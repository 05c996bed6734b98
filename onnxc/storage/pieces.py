"""Where the data of tensors lies in a model file and in the files of its external data.

A message is walked as the descriptors of onnx.proto say: tensors are found wherever they are, in
initializers, attributes, nested bodies, functions and sparse tensors. Pieces of a file do not
overlap and are in order; what lies between them is the rest of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import DecodeError

from onnxc import elements, wire
from onnxc.errors import ModelError
from onnxc.storage.streams import WIDTHS, Kind
from onnxc.weights import DIGITS, is_inside, stored_bytes

LEAST = 512  # bytes of data that are coded by themselves
_SIZED = 2  # the kind of a field with a length in front
_DEEPEST = 100  # messages in messages, as protobuf allows
_TENSOR = onnx.TensorProto.DESCRIPTOR
_NUMBERS = {name: field.number for name, field in _TENSOR.fields_by_name.items()}
_DATA = {  # bytes of an element in the fields that hold data; 0: what the type of the tensor takes
    _NUMBERS["raw_data"]: 0,
    _NUMBERS["float_data"]: 4,
    _NUMBERS["double_data"]: 8,
    _NUMBERS["int32_data"]: 1,  # numbers of 7 bits a byte, as are the next two
    _NUMBERS["int64_data"]: 1,
    _NUMBERS["uint64_data"]: 1,
}


@dataclass(frozen=True)
class Piece:
    """Bytes from `start` to `stop` of a file: data of a tensor."""

    name: str
    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True)
class Member:
    """A file of a model: its name beside the model, and the pieces in it."""

    name: str
    path: Path
    pieces: tuple[Piece, ...]


def members(path: Path) -> list[Member]:
    """A model file, and the files of its external data. Raises ModelError, OSError."""
    found: list[Piece] = []
    outside: dict[str, list[Piece]] = defaultdict(list)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            for tensor, places in _tensors(file, onnx.ModelProto.DESCRIPTOR, 0, size, 0):
                found += places
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    location, piece = _external(path, tensor)
                    outside[location].append(piece)
    except DecodeError as error:
        raise ModelError("not an ONNX model, or a truncated one") from error
    beside = [
        Member(name, path.parent / name, _apart(pieces)) for name, pieces in sorted(outside.items())
    ]
    return [Member("", path, _apart(found)), *beside]


def _tensors(
    file: BinaryIO, message: Any, start: int, stop: int, depth: int
) -> Iterator[tuple[onnx.TensorProto, list[Piece]]]:
    """Tensors in a message, without the data that is in pieces."""
    if depth > _DEEPEST:
        raise DecodeError("messages are nested too deep")
    for field in wire.fields(file, start, stop):
        known = message.fields_by_number.get(field.number)
        inner = None if known is None else known.message_type
        if inner is None or field.kind != _SIZED:
            continue
        if inner is _TENSOR:
            yield _tensor(file, field.inside, field.stop)
        elif _may_hold(file, field):
            yield from _tensors(file, inner, field.inside, field.stop, depth + 1)


def _may_hold(file: BinaryIO, field: wire.Field) -> bool:
    """Whether a message may hold much data, or a reference to some; most nodes do not."""
    if field.stop - field.inside >= LEAST:
        return True
    file.seek(field.inside)
    return b"location" in file.read(field.stop - field.inside)


def _tensor(file: BinaryIO, start: int, stop: int) -> tuple[onnx.TensorProto, list[Piece]]:
    tensor, places, parts = onnx.TensorProto(), [], []
    for field in wire.fields(file, start, stop):
        if field.number in _DATA and field.kind == _SIZED and field.stop - field.inside >= LEAST:
            places.append(field)
        else:
            file.seek(field.start)
            parts.append(file.read(field.stop - field.start))
    tensor.ParseFromString(b"".join(parts))
    if not wire.is_text(tensor):
        raise DecodeError("the name of a tensor is no text")
    whole = Piece(tensor.name, 0, 0, _kind(tensor))
    found = [_piece(whole, f.inside, f.stop, _DATA[f.number]) for f in places]
    return tensor, found


def _piece(whole: Piece, start: int, stop: int, width: int) -> Piece:
    kind = replace(whole.kind, width=width, is_float=width > 1) if width else whole.kind
    rows = kind.channels if (stop - start) % (kind.channels * kind.width) == 0 else 1
    return Piece(whole.name, start, stop, replace(kind, channels=rows))


def _kind(tensor: onnx.TensorProto) -> Kind:
    rows = tensor.dims[0] if len(tensor.dims) > 1 and tensor.dims[0] > 0 else 1
    try:
        kind = elements.dtype(tensor.data_type)
    except ValueError:  # a type of the future, or texts
        return Kind(channels=rows)
    width = elements.bits(kind) // 8
    return Kind(width, elements.is_float(kind), rows) if width in WIDTHS else Kind(channels=rows)


def _external(path: Path, tensor: onnx.TensorProto) -> tuple[str, Piece]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, numbers = entries.get("location", ""), [entries.get(k, "0") for k in ("offset", "length")]
    if not name or not is_inside(name) or not (path.parent / name).is_file():
        raise ModelError(
            f"external data {name!r} of weight {tensor.name!r} is not beside the model"
        )
    if not all(number.isdecimal() and len(number) <= DIGITS for number in numbers):
        raise ModelError(f"weight {tensor.name!r}: external data has a bad place")
    start, length = map(int, numbers)
    stop = start + (length or stored_bytes(tensor))
    if stop > (path.parent / name).stat().st_size:
        raise ModelError(f"external data {name!r} is too short for weight {tensor.name!r}")
    return name, _piece(Piece(tensor.name, 0, 0, _kind(tensor)), start, stop, 0)


def _apart(pieces: list[Piece]) -> tuple[Piece, ...]:
    """In order, without those that overlap an earlier one or are small."""
    kept: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.start, -piece.stop)):
        is_behind = not kept or piece.start >= kept[-1].stop
        if is_behind and piece.stop - piece.start >= LEAST:
            kept.append(piece)
    return tuple(kept)
