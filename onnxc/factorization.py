"""What `onnxc factorize` may be asked for, and the passes that do it.

    alternatives of each layer (`onnxc.lowrank.alternatives`) -> one of each under the budget ->
    time the whole -> factorize, reconstruct

Ranks are chosen here and stand in the recipe, for times of nodes never repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from onnxc.bench import speedup, time_interleaved
from onnxc.core import Pass
from onnxc.cost import macs_by_node
from onnxc.errors import OptionError
from onnxc.lowrank.alternatives import MARGIN, SHARES, WHOLE, Alternative, Options, Trial, sketched
from onnxc.lowrank.layers import Layer, find_layers
from onnxc.numerics.choices import choose
from onnxc.workpiece import Workpiece
from passes.factorize import Factorize, Method
from passes.reconstruct import Reconstruct

DEFAULT = 0.75  # of the MACs, where nothing is asked for
ROUNDS = 5  # of a plan for latency, each corrected by what the last one measured
CLOSE = 0.02  # of the latency that was asked for
CLOSE_DB = 1.0  # above the SQNR that was asked for
LOOSE, LATE = 1.01, 1.1  # of a budget: how much more of MACs or weights, and of latency, is no miss
UNITS = ("macs", "params", "latency", "sqnr")
NAMES = {"macs": "MACs", "params": "weights", "latency": "latency"}


@dataclass(frozen=True)
class FactorizeSettings:
    """How to factorize; the options of `onnxc factorize` besides data, target and nodes.

    method: the structure of the factors; auto tries all and keeps what is best for each layer.
    macs: share of the multiply-accumulates that stays; 0.75 where nothing is asked for.
    params: share of the weights that stays.
    latency: share of the latency that stays, by the time that each layer takes here.
    sqnr: dB that the outputs keep; as much goes as that allows.
    rank: a rule for each layer in place of a budget: energy:SHARE, sqnr:DB or vbmf.
    ranks: of which node, as NODE=METHOD:RANK or NODE=METHOD:RANKxRANK, in place of a budget.
    allocation: whether layers share the loss so that it hurts least, or all lose the same share.
    faster: whether layers whose factors are not faster here stay whole; by default that is so
    unless each layer is told what to become, by ranks or by a uniform share of one method.
    reconstruct: whether layers are refit to the original's outputs, one after the other.
    nonlinear: whether the ReLU behind a layer is looked at when it is refit.
    """

    method: Method = "auto"
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    sqnr: float | None = None
    rank: str = ""
    ranks: tuple[str, ...] = ()
    allocation: Literal["global", "uniform"] = "global"
    faster: bool | None = None
    reconstruct: bool = True
    nonlinear: bool = False

    def __post_init__(self) -> None:
        given = [n for n in UNITS if getattr(self, n) is not None]
        given += [n for n in ("rank", "ranks") if getattr(self, n)]
        if len(given) > 1:
            every = f"{', '.join(UNITS)}, rank and ranks"
            raise OptionError(f"give one of {every}, not {' and '.join(given)}")
        for name in given:
            if name in NAMES and not 0 < getattr(self, name) < 1:
                raise OptionError(f"{name} is a share between 0 and 1, not {getattr(self, name):g}")
        if self.allocation == "uniform" and not {"latency", "sqnr", "rank"}.isdisjoint(given):
            raise OptionError(f"uniform allocation is of macs or params, not of {given[0]}")
        Factorize(ranks=self.ranks, rank=self.rank)

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
    def is_told(self) -> bool:
        """Whether each layer is told what to become, and nothing is left to onnxc."""
        is_same = self.allocation == "uniform" and self.goal[0] == "macs"
        return bool(self.ranks) or (is_same and self.method != "auto")

    @property
    def wants_speed(self) -> bool:
        return not self.is_told if self.faster is None else self.faster

    @property
    def summary(self) -> str:
        if self.ranks:
            return f"ranks of {len(self.ranks)} layers"
        if self.rank:
            return f"ranks by {self.rank}, {self.method}"
        unit, amount = self.goal
        what = f"{amount:g} dB" if unit == "sqnr" else f"{100 * amount:g} % of the {NAMES[unit]}"
        return f"{what}, {self.allocation}, {self.method}"


def ways(settings: FactorizeSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what stays and how it was allocated."""
    factorize = _planned(settings, piece)
    refit: tuple[Pass, ...] = (
        (Reconstruct(nonlinear=settings.nonlinear),) if settings.reconstruct else ()
    )
    return {settings.summary: (factorize, *refit)}


def missed(settings: FactorizeSettings, found: Any) -> tuple[str, ...]:
    """A sentence for the budget that was asked for and is not met."""
    if settings.ranks or settings.rank or settings.allocation == "uniform":
        return ()
    unit, amount = settings.goal
    if getattr(settings, unit) is None:
        return ()
    before, after = found.macs
    if unit == "macs" and before and after and after > amount * before * LOOSE:
        return (_more(unit, after / before, amount, settings),)
    if unit == "latency" and found.ratio is not None and 1 / found.ratio.median > amount * LATE:
        return (_more(unit, 1 / found.ratio.median, amount, settings),)
    if unit == "sqnr" and found.comparison.sqnr < amount:
        return (f"the outputs keep {found.comparison.sqnr:.1f} dB, not {amount:g}",)
    return ()


def _more(unit: str, left: float, asked: float, settings: FactorizeSettings) -> str:
    said = f"{left:.0%} of the {NAMES[unit]} stays, more than the {asked:.0%} asked for"
    return f"{said} (--no-faster takes slow layers too)" if settings.wants_speed else said


def _planned(settings: FactorizeSettings, piece: Workpiece) -> Factorize:
    """The pass with ranks for the layers that change, and reasons for those that do not."""
    free = [x for x in find_layers(piece.model.graph, piece.context) if not x.obstacle]
    if not piece.has_data and free:
        piece.calibration.notes.append(
            "factors are fitted to the weights alone, without data: expect several times the error"
        )
    unit, amount = settings.goal
    if settings.ranks:
        return Factorize(settings.method, macs=0.0, ranks=settings.ranks)
    shares = (amount,) if settings.allocation == "uniform" else SHARES
    given = Factorize(settings.method, max(shares), settings.rank)
    is_plain = bool(settings.rank) or settings.is_told
    if (is_plain and not settings.wants_speed) or not free:
        return given
    trial = Trial(piece, free, given, shares, unit, settings.wants_speed)
    key = ("alternatives", given, unit, settings.wants_speed)
    plan = Plan(settings, trial, piece.once(key, trial.options))
    return plan.decided(plan.faster() if settings.wants_speed else plan.settled())


@dataclass(frozen=True)
class Plan:
    """What is asked for, and what may become of each layer that is free."""

    settings: FactorizeSettings
    trial: Trial
    options: Sequence[Options]

    def decided(self, chosen: Sequence[Alternative]) -> Factorize:
        """The pass that does it. What a layer stays whole for is said of each."""
        pairs = list(zip(self.options, chosen, strict=True))
        ranks = (f"{o.layer.name}={a.choice}" for o, a in pairs if a.choice is not None)
        left = [(o.layer.name, o.why) for o, a in pairs if a.choice is None]
        rest = "stays whole: the budget is met without it"
        if all(a.choice is None for a in chosen):
            rest = "stays whole: all together, factors are not faster here"
        whole = (f"{name}={why or rest}" for name, why in left)
        return Factorize(self.settings.method, macs=0.0, ranks=tuple(ranks), whole=tuple(whole))

    def chosen(self, amount: float) -> list[Alternative]:
        """One alternative of each layer, for that much of the unit of the budget."""
        unit, options = self.settings.goal[0], [o.alternatives for o in self.options]
        rule = self.trial.factorize.rule
        if rule is not None and rule.bounds_error:
            return [
                min(some[1:], key=lambda a: (a.time, a.macs), default=WHOLE) for some in options
            ]
        if rule is not None or self.settings.allocation == "uniform":
            return [min(some[1:], key=lambda a: a.damage, default=WHOLE) for some in options]
        sizes, rest = self.sizes
        pairs = zip(sizes, options, strict=True)
        costs = [np.array([size * a.cost(unit) for a in some]) for size, some in pairs]
        losses = [np.array([a.damage for a in some]) for some in options]
        if unit == "sqnr":
            picked = choose(losses, costs, 10 ** (-amount / 10))
        else:
            picked = choose(costs, losses, amount * (sum(sizes) + rest) - rest)
        return [some[i] for some, i in zip(options, picked, strict=True)]

    def settled(self) -> list[Alternative]:
        """The same for what was asked: corrected by what the whole model then takes or keeps."""
        unit, amount = self.settings.goal
        wanted, chosen = amount, self.chosen(amount)
        for _ in range(ROUNDS):
            if unit == "latency":
                reached = self._latency(chosen)
                if amount * (1 - 3 * CLOSE) <= reached <= amount * (1 + CLOSE):
                    break
                wanted = min(max(wanted * amount / reached, 0.02), 1.0)
            elif unit == "sqnr":
                reached = -10 * np.log10(max(self.trial.noise(chosen), 1e-20))
                if amount <= reached <= amount + CLOSE_DB:
                    break
                wanted += amount + CLOSE_DB / 2 - reached
            else:
                break
            chosen = self.chosen(wanted)
        return chosen

    def faster(self) -> list[Alternative]:
        """The same, or nothing where all together are not faster."""
        chosen = self.settled()
        if all(a.choice is None for a in chosen):
            return chosen
        reached = self._latency(chosen)
        if reached > MARGIN:  # on a busy machine one of three is often wrong
            reached = sorted((reached, self._latency(chosen), self._latency(chosen)))[1]
        if reached <= MARGIN:
            return chosen
        self.trial.piece.calibration.notes.append(
            f"nothing is factorized: all together, the factors take {reached:.2f} of the time"
        )
        return [WHOLE for _ in chosen]

    def _latency(self, chosen: Sequence[Alternative]) -> float:
        """Latency of the model with these alternatives over that without."""
        if all(a.choice is None for a in chosen):
            return 1.0
        piece = self.trial.piece
        piece.say("factorize: timing the plan")
        model, _ = sketched(piece, self.trial.free, chosen)
        models = {"before": piece.model, "after": model}
        times = time_interleaved(models, dict(piece.feed), piece.runtime, min_time=0.5)
        return 1 / speedup(times["before"], times["after"]).median

    @cached_property
    def sizes(self) -> tuple[list[float], float]:
        """What each layer costs in the unit, and all the rest of the graph."""
        return _sizes(self.settings.goal[0], self.trial.piece, self.trial.free)


def _cheapness(one: Alternative) -> tuple[float, float]:
    return one.time, one.macs


def _sizes(unit: str, piece: Workpiece, free: Sequence[Layer]) -> tuple[list[float], float]:
    """What each layer costs in a unit, and all the rest of the graph."""
    graph = piece.model.graph
    if unit == "params":
        sizes = [float(np.prod(layer.shape)) for layer in free]
        heavy = (layer for layer in find_layers(graph, piece.context) if layer.obstacle)
        return sizes, float(sum(layer.size for layer in heavy))
    if unit == "latency":
        costs: Mapping[str, float] = piece.times.of(piece.model, piece.feed, piece.runtime)
    else:
        costs = macs_by_node(piece.model)
    sizes = [sum(costs.get(node.name, 0.0) for node in layer.nodes) for layer in free]
    return sizes, sum(costs.values()) - sum(sizes)
