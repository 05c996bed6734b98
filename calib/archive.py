"""Named arrays and a JSON header in one .zip that other tools read too, and that nobody can fake.

    header.json          what the arrays are: small, stored as it is
    NAME.npy             one array, stored; whole numbers, which shrink well, deflated

Equal content gives equal bytes: entries in the order given, all of one date. Reading trusts
nothing: an entry is read only if the room that it asks for is what its bytes in the file can hold,
values are never unpickled, and a wrong bit anywhere in them is told by the checksum of the entry.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxc.errors import OptionError
from onnxc.files import replacing

Array = NDArray[Any]

HEADER = "header.json"
DATE = (1980, 1, 1, 0, 0, 0)  # the first that a .zip can hold
LEVEL = 1  # of deflation: the fastest halves histograms many times already
LARGEST_DEFLATED = 1 << 20  # bytes of one deflated entry: what claims more is no file of ours
ZIP = b"PK\x03\x04"
MAGIC = b"\x93NUMPY\x01\x00"
HEAD = re.compile(  # as NumPy writes it; its reader evaluates more than this
    rb"\{'descr': '(<f8|<i8|\|u1)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n"
)
UNIX = 3

DAMAGE: tuple[type[Exception], ...] = (  # what reading a damaged file may raise
    *(OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError),
    *(SyntaxError, struct.error, zlib.error, zipfile.BadZipFile, OptionError),
)


def write(path: str | Path, header: Any, arrays: Iterable[tuple[str, Array]]) -> None:
    """Write a file whole or not at all. Raises OptionError when the path cannot be written."""
    text = json.dumps(header, allow_nan=False, sort_keys=True).encode()
    with replacing(path) as (file,), zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_entry(HEADER, len(text)), text)
        for name, array in arrays:
            _write(archive, name, np.asarray(array, order="C"))


def _write(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    head = io.BytesIO()
    npy.write_array_header_1_0(head, npy.header_data_from_array_1_0(array))
    is_small = array.dtype.kind == "i" and array.nbytes < LARGEST_DEFLATED
    entry = _entry(f"{name}.npy", head.tell() + array.nbytes, is_small)
    with archive.open(entry, "w") as file:
        file.write(head.getvalue())
        file.write(array.reshape(-1).view(np.uint8).data)


def _entry(name: str, size: int, is_deflated: bool = False) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, DATE)
    entry.create_system, entry.external_attr, entry.file_size = UNIX, 0o644 << 16, size
    entry.compress_type = zipfile.ZIP_DEFLATED if is_deflated else zipfile.ZIP_STORED
    entry._compresslevel = LEVEL  # type: ignore[attr-defined]
    return entry


def is_archive(path: str | Path) -> bool:
    """Whether a file begins as a .zip does."""
    with Path(path).open("rb") as file:
        return file.read(len(ZIP)) == ZIP


class Archive:
    """A file open for reading. Any of DAMAGE means that it is damaged, or none of ours."""

    def __init__(self, path: str | Path) -> None:
        self._bytes = Path(path).stat().st_size
        self._zip = zipfile.ZipFile(path)
        self._entries = {entry.filename: entry for entry in self._zip.infolist()}
        if len(self._entries) < len(self._zip.infolist()):
            self._zip.close()
            raise ValueError("two entries have one name")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._zip.close()

    @property
    def is_ours(self) -> bool:
        """Whether there is a header."""
        return HEADER in self._entries

    @property
    def names(self) -> frozenset[str]:
        """Names of the arrays."""
        return frozenset(n.removesuffix(".npy") for n in self._entries if n != HEADER)

    def header(self) -> Any:
        """What JSON holds."""
        with self._open(HEADER) as file:
            return json.loads(file.read())

    def array(self, name: str) -> Array:
        """An array of float64, int64 or uint8, as `write` left it."""
        with self._open(f"{name}.npy") as file:
            start = file.read(len(MAGIC) + 2)
            found = HEAD.fullmatch(file.read(int.from_bytes(start[len(MAGIC) :], "little")))
            if not start.startswith(MAGIC) or found is None:
                raise ValueError(f"{name} is no array")
            shape = tuple(int(size) for size in found[2].split(b",") if size.strip())
            dtype, size = np.dtype(found[1].decode()), self._entries[f"{name}.npy"].file_size
            if math.prod(shape) * dtype.itemsize != size - file.tell():
                raise ValueError(f"{name} is not as large as it says")
            array = np.empty(shape, dtype)
            _fill(file, array.reshape(-1).view(np.uint8).data)
            return array

    def _open(self, name: str) -> Any:
        """An entry whose size its bytes in the file can hold."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{name} is missing")
        room = LARGEST_DEFLATED if entry.compress_type == zipfile.ZIP_DEFLATED else self._bytes
        if entry.file_size > room or entry.compress_size > self._bytes:
            raise ValueError(f"{name} says that it is larger than the file")
        return self._zip.open(entry)


def _fill(file: Any, room: memoryview) -> None:
    """Read until the room is full, and on to the end, where the checksum is compared."""
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            raise EOFError("the file ends early")
        done += count
    if file.read(1):
        raise ValueError("the entry is longer than it says")
