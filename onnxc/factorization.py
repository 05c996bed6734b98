"""What `onnxc factorize` may be asked for, and the passes that do it.

    time the structures of each layer -> drop what is not faster -> measure the damage of the rest
    -> allocate under the budget -> factorize, reconstruct

Statistics for the plan are of one half of the samples, damage is measured on the other. Ranks are
chosen here and stand in the recipe, for times of nodes never repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxc.budget import macs_of
from onnxc.core import Pass
from onnxc.cost import free_dimensions
from onnxc.damage import WORST, Judge, outputs
from onnxc.errors import OptionError
from onnxc.graph import copy, is_spilling
from onnxc.numerics import lowrank
from onnxc.numerics.choices import choose
from onnxc.pipeline import few, gather
from onnxc.profile import node_times
from onnxc.workpiece import Workpiece
from passes.factorize import Choice, Factorize, Fitter, Layer, Method, layers, put_sketch
from passes.reconstruct import Reconstruct

Array = NDArray[Any]

DEFAULT = 0.75  # of the MACs, where nothing is asked for
SHARES = (0.75, 0.5, 0.3)  # of a layer's MACs, at which structures are tried
MARGIN = 0.97  # of a layer's time: what its factors may take to count as faster
UNITS = ("macs", "params", "latency", "sqnr")


@dataclass(frozen=True)
class FactorizeSettings:
    """How to factorize; the options of `onnxc factorize` besides data, target and nodes.

    method: the structure of the factors; auto tries all and keeps what is best for each layer.
    macs: share of the multiply-accumulates that stays; 0.75 where nothing is asked for.
    params: share of the weights that stays.
    latency: share of the latency that stays, by the time that each layer takes here.
    sqnr: dB that the outputs keep; as much goes as that allows.
    ranks: of which node, as NODE=METHOD:RANK or NODE=METHOD:RANKxRANK, in place of a budget.
    allocation: whether layers share the loss so that it hurts least, or all lose the same share.
    faster: whether layers whose factors are not faster here stay whole; by default where the method
    is left to onnxc, or latency is asked for.
    reconstruct: whether layers are refit to the original's outputs, one after the other.
    """

    method: Method = "auto"
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    sqnr: float | None = None
    ranks: tuple[str, ...] = ()
    allocation: Literal["global", "uniform"] = "global"
    faster: bool | None = None
    reconstruct: bool = True

    def __post_init__(self) -> None:
        given = [n for n in UNITS if getattr(self, n) is not None]
        given += ["ranks"] if self.ranks else []
        if len(given) > 1:
            raise OptionError(
                f"give one of {', '.join(UNITS)} and ranks, not {' and '.join(given)}"
            )
        for name in given:
            if name in UNITS[:3] and not 0 < getattr(self, name) < 1:
                raise OptionError(f"{name} is a share between 0 and 1, not {getattr(self, name):g}")
        if self.allocation == "uniform" and not {"latency", "sqnr"}.isdisjoint(given):
            raise OptionError(f"uniform allocation is of macs or params, not of {given[0]}")
        Factorize(ranks=self.ranks)

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "factorized"

    @property
    def goal(self) -> tuple[str, float]:
        """The unit of the budget, and how much of it stays."""
        given = ((n, getattr(self, n)) for n in UNITS)
        return next(((n, float(v)) for n, v in given if v is not None), ("macs", DEFAULT))

    @property
    def wants_speed(self) -> bool:
        if self.faster is not None:
            return self.faster
        return self.method == "auto" or self.latency is not None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to measure: one structure, the same share for every layer."""
        is_same = self.allocation == "uniform" and self.method != "auto"
        return is_same and self.goal[0] == "macs" and not self.wants_speed

    @property
    def summary(self) -> str:
        if self.ranks:
            return f"ranks of {len(self.ranks)} layers"
        unit, amount = self.goal
        names = {"macs": "MACs", "params": "weights", "latency": "latency"}
        what = f"{amount:g} dB" if unit == "sqnr" else f"{100 * amount:g} % of the {names[unit]}"
        return f"{what}, {self.allocation}, {self.method}"


@dataclass(frozen=True)
class Option:
    """What may become of a layer: costs relative to it, and damage. choice: None for as it is."""

    choice: Choice | None = None
    macs: float = 1.0
    params: float = 1.0
    time: float = 1.0
    damage: float = 0.0

    def cost(self, unit: str) -> float:
        return {"params": self.params, "latency": self.time}.get(unit, self.macs)


WHOLE = Option()


def ways(settings: FactorizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what stays and how it was allocated."""
    factorize = _planned(settings, piece)
    refit: tuple[Pass, ...] = (Reconstruct(),) if settings.reconstruct else ()
    return {settings.summary: (factorize, *refit)}


def _planned(settings: FactorizeSettings, piece: Workpiece) -> Factorize:
    """The pass with ranks for the layers that change."""
    if settings.ranks:
        return Factorize(macs=0.0, ranks=settings.ranks)
    unit, amount = settings.goal
    found = layers(piece.model.graph, piece.context)
    free = [layer for layer in found if not layer.obstacle]
    if not piece.has_data and free:
        piece.calibration.notes.append(
            "factors are fitted to the weights alone, without data: expect several times the error"
        )
    if settings.is_plain or not free:
        return Factorize(settings.method, macs=amount if unit == "macs" else 0.0)
    options = _options(settings, piece, free)
    chosen = _chosen(settings, piece, free, options)
    ranks = tuple(
        f"{layer.name}={option.choice}"
        for layer, option in zip(free, chosen, strict=True)
        if option.choice is not None
    )
    return Factorize(settings.method, macs=0.0, ranks=ranks)


def _chosen(
    settings: FactorizeSettings,
    piece: Workpiece,
    free: Sequence[Layer],
    options: Sequence[Sequence[Option]],
) -> list[Option]:
    """One option of each layer."""
    unit, amount = settings.goal
    if settings.allocation == "uniform":
        return [min(some[1:], key=lambda o: o.damage, default=WHOLE) for some in options]
    sizes, rest = _sizes(unit, piece, free)
    costs = [
        np.array([size * o.cost(unit) for o in some])
        for size, some in zip(sizes, options, strict=True)
    ]
    losses = [np.array([o.damage for o in some]) for some in options]
    if unit == "sqnr":
        picked = choose(losses, costs, 10 ** (-amount / 10))
    else:
        picked = choose(costs, losses, amount * (sum(sizes) + rest) - rest)
    return [some[i] for some, i in zip(options, picked, strict=True)]


def _sizes(unit: str, piece: Workpiece, free: Sequence[Layer]) -> tuple[list[float], float]:
    """What each layer costs in a unit, and all the rest of the graph."""
    graph = piece.model.graph
    if unit == "params":
        sizes = [float(np.prod(layer.shape)) for layer in free]
        heavy = (layer for layer in layers(graph, piece.context) if layer.obstacle)
        return sizes, float(sum(layer.size for layer in heavy))
    if unit == "latency":
        costs: Mapping[str, float] = node_times(piece.model, piece.feed, piece.runtime)
    else:
        costs = macs_of(graph, free_dimensions(graph))
    sizes = [sum(costs.get(node.name, 0.0) for node in layer.nodes) for layer in free]
    return sizes, sum(costs.values()) - sum(sizes)


def _options(
    settings: FactorizeSettings, piece: Workpiece, free: Sequence[Layer]
) -> list[list[Option]]:
    """What may become of each layer; first, nothing."""
    unit, amount = settings.goal
    shares = (amount,) if settings.allocation == "uniform" else SHARES
    multiple = piece.context.target.channels
    found = [_tried(settings.method, layer, shares, unit, multiple) for layer in free]
    if settings.wants_speed and free:
        found = _timed(piece, free, found)
    return _judged(piece, free, found)


def _tried(
    method: Method, layer: Layer, shares: Sequence[float], unit: str, multiple: int
) -> list[Option]:
    """The structures for a layer, near some shares of its cost."""
    tried: dict[Choice, Option] = {}
    for name in layer.methods(method):
        for share in shares:
            ranks = lowrank.pick(name, layer.shape, share, layer.strides, multiple, unit)
            if ranks:
                macs = lowrank.macs(name, layer.shape, ranks, layer.strides)
                params = lowrank.parameters(name, layer.shape, ranks)
                choice = Choice(name, ranks)
                tried[choice] = Option(choice, macs, params)
    return list(tried.values())


def _timed(
    piece: Workpiece, free: Sequence[Layer], found: Sequence[Sequence[Option]]
) -> list[list[Option]]:
    """The options that are faster than the layer, with their times relative to it.

    All layers take their first option, are timed together, take their second one, and so on.
    """
    kept: list[list[Option]] = [[] for _ in free]
    rounds = max(map(len, found), default=0)
    for number in range(rounds):
        piece.say(f"factorize: timing {number}/{rounds}")
        before = node_times(piece.model, piece.feed, piece.runtime)
        some = [options[number] if number < len(options) else WHOLE for options in found]
        times = _times(piece, free, some)
        for index, (layer, option) in enumerate(zip(free, some, strict=True)):
            whole = sum(before.get(node.name, 0.0) for node in layer.nodes)
            share = times[index] / whole if whole > 0 else 1.0
            if option.choice is not None and share <= MARGIN:
                kept[index].append(replace(option, time=share))
    slow = [x.name for x, some, left in zip(free, found, kept, strict=True) if some and not left]
    if slow:
        names = ", ".join(slow[:3]) + (", …" if len(slow) > 3 else "")
        piece.calibration.notes.append(
            f"{len(slow)} of {len(free)} layers stay whole, for no factors of theirs are faster "
            f"when measured: {names}"
        )
    return kept


def _times(piece: Workpiece, free: Sequence[Layer], some: Sequence[Option]) -> list[float]:
    """Milliseconds of the layers with these options, with weights that mean nothing."""
    model = copy(piece.model)
    own = {layer.name: layer for layer in layers(model.graph, piece.context)}
    names: list[list[str]] = []
    for layer, option in zip(free, some, strict=True):
        same = own[layer.name]
        made = [] if option.choice is None else put_sketch(model.graph, same, option.choice)
        names.append([node.name for node in (*same.nodes, *made)])
    times = node_times(model, piece.feed, piece.runtime)
    return [sum(times.get(name, 0.0) for name in group) for group in names]


def _judged(
    piece: Workpiece, free: Sequence[Layer], found: Sequence[Sequence[Option]]
) -> list[list[Option]]:
    """Options with their damage at the outputs of the model, or at the layer without data.

    Of each structure one rank is measured; the damage of the others goes with the layer's error.
    """
    train, judge, stats = _halves(piece)
    every = Factorize()
    if train is not None:
        calibration = replace(piece.calibration, dataset=train, known=None)
        stats = gather(piece.model, every, piece.context, calibration, piece.say)
    context = replace(piece.context, stats=stats)
    total, done = sum(map(len, found)), 0
    result: list[list[Option]] = []
    for layer, some in zip(free, found, strict=True):
        judged = [WHOLE]
        fitter = Fitter.of(layer, context)
        scale: dict[str, float] = {}
        for option in some:
            piece.say(f"factorize: measuring {done}/{total}")
            done += 1
            assert option.choice is not None
            error = fitter.fit(option.choice).error
            method = option.choice.method
            if judge is not None and method not in scale:
                only = Factorize(macs=0.0, ranks=(f"{layer.name}={option.choice}",))
                scale[method] = judge.damage(only, stats) / max(error, 1e-12)
            judged.append(replace(option, damage=min(error * scale.get(method, 1.0), WORST)))
        result.append(judged)
    return result


def _halves(piece: Workpiece) -> tuple[Any, Judge | None, dict[Any, Any]]:
    """Samples for statistics, a judge on others, and the statistics that are known."""
    dataset = piece.calibration.dataset
    known = piece.calibration.known
    if dataset is None or len(dataset) < 2 or is_spilling(piece.model.graph):
        return dataset, None, {} if known is None else dict(known.stats)
    train = dataset.subset(range(0, len(dataset), 2))
    judge = few(dataset.subset(range(1, len(dataset), 2)))
    return train, Judge(piece, judge, outputs(piece, judge)), {}
