"""Cross-layer equalization: bring the channels of a tensor to one scale before they share a range.

Channels whose values pass only through homogeneous operators (f(s x) = s f(x) for s > 0: Relu, Add,
pooling, …) between the layers that make them and the layers that read them can be scaled freely
(`onnxc.scalable`):

    W_p[c, :] <- W_p[c, :] / s_c,   b_p[c] <- b_p[c] / s_c     in every producer p
    W_r[:, c] <- W_r[:, c] · s_c                                in every reader r

leaves the network's function as it was. With r_c the mean over the samples of the channel's largest
magnitude,

    s_c = (r_c / m)^½,   m the geometric mean of r,

shares the spread between the activations' one scale and the readers' weights (Nagel 2019,
"Data-free quantization", whose weight ranges are replaced by what is measured on the activations).

A Clip(0, h) is homogeneous only for a channel that stays below h. There r is measured behind the
Clip, with a factor of HEADROOM for the samples that reach higher than most, and

    s_c = min(1, HEADROOM r_c / h)^½

so that channels are only scaled up, and one that reaches h stays as it is. The largest values of a
few samples may be clipped; it is the one change that is not exact.

Where products of matrices read a tensor, as in a transformer, s is that of SmoothQuant, with the
share between activations and weights that loses least (`onnxc.numerics.smoothing`). There norms and
the linear factor of gated layers make it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import nbytes, values
from onnxc.integer import activation_grid, weight_grid
from onnxc.moments import matrix, moments_key
from onnxc.numerics.smoothing import Reader, smoothing
from onnxc.ops import weight_of
from onnxc.scalable import ChannelGroup, channel_groups, scale

LIMIT = 64.0  # largest ratio of two channels' factors to their mean: a dead channel is no guide
PEAK = 3.0  # of a channel, in standard deviations, where only that is known
HEADROOM = 1.5  # of a channel's mean peak below the bound of a Clip


@register
@dataclass(frozen=True)
class Equalize:
    """Scale channels so that they share one quantization range better."""

    name: ClassVar[str] = "equalize"
    lossless: ClassVar[bool] = False
    rescales: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for group in self._groups(graph, context):
            if not group.obstacle:
                yield from (*group.keys, *_moments(group))

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return [
            result
            for group in self._groups(graph, context)
            for result in _scale(graph, group, context)
        ]

    def _groups(self, graph: gs.Graph, context: Context) -> list[ChannelGroup]:
        return channel_groups(graph, context.only.names(graph))


def _moments(group: ChannelGroup) -> list[Key]:
    """Of what products read."""
    found = [] if group.is_convolved else [moments_key(node) for node in group.readers]
    return [key for key in found if key is not None]


def _scale(graph: gs.Graph, group: ChannelGroup, context: Context) -> list[Change | Skip]:
    first = group.first
    if group.obstacle:
        return [Skip(first.name, f"channels not equalized: {group.obstacle}")]
    peaks = [context.stats[key].peak for key in group.keys if key in context.stats]
    if not peaks or not group.readers:
        return [Skip(first.name, "channels not equalized: nothing was measured on them")]
    s = _factors(np.max(peaks, axis=0), group, context)
    if np.allclose(s, 1, atol=0.01):
        return [Skip(first.name, "channels not equalized: they already share one scale")]
    scale(graph, group, s, "equalized")
    places = (*group.divided, *group.multiplied)
    size = sum(nbytes(place.node.inputs[place.position]) for place in places)
    what = f"{len(s)} channels equalized, factors {s.min():.2g} to {s.max():.2g}"
    return [Change(first.name, what, size, size)]


def _factors(peak: NDArray[Any], group: ChannelGroup, context: Context) -> NDArray[np.float64]:
    """The s of a group from the peaks of its channels."""
    if group.is_convolved:
        return factors(peak, group.bound)
    grids = activation_grid(context.target), weight_grid(context.target)
    n, m = (grid.high - grid.low for grid in grids)
    return smoothing(peak, _readers(group, peak, context), n, m)


def _readers(group: ChannelGroup, peak: NDArray[Any], context: Context) -> Sequence[Reader]:
    """Weights, with the power of what they multiply, or what peaks let guess of it."""
    found = []
    for node in group.readers:
        weight, key = weight_of(node), moments_key(node)
        assert weight is not None
        stats = None if key is None else context.stats.get(key)
        power = (peak / PEAK) ** 2 if stats is None else stats.diagonal[0]
        found.append((matrix(node, values(weight))[0], power))
    return found


def factors(peak: NDArray[Any], bound: float | None = None) -> NDArray[np.float64]:
    """The s_c of the module's docstring for peaks (channels,); 1 for a channel that is always zero.

    bound: where a Clip cuts off, or None.
    """
    alive = peak > 0
    if not alive.any():
        return np.ones(len(peak))
    if bound is None:
        relative = peak / np.exp(np.log(peak[alive]).mean())
    else:
        relative = np.minimum(1, HEADROOM * peak / bound)
    s = np.sqrt(np.where(alive, relative, 1))
    return np.asarray(np.clip(s, 1 / LIMIT, LIMIT))
