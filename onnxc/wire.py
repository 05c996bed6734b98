"""Model files in the protobuf wire format, read and written without holding their weights.

A message is its fields one after the other, each with its number, its kind and, for texts, data and
messages, its length in front. So a large file can be read by skipping the data of the initializers,
which then count as external data in that very file, and written by putting the data of each weight
where it belongs between the bytes of the rest. What is written are the bytes that protobuf writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from onnxc import weights
from onnxc.weights import KEEP, Values

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # numbers of fields in onnx.proto
_TENSOR = onnx.TensorProto.DESCRIPTOR
_WIDTHS = {1: 8, 5: 4}  # bytes of kinds of fixed length
_VARINT, _SIZED = 0, 2  # kinds


class Field(NamedTuple):
    """A field in a file: from its key at `start` to `stop`; its content begins at `inside`."""

    number: int
    kind: int
    start: int
    inside: int
    stop: int


def outline(path: Path) -> onnx.ModelProto:
    """A model whose large initializers are references to where they lie in the file.

    Raises DecodeError when this is no model or a truncated one, OSError.
    """
    with path.open("rb") as file:
        parts = []
        for field in fields(file, 0, path.stat().st_size):
            is_graph = field.number == GRAPH and field.kind == _SIZED
            parts.append(_graph(file, field, path.name) if is_graph else _bytes(file, field))
    model = onnx.ModelProto()
    model.ParseFromString(b"".join(parts))
    return model


def _graph(file: BinaryIO, graph: Field, location: str) -> bytes:
    parts = []
    for field in fields(file, graph.inside, graph.stop):
        is_weight = field.number == INITIALIZER and field.stop - field.start > KEEP
        parts.append(_weight(file, field, location) if is_weight else _bytes(file, field))
    content = b"".join(parts)
    return _key(GRAPH, len(content)) + content


def _weight(file: BinaryIO, weight: Field, location: str) -> bytes:
    data: Field | None = None
    parts = []
    for field in fields(file, weight.inside, weight.stop):
        if field.number == RAW_DATA and field.stop - field.inside > KEEP:
            data = field
        else:
            parts.append(_bytes(file, field))
    tensor = onnx.TensorProto()
    tensor.ParseFromString(b"".join(parts))
    if data is not None:
        weights.refer_to(tensor, location, data.inside, data.stop - data.inside)
    content: bytes = tensor.SerializeToString()
    return _key(INITIALIZER, len(content)) + content


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of a message that lies between two positions."""
    while start < end:
        file.seek(start)
        key = _read_varint(file)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _read_varint(file)
        length = _read_varint(file) if kind == _SIZED else _WIDTHS.get(kind, 0)
        inside = file.tell()
        stop = inside + length
        if stop > end or (kind not in _WIDTHS and kind not in (_VARINT, _SIZED)):
            raise DecodeError("a field is longer than the message around it")
        yield Field(number, kind, start, inside, stop)
        start = stop


def _bytes(file: BinaryIO, field: Field) -> bytes:
    file.seek(field.start)
    return file.read(field.stop - field.start)


def _read_varint(file: BinaryIO) -> int:
    number = shift = 0
    while True:
        digit = file.read(1)
        if not digit or shift > 63:
            raise DecodeError("a number is truncated")
        number |= (digit[0] & 127) << shift
        if digit[0] < 128:
            return number
        shift += 7


def is_text(message: Any) -> bool:
    """Whether every text in a message is one: protobuf gives bytes for what is not UTF-8."""
    pending = [message]
    while pending:
        current = pending.pop()
        is_tensor = current.DESCRIPTOR is _TENSOR
        for field, value in _described(current) if is_tensor else current.ListFields():
            is_list = hasattr(value, "extend")
            if field.type == FieldDescriptor.TYPE_STRING:
                if not all(isinstance(text, str) for text in (value if is_list else (value,))):
                    return False
            elif field.message_type is not None:
                pending += value if is_list else (value,)
    return True


def _described(tensor: onnx.TensorProto) -> Iterator[tuple[FieldDescriptor, Any]]:
    """The fields of a tensor, but for its data, which would be copied."""
    for name in ("name", "doc_string", "external_data", "metadata_props"):
        if name in _TENSOR.fields_by_name:
            yield _TENSOR.fields_by_name[name], getattr(tensor, name)


def write(proto: onnx.ModelProto, held: list[Values], file: BinaryIO) -> None:
    """Write a skeleton as a whole model, the bytes that `fill` gives, one weight at a time."""
    weights.fill_bodies(proto.graph, held)
    before, behind = _parted(proto.graph, INITIALIZER)
    parts = [_headed(tensor, held) for tensor in proto.graph.initializer]
    length = sum(len(head) + weights.size(values) for head, values in parts if values is not None)
    length += sum(len(head) for head, values in parts if values is None)
    first, last = _parted(proto, GRAPH)
    file.write(first + _key(GRAPH, len(before) + length + len(behind)) + before)
    for head, values in parts:
        file.write(head)
        if values is not None:
            weights.write(values, file)
    file.write(behind + last)


def _headed(tensor: onnx.TensorProto, held: list[Values]) -> tuple[bytes, Values | None]:
    """An initializer as a field: its bytes up to the data, and the data where they are apart."""
    values = weights.of_stub(tensor, held)
    if values is None:
        whole = tensor.SerializeToString()
        return _key(INITIALIZER, len(whole)) + whole, None
    bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    length = weights.size(values)
    head = bare.SerializeToString() + _key(RAW_DATA, length)
    return _key(INITIALIZER, len(head) + length) + head, values


def _parted(message: Any, number: int) -> tuple[bytes, bytes]:
    """The bytes of the fields in front of a field, and of those behind it."""
    before, behind = type(message)(), type(message)()
    for field, value in message.ListFields():
        if field.number != number:
            _set(before if field.number < number else behind, field.name, value)
    return before.SerializeToString(), behind.SerializeToString()


def _set(message: Any, name: str, value: Any) -> None:
    if hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _key(number: int, length: int) -> bytes:
    """What stands in front of a field of so many bytes."""
    return _varint(number << 3 | _SIZED) + _varint(length)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes((*digits, number))
