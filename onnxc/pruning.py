"""What `onnxc prune` may be asked for, and the passes that do it.

    rank channels → measure the damage of each group → allocate under the budget → prune,
    reconstruct, shrink

Counts are chosen here and stand in the recipe, for times of nodes never repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.bench import speedup, time_interleaved
from onnxc.channels.budget import Budget, budget
from onnxc.channels.criteria import Name
from onnxc.channels.groups import find_channels
from onnxc.core import Pass
from onnxc.cost import macs_by_node
from onnxc.damage import Measured, measure
from onnxc.errors import OptionError
from onnxc.graph import copy
from onnxc.numerics.allocation import allocate, uniform_under
from onnxc.pipeline import PREPARED, gather
from onnxc.workpiece import Workpiece
from passes.prune import Part, Prune, parts
from passes.reconstruct import Reconstruct
from passes.shrink import Shrink

Array = NDArray[Any]

DEFAULT = 0.75  # of the MACs, where nothing is asked for
ROUNDS = 3  # of a budget for latency, each corrected by what the last one measured
CLOSE = 0.02  # of the latency that was asked for
LOOSE, LATE = 1.005, 1.05  # times the budget that count as met


@dataclass(frozen=True)
class PruneSettings:
    """How to prune; the options of `onnxc prune` besides data, target and nodes.

    ratio: share of the channels that goes.
    macs: share of the multiply-accumulates that stays; 0.75 where nothing is asked for.
    latency: share of the latency that stays, by the time that each layer takes here.
    allocation: whether groups share the loss so that it hurts least, or all lose the same share.
    criterion: what tells which channels of a group go.
    reconstruct: whether layers are refit to the original's outputs, one after the other.
    nonlinear: whether the ReLU behind a layer is looked at when it is refit.
    """

    ratio: float | None = None
    macs: float | None = None
    latency: float | None = None
    allocation: Literal["global", "uniform"] = "global"
    criterion: Name = "obs"
    reconstruct: bool = True
    nonlinear: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "macs", "latency") if getattr(self, n) is not None]
        if len(given) > 1:
            raise OptionError(f"give one of ratio, macs and latency, not {' and '.join(given)}")
        for name in given:
            if not 0 < getattr(self, name) < 1:
                raise OptionError(f"{name} is a share between 0 and 1, not {getattr(self, name):g}")

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "pruned"

    @property
    def goal(self) -> tuple[str, float]:
        """What is to stay, and the share of it."""
        if self.ratio is not None:
            return "channels", 1 - self.ratio
        if self.latency is not None:
            return "latency", self.latency
        return "MACs", DEFAULT if self.macs is None else self.macs


def ways(settings: PruneSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what stays and how it was allocated."""
    what, share = settings.goal
    if settings.ratio is not None and settings.allocation == "uniform":
        prune = Prune(ratio=settings.ratio, criterion=settings.criterion)
    else:
        prune = _allocated(settings, piece)
    refit: tuple[Pass, ...] = (
        (Reconstruct(nonlinear=settings.nonlinear),) if settings.reconstruct else ()
    )
    name = f"{100 * share:g} % of the {what}, {settings.allocation}, {settings.criterion}"
    return {name: (prune, *refit, Shrink())}


def missed(settings: PruneSettings, found: Any) -> tuple[str, ...]:
    """A sentence for the budget that was asked for and is not met."""
    before, after = found.macs
    if settings.macs is not None and before and after and after > settings.macs * before * LOOSE:
        return (_more("work (MACs)", after / before, settings.macs),)
    if settings.latency is not None and found.ratio is not None:
        left = 1 / found.ratio.median
        return (_more("latency", left, settings.latency),) if left > settings.latency * LATE else ()
    return ()


def _more(what: str, left: float, asked: float) -> str:
    return f"{100 * left:.0f} % of the {what} stays, more than the {100 * asked:g} % asked for"


def _allocated(settings: PruneSettings, piece: Workpiece) -> Prune:
    """The pass with counts for each group that meet the budget."""
    what, share = settings.goal
    prune = Prune(ratio=0.0, criterion=settings.criterion)
    free = [part for part in parts(piece.model.graph, piece.context) if not part.obstacle]
    if not free:
        return prune
    stats = gather(piece.model, prune, piece.context, piece.calibration, piece.say, state=PREPARED)
    multiple = piece.context.target.channels
    found = piece.once(
        ("damage of channels", prune), lambda: measure(piece, prune, free, stats, multiple)
    )
    costs = _budget(what, piece, free)
    if what != "latency":
        return replace(prune, remove=_counts(settings, found, costs, share))
    return _timed(settings, piece, replace(prune, update=False), found, costs, share)


def _budget(what: str, piece: Workpiece, free: Sequence[Part]) -> Budget:
    """What the graph costs in a unit: channels, MACs, or milliseconds."""
    graph = piece.model.graph
    channels = find_channels(graph, piece.context.only.excluded(graph))
    groups = [part.group for part in free]
    if what == "channels":
        sizes = np.array([len(group.channels) for group in groups], float)
        rows = tuple((i,) for i in range(len(groups)))
        counts = np.hstack([np.diag(np.ones(len(groups))), np.zeros((len(groups), 1))])
        return Budget(sizes, rows, counts, sizes, 0.0)
    if what == "MACs":
        return budget(graph, channels, groups, macs_by_node(piece.model))
    piece.say("prune: timing layers")
    times = piece.times.of(piece.model, piece.feed, piece.runtime)
    return budget(graph, channels, groups, times, piece.context.target.channels)


def _counts(
    settings: PruneSettings, found: Sequence[Measured], costs: Budget, share: float
) -> tuple[str, ...]:
    """NODE=COUNT of each group that loses some."""
    curves = [one.curve for one in found]
    solve = allocate if settings.allocation == "global" else uniform_under
    counts = solve(curves, _cost(costs), share)
    return tuple(f"{one.part.name}={k}" for one, k in zip(found, counts, strict=True) if k)


def _cost(costs: Budget) -> Callable[[NDArray[np.intp]], NDArray[np.float64]]:
    return lambda gone: costs.cost(costs.all - gone)


def _timed(
    settings: PruneSettings,
    piece: Workpiece,
    prune: Prune,
    found: Sequence[Measured],
    costs: Budget,
    share: float,
) -> Prune:
    """The same for latency: what was planned is built and timed, and the plan corrected."""
    wanted, remove = share, tuple[str, ...]()
    for _ in range(ROUNDS):
        remove = _counts(settings, found, costs, wanted)
        reached = _latency(piece, replace(prune, remove=remove))
        if reached <= share * (1 + CLOSE) and reached >= share * (1 - 3 * CLOSE):
            break
        wanted = min(max(wanted * share / reached, 0.02), 1.0)
    return replace(prune, remove=remove, update=True)


def _latency(piece: Workpiece, prune: Prune) -> float:
    """Latency without the channels over that with all of them."""
    if not prune.remove:
        return 1.0
    less = copy(piece.model)
    prune.apply(less.graph, piece.context)
    Shrink().apply(less.graph, piece.context)
    piece.say("prune: timing the plan")
    models = {"before": piece.model, "after": less}
    times = time_interleaved(models, dict(piece.feed), piece.runtime, min_time=0.5)
    return 1 / speedup(times["before"], times["after"]).median
