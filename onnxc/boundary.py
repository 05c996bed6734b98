"""What crosses from one stage of a run to the next: kept by batch, on disk where it is much."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ValueInfoProto

from onnxc.files import TemporaryFolder

IN_MEMORY = 16 << 20  # bytes of tensors that stay in memory

Array = NDArray[Any]


class Place(NamedTuple):
    """Where a tensor lies in the file of its name."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Boundary:
    """Tensors by batch and name, in a temporary folder that goes when the block ends."""

    def __init__(self) -> None:
        self.folder = TemporaryFolder()
        self.near: dict[str, dict[int, Array]] = {}
        self.far: dict[str, dict[int, Place]] = {}
        self.numbers: dict[str, int] = {}
        self.used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.near.clear()
        self.folder.__exit__(None, None, None)

    def __contains__(self, name: str) -> bool:
        return name in self.near or name in self.far

    def put(self, batch: int, name: str, array: Array) -> None:
        """Keep a tensor; a copy, for the session owns the original."""
        if name not in self.far and self.used + array.nbytes <= IN_MEMORY:
            self.near.setdefault(name, {})[batch] = array.copy()
            self.used += array.nbytes
            return
        with self._file(name).open("ab") as file:
            place = Place(file.tell(), array.dtype, array.shape)
            np.ascontiguousarray(array).tofile(file)
        self.far.setdefault(name, {})[batch] = place

    def get(self, batch: int, name: str) -> Array:
        """A tensor as it was put."""
        if batch in self.near.get(name, {}):
            return self.near[name][batch]
        place = self.far[name][batch]
        count = int(np.prod(place.shape))
        found = np.fromfile(self._file(name), place.dtype, count, offset=place.offset)
        return found.reshape(place.shape)

    def drop(self, names: Iterable[str]) -> None:
        """Forget what no later stage reads."""
        for name in names:
            self.used -= sum(array.nbytes for array in self.near.pop(name, {}).values())
            if self.far.pop(name, None) is not None:
                self._file(name).unlink()

    def type_of(self, name: str, declared: ValueInfoProto | None) -> ValueInfoProto:
        """Type of what crosses: as seen, with the sizes that are declared and were not refuted."""
        near, far = self.near.get(name, {}).values(), self.far.get(name, {}).values()
        seen: Array | Place | None = next(iter(near), None)
        seen = next(iter(far), None) if seen is None else seen
        if seen is None:
            return declared or ValueInfoProto(name=name)
        sizes: list[int | str | None] = [None] * len(seen.shape)
        dims = declared.type.tensor_type.shape.dim if declared is not None else ()
        if len(dims) == len(seen.shape):
            pairs = zip(dims, seen.shape, strict=True)
            sizes = [d.dim_value if d.dim_value == n else d.dim_param or None for d, n in pairs]
        element = onnx.helper.np_dtype_to_tensor_dtype(seen.dtype)
        return onnx.helper.make_tensor_value_info(name, element, sizes)

    def _file(self, name: str) -> Path:
        return Path(self.folder.name) / str(self.numbers.setdefault(name, len(self.numbers)))


def release() -> None:
    """Give freed memory back to the system, as a session that was closed does not by itself."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)
