"""STRUCTURES: what may stand in place of the weight W of a linear layer, y = W x.

    svd          W ≈ B A                                         Denton 2014
    channel      k×k to r channels, then 1×1                     Zhang 2016
    spatial      k×1 to r channels, then 1×k                     Jaderberg 2014; Tai 2016
    tucker       1×1, then k×k on fewer channels, then 1×1       Kim 2016
    cp           1×1, k×1 and 1×k on single channels, 1×1        Lebedev 2015; Phan 2020
    depthwise    k×k on single channels, r for each, then 1×1    Guo 2018
    grouped      k×k in groups of channels, then 1×1             Peng 2018
    tt           a tensor train of two cores, without a kernel   Novikov 2015; Van Loan 2000

The cores of a train take both sizes apart, o = o1 o2 and c = c1 c2,

    W[(o1 o2), (c1 c2)] ≈ Σ_r G1[o1 r c1] G2[r o2 c2],

a sum of r Kronecker products. From the right, no step needs a transposition: x seen as (c1, c2)
times G2 is (c1, r o2), which seen as (c1 r, o2) is multiplied by G1 at each of o2 positions.

Each one is an Einstein sum (`onnxc.numerics.multilinear`) with a closed form for its first factors
(`onnxc.numerics.lowrank_starts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxc.numerics import lowrank_starts as starts
from onnxc.numerics.multilinear import Floats

Ints = tuple[int, ...]

SWEEPS = 4  # of alternating least squares after a closed form
MANY_SWEEPS = 20  # where there is no closed form
SPLITS = (2, 4, 8)  # groups of input channels


@dataclass(frozen=True)
class Stage:
    """One layer of several in a row: a convolution's weight (M, C / groups, *kernel).

    axes: the spatial axes that it moves along, with their strides, dilations and pads. sample: the
    axes of what it takes for one sample, channels first: x is reshaped to (-1, *sample); empty
    where it takes x as it is.
    """

    weight: Floats
    axes: Ints = ()
    groups: int = 1
    sample: Ints = ()


@dataclass(frozen=True)
class Structure:
    """A row of STRUCTURES. dims: (o, c, k) or (o, c, i, j), the sizes of the axes of W.

    spec: the Einstein sum from factors to W. view: the shape of W in it. shapes: of the factors.
    ladder: ranks by growing size. start: first factors of W, in that view, for H. stages: the
    layers of factors, for a kernel. parts: how many axes kernels are seen as. kernel: whether it
    is made for kernels, or for matrices. sweeps: of least squares after the start. counts: which
    ranks count channels of a layer, that kernels work on in multiples. unfold: the matrices of
    (o, c, *kernel) that have the ranks; None where ranks are not those of matrices. splits: whether
    o and c are taken apart, so that its layers take x for other samples than it comes in.
    """

    spec: str
    view: Callable[[Ints, Ints], Ints]
    shapes: Callable[[Ints, Ints], list[Ints]]
    ladder: Callable[[Ints], list[Ints]]
    start: Callable[[Floats, Floats, Ints], list[Floats]]
    stages: Callable[[Sequence[Floats], Ints], list[Stage]]
    parts: int = 1
    kernel: bool = True
    sweeps: int = SWEEPS
    counts: Ints = (0,)
    unfold: Callable[[Floats], list[Floats]] | None = None
    splits: bool = False


def halves(size: int) -> Ints:
    """Two factors of a size, the larger one first, as near to each other as there are."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return size // small, small


def seen(parts: int, shape: Ints) -> Ints:
    """(o, c, k) or (o, c, i, j): the first wide axis of the kernel, and the others."""
    o, c, *kernel = shape
    if parts == 1:
        return o, c, math.prod(kernel)
    first = _first(tuple(kernel))
    return o, c, math.prod(kernel[: first + 1]), math.prod(kernel[first + 1 :])


def _first(kernel: Ints) -> int:
    """The first axis along which a kernel is wide."""
    return next(axis for axis, k in enumerate(kernel) if k > 1)


def _stages_channel(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    A, B = factors
    r, c, _ = A.shape
    return [Stage(A.reshape(r, c, *kernel), _all(kernel)), _pointwise(B, kernel)]


def _pointwise(B: Floats, kernel: Ints) -> Stage:
    return Stage(B.reshape(*B.shape, *(1 for _ in kernel)))


def _all(kernel: Ints) -> Ints:
    return tuple(range(len(kernel)))


def _split(kernel: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """The kernels of two layers in place of one, and the axes that they move along."""
    cut = _first(kernel) + 1
    ones = (1,) * len(kernel)
    axes = _all(kernel)
    return kernel[:cut] + ones[cut:], ones[:cut] + kernel[cut:], axes[:cut], axes[cut:]


def _unfold_spatial(W: Floats) -> list[Floats]:
    o, c, i, j = seen(2, W.shape)
    return [W.reshape(o, c, i, j).transpose(0, 3, 1, 2).reshape(o * j, c * i)]


def _stages_spatial(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    A, B = factors
    first, second, ahead, behind = _split(kernel)
    return [
        Stage(A.reshape(*A.shape[:2], *first), ahead),
        Stage(B.reshape(*B.shape[:2], *second), behind),
    ]


def _unfold_tucker(W: Floats) -> list[Floats]:
    return [np.moveaxis(W, 1, 0).reshape(W.shape[1], -1), W.reshape(len(W), -1)]


def _stages_tucker(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    V, core, U = factors
    middle = Stage(core.reshape(*core.shape[:2], *kernel), _all(kernel))
    return [_pointwise(V, kernel), middle, _pointwise(U, kernel)]


def _ladder_tucker(dims: Ints) -> list[Ints]:
    o, c, _ = dims
    n = max(o, c)
    found = ((-(-c * t // n), -(-o * t // n)) for t in range(1, n + 1))
    return list(dict.fromkeys(found))


def _stages_cp(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    C, first, second, B = factors
    r = len(C)
    tall, wide, ahead, behind = _split(kernel)
    return [
        _pointwise(C, kernel),
        Stage(first.reshape(r, 1, *tall), ahead, r),
        Stage(second.reshape(r, 1, *wide), behind, r),
        _pointwise(B, kernel),
    ]


def _ladder_cp(dims: Ints) -> list[Ints]:
    """Up to as many components as cost what the layer does."""
    return [(r,) for r in range(1, min(math.prod(dims) // sum(dims), dims[0] * dims[1]) + 1)]


def _stages_grouped(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    A, B = factors
    g, r, c, _ = A.shape
    flat = B.reshape(len(B), g * r)
    return [Stage(A.reshape(g * r, c, *kernel), _all(kernel), g), _pointwise(flat, kernel)]


def _ladder_grouped(dims: Ints) -> list[Ints]:
    o, c, k = dims
    found = [
        (g, r)
        for g in SPLITS
        if c % g == 0 and c > g
        for r in range(1, min(o, c // g * k) + 1)
        if g * r * (c // g * k + o) < o * c * k
    ]
    return sorted(found, key=lambda ranks: ranks[0] * ranks[1] * (c // ranks[0] * k + o))


def _split_train(dims: Ints) -> Ints:
    """(o1, o2, c1, c2), o1 and c2 the larger ones, for the MACs are r o c (1 / o1 + 1 / c2)."""
    o, c, _ = dims
    return (*halves(o), *reversed(halves(c)))


def _shapes_train(dims: Ints, ranks: Ints) -> list[Ints]:
    o1, o2, c1, c2 = _split_train(dims)
    return [(*ranks, o2, c2), (o1, *ranks, c1)]


def _stages_train(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    G2, G1 = factors
    r, o2, c2 = G2.shape
    o1, _, c1 = G1.shape
    left = G1.transpose(0, 2, 1).reshape(o1, c1 * r, 1)
    return [Stage(G2.reshape(r * o2, c2), sample=(c2,)), Stage(left, sample=(c1 * r, o2))]


def _ladder_train(dims: Ints) -> list[Ints]:
    o1, o2, c1, c2 = _split_train(dims)
    return [] if 1 in (o2, c1) else [(r,) for r in range(1, min(o1 * c1, o2 * c2) + 1)]


def _unfold_train(W: Floats) -> list[Floats]:
    o1, o2, c1, c2 = _split_train(seen(1, W.shape))
    return [W.reshape(o1, o2, c1, c2).swapaxes(1, 2).reshape(o1 * c1, o2 * c2)]


def _channel(kernel: bool) -> Structure:
    return Structure(
        "rck,or->ock",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(ranks[0], *dims[1:]), (dims[0], ranks[0])],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0], math.prod(dims[1:])) + 1)],
        start=starts.channel,
        stages=_stages_channel,
        kernel=kernel,
        sweeps=0,
        unfold=lambda W: [W.reshape(len(W), -1)],
    )


STRUCTURES: dict[str, Structure] = {
    "svd": _channel(kernel=False),
    "channel": _channel(kernel=True),
    "spatial": Structure(
        "rci,orj->ocij",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(*ranks, *dims[1:3]), (dims[0], *ranks, dims[3])],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0] * dims[3], dims[1] * dims[2]) + 1)],
        start=starts.spatial,
        stages=_stages_spatial,
        parts=2,
        unfold=_unfold_spatial,
    ),
    "tucker": Structure(
        "rc,srk,os->ock",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [
            (ranks[0], dims[1]),
            (ranks[1], ranks[0], dims[2]),
            (dims[0], ranks[1]),
        ],
        ladder=_ladder_tucker,
        start=starts.tucker,
        stages=_stages_tucker,
        counts=(0, 1),
        unfold=_unfold_tucker,
    ),
    "cp": Structure(
        "rc,ri,rj,or->ocij",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(*ranks, n) for n in dims[1:]] + [(dims[0], *ranks)],
        ladder=_ladder_cp,
        start=starts.cp,
        stages=_stages_cp,
        parts=2,
        sweeps=MANY_SWEEPS,
    ),
    "depthwise": Structure(
        "grck,ogr->ogck",
        view=lambda dims, ranks: (dims[0], dims[1], 1, dims[2]),
        shapes=lambda dims, ranks: [(dims[1], *ranks, 1, dims[2]), (dims[0], dims[1], *ranks)],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0], dims[2]) + 1)],
        start=lambda W, H, ranks: starts.grouped(W, H, ranks[0]),
        stages=_stages_grouped,
        counts=(),
    ),
    "grouped": Structure(
        "grck,ogr->ogck",
        view=lambda dims, ranks: (dims[0], ranks[0], dims[1] // ranks[0], dims[2]),
        shapes=lambda dims, ranks: [
            (*ranks, dims[1] // ranks[0], dims[2]),
            (dims[0], *ranks),
        ],
        ladder=_ladder_grouped,
        start=lambda W, H, ranks: starts.grouped(W, H, ranks[1]),
        stages=_stages_grouped,
        counts=(),
    ),
    "tt": Structure(
        "rbd,arc->abcd",
        view=lambda dims, ranks: _split_train(dims),
        shapes=_shapes_train,
        ladder=_ladder_train,
        start=starts.train,
        stages=_stages_train,
        kernel=False,
        counts=(),
        unfold=_unfold_train,
        splits=True,
    ),
}
