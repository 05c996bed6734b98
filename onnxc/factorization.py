"""What `onnxc factorize` may be asked for, and the passes that do it.

    time the structures of each layer -> drop what is not faster -> measure the damage of the rest
    -> allocate under the budget -> factorize, reconstruct

Factors of the plan are fitted to one half of the samples, their damage is measured on the other.
Ranks are chosen here and stand in the recipe, for times of nodes never repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxc.bench import speedup, time_interleaved
from onnxc.core import Change, Context, Key, Pass, Skip
from onnxc.cost import macs_by_node
from onnxc.damage import WORST, Judge, outputs
from onnxc.errors import OptionError
from onnxc.graph import Model, copy, is_spilling
from onnxc.numerics import lowrank
from onnxc.numerics.choices import choose
from onnxc.numerics.lowrank import Factors
from onnxc.pipeline import few, gather
from onnxc.profile import node_times
from onnxc.workpiece import Workpiece
from passes.factorize import Choice, Factorize, Fitter, Layer, Method, layers, put, put_sketch
from passes.reconstruct import Reconstruct

Array = NDArray[Any]

DEFAULT = 0.75  # of the MACs, where nothing is asked for
SHARES = (0.75, 0.5, 0.3)  # of a layer's MACs, at which structures are tried
ROUNDS = 5  # of a plan for latency, each corrected by what the last one measured
CLOSE = 0.02  # of the latency that was asked for
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
    nonlinear: whether the ReLU behind a layer is looked at when it is refit.
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
    nonlinear: bool = False

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
    refit: tuple[Pass, ...] = (
        (Reconstruct(nonlinear=settings.nonlinear),) if settings.reconstruct else ()
    )
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
    plan = Plan(settings, piece, free, options)
    chosen = plan.timed() if settings.wants_speed else plan.chosen(amount)
    ranks = tuple(
        f"{layer.name}={option.choice}"
        for layer, option in zip(free, chosen, strict=True)
        if option.choice is not None
    )
    return Factorize(settings.method, macs=0.0, ranks=ranks)


@dataclass(frozen=True)
class Plan:
    """What may become of the layers that are free, and what is asked for."""

    settings: FactorizeSettings
    piece: Workpiece
    free: Sequence[Layer]
    options: Sequence[Sequence[Option]]

    def chosen(self, amount: float) -> list[Option]:
        """One option of each layer, for that much of the unit of the budget."""
        unit, options = self.settings.goal[0], self.options
        if self.settings.allocation == "uniform":
            return [min(some[1:], key=lambda o: o.damage, default=WHOLE) for some in options]
        sizes, rest = _sizes(unit, self.piece, self.free)
        pairs = zip(sizes, options, strict=True)
        costs = [np.array([size * o.cost(unit) for o in some]) for size, some in pairs]
        losses = [np.array([o.damage for o in some]) for some in options]
        if unit == "sqnr":
            picked = choose(losses, costs, 10 ** (-amount / 10))
        else:
            picked = choose(costs, losses, amount * (sum(sizes) + rest) - rest)
        return [some[i] for some, i in zip(options, picked, strict=True)]

    def timed(self) -> list[Option]:
        """The same, built and timed: corrected for latency, and nothing where it is not faster."""
        unit, amount = self.settings.goal
        wanted, reached, chosen = amount, 1.0, self.chosen(amount)
        for _ in range(ROUNDS):
            reached = self._latency(chosen)
            if unit != "latency" or amount * (1 - 3 * CLOSE) <= reached <= amount * (1 + CLOSE):
                break
            wanted = min(max(wanted * amount / reached, 0.02), 1.0)
            chosen = self.chosen(wanted)
        if reached <= 1:
            return chosen
        self.piece.calibration.notes.append(
            f"nothing is factorized: all together, the factors take {reached:.2f} of the time"
        )
        return [WHOLE for _ in chosen]

    def _latency(self, chosen: Sequence[Option]) -> float:
        """Latency of the model with these options over that without."""
        if all(option.choice is None for option in chosen):
            return 1.0
        self.piece.say("factorize: timing the plan")
        model, _ = _sketched(self.piece, self.free, chosen)
        models = {"before": self.piece.model, "after": model}
        times = time_interleaved(models, dict(self.piece.feed), self.piece.runtime, min_time=0.5)
        return 1 / speedup(times["before"], times["after"]).median


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
        costs = macs_by_node(piece.model)
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
    with threadpool_limits(1, user_api="blas"):  # matrices are small: threads only wait
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
    """Milliseconds of the layers with these options."""
    model, names = _sketched(piece, free, some)
    times = node_times(model, piece.feed, piece.runtime)
    return [sum(times.get(name, 0.0) for name in group) for group in names]


def _sketched(
    piece: Workpiece, free: Sequence[Layer], some: Sequence[Option]
) -> tuple[Model, list[list[str]]]:
    """A model with these options, whose weights mean nothing, and the nodes of each layer."""
    model = copy(piece.model)
    own = {layer.name: layer for layer in layers(model.graph, piece.context)}
    names: list[list[str]] = []
    for layer, option in zip(free, some, strict=True):
        same = own[layer.name]
        made = [] if option.choice is None else put_sketch(model.graph, same, option.choice)
        names.append([node.name for node in (*same.nodes, *made)])
    return model, names


@dataclass(frozen=True)
class Placed:
    """A pass that puts factors found before in place of one layer, of the same name."""

    layer: str
    choice: Choice
    made: Factors
    fitter: Fitter
    name: ClassVar[str] = "placed"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        own = next(x for x in layers(graph, context) if x.name == self.layer)
        return list(put(graph, own, self.choice, self.made, self.fitter))


def _judged(
    piece: Workpiece, free: Sequence[Layer], found: Sequence[Sequence[Option]]
) -> list[list[Option]]:
    """Options with their damage; a structure that does more for what costs no less is out.

    Factors are fitted to one half of the samples and compared with the layer on the other. What an
    error of a layer does to the outputs of the model is measured once for each layer.
    """
    train, held, judge = _halves(piece)
    total, done = sum(map(len, found)), 0
    result: list[list[Option]] = []
    for layer, some in zip(free, found, strict=True):
        fitter, other = Fitter.of(layer, train), Fitter.of(layer, held)
        judged: list[tuple[Option, Factors]] = []
        for option in some:
            piece.say(f"factorize: fitting {done}/{total}")
            done += 1
            assert option.choice is not None
            made = fitter.fit(option.choice)
            judged.append((replace(option, damage=other.error(made)), made))
        scale = 1.0
        if judge is not None and judged:
            scale = _scale(judge, layer, fitter, judged)
        options = (replace(o, damage=min(o.damage * scale, WORST)) for o, _ in judged)
        result.append([WHOLE, *options])
    return result


def _scale(
    judge: Judge, layer: Layer, fitter: Fitter, judged: Sequence[tuple[Option, Factors]]
) -> float:
    """Damage at the outputs of the model for each unit of a layer's error, where it is middling."""
    option, made = sorted(judged, key=lambda pair: pair[0].damage)[len(judged) // 2]
    assert option.choice is not None
    damage = judge.damage(Placed(layer.name, option.choice, made, fitter), {})
    return damage / option.damage if option.damage > 0 else 1.0


def _halves(piece: Workpiece) -> tuple[Context, Context, Judge | None]:
    """Statistics to fit factors to, those to compare them by, and a judge of damage."""
    dataset, known = piece.calibration.dataset, piece.calibration.known
    if dataset is None or len(dataset) < 2 or is_spilling(piece.model.graph):
        stats = {} if known is None else dict(known.stats)
        if dataset is not None:
            stats = gather(piece.model, Factorize(), piece.context, piece.calibration, piece.say)
        context = replace(piece.context, stats=stats)
        return context, context, None
    contexts, halves = [], [dataset.subset(slice(start, None, 2)) for start in range(2)]
    for half in halves:
        calibration = replace(piece.calibration, dataset=half, known=None)
        stats = gather(piece.model, Factorize(), piece.context, calibration, piece.say)
        contexts.append(replace(piece.context, stats=stats))
    samples = few(halves[1])
    return contexts[0], contexts[1], Judge(piece, samples, outputs(piece, samples))
