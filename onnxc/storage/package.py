"""The file format .onnxz: the files of a model, its tensors coded one by one.

    magic · payloads of tensors · contents, by zstandard · end

The end has a fixed length and tells where the contents lie. They list, for each file of the model,
the pieces that are coded (`onnxc.storage.streams`), and hold the rest of its bytes; so a file comes
back byte for byte, whatever wrote it. Tensors that are coded alike share a payload. Payloads,
tensors, contents and end have checksums (CRC-32), and no declared size is believed that is above
65,536 times what stands for it. Numbers are of 7 bits a byte, those of the end little-endian.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnxc.errors import ModelError, OptionError
from onnxc.files import TemporaryFolder, replacing
from onnxc.paths import check_unchanged, stamps
from onnxc.storage import coders, pieces, streams
from onnxc.storage.coders import EXPANSION, Head, numbers
from onnxc.storage.pieces import Member, Piece
from onnxc.storage.rans import libraries
from onnxc.weights import is_inside

MAGIC = b"\x89ONNXZ\r\n"
VERSION = 1
_END = struct.Struct("<QQQII8s")  # contents: place, bytes, bytes decoded, CRC · version · magic
_SEAL = struct.Struct("<I")  # CRC of the end
_SHORT = 64  # bytes that are allowed for besides, where sizes are checked
_BITS = 32


@dataclass(frozen=True)
class Tally:
    """What became of tensors that were coded in one way: how many, and their bytes."""

    tensors: int
    before: int
    after: int


@dataclass(frozen=True)
class Place:
    """A coded piece: the bytes of the file in front of it, its own, and where its payload lies."""

    name: str
    gap: int
    size: int
    offset: int
    length: int
    head: bytes
    sums: tuple[int, int]  # CRCs of the piece and of its payload


@dataclass(frozen=True)
class Stored:
    """A file in a package: its name beside the model, what is coded of it, and the rest."""

    name: str
    places: tuple[Place, ...]
    rest: bytes

    @property
    def size(self) -> int:
        return len(self.rest) + sum(place.size for place in self.places)


Said = Callable[[int, int], None]


def is_package(path: Path) -> bool:
    """Whether a file begins as a package does. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write(path: Path, output: Path, thorough: bool, said: Said) -> dict[str, Tally]:
    """Pack a model file; what became of its tensors, by the way they are coded.

    said: told how many tensors of how many are done. Raises ModelError, OptionError or OSError.
    """
    libraries()
    files = stamps(path)
    found = pieces.members(path)
    files |= stamps(*(member.path for member in found[1:]))
    tallies: dict[str, Tally] = {}
    total = sum(len(member.pieces) for member in found)
    with replacing(output) as (file,):
        file.write(MAGIC)
        packer = _Packer(file, thorough, {}, tallies)
        parts = [numbers(len(found))]
        for member in found:
            parts.append(packer.add(member, lambda: said(packer.done, total)))
        _finish(file, b"".join(parts))
        check_unchanged(files)
    return tallies


@dataclass
class _Packer:
    """Writes payloads to a file; known: where those that were written lie, by their digest."""

    file: BinaryIO
    thorough: bool
    known: dict[bytes, int]
    tallies: dict[str, Tally]
    done: int = 0

    def add(self, member: Member, said: Callable[[], None]) -> bytes:
        """Write the pieces of a file; what the contents say of it."""
        told, rest, at = [], [], 0
        with member.path.open("rb") as file:
            for piece in member.pieces:
                rest.append(file.read(piece.start - at))
                data = np.fromfile(file, np.uint8, piece.stop - piece.start)
                told.append(numbers(piece.start - at) + self._piece(piece, data))
                at = piece.stop
                self.done += 1
                said()
            rest.append(file.read())
        name, whole = member.name.encode(), b"".join(rest)
        head = numbers(len(name)) + name + numbers(len(told), len(whole))
        return head + b"".join(told) + whole

    def _piece(self, piece: Piece, data: coders.Bytes) -> bytes:
        coded, label = streams.encode(data, piece.kind, self.thorough)
        digest = hashlib.sha256(coded.payload).digest()
        is_new = digest not in self.known
        if is_new:
            self.known[digest] = self.file.tell()
            self.file.write(coded.payload)
        before = self.tallies.get(label, Tally(0, 0, 0))
        after = before.after + len(coded.head) + is_new * len(coded.payload)
        self.tallies[label] = Tally(before.tensors + 1, before.before + data.size, after)
        name, sums = piece.name.encode(), (zlib.crc32(data.data), zlib.crc32(coded.payload))
        told = numbers(data.size, self.known[digest], len(coded.payload), *sums)
        return told + numbers(len(name)) + name + numbers(len(coded.head)) + coded.head


def _finish(file: BinaryIO, contents: bytes) -> None:
    place, packed = file.tell(), coders.zstd(np.frombuffer(contents, np.uint8)).payload
    sums = zlib.crc32(packed)
    end = _END.pack(place, len(packed), len(contents), sums, VERSION, MAGIC)
    file.write(packed + _SEAL.pack(zlib.crc32(end)) + end)


def read(path: Path) -> list[Stored]:
    """The files in a package, the model first. Raises ModelError, OSError."""
    libraries()
    with path.open("rb") as file:
        limit, contents = _contents(file, path.stat().st_size)
    head = Head(contents)
    found = [_stored(head, limit) for _ in range(head.number())]
    names = [stored.name for stored in found]
    is_sound = names[:1] == [""] and all(map(is_inside, names[1:]))
    if not is_sound or len(set(names)) < len(names) or head.at != len(contents):
        raise ModelError("the package is damaged: its contents make no model")
    return found


def _contents(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """Where payloads end, and the contents."""
    length = _END.size + _SEAL.size
    file.seek(max(size - length, 0))
    tail = file.read(length)
    if len(tail) < length or not tail.endswith(MAGIC):
        raise ModelError("the package is truncated")
    if _SEAL.unpack(tail[: _SEAL.size])[0] != zlib.crc32(tail[_SEAL.size :]):
        raise ModelError("the package is damaged at its end")
    place, packed, whole, sums, version, _ = _END.unpack(tail[_SEAL.size :])
    if version != VERSION:
        raise ModelError(f"the package is of version {version}; this onnxc reads {VERSION}")
    if place + packed + length != size or whole > EXPANSION * (packed + _SHORT):
        raise ModelError("the package is truncated, or its end is damaged")
    file.seek(place)
    data = file.read(packed)
    if zlib.crc32(data) != sums:
        raise ModelError("the package is damaged: the checksum of its contents differs")
    return place, coders.from_zstd(memoryview(data), whole)


def _stored(head: Head, limit: int) -> Stored:
    name = head.text()
    count, rest = head.number(), head.number()
    if count > len(head.data) or rest > len(head.data):
        raise ModelError("the package is damaged: its contents are too short")
    places = tuple(_place(head, limit) for _ in range(count))
    if sum(place.gap for place in places) > rest:
        raise ModelError("the package is damaged: its contents are too short")
    return Stored(name, places, head.bytes(rest))


def _place(head: Head, limit: int) -> Place:
    gap, size, offset, length, whole, coded = (head.number() for _ in range(6))
    name = head.text()
    told = head.bytes(head.number())
    if offset + length > limit or max(whole, coded) >> _BITS:
        raise ModelError(f"the package is damaged: weight {name!r} is outside of it")
    if size > EXPANSION * (length + len(told) + _SHORT):
        raise ModelError(f"the package is damaged: weight {name!r} declares too many bytes")
    return Place(name, gap, size, offset, length, told, (whole, coded))


def restore(path: Path, stored: Stored) -> Iterator[bytes | memoryview]:
    """The bytes of a file in a package, a tensor at a time. Raises ModelError, OSError."""
    at = 0
    with path.open("rb") as file:
        for place in stored.places:
            yield stored.rest[at : at + place.gap]
            at += place.gap
            yield _decoded(file, place)
    yield stored.rest[at:]


def _decoded(file: BinaryIO, place: Place) -> memoryview:
    file.seek(place.offset)
    payload = file.read(place.length)
    if zlib.crc32(payload) != place.sums[1]:
        raise ModelError(f"the package is damaged: weight {place.name!r} has another checksum")
    head = Head(place.head)
    try:
        data, used = streams.decode(head, memoryview(payload), place.size)
    except MemoryError as error:
        raise ModelError(f"weight {place.name!r} is too large for the memory") from error
    except ModelError as error:
        raise ModelError(f"the package is damaged: weight {place.name!r}: {error}") from error
    is_whole = used == place.length and head.at == len(place.head) and data.size == place.size
    if not is_whole or zlib.crc32(data.data) != place.sums[0]:
        raise ModelError(f"the package is damaged: weight {place.name!r} has another checksum")
    return data.data


def unpack(path: Path, output: Path, said: Said) -> list[Path]:
    """Write the files of a package, the model first; others take their names beside it.

    Raises ModelError, OptionError where one of the others exists, or OSError.
    """
    found = read(path)
    targets = [output, *(output.parent / stored.name for stored in found[1:])]
    for target in targets[1:]:
        if target.exists() or target == output:
            raise OptionError(
                f"external data {target} exists already; unpack the model into another folder"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output.parent, sum(stored.size for stored in found))
    done, total = 0, sum(len(stored.places) for stored in found)
    with replacing(*reversed(targets)) as files:
        for file, stored in zip(reversed(files), found, strict=True):
            for number, part in enumerate(restore(path, stored)):
                file.write(part)
                done += number % 2
                said(done, total)
    return targets


def _check_room(folder: Path, needed: int) -> None:
    """Raise OptionError where a folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else needed
    if needed > free:
        raise OptionError(f"{folder} has room for {free} bytes, but the model takes {needed}")


_unpacked: dict[tuple[Path, int, int], tuple[TemporaryFolder, Path]] = {}


def plain(path: str | Path) -> Path:
    """A model file as it is, or what a package holds, in a folder that goes with the process.

    Raises ModelError, OptionError, OSError.
    """
    path = Path(path)
    if not path.is_file() or not is_package(path):
        return path
    status = path.stat()
    key = path.resolve(), status.st_mtime_ns, status.st_size
    if key not in _unpacked:
        folder = TemporaryFolder()
        model = Path(folder.name) / f"{path.stem}.onnx"
        unpack(path, model, lambda done, total: None)
        _unpacked[key] = folder, model
    return _unpacked[key][1]
