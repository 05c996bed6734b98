"""What a model expects of each input, and how an array is cut into samples that fit.

A **sample** is one row along an input's *sample axis*; a **feed** maps input names to arrays.
An array of the input's rank is split along the sample axis; one of rank + 1 holds a complete input
a sample; one of rank - 1 is a single sample; one without a sample axis is shared by all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.elements import is_float
from onnxc.errors import DataError

Array = NDArray[Any]
Axes = dict[str, int | None]
Feed = dict[str, Array]
Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class InputSpec:
    """Name, NumPy type (object for strings) and shape of a model's input.

    A dimension is an int where it is fixed, a str or None where it is dynamic. A shape of None:
    even the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Dims | None

    @property
    def expects(self) -> str:
        """The opening of an error message: "input 'x' expects float32 [N, 3, 224, 224]"."""
        kind = "string" if self.dtype.hasobject else self.dtype.name
        dims = "of any shape" if self.shape is None else _text(self.shape)
        return f"input {self.name!r} expects {kind} {dims}"


def _text(dims: Dims) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in dims)}]"


def sample_axes(inputs: Sequence[InputSpec]) -> Axes:
    """Axis along which samples are stacked, by input; None where an input has no such axis.

    It is axis 0 where that is dynamic or equal to the batch of a fixed model, else the axis that
    carries the symbol of another input's axis 0: `state [2, batch, 128]` beside `x [batch, T]`.
    """
    firsts = [i.shape[0] for i in inputs if i.shape]
    symbols = {d for d in firsts if isinstance(d, str)}
    batch = firsts[0] if len(set(firsts)) == 1 else 1
    return {i.name: _sample_axis(i.shape, symbols, batch) for i in inputs}


def _sample_axis(shape: Dims | None, symbols: set[str], batch: int | str | None) -> int | None:
    if shape is None or shape == ():
        return 0 if shape is None else None
    if not isinstance(shape[0], int):
        return 0
    named = [axis for axis, d in enumerate(shape) if d in symbols]
    if named:
        return named[0]
    is_batch = shape[0] == 1 or (shape[0] == batch and len(shape) > 1)
    return 0 if is_batch else None


def fixed_batch(inputs: Sequence[InputSpec], axes: Axes | None = None) -> int | None:
    """Rows that the model insists on in every run, or None where any number will do.

    An input without a sample axis (a recurrent state, say) ties a run to one sample.
    """
    axes = axes or sample_axes(inputs)
    if any(i.shape and axes[i.name] is None for i in inputs):
        return 1
    sizes = [i.shape[axis] for i in inputs if i.shape and (axis := axes[i.name]) is not None]
    fixed = [d for d in sizes if isinstance(d, int)]
    return max(fixed) if fixed else None


@dataclass(frozen=True)
class Reading:
    """How sample i is cut out of an array: `count` samples of `rows` rows; no count: shared."""

    kind: Literal["split", "stacked", "unbatched", "single", "shared"]
    axis: int = 0
    count: int | None = None
    rows: int = 1

    def cut(self, array: Array, index: int) -> Array:
        """The feed of sample `index`: a view, in the rank that the model expects."""
        return _CUTS[self.kind](array, self.axis, index % (self.count or 1))


_CUTS: dict[str, Callable[[Array, int, int], Array]] = {
    "split": lambda x, axis, i: x[(slice(None),) * axis + (slice(i, i + 1),)],
    "stacked": lambda x, axis, i: x[i],
    "unbatched": lambda x, axis, i: np.expand_dims(x[i], axis),
    "single": lambda x, axis, i: np.expand_dims(x, axis),
    "shared": lambda x, axis, i: x,
}


def reading(
    spec: InputSpec, axis: int | None, shape: tuple[int, ...], where: str, whole: bool = False
) -> Reading:
    """How an array of `shape` feeds an input; `whole`: it is one complete feed, not to be split.

    Raises DataError, with `where` for the array's name and file, when the shape does not fit.
    """
    dims = spec.shape
    if 0 in shape:
        raise DataError(f"{where} is empty (shape {shape}); {spec.expects}")
    if dims is None:
        return Reading("split", 0, shape[0]) if shape and not whole else Reading("shared")
    if whole and _fits(shape, dims):
        return Reading("shared", rows=1 if axis is None else shape[axis])
    if _fits(shape[1:], dims) and len(shape) > len(dims):
        return Reading("stacked", 0, shape[0], 1 if axis is None else shape[1 + axis])
    if axis is None:
        if _fits(shape, dims):
            return Reading("shared")
        raise DataError(_misfit(spec, shape, where))
    row = dims[:axis] + dims[axis + 1 :]
    if len(shape) == len(dims) and _fits(shape[:axis] + shape[axis + 1 :], row):
        return Reading("split", axis, shape[axis])
    if axis and len(shape) == len(dims) and _fits(shape[1:], row):
        return Reading("unbatched", axis, shape[0])
    if _fits(shape, row) and len(dims) > 1:
        return Reading("single", axis, 1)
    raise DataError(_misfit(spec, shape, where))


def _fits(shape: tuple[int, ...], dims: Dims) -> bool:
    return len(shape) == len(dims) and all(
        size == d for size, d in zip(shape, dims, strict=True) if isinstance(d, int)
    )


def _misfit(spec: InputSpec, shape: tuple[int, ...], where: str) -> str:
    message = f"{spec.expects}, but {where} has shape {shape}"
    dims = spec.shape or ()
    if len(shape) != 4 or len(dims) != 4:
        return message
    orders = {"NHWC to NCHW": (3, 1, 2), "NCHW to NHWC": (2, 3, 1)}
    for name, order in orders.items():
        if _fits(tuple(shape[k] for k in order), dims[1:]):
            return f"{message}: transpose it from {name}"
    return message


def agree(inputs: Sequence[InputSpec], readings: dict[str, Reading], where: str) -> int:
    """The number of samples that all inputs have in common.

    An input whose sample axis is fixed at 1 may hold a single row for all samples (an initial
    state). Raises DataError when two inputs hold different numbers of samples.
    """
    axes = sample_axes(inputs)
    counts = {name: r.count for name, r in readings.items() if r.count is not None}
    for spec in inputs:
        axis = axes[spec.name]
        if spec.shape and axis is not None and spec.shape[axis] == 1 and counts.get(spec.name) == 1:
            counts[spec.name] = max(counts.values())
    if len(set(counts.values())) > 1:
        pairs = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise DataError(f"{where}: the inputs hold different numbers of samples: {pairs}")
    return max(counts.values(), default=1)


KINDS = {"float": "fiub", "i": "iub", "u": "iub", "b": "iub", "O": "OUST"}


def check_dtype(spec: InputSpec, dtype: np.dtype[Any], where: str) -> None:
    """Raise DataError when an array's type cannot feed the input (floats to ints, objects)."""
    accepted = KINDS.get("float" if is_float(spec.dtype) else spec.dtype.kind, "")
    source = "f" if is_float(dtype) else dtype.kind
    if source not in accepted:
        raise DataError(f"{spec.expects}, but {where} is {dtype.name}")


def conform(spec: InputSpec, array: Array, where: str) -> Array:
    """The array in the input's type, contiguous; copied only where it has to be.

    Raises DataError for NaN or infinity, and for values that the type cannot hold.
    """
    if spec.dtype.hasobject:
        return np.asarray(array.astype(str), object)
    if is_float(spec.dtype):
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(array, spec.dtype)
        if not np.isfinite(cast).all():
            raise DataError(f"{where} holds NaN or infinity (as {spec.dtype.name}); remove it")
        return cast.reshape(array.shape)
    low, high = (0, 1) if spec.dtype.kind == "b" else _limits(spec.dtype)
    if not np.can_cast(array.dtype, spec.dtype) and not low <= array.min() <= array.max() <= high:
        raise DataError(f"{spec.expects}, but {where} holds values outside {low}..{high}")
    return np.ascontiguousarray(array, spec.dtype).reshape(array.shape)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
