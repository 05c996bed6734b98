"""Made-up feeds for a model without data: seeded, of plausible shapes, no evidence of accuracy.

Floats are standard normal, 8-bit integers cover their range, other integers are 0..9 (so that ids
stay inside small tables), booleans are fair coins. Dynamic dimensions are guessed from their names,
else from rank and position; the same symbol always gets the same size.

Where a histogram of a float input is known, its values are drawn from that, and those of images
put in the order of noise with the spectrum of natural ones, amplitude ~ 1 / frequency (Field 1987):
input that looks like nothing leaves the ranges of the layers inside, and results on it say little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from calib.inputs import Array, Axes, Dims, Feed, InputSpec, sample_axes
from calib.observers import SIDE, HistogramObserver
from onnxc.elements import is_float
from onnxc.errors import DataError, OptionError

NAMES: tuple[tuple[str, int], ...] = (  # symbol of a dimension, matched in this order
    (r"batch|^n$|^b$|^none$", 1),
    (r"height|width|^[hw]$|^(in)?put_?[hw]$", 224),
    (r"chan|^c$", 3),
    (r"seq|len|tok|time|frame|^[tsl]$", 16),
)
PLACES: dict[tuple[int, int], int] = {  # (rank, axis)
    **{(4, 1): 3, (4, 2): 224, (4, 3): 224},
    **{(5, 1): 3, (5, 2): 16, (5, 3): 32, (5, 4): 32},
}
ELSEWHERE = 16
WAVEFORM = 512  # samples of a float input [batch, time]
VALUES = ((r"(^|_)sr$|sample_?rate", 16000), (r"mask", 1), (r"token_?type|segment", 0))
IDS = 10  # made-up ids lie below
NOTHING: Mapping[str, HistogramObserver] = {}


def guessed_shapes(
    inputs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every input: the given one, else the model's with its gaps guessed.

    Raises OptionError when a given shape names no input or contradicts it, DataError when a rank is
    unknown and no shape is given.
    """
    known = {i.name: i for i in inputs}
    for name, shape in shapes.items():
        _check_given(name, tuple(shape), known)
    symbols = {
        d: size
        for name, shape in shapes.items()
        for d, size in zip(known[name].shape or (), shape, strict=False)
        if isinstance(d, str)
    }
    axes = sample_axes(inputs)
    return {i.name: tuple(shapes.get(i.name) or _guess(i, axes, symbols)) for i in inputs}


def _check_given(name: str, shape: tuple[int, ...], known: Mapping[str, InputSpec]) -> None:
    if name not in known:
        raise OptionError(f"shape for {name!r}: the model's inputs are {', '.join(known)}")
    dims = known[name].shape
    if dims is None:
        return
    if len(shape) != len(dims) or any(
        isinstance(d, int) and d != size for d, size in zip(dims, shape, strict=True)
    ):
        raise OptionError(f"{known[name].expects}, so the shape {list(shape)} does not fit")


def _guess(spec: InputSpec, axes: Axes, symbols: dict[str, int]) -> tuple[int, ...]:
    if spec.shape is None:
        raise DataError(f"{spec.expects}, which cannot be made up: give --data or its shape")
    sizes = []
    for axis, d in enumerate(spec.shape):
        if d is None and axes[spec.name] is None:  # of a state: its batch
            sizes.append(1)
            continue
        size = d if isinstance(d, int) else _guessed_size(spec, spec.shape, axis, symbols)
        if isinstance(d, str):
            symbols.setdefault(d, size)
        sizes.append(size)
    return tuple(sizes)


def _guessed_size(spec: InputSpec, dims: Dims, axis: int, symbols: Mapping[str, int]) -> int:
    symbol = dims[axis]
    if isinstance(symbol, str) and symbol in symbols:
        return symbols[symbol]
    if len(dims) == 2 and axis == 1 and is_float(spec.dtype):
        return WAVEFORM
    for pattern, size in NAMES if isinstance(symbol, str) else ():
        if re.search(pattern, str(symbol), re.IGNORECASE):
            return size
    if axis == 0:
        return 1
    if len(dims) == 4 and dims[3] in (1, 3) and axis < 3:  # channels last
        return PLACES[4, axis + 1]
    return PLACES.get((len(dims), axis), ELSEWHERE)


class Synthetic:
    """A source of made-up feeds; sample i depends on the seed and on i alone."""

    labels: Array | None = None

    def __init__(
        self,
        inputs: Sequence[InputSpec],
        shapes: Mapping[str, tuple[int, ...]],
        count: int,
        seed: int,
        known: Mapping[str, HistogramObserver] = NOTHING,
    ) -> None:
        self._inputs, self._shapes, self._count, self._seed = inputs, shapes, count, seed
        self._known = known
        dims = "; ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        self.notes = [f"the input is synthesized (seed {seed}), not data: {dims}"]
        self.skipped: dict[int, str] = {}
        self.axes = sample_axes(inputs)
        stacks = {name: shapes[name][axis] for name, axis in self.axes.items() if axis is not None}
        bare = next((name for name, rows in stacks.items() if not rows), None)
        if bare is not None:
            raise DataError(f"input {bare!r} has no rows, {list(shapes[bare])}: nothing can be run")
        self.rows = max(stacks.values(), default=1)

    def __len__(self) -> int:
        return self._count

    def feed(self, index: int) -> Feed:
        rng = np.random.default_rng((self._seed, index))
        return {i.name: self._made(i, self._shapes[i.name], rng) for i in self._inputs}

    def _made(self, spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        observed = self._known.get(spec.name)
        if observed is None or not is_float(spec.dtype):
            return _drawn(spec, shape, rng)
        values = drawn_from(observed, math.prod(shape), rng)
        return _looking_natural(values, shape, rng).astype(spec.dtype)

    def file(self, index: int) -> None:
        return None

    def content(self, index: int) -> Iterator[bytes]:
        for name, array in self.feed(index).items():
            yield f"{name}{array.dtype}{array.shape}".encode()
            yield array.tobytes()


def drawn_from(observed: HistogramObserver, count: int, rng: np.random.Generator) -> Array:
    """Independent values with the distribution of a histogram, float64 (count,)."""
    bins = np.arange(len(observed.counts)) - (SIDE - 1)
    chosen = rng.choice(bins, count, p=observed.counts / observed.binned)
    inside = np.where(chosen, rng.random(count), rng.uniform(-1, 1, count))
    values = (chosen + np.where(chosen < 0, -inside, inside)) * observed.width
    return np.clip(values, observed.low, observed.high)


def _looking_natural(values: Array, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Values in a shape; those of images in the order of 1/f noise."""
    if len(shape) < 4:
        return values.reshape(shape)
    axes = tuple(range(2, len(shape)) if shape[1] <= shape[-1] else range(1, len(shape) - 1))
    grid = np.meshgrid(*(np.fft.fftfreq(shape[a]) for a in axes), indexing="ij")
    frequency = np.sqrt(sum(f**2 for f in grid))
    frequency.flat[0] = 1 / max(shape[a] for a in axes)
    aligned = np.expand_dims(frequency, [a for a in range(len(shape)) if a not in axes])
    noise = np.fft.ifftn(np.fft.fftn(rng.standard_normal(shape), axes=axes) / aligned, axes=axes)
    result = np.empty(len(values))
    result[np.argsort(noise.real, axis=None)] = np.sort(values)
    return result.reshape(shape)


def _drawn(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if is_float(spec.dtype):
        return np.asarray(rng.standard_normal(shape, np.float32), spec.dtype)
    if spec.dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape), bool)
    if spec.dtype.kind not in "iu":
        raise DataError(f"{spec.expects}, which cannot be made up: give --data")
    for pattern, value in VALUES:
        if re.search(pattern, spec.name, re.IGNORECASE):
            return np.full(shape, value, spec.dtype)
    if spec.dtype.itemsize > 1:
        return np.asarray(rng.integers(0, IDS, shape), spec.dtype)
    info = np.iinfo(spec.dtype)
    return np.asarray(rng.integers(info.min, info.max + 1, shape), spec.dtype)
