"""What may become of each layer: thinner layers of some ranks, with their costs and their damage.

    time the structures of each layer -> drop what is not faster -> measure the damage of the rest

Factors are fitted to one half of the samples, their damage is measured on the other, so that a
structure with more freedom is not the better one for that alone. What an error of a layer does to
the outputs of the model is measured once for each layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from onnxc.core import Change, Context, Key, Skip
from onnxc.damage import WORST, Judge, affordable, outputs
from onnxc.graph import Model, copy, is_spilling
from onnxc.lowrank.fitter import Fitter
from onnxc.lowrank.layers import Layer, find_layers
from onnxc.numerics import lowrank
from onnxc.numerics.lowrank import Factors
from onnxc.pipeline import few, gather
from onnxc.profile import node_times
from onnxc.workpiece import Workpiece
from passes.factorize import Choice, Factorize, put, put_sketch

SHARES = (0.75, 0.5, 0.3)  # of a layer's cost, at which structures are tried
MARGIN = 0.97  # of a layer's time: what its factors may take to count as faster


@dataclass(frozen=True)
class Alternative:
    """One of a layer: costs relative to it, and damage. choice: None for the layer as it is."""

    choice: Choice | None = None
    macs: float = 1.0
    params: float = 1.0
    time: float = 1.0
    damage: float = 0.0

    def cost(self, unit: str) -> float:
        return {"params": self.params, "latency": self.time}.get(unit, self.macs)


WHOLE = Alternative()


@dataclass(frozen=True)
class Options:
    """The alternatives of one layer; the first is the layer itself. why: there are no others."""

    layer: Layer
    alternatives: tuple[Alternative, ...] = (WHOLE,)
    why: str = ""


@dataclass(frozen=True)
class Trial:
    """What is to be tried on the layers of a model that are free.

    factorize: the method, and the rule for ranks if there is one. shares: of each layer's cost in a
    unit, at which structures are tried without one. is_timed: what is not faster is dropped.
    """

    piece: Workpiece
    free: Sequence[Layer]
    factorize: Factorize
    shares: Sequence[float] = SHARES
    unit: str = "macs"
    is_timed: bool = True
    halves: list[tuple[Context, Context, Judge | None]] = field(default_factory=list)

    def options(self) -> list[Options]:
        """The alternatives of each layer, with what they cost and what they do."""
        with threadpool_limits(1, user_api="blas"):  # matrices are small: threads only wait
            found = [self._proposed(layer) for layer in self.free]
            if self.is_timed:
                found = _timed(self.piece, found)
            return self._all_judged(found)

    def _proposed(self, layer: Layer) -> Options:
        """The structures for a layer, near some shares of its cost or as the rule has them."""
        found = [WHOLE]
        for choice in dict.fromkeys(self._choices(layer)):
            macs = lowrank.macs(choice.method, layer.shape, choice.ranks, layer.strides)
            params = lowrank.parameters(choice.method, layer.shape, choice.ranks)
            found.append(Alternative(choice, macs, params))
        why = "" if len(found) > 1 else self.factorize.why_none(layer)
        return Options(layer, tuple(found), why)

    def _choices(self, layer: Layer) -> Iterable[Choice]:
        multiple = self.piece.context.target.channels
        if self.factorize.rule is not None:
            train = self._halves()[0]
            yield from self.factorize.tried(layer, train, Fitter.of(layer, train))
            return
        for name in self.factorize.methods(layer):
            for share in self.shares:
                fixed = (layer.strides, multiple, self.unit)
                ranks = lowrank.pick(name, layer.shape, share, *fixed)
                if ranks:
                    yield Choice(name, ranks)

    def _all_judged(self, found: Sequence[Options]) -> list[Options]:
        """The same with damage, that of the largest layers first."""
        several = [i for i, options in enumerate(found) if len(options.alternatives) > 1]
        if not several:
            return list(found)
        scales, judged = Scales(self._halves()[2]), list(found)
        for index in sorted(several, key=lambda i: -math.prod(found[i].layer.shape)):
            judged[index] = self._judged(found[index], scales)
        if scales.untold:
            self.piece.calibration.notes.append(
                f"{scales.untold} of {len(several)} layers were not tried in the model, which is "
                "slow: their damage was taken to reach its outputs as that of the others does"
            )
        return judged

    def _judged(self, options: Options, scales: Scales) -> Options:
        """On the half that factors were not fitted to, at the outputs."""
        train, held, _ = self._halves()
        layer, some = options.layer, options.alternatives[1:]
        self.piece.say(f"factorize: fitting {layer.name}")
        fitter, other = Fitter.of(layer, train), Fitter.of(layer, held)
        judged: list[tuple[Alternative, Factors]] = []
        for one in some:
            assert one.choice is not None
            made = fitter.fit(one.choice.method, one.choice.ranks)
            judged.append((replace(one, damage=other.error(made)), made))
        scale = scales.of(layer, fitter, judged)
        found = (replace(one, damage=min(one.damage * scale, WORST)) for one, _ in judged)
        return replace(options, alternatives=(WHOLE, *found))

    def noise(self, chosen: Sequence[Alternative]) -> float:
        """E‖y − ŷ‖² / E‖y‖² of the outputs with these alternatives; 0 where nothing can tell."""
        train, _, judge = self._halves()
        if judge is None:
            return 0.0
        placed = []
        for layer, one in zip(self.free, chosen, strict=True):
            if one.choice is not None:
                fitter = Fitter.of(layer, train)
                made = fitter.fit(one.choice.method, one.choice.ranks)
                placed.append(Placed(layer.name, one.choice, made, fitter))
        return replace(judge, is_noise=True).damage(Together(tuple(placed)), {})

    def _halves(self) -> tuple[Context, Context, Judge | None]:
        if not self.halves:
            self.halves.append(halves(self.piece, len(self.free), self.unit == "sqnr"))
        return self.halves[0]


def halves(piece: Workpiece, layers: int, is_noise: bool) -> tuple[Context, Context, Judge | None]:
    """Statistics to fit factors to, those to compare them by, and a judge of damage.

    layers: how many will be judged.
    """
    dataset, known = piece.calibration.dataset, piece.calibration.known
    if dataset is None or len(dataset) < 2 or is_spilling(piece.model.graph):
        stats = {} if known is None else dict(known.stats)
        if dataset is not None:
            stats = gather(piece.model, Factorize(), piece.context, piece.calibration, piece.say)
        context = replace(piece.context, stats=stats)
        return context, context, None
    contexts, parts = [], [dataset.subset(slice(start, None, 2)) for start in range(2)]
    for part in parts:
        calibration = replace(piece.calibration, dataset=part, known=None)
        stats = gather(piece.model, Factorize(), piece.context, calibration, piece.say)
        contexts.append(replace(piece.context, stats=stats))
    samples = affordable(piece, few(parts[1]), layers)
    return contexts[0], contexts[1], Judge(piece, samples, outputs(piece, samples), is_noise)


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
        own = next(x for x in find_layers(graph, context) if x.name == self.layer)
        return list(put(graph, own, self.choice, self.made, self.fitter))


@dataclass(frozen=True)
class Together:
    """Several passes as one."""

    parts: Sequence[Placed]
    name: ClassVar[str] = "together"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return [result for part in self.parts for result in part.apply(graph, context)]


@dataclass
class Scales:
    """Damage at the outputs of the model for each unit of a layer's error.

    When the patience of the piece is over, it is no longer measured, but what it was for the others
    on average. known: what was measured. untold: how often it was not.
    """

    judge: Judge | None
    start: float = field(default_factory=time.perf_counter)
    known: list[float] = field(default_factory=list)
    untold: int = 0

    def of(
        self, layer: Layer, fitter: Fitter, judged: Sequence[tuple[Alternative, Factors]]
    ) -> float:
        """That of one layer, where its alternatives do middling damage."""
        if self.judge is None:
            return 1.0
        if self.known and time.perf_counter() - self.start > self.judge.piece.patience:
            self.untold += 1
            return math.exp(sum(map(math.log, self.known)) / len(self.known))
        one, made = sorted(judged, key=lambda pair: pair[0].damage)[len(judged) // 2]
        assert one.choice is not None
        damage = self.judge.damage(Placed(layer.name, one.choice, made, fitter), {})
        if damage > 0 and one.damage > 0:
            self.known.append(damage / one.damage)
        return damage / one.damage if one.damage > 0 else 1.0


def sketched(
    piece: Workpiece, free: Sequence[Layer], some: Sequence[Alternative]
) -> tuple[Model, list[list[str]]]:
    """A model with one alternative for each layer, whose weights mean nothing, to be timed.

    With the nodes of each layer.
    """
    model = copy(piece.model)
    own = {layer.name: layer for layer in find_layers(model.graph, piece.context)}
    names: list[list[str]] = []
    for layer, one in zip(free, some, strict=True):
        same = own[layer.name]
        made = [] if one.choice is None else put_sketch(model.graph, same, one.choice)
        names.append([node.name for node in (*same.nodes, *made)])
    return model, names


def _timed(piece: Workpiece, found: Sequence[Options]) -> list[Options]:
    """The alternatives that are faster than the layer, with their times relative to it.

    All layers take their first one, are timed together, take their second one, and so on.
    """
    free = [options.layer for options in found]
    kept: list[list[Alternative]] = [[WHOLE] for _ in free]
    fastest = [float("inf") for _ in free]
    rounds = max((len(options.alternatives) for options in found), default=1)
    for number in range(1, rounds):
        piece.say(f"factorize: timing {number}/{rounds - 1}")
        before = node_times(piece.model, piece.feed, piece.runtime)
        some = [_at(options.alternatives, number) for options in found]
        times = _times(piece, free, some)
        for index, (layer, one) in enumerate(zip(free, some, strict=True)):
            whole = sum(before.get(node.name, 0.0) for node in layer.nodes)
            share = times[index] / whole if whole > 0 else 1.0
            if one.choice is None:
                continue
            fastest[index] = min(fastest[index], share)
            if share <= MARGIN:
                kept[index].append(replace(one, time=share))
    return [
        replace(options, alternatives=tuple(left), why=options.why or _slow(left, best))
        for options, left, best in zip(found, kept, fastest, strict=True)
    ]


def _at(some: Sequence[Alternative], number: int) -> Alternative:
    return some[number] if number < len(some) else WHOLE


def _slow(left: Sequence[Alternative], fastest: float) -> str:
    if len(left) > 1:
        return ""
    return f"stays whole: no factors of it are faster here, the best take {fastest:.2f} of its time"


def _times(piece: Workpiece, free: Sequence[Layer], some: Sequence[Alternative]) -> list[float]:
    """Milliseconds of the layers with these alternatives."""
    model, names = sketched(piece, free, some)
    times = node_times(model, piece.feed, piece.runtime)
    return [sum(times.get(name, 0.0) for name in group) for group in names]
