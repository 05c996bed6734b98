"""Structures of low rank for the weight W of a linear layer, y = W x, fitted on its input.

    svd          W ≈ B A                                         Denton 2014
    channel      k×k to r channels, then 1×1                     Zhang 2016
    spatial      k×1 to r channels, then 1×k                     Jaderberg 2014; Tai 2016
    tucker       1×1, then k×k on fewer channels, then 1×1       Kim 2016
    cp           1×1, k×1 and 1×k on single channels, 1×1        Lebedev 2015; Phan 2020
    depthwise    k×k on single channels, r for each, then 1×1    Guo 2018
    grouped      k×k in groups of channels, then 1×1             Peng 2018

Each one is an Einstein sum (`onnxc.numerics.multilinear`). With H the second moments of x, a closed
form gives its first factors, which alternating least squares then improve:

    W H Wᵀ = U Σ² Uᵀ,    B = U_r Σ_r^½,   A = Σ_r^-½ U_rᵀ W

is the best of rank r for y itself, with no inverse of H (Zhang 2016, §3.2: principal components of
the responses). Where a factor sees a part of the axes of x only, H is replaced by its share in that
part, the trace over the others. Without data H is the identity, and the closed forms are those of
the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxc.numerics.multilinear import STEPS, Floats, compose, error, refine

Ints = tuple[int, ...]

SWEEPS = 4  # of alternating least squares after a closed form
MANY_SWEEPS = 20  # where there is no closed form
WORK = 4e9  # multiply-adds that sweeps over one layer may take
RIDGE = 1e-7  # λ against diverging components
LETTERS = "abcdefgh"
FILL = 1 / 1024  # of sketched weights
SPLITS = (2, 4, 8)  # groups of input channels


@dataclass(frozen=True)
class Stage:
    """One layer of several in a row: a convolution's weight (M, C / groups, *kernel).

    axes: the spatial axes that it moves along, with their strides, dilations and pads.
    """

    weight: Floats
    axes: Ints = ()
    groups: int = 1


@dataclass(frozen=True)
class Structure:
    """A row of STRUCTURES. dims: (o, c, k) or (o, c, i, j), the sizes of the axes of W.

    spec: the Einstein sum from factors to W. view: the shape of W in it. shapes: of the factors.
    ladder: ranks by growing size. start: first factors of W, in that view, for H. stages: the
    layers of factors, for a kernel. parts: how many axes kernels are seen as. kernel: whether it
    is made for kernels, or for matrices. sweeps: of least squares after the start. counts: which
    ranks count channels of a layer, that kernels work on in multiples.
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


@dataclass(frozen=True)
class Factors:
    """Layers in place of one. made: Ŵ, like W. error: E‖(W − Ŵ) x‖² / E‖W x‖²."""

    stages: tuple[Stage, ...]
    made: Floats
    error: float


def why_not(method: str, shape: Ints) -> str:
    """Why a structure is not for weights (groups, o, c, *kernel); empty where it is."""
    row, (_, o, c, *kernel) = STRUCTURES[method], shape
    wide = sum(k > 1 for k in kernel)
    if o == 1 or c * math.prod(kernel) == 1:
        return "it makes one output of each group, which has no smaller rank"
    if row.kernel and not wide:
        return f"{method} is for kernels, and it has none"
    if not row.kernel and wide:
        return f"{method} is for matrices, and it has a kernel"
    if row.kernel and row.parts > wide:
        return f"{method} splits a kernel of two axes or more, and it has one"
    return "" if ranks(method, shape) else f"{method} has no rank for its shape"


def is_quick(method: str, shape: Ints) -> bool:
    """Whether there is a closed form to start from, or the layer is small enough without one."""
    _, o, *rest = shape
    once = 2.0 * o * math.prod(rest) ** 2 * STEPS
    return STRUCTURES[method].sweeps <= SWEEPS or once * MANY_SWEEPS <= WORK


def ranks(method: str, shape: Ints, multiple: int = 1) -> list[Ints]:
    """The ranks of a structure for weights (groups, o, c, *kernel), growing.

    multiple: of channels that kernels work in. Large ranks keep to it, smaller ones to the power of
    two that is an eighth of the largest.
    """
    row, found = STRUCTURES[method], STRUCTURES[method].ladder(_dims(method, shape))
    if not found:
        return []
    steps = [_step(multiple, found[-1][i]) if i in row.counts else 1 for i in range(len(found[-1]))]
    whole = (tuple(max(n - n % s, s) for n, s in zip(r, steps, strict=True)) for r in found)
    return list(dict.fromkeys(whole))


def has_ranks(method: str, shape: Ints, wanted: Ints) -> bool:
    """Whether a structure that is for weights of this shape may have these ranks."""
    found = ranks(method, shape)
    if len(wanted) != len(found[-1]) or (len(wanted) > 1 and not STRUCTURES[method].counts):
        return wanted in found  # numbers of groups, which divide channels
    most = (max(r[i] for r in found) for i in range(len(wanted)))
    return all(1 <= n <= top for n, top in zip(wanted, most, strict=True))


def _step(multiple: int, most: int) -> int:
    """The largest power of two up to a multiple, and up to an eighth of the largest rank."""
    return 1 << max(min(multiple, most // 8), 1).bit_length() - 1


def pick(
    method: str,
    shape: Ints,
    share: float,
    strides: Ints = (),
    multiple: int = 1,
    unit: str = "macs",
) -> Ints | None:
    """The largest ranks that cost at most a share; None where there are none.

    unit: of the cost, "params" for the number of weights, anything else for MACs.
    """
    best: tuple[Ints | None, float] = (None, 0.0)
    for found in ranks(method, shape, multiple):
        is_size = unit == "params"
        cost = parameters(method, shape, found) if is_size else macs(method, shape, found, strides)
        if best[1] < cost <= share:
            best = found, cost
    return best[0]


def macs(method: str, shape: Ints, ranks: Ints, strides: Ints = ()) -> float:
    """Multiply-accumulates of the layers over those of the one that they replace."""
    _, o, c, *kernel = shape
    total = 0.0
    done: set[int] = set()
    for stage in _empty(method, shape, ranks):
        done |= set(stage.axes)
        ahead = math.prod(s for axis, s in enumerate(strides) if axis not in done)
        total += stage.weight.size * ahead
    return total / (o * c * math.prod(kernel))


def parameters(method: str, shape: Ints, ranks: Ints) -> float:
    """Weights of the layers over those of the one that they replace."""
    _, o, c, *kernel = shape
    sizes = (stage.weight.size for stage in _empty(method, shape, ranks))
    return sum(sizes) / (o * c * math.prod(kernel))


def sketch(method: str, shape: Ints, ranks: Ints) -> tuple[Stage, ...]:
    """The layers for weights of this shape, filled with a number: what can be timed."""
    stages = _empty(method, shape, ranks)
    whole = (_side_by_side([stage] * shape[0]) for stage in stages)
    return tuple(Stage(np.full(s.weight.shape, FILL), s.axes, s.groups) for s in whole)


def factorize(method: str, W: Floats, H: Floats | None, ranks: Ints) -> Factors:
    """Layers of these ranks in place of W, (groups, o, c, *kernel).

    H: (groups, d, d) of the rows that W multiplies, d = c · kernel; None without data.
    """
    metric = _metric(W, H)
    each = [_factors(method, w, h, ranks) for w, h in zip(W, metric, strict=True)]
    kernel = tuple(W.shape[3:])
    stages = [STRUCTURES[method].stages(factors, kernel) for factors, _ in each]
    made = np.stack([made for _, made in each])
    lost = relative_error(W, made, H)
    return Factors(tuple(map(_side_by_side, zip(*stages, strict=True))), made, lost)


def relative_error(W: Floats, made: Floats, H: Floats | None) -> float:
    """E‖(W − Ŵ) x‖² / E‖W x‖²; 0 where W gives nothing."""
    triples = list(zip(W, made, _metric(W, H), strict=True))
    power = sum(error(w, h) for w, _, h in triples)
    return sum(error(w - m, h) for w, m, h in triples) / power if power > 0 else 0.0


def _metric(W: Floats, H: Floats | None) -> Floats:
    d = math.prod(W.shape[2:])
    return np.broadcast_to(np.eye(d), (len(W), d, d)) if H is None else H


def _factors(method: str, W: Floats, H: Floats, ranks: Ints) -> tuple[Sequence[Floats], Floats]:
    """Factors of one group's W, (o, c, *kernel), and what they make."""
    row, d = STRUCTURES[method], len(H)
    viewed = W.reshape(row.view(_seen(row.parts, W.shape), ranks))
    factors = row.start(viewed, H, ranks)
    if row.sweeps:
        once = 2.0 * len(W) * d * d * STEPS * len(factors)
        sweeps = int(np.clip(WORK // once, 1, row.sweeps))
        factors = refine(row.spec, factors, viewed, H, sweeps, RIDGE)
    return factors, compose(row.spec, factors).reshape(W.shape)


def _empty(method: str, shape: Ints, ranks: Ints) -> list[Stage]:
    """The layers of one group, of zeros that take no memory."""
    shapes = STRUCTURES[method].shapes(_dims(method, shape), ranks)
    zeros = [np.broadcast_to(np.float64(0), shape) for shape in shapes]
    return STRUCTURES[method].stages(zeros, shape[3:])


def _dims(method: str, shape: Ints) -> Ints:
    return _seen(STRUCTURES[method].parts, shape[1:])


def _seen(parts: int, shape: Ints) -> Ints:
    """(o, c, k) or (o, c, i, j): the first wide axis of the kernel, and the others."""
    o, c, *kernel = shape
    if parts == 1:
        return o, c, math.prod(kernel)
    first = _first(tuple(kernel))
    return o, c, math.prod(kernel[: first + 1]), math.prod(kernel[first + 1 :])


def _first(kernel: Ints) -> int:
    """The first axis along which a kernel is wide."""
    return next(axis for axis, k in enumerate(kernel) if k > 1)


def _side_by_side(stages: Sequence[Stage]) -> Stage:
    """The same layer of several groups as one."""
    weight = np.concatenate([stage.weight for stage in stages])
    return Stage(weight, stages[0].axes, len(stages) * stages[0].groups)


def _principal(W: Floats, H: Floats, r: int) -> tuple[Floats, Floats]:
    """B (o, r) and A (r, d) of the module's docstring."""
    values, vectors = np.linalg.eigh(W @ H @ W.T)
    U = vectors[:, ::-1][:, :r]
    sigma = np.sqrt(np.maximum(values[::-1][:r], 0))
    root = np.sqrt(np.maximum(sigma, 1e-6 * max(float(sigma[0]), 1e-30)))
    return np.asarray(U * root), np.asarray((U / root).T @ W)


def _root(H: Floats) -> Floats:
    """L, L Lᵀ = H with a little on the diagonal."""
    d = len(H)
    size = float(np.trace(H)) / d
    return np.asarray(np.linalg.cholesky(H + np.eye(d) * (1e-9 * size or 1.0)))


def _share(H: Floats, sizes: Ints, kept: Sequence[int]) -> Floats:
    """H between some axes of the rows, whose sizes are given: the trace over the others."""
    n = len(sizes)
    rows = LETTERS[:n]
    columns = "".join(LETTERS[n + a] if a in kept else rows[a] for a in range(n))
    result = "".join(rows[a] for a in kept) + "".join(columns[a] for a in kept)
    found = np.einsum(f"{rows}{columns}->{result}", H.reshape(*sizes, *sizes))
    count = math.prod(sizes[a] for a in kept)
    return np.asarray(found.reshape(count, count))


def _start_channel(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    B, A = _principal(W.reshape(len(W), -1), H, ranks[0])
    return [A.reshape(-1, *W.shape[1:]), B]


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


def _start_spatial(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """Rank r of (o j) × (c i), where H is taken for the product of its shares in (c i) and in j."""
    o, c, i, j = W.shape
    first, second = _root(_share(H, (c, i, j), (0, 1))), _root(_share(H, (c, i, j), (2,)))
    white = np.einsum("ocij,jk,cia->oka", W, second, first.reshape(c, i, -1))
    U, sigma, Vt = np.linalg.svd(white.reshape(o * j, c * i), full_matrices=False)
    r = ranks[0]
    root = np.sqrt(sigma[:r])
    A = np.linalg.solve(first.T, Vt[:r].T * root).T
    B = np.einsum("okr,kj->orj", (U[:, :r] * root).reshape(o, j, r), np.linalg.inv(second))
    return [A.reshape(r, c, i), B]


def _stages_spatial(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    A, B = factors
    first, second, ahead, behind = _split(kernel)
    return [
        Stage(A.reshape(*A.shape[:2], *first), ahead),
        Stage(B.reshape(*B.shape[:2], *second), behind),
    ]


def _start_tucker(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """Principal subspaces of the output and input channels, and the core between them."""
    o, c, k = W.shape
    U, core = _principal(W.reshape(o, -1), H, ranks[1])
    core = core.reshape(-1, c, k)
    root = _root(_share(H, (c, k), (0,)))
    white = np.einsum("ca,sck->ask", root, core).reshape(c, -1)
    V = np.linalg.svd(white, full_matrices=False)[0][:, : ranks[0]]
    V = np.pad(V, ((0, 0), (0, ranks[0] - V.shape[1])))
    encode = np.linalg.solve(root.T, V).T
    return [encode, np.einsum("ar,ca,sck->srk", V, root, core), U]


def _stages_tucker(factors: Sequence[Floats], kernel: Ints) -> list[Stage]:
    V, core, U = factors
    middle = Stage(core.reshape(*core.shape[:2], *kernel), _all(kernel))
    return [_pointwise(V, kernel), middle, _pointwise(U, kernel)]


def _ladder_tucker(dims: Ints) -> list[Ints]:
    o, c, _ = dims
    n = max(o, c)
    found = ((-(-c * t // n), -(-o * t // n)) for t in range(1, n + 1))
    return list(dict.fromkeys(found))


def _start_cp(W: Floats, H: Floats, ranks: Ints) -> list[Floats]:
    """The largest products of the vectors that components of a spatial split are made of."""
    o, c, i, j = W.shape
    full = min(o * j, c * i)
    A, B = _start_spatial(W, H, (min(full, ranks[0]),))
    parts = []
    for a, b in zip(A, B.transpose(1, 0, 2), strict=True):
        left, right = (np.linalg.svd(m, full_matrices=False) for m in (a, b))
        for p, s in enumerate(left[1]):
            for q, t in enumerate(right[1]):
                vectors = (left[0][:, p], left[2][p], right[2][q], right[0][:, q])
                parts.append((s * t, [v * (s * t) ** 0.25 for v in vectors]))
    parts.sort(key=lambda part: -part[0])
    best = [vectors for _, vectors in parts[: ranks[0]]]
    rows = [np.stack(vectors) for vectors in zip(*best, strict=True)]
    return [*rows[:3], rows[3].T]


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


def _start_grouped(W: Floats, H: Floats, r: int) -> list[Floats]:
    """Principal components of what each group of input channels gives."""
    o, g, c, k = W.shape
    d = c * k
    found = []
    for index in range(g):
        part = slice(index * d, (index + 1) * d)
        found.append(_principal(W[:, index].reshape(o, -1), H[part, part], r))
    A = np.stack([a.reshape(r, c, k) for _, a in found])
    return [A, np.stack([b for b, _ in found], axis=1)]


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


def _channel(kernel: bool) -> Structure:
    return Structure(
        "rck,or->ock",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(ranks[0], *dims[1:]), (dims[0], ranks[0])],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0], math.prod(dims[1:])) + 1)],
        start=_start_channel,
        stages=_stages_channel,
        kernel=kernel,
        sweeps=0,
    )


STRUCTURES: dict[str, Structure] = {
    "svd": _channel(kernel=False),
    "channel": _channel(kernel=True),
    "spatial": Structure(
        "rci,orj->ocij",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(*ranks, *dims[1:3]), (dims[0], *ranks, dims[3])],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0] * dims[3], dims[1] * dims[2]) + 1)],
        start=_start_spatial,
        stages=_stages_spatial,
        parts=2,
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
        start=_start_tucker,
        stages=_stages_tucker,
        counts=(0, 1),
    ),
    "cp": Structure(
        "rc,ri,rj,or->ocij",
        view=lambda dims, ranks: dims,
        shapes=lambda dims, ranks: [(*ranks, n) for n in dims[1:]] + [(dims[0], *ranks)],
        ladder=_ladder_cp,
        start=_start_cp,
        stages=_stages_cp,
        parts=2,
        sweeps=MANY_SWEEPS,
    ),
    "depthwise": Structure(
        "grck,ogr->ogck",
        view=lambda dims, ranks: (dims[0], dims[1], 1, dims[2]),
        shapes=lambda dims, ranks: [(dims[1], *ranks, 1, dims[2]), (dims[0], dims[1], *ranks)],
        ladder=lambda dims: [(r,) for r in range(1, min(dims[0], dims[2]) + 1)],
        start=lambda W, H, ranks: _start_grouped(W, H, ranks[0]),
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
        start=lambda W, H, ranks: _start_grouped(W, H, ranks[1]),
        stages=_stages_grouped,
        counts=(),
    ),
}
