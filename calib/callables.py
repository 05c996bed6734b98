"""Data from Python code: what a callable yields, kept in a temporary file and read back by sample.

The callable runs once, so that its data are the same in every pass over them and their number is
known; memory stays flat however much it yields.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.lib import format as npy

from calib.inputs import Array, InputSpec
from calib.sources import Block, Fit, mapping, reason
from onnxc.errors import DataError

RAISED = (  # by the user's own module, whose faults are told in one sentence too
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
IN_MEMORY = 64 << 20  # bytes of a callable's arrays that are kept before they go to a file
MOST = 1 << 30  # bytes of them that are sent to other processes


def call(text: str, inputs: Sequence[InputSpec], samples: int | None) -> list[Block]:
    """Blocks that the callable `module:function` yields; its arrays are spooled to a file.

    An item is a feed by input name (with `labels` if there are any), an array for a model with one
    input, or a tuple of arrays in the order of the inputs. Stops after `samples` samples.
    """
    with own_code(text):
        function = imported(text)
        items = iter(function() if callable(function) else function)
        return list(spool(items, inputs, text, samples))


@contextmanager
def own_code(text: str) -> Iterator[None]:
    """Run code of the user's own modules, of this folder too. Raises DataError for its faults."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    except RAISED as error:
        raise DataError(f"{text} fails with {type(error).__name__}: {reason(error)}") from error
    finally:
        sys.path.remove(here)


def imported(text: str) -> Any:
    """What `module:name` stands for."""
    module, _, name = text.partition(":")
    importlib.invalidate_caches()
    return getattr(importlib.import_module(module), name)


def spool(
    items: Iterable[Any], inputs: Sequence[InputSpec], origin: str, samples: int | None
) -> Iterator[Block]:
    """The items as blocks whose arrays lie in one temporary file, read back one at a time."""
    kept = Spool()
    missing, is_empty = sys.maxsize if samples is None else samples, True
    for number, item in enumerate(items):
        if missing <= 0:
            return
        named = _named(item, inputs, f"item {number} of {origin}")
        block = _spooled(kept, mapping(named, f"item {number} of {origin}"))
        missing -= Fit.of(block, inputs).count
        is_empty = False
        yield block
    if is_empty:
        raise DataError(f"{origin} yields nothing")


class Spool:
    """Arrays one after the other in a temporary file, which lives as long as this."""

    def __init__(self, content: bytes = b"") -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._turn = Lock()  # of the threads that move in the file
        self._file.write(content)

    def add(self, array: Array) -> int:
        """Where the array lies from now on."""
        place = self._file.seek(0, 2)
        npy.write_array(self._file, array, allow_pickle=False)
        return place

    def read(self, place: int) -> Array:
        with self._turn:
            self._file.seek(place)
            array: Array = npy.read_array(self._file, allow_pickle=False)
            return array

    def __reduce__(self) -> tuple[type[Spool], tuple[bytes]]:
        """It travels with what it holds. Raises DataError where that is too much."""
        with self._turn:
            size = self._file.seek(0, 2)
            if size > MOST:
                raise DataError(
                    f"the data of a Python function, {size >> 20} MiB, are too much to send to "
                    "workers: save them as .npz files in a folder that every machine has"
                )
            self._file.seek(0)
            return Spool, (self._file.read(),)


def _spooled(spool: Spool, block: Block) -> Block:
    places = {name: spool.add(block.load(name)) for name in block.headers}
    return Block(block.origin, block.headers, partial(_read, spool, places))


def _read(spool: Spool, places: Mapping[str, int], name: str) -> Array:
    return spool.read(places[name])


def _named(item: Any, inputs: Sequence[InputSpec], where: str) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if len(inputs) == 1:
        return {inputs[0].name: item}
    if isinstance(item, tuple | list) and len(item) == len(inputs):
        return {spec.name: value for spec, value in zip(inputs, item, strict=True)}
    names = ", ".join(repr(i.name) for i in inputs)
    raise DataError(f"{where} is a {type(item).__name__}; yield a dict with the inputs {names}")
