"""Which layers to leave float in a quantized model: greedily, by what the outputs gain.

From the model with all layers in integers, the layer whose return to float takes most noise for its
price is returned, then the next one beside it, and so on:

    (noise before − noise after) / (share of bytes + share of MACs + BASE)

Only the layers that alone cost most are tried: noises of layers nearly add up. What is worth its
price is the shortest of these lists that brings back SHARE of the decibels that the longest one
does; it is then built as `onnxc quantize` would, beside the model with all in integers, and both
are measured and timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from calib.data import Dataset
from onnxc import search
from onnxc.core import Context, Pass, Stats
from onnxc.graph import Model, copy, opset
from onnxc.harm import Gauge, Harm, gauge
from onnxc.pipeline import compress, gather
from onnxc.report import Kept, Sensitivity
from onnxc.selectors import Selector
from onnxc.sensitivity import (
    All,
    Centre,
    Sensitivities,
    Wanted,
    quantized_trials,
    quantizing,
    run_trials,
)
from onnxc.shapes import infer
from onnxc.workpiece import Workpiece
from passes.absorb_offsets import AbsorbOffsets
from passes.correct_bias import CorrectBias
from passes.equalize import Equalize
from passes.quantize import Quantize

MOST = 5  # layers that are left float
LATE = 0.2  # share of the time for trials that they get in any case, once they begin
GREEDY = 40  # runs to choose the layers that are left float, about
TRIED = 8  # layers that are looked at
BASE = 0.05  # of a price: what is next to nothing is as good as nothing
SHARE = 0.7  # of the decibels that the longest list brings back
LEAST = 0.5  # dB below which a layer brings nothing back


def float_layers(
    piece: Workpiece,
    wanted: Wanted,
    found: Sensitivities,
    share: float,
    deadline: float,
) -> tuple[Kept, ...]:
    """Each layer alone in integers, then all but some; on the model as equalized for it."""
    base = copy(piece.model)
    start = (Equalize(), AbsorbOffsets())
    compress(base, start, piece.context, piece.calibration, piece.feed, piece.say)
    infer(base, piece.feed)
    calibration = replace(piece.calibration, memo={}, notes=[])
    context = replace(piece.context, opset=opset(base.graph))
    level = replace(
        piece,
        model=base,
        context=context,
        calibration=calibration,
        runtime=replace(piece.runtime, rounds=False),
    )
    trials = quantized_trials(level, wanted, {})
    if not trials:
        return ()
    names = tuple(dict.fromkeys(trial.node for trial in trials))
    ways = [Quantize(leave=tuple(n for n in names if n != name)) for name in names]
    wanting: tuple[Pass, ...] = (Quantize(), Centre(wanted.bits), *ways)
    every = All(tuple((way, context) for way in wanting))
    ranges = gather(base, every, context, calibration, piece.say)
    drifts = gather(base, CorrectBias(bits=wanted.bits), context, calibration, piece.say)
    stats = {**ranges, **drifts}
    trials = quantized_trials(level, wanted, stats)
    assert piece.judge is not None
    begun = time.monotonic()
    end = max(deadline - share, begun + LATE * share)
    meter = gauge(level, piece.judge, len(trials) + GREEDY, end - begun)
    found.count(len(meter.samples), len(piece.judge))
    run_trials(base, trials, meter, end, found)
    prices = candidates(found.found)
    end = max(deadline, time.monotonic() + LATE * share)
    return greedy(level, stats, prices, meter, wanted.bits, end)


def nodes_to_keep(piece: Workpiece, most: int) -> tuple[str, ...]:
    """At most so many nodes that a quantized model should leave float; what is seen is kept."""

    def tried() -> tuple[Kept, ...]:
        wanted = Wanted(what=("both",), passes=("quantize",))
        deadline = time.monotonic() + piece.patience
        return float_layers(piece, wanted, Sensitivities(), 0.3 * piece.patience, deadline)

    found = piece.once("float layers", tried)
    return max((kept.nodes for kept in found if len(kept.nodes) <= most), key=len, default=())


def candidates(found: Sequence[Sensitivity]) -> dict[str, float]:
    """The layers that lose most when they alone are quantized, each with its price."""
    worst: dict[str, Sensitivity] = {}
    for one in sorted(found, key=lambda s: (s.what != "both", s.sqnr)):
        worst.setdefault(one.node, one)
    some = sorted(worst.values(), key=lambda s: s.sqnr)[:TRIED]
    return {s.node: 10 ** (-s.sqnr / 10) / s.cost if s.cost > 0 else 1.0 for s in some}


def greedy(
    piece: Workpiece,
    stats: Stats,
    prices: Mapping[str, float],
    meter: Gauge,
    bits: int,
    deadline: float,
) -> tuple[Kept, ...]:
    """The model with no layer float, with one, with two, …, as measured."""

    def left(nodes: tuple[str, ...]) -> Harm:
        changed = copy(piece.model)
        edit = quantizing(frozenset(nodes), "both", bits, piece.context, stats, together=True)
        edit(changed.graph)
        return meter.of(changed)

    last = left(())
    found = [Kept((), last.sqnr, _agreement(last))]
    chosen: tuple[str, ...] = ()
    for _ in range(min(MOST, len(prices) - 1)):
        if time.monotonic() > deadline:
            break
        piece.say(f"analyze: leaving layers float {len(chosen)}/{MOST}")
        tried = {name: left((*chosen, name)) for name in prices if name not in chosen}
        gains = {n: (last.noise - t.noise) / (prices[n] + BASE) for n, t in tried.items()}
        best = max(gains, key=lambda name: gains[name])
        if gains[best] <= 0:
            break
        chosen, last = (*chosen, best), tried[best]
        found.append(Kept(chosen, last.sqnr, _agreement(last)))
    return tuple(found)


def _agreement(lost: Harm) -> float | None:
    return None if lost.loss is None else 1 - lost.loss


def worth(found: Sequence[Kept]) -> tuple[str, ...]:
    """The nodes that are worth leaving float; empty where none is."""
    if not found:
        return ()
    start, most = found[0].sqnr, max(kept.sqnr for kept in found)
    if most - start < LEAST:
        return ()
    bar = start + SHARE * (most - start)
    return next(kept.nodes for kept in found if kept.sqnr >= bar)


def proven(
    original: Model, piece: Workpiece, names: tuple[str, ...], judge: Dataset
) -> tuple[Kept, Kept | None]:
    """The model quantized as `onnxc quantize` does it, without and with these nodes left float."""
    plans = {"all": piece.context}
    if names:
        only = Selector(exclude=names).resolve(piece.model.graph)
        barred = only.barred | piece.context.only.barred
        pinned = only.pinned | piece.context.only.pinned
        plans["kept"] = replace(piece.context, only=Selector(barred=barred, pinned=pinned))
    built = {name: _built(piece, context) for name, context in plans.items()}
    trials, _ = search.trials(original, built, judge, piece.runtime)
    nodes = {"all": (), "kept": names}
    found = {trial.name: _kept(trial, nodes[trial.name]) for trial in trials}
    return found["all"], found.get("kept")


def _built(piece: Workpiece, context: Context) -> search.Built:
    """By the way that is tried first, with statistics of its own."""
    ways = search.candidates(piece.model, context, "auto", has_data=piece.has_data)
    name = "static" if "static" in ways else next(iter(ways))
    calibration = replace(piece.calibration, memo={}, notes=[])
    built = search.build(
        piece.model, {name: ways[name]}, context, calibration, piece.feed, piece.say
    )
    return built[name]


def _kept(trial: search.Trial, nodes: tuple[str, ...]) -> Kept:
    comparison = trial.comparison
    top1 = None if comparison.top1 is None else comparison.top1[1]
    return Kept(
        *(nodes, comparison.sqnr, comparison.agreement, top1, trial.size, trial.ratio),
    )
