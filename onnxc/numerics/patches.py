"""The vectors x that the weight of a linear layer multiplies, y = W x, cut out of its input.

A layer sees its input as **rows**, one for each position of its output:

    Gemm, MatMul      the slice along the axis that is summed over
    Conv              the patch under the kernel (im2col): x[c, k] = input[c, stride · o − pad +
                      dilation · k], zero outside, for output position o, channel c of the group
                      and kernel offset k; in the order of W.reshape(out, −1)
    ConvTranspose     the channels at one input position

Neighbouring positions look alike, so each sample gives at most `positions` rows, evenly spread:
every n-th, n being coprime to their number so that no row or column of an image is favoured.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    x: Array, axis: int, window: Window, positions: int, samples: int | None = None
) -> tuple[Array, int]:
    """Rows of an input, (groups, rows, d) of its type, and how many there were to choose from.

    x: the channels on `axis`; with a kernel, (samples, channels, *spatial). samples: how many `x`
    holds, None: as many as the axis of the samples is long.
    """
    if window.samples:
        x = np.ascontiguousarray(np.moveaxis(x, window.samples, 0))
    if window.is_slice:
        return _slices(x, axis % x.ndim, window.groups, positions, samples)
    return _patches(x, window, positions)


def spread(count: int, positions: int) -> NDArray[np.intp]:
    """At most `positions` of 0 … count − 1, evenly spread."""
    stride = -(-count // positions)
    while math.gcd(stride, count) > 1 and stride > 1:
        stride += 1
    return np.arange(0, count, stride)


def _slices(
    x: Array, axis: int, groups: int, positions: int, samples: int | None
) -> tuple[Array, int]:
    """Positions lie before and behind the axis: (samples, before, channels, behind)."""
    channels, behind = x.shape[axis], math.prod(x.shape[axis + 1 :])
    outer = math.prod(x.shape[:axis])
    parts = samples if samples is not None else (x.shape[0] if axis else 1)
    parts = parts if parts and outer % parts == 0 else 1
    before = outer // parts
    cut = x.reshape(parts, before, channels, behind)
    chosen = spread(before * behind, positions)
    if before == 1:
        taken = cut[:, 0].take(chosen, axis=2).transpose(0, 2, 1)
    else:
        taken = cut[:, chosen // behind, :, chosen % behind]
    taken = taken.reshape(-1, groups, channels // groups).transpose(1, 0, 2)
    return np.ascontiguousarray(taken), parts * before * behind


def _patches(x: Array, window: Window, positions: int) -> tuple[Array, int]:
    samples, channels = x.shape[:2]
    places, outside, count = _places(x.shape[2:], window, positions)
    taken = x.reshape(samples, channels, -1).take(places.reshape(-1), axis=2)
    taken = taken.reshape(samples, channels, *places.shape)
    if outside.any():
        taken[:, :, outside] = 0
    each = channels // window.groups
    grouped = taken.reshape(samples, window.groups, each, *places.shape).transpose(1, 0, 3, 2, 4)
    return grouped.reshape(window.groups, samples * len(places), -1), samples * count


@lru_cache(maxsize=256)
def _places(
    spatial: Ints, window: Window, positions: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_], int]:
    """Flat places (positions, offsets), which are padding, and the number of all positions."""
    rank = len(spatial)
    strides, dilations = window.strides or (1,) * rank, window.dilations or (1,) * rank
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, dilations, strict=True)]
    sizes, begins = _geometry(spatial, spans, strides, window)
    count = math.prod(sizes)
    chosen = np.unravel_index(spread(count, positions), sizes) if count else [np.arange(0)] * rank
    offsets = np.array(list(itertools.product(*map(range, window.kernel))), np.intp)
    flat = np.zeros((len(chosen[0]), len(offsets)), np.intp)
    outside = np.zeros(flat.shape, bool)
    for axis, size in enumerate(spatial):
        corner = chosen[axis] * strides[axis] - begins[axis]
        index = corner[:, None] + offsets[:, axis] * dilations[axis]
        outside |= (index < 0) | (index >= size)
        flat = flat * size + np.clip(index, 0, size - 1)
    return flat, outside, count


def _geometry(
    spatial: Ints, spans: list[int], strides: Ints, window: Window
) -> tuple[list[int], list[int]]:
    """Output sizes and leading pads; SAME pads so that the size is ⌈input / stride⌉."""
    rank = len(spatial)
    pads = list(window.pads) or [0] * (2 * rank)
    if window.auto_pad.startswith("SAME"):
        sizes = [-(-size // stride) for size, stride in zip(spatial, strides, strict=True)]
        outs = zip(sizes, strides, spans, spatial, strict=True)
        total = [max((o - 1) * stride + span - size, 0) for o, stride, span, size in outs]
        half = [(t + (window.auto_pad == "SAME_LOWER")) // 2 for t in total]
        return sizes, half
    if window.auto_pad == "VALID":
        pads = [0] * (2 * rank)
    padded = [size + pads[i] + pads[i + rank] for i, size in enumerate(spatial)]
    pairs = zip(padded, spans, strides, strict=True)
    return [max((size - span) // stride + 1, 0) for size, span, stride in pairs], pads[:rank]
