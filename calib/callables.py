"""Data from Python code: what a callable yields, kept in a temporary file and read back by sample.

The callable runs once, so that its data are the same in every pass over them and their number is
known; memory stays flat however much it yields.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from numpy.lib import format as npy

from calib.inputs import Array, InputSpec
from calib.sources import Block, Fit, mapping, reason
from onnxc.errors import DataError

RAISED = (  # by the user's own module, whose faults are told in one sentence too
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
IN_MEMORY = 64 << 20  # bytes of a callable's arrays that are kept before they go to a file


def call(text: str, inputs: Sequence[InputSpec], samples: int | None) -> list[Block]:
    """Blocks that the callable `module:function` yields; its arrays are spooled to a file.

    An item is a feed by input name (with `labels` if there are any), an array for a model with one
    input, or a tuple of arrays in the order of the inputs. Stops after `samples` samples.
    """
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        function = getattr(importlib.import_module(module), name)
        items = iter(function() if callable(function) else function)
        return list(spool(items, inputs, text, samples))
    except RAISED as error:
        raise DataError(f"{text} fails with {type(error).__name__}: {reason(error)}") from error
    finally:
        sys.path.remove(here)


def spool(
    items: Iterable[Any], inputs: Sequence[InputSpec], origin: str, samples: int | None
) -> Iterator[Block]:
    """The items as blocks whose arrays lie in one temporary file, read back one at a time."""
    file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - lives as long as its blocks
    missing, is_empty = sys.maxsize if samples is None else samples, True
    for number, item in enumerate(items):
        if missing <= 0:
            return
        named = _named(item, inputs, f"item {number} of {origin}")
        block = _spooled(file, mapping(named, f"item {number} of {origin}"))
        missing -= Fit.of(block, inputs).count
        is_empty = False
        yield block
    if is_empty:
        raise DataError(f"{origin} yields nothing")


def _spooled(file: IO[bytes], block: Block) -> Block:
    offsets = {}
    for name in block.headers:
        offsets[name] = file.seek(0, 2)
        npy.write_array(file, block.load(name), allow_pickle=False)

    def load(name: str) -> Array:
        file.seek(offsets[name])
        array: Array = npy.read_array(file, allow_pickle=False)
        return array

    return Block(block.origin, block.headers, load)


def _named(item: Any, inputs: Sequence[InputSpec], where: str) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if len(inputs) == 1:
        return {inputs[0].name: item}
    if isinstance(item, tuple | list) and len(item) == len(inputs):
        return {spec.name: value for spec, value in zip(inputs, item, strict=True)}
    names = ", ".join(repr(i.name) for i in inputs)
    raise DataError(f"{where} is a {type(item).__name__}; yield a dict with the inputs {names}")
