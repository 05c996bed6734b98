"""The vectors x that the weight of a linear layer multiplies, y = W x, cut out of its input.

A layer sees its input as **rows**, one for each position of its output:

    Gemm, MatMul      the slice along the axis that is summed over
    Conv              the patch under the kernel (im2col): x[c, k] = input[c, stride · o − pad +
                      dilation · k], zero outside, for output position o, channel c of the group
                      and kernel offset k; in the order of W.reshape(out, −1)
    ConvTranspose     the channels at one input position

Neighbouring positions look alike, so each sample gives at most `positions` rows, spread evenly
(`onnxc.numerics.sampling`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxc.numerics.sampling import spread, start, stride

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """How a layer cuts its input into rows.

    kernel, strides, dilations: one number a spatial axis; no kernel: rows are slices. pads: begins,
    then ends. auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER, as in ONNX. groups: of channels,
    each with rows of its own. samples: the axis that counts the samples.
    """

    kernel: Ints = ()
    strides: Ints = ()
    dilations: Ints = ()
    pads: Ints = ()
    auto_pad: str = "NOTSET"
    groups: int = 1
    samples: int = 0

    @property
    def is_slice(self) -> bool:
        """Whether a row is one slice of the input, and there is one at each position."""
        is_plain = {*self.kernel, *self.strides} <= {1} and not any(self.pads)
        return not self.kernel or is_plain


def length(shape: Ints, axis: int, window: Window) -> int:
    """Elements d of a row, for an input of this shape."""
    return shape[axis] // window.groups * math.prod(window.kernel)


def rows(
    x: Array,
    axis: int,
    window: Window,
    positions: int,
    samples: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Array, int]:
    """Rows of an input, (groups, rows, d) of its type, and how many there were to choose from.

    x: the channels on `axis`; with a kernel, (samples, channels, *spatial). samples: how many `x`
    holds, None: as many as the axis of the samples is long. starts: where to start in each sample,
    None: where `first` says, so that the rows of another tensor are of the same positions.
    """
    if window.samples:
        x = np.ascontiguousarray(np.moveaxis(x, window.samples, 0))
    if starts is None:
        starts = first(x, axis, window, positions, samples)
    if window.is_slice:
        return _slices(_cut(x, axis, samples), window.groups, positions, starts)
    return _patches(x, window, positions, starts)


def first(
    x: Array, axis: int, window: Window, positions: int, samples: int | None = None
) -> list[int]:
    """Where `rows` starts in each sample of an input whose first axis counts the samples."""
    cut = _cut(x, axis, samples) if window.is_slice else x
    step = stride(_count(cut, window), positions)
    return [start(sample, step) for sample in cut]


def _count(cut: Array, window: Window) -> int:
    """Positions of a sample."""
    if window.is_slice:
        return int(cut.shape[1] * cut.shape[3])
    sizes: Ints = _geometry(cut.shape[2:], window)[0]
    return math.prod(sizes)


def _cut(x: Array, axis: int, samples: int | None) -> Array:
    """(samples, before, channels, behind): positions lie before and behind the channels."""
    axis %= x.ndim
    channels, behind = x.shape[axis], math.prod(x.shape[axis + 1 :])
    outer = math.prod(x.shape[:axis])
    parts = samples if samples is not None else (x.shape[0] if axis else 1)
    parts = parts if parts and outer % parts == 0 else 1
    return x.reshape(parts, outer // parts, channels, behind)


def _slices(cut: Array, groups: int, positions: int, starts: Sequence[int]) -> tuple[Array, int]:
    parts, before, channels, behind = cut.shape
    step = stride(before * behind, positions)
    pairs = zip(cut, starts, strict=True)
    taken = _stacked([_positions_of(sample, step, at) for sample, at in pairs])
    taken = taken.reshape(-1, groups, channels // groups).transpose(1, 0, 2)
    return taken, parts * before * behind


def _stacked(arrays: list[Array]) -> Array:
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def _positions_of(sample: Array, step: int, at: int) -> Array:
    """Slices (rows, channels) at the chosen positions of a sample (before, channels, behind)."""
    before, _, behind = sample.shape
    chosen = spread(before * behind, step, at)
    if before == 1:
        return np.take(sample[0], chosen, axis=1).T
    taken: Array = sample[chosen // behind, :, chosen % behind]
    return taken


def _patches(x: Array, window: Window, positions: int, starts: Sequence[int]) -> tuple[Array, int]:
    samples, channels = x.shape[:2]
    count = _count(x, window)
    step = stride(count, positions)
    pairs = zip(x, starts, strict=True)
    taken = _stacked([_patches_of(sample, window, step, at) for sample, at in pairs])
    each = channels // window.groups
    grouped = taken.reshape(samples, window.groups, each, *taken.shape[2:]).transpose(1, 0, 3, 2, 4)
    return grouped.reshape(window.groups, samples * taken.shape[2], -1), samples * count


def _patches_of(sample: Array, window: Window, step: int, at: int) -> Array:
    """Patches (channels, rows, offsets) at the chosen positions of a sample."""
    places, outside = _places(sample.shape[1:], window, step, at)
    taken = sample.reshape(len(sample), -1).take(places.reshape(-1), axis=1)
    taken = taken.reshape(len(sample), *places.shape)
    if outside is not None:
        taken[:, outside] = 0
    return taken


@lru_cache(maxsize=512)
def _places(
    spatial: Ints, window: Window, step: int, begin: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_] | None]:
    """Flat places (rows, offsets) of the patches, and which are padding, None where none is."""
    sizes, begins, strides, dilations = _geometry(spatial, window)
    count = math.prod(sizes)
    chosen = np.unravel_index(spread(count, step, begin), sizes) if count else ()
    offsets = np.array(list(itertools.product(*map(range, window.kernel))), np.intp)
    flat = np.zeros((-(-count // step), len(offsets)), np.intp)
    outside = np.zeros(flat.shape, bool)
    for axis, at in enumerate(chosen):
        corner = at * strides[axis] - begins[axis]
        index = corner[:, None] + offsets[:, axis] * dilations[axis]
        outside |= (index < 0) | (index >= spatial[axis])
        flat = flat * spatial[axis] + np.clip(index, 0, spatial[axis] - 1)
    return flat, outside if outside.any() else None


@lru_cache(maxsize=256)
def _geometry(spatial: Ints, window: Window) -> tuple[Ints, Ints, Ints, Ints]:
    """Output sizes, leading pads, strides, dilations; SAME gives ⌈input / stride⌉ outputs."""
    rank = len(spatial)
    strides, dilations = window.strides or (1,) * rank, window.dilations or (1,) * rank
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, dilations, strict=True)]
    pads = window.pads or (0,) * (2 * rank)
    if window.auto_pad.startswith("SAME"):
        sizes = tuple(-(-n // s) for n, s in zip(spatial, strides, strict=True))
        axes = zip(sizes, strides, spans, spatial, strict=True)
        total = [max((out - 1) * s + span - n, 0) for out, s, span, n in axes]
        begins = tuple((t + (window.auto_pad == "SAME_LOWER")) // 2 for t in total)
        return sizes, begins, strides, dilations
    if window.auto_pad == "VALID":
        pads = (0,) * (2 * rank)
    padded = [n + pads[i] + pads[i + rank] for i, n in enumerate(spatial)]
    fits = zip(padded, spans, strides, strict=True)
    sizes = tuple(max((n - span) // s + 1, 0) for n, span, s in fits)
    return sizes, tuple(pads[:rank]), strides, dilations
