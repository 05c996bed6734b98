"""What the outputs of a model lose when one thing is done to one layer, all others untouched.

All is measured on the same samples, that no statistic saw, with the same statistics for all layers.
What a thing costs is its noise (`onnxc.harm`) for each share of the model that it gains:

    cost = noise / (bytes saved / bytes of all weights + MACs gained / all MACs)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.biases import has_place, shift_bias
from onnxc.core import Change, Context, Key, Pass, Skip, Stats
from onnxc.cost import free_dimensions
from onnxc.graph import Model, copy, nbytes, values
from onnxc.harm import Gauge, Harm
from onnxc.integer import round_weights, rounded, weighted_nodes
from onnxc.macs import macs
from onnxc.moments import matrix, mean_output
from onnxc.ops import knowledge, weight_of
from onnxc.pipeline import PASS_ERRORS, PREPARED, gather
from onnxc.report import Sensitivity
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.workpiece import Workpiece
from passes.cluster import Cluster
from passes.correct_bias import CorrectBias
from passes.factorize import Factorize
from passes.prune import Prune, parts
from passes.quantize import Quantize
from passes.shrink import Shrink

What = Literal["weights", "activations", "both"]
WHATS: tuple[What, ...] = ("weights", "activations", "both")
OTHERS: dict[str, str] = {
    "prune": "25 % of channels out",
    "factorize": "factors, half the MACs",
    "cluster": "4-bit codebook",
}
PRUNED = 0.25  # of the channels of a group
CODE = 4  # bits of a clustered weight


@dataclass(frozen=True)
class Wanted:
    """What is to be tried. passes: "quantize" and those of OTHERS. bits: of the weights."""

    what: tuple[What, ...] = WHATS
    passes: tuple[str, ...] = ("quantize", *OTHERS)
    bits: int = 8


@dataclass(frozen=True)
class All:
    """What several passes want, gathered at once."""

    wanting: tuple[tuple[Pass, Context], ...]
    name: ClassVar[str] = "analyze"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return dict.fromkeys(k for pass_, seen in self.wanting for k in pass_.wants(graph, seen))

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        return []


Edit = Callable[[gs.Graph], list[Change | Skip]]


@dataclass(frozen=True)
class Trial:
    """One thing to do to one layer. saved: bytes, and macs: those gained, None where the changed
    graph tells."""

    node: str
    op: str
    what: str
    edit: Edit
    saved: int | None = None
    macs: int | None = None


@dataclass
class Sensitivities:
    """Trials on a model, what they showed, and what was left out with reasons."""

    found: list[Sensitivity] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, used: int, there: int, what: str = "") -> None:
        """Take note of how many samples judged trials."""
        if used < there:
            self.notes.append(
                f"trials{what} were judged by {used} of the {there} samples, to be done in time: "
                "more --seconds take more"
            )

    @property
    def ranked(self) -> tuple[Sensitivity, ...]:
        """The highest cost first."""
        return tuple(sorted(self.found, key=lambda s: (-s.cost, s.node, s.what)))


def quantized_trials(piece: Workpiece, wanted: Wanted, stats: Stats) -> list[Trial]:
    """Both weights and activations of each layer in integers, then one of them alone."""
    graph, free = piece.model.graph, free_dimensions(piece.model.graph)
    heavy = list(weighted_nodes(graph, piece.context))
    names = frozenset(node.name for node in heavy)
    found = []
    for what in sorted(wanted.what, key=WHATS.index, reverse=True):
        for node in heavy:
            weight = weight_of(node)
            assert weight is not None
            saved = nbytes(weight) * (32 - wanted.bits) // 32
            edit = quantizing(names - {node.name}, what, wanted.bits, piece.context, stats)
            work = 0 if what == "weights" else macs(node, free) or 0
            kept = 0 if what == "activations" else saved
            found.append(Trial(node.name, node.op, what, edit, kept, work))
    return found


def quantizing(
    left: frozenset[str],
    what: What,
    bits: int,
    context: Context,
    stats: Stats,
    together: bool = False,
) -> Edit:
    """Put all heavy nodes but those on integers, weights by their values; biases make up for it.

    together: by drifts that were measured with all layers before on integers, too.
    """
    only = replace(context.only, barred=context.only.barred | left)
    seen = replace(context, stats=stats, only=only)

    def edit(graph: gs.Graph) -> list[Change | Skip]:
        results: list[Change | Skip] = []
        if what != "activations":
            centring: Pass = CorrectBias(bits=bits) if together else Centre(bits)
            centring.apply(graph, seen)
            nodes = [node.name for node in weighted_nodes(graph, seen)]
            round_weights(graph, seen, bits=bits)
            results += [Change(name, "rounded") for name in nodes]
        if what != "weights":
            quantize = Quantize(leave=tuple(sorted(left)), weights=False)
            results += quantize.apply(graph, replace(context, stats=stats))
        return results

    return edit


@dataclass(frozen=True)
class Centre:
    """Let biases make up for what rounding the weights does to the means of single layers.

        b <- b + (W − Ŵ) E[x]

    What a convolution pads is not looked at.
    """

    bits: int = 8
    name: ClassVar[str] = "centre"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return [_mean_key(node) for node in weighted_nodes(graph, context) if has_place(node)]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        for node in [n for n in weighted_nodes(graph, context) if has_place(n)]:
            found, weight = context.stats.get(_mean_key(node)), weight_of(node)
            window = knowledge(node).window
            if found is None or weight is None or window is None:
                continue
            W = values(weight).astype(np.float64)
            lost = W - rounded(node, values(weight), context, self.bits, False)
            groups = window(node).groups
            mean = np.asarray(found.total / max(found.count, 1)).reshape(groups, -1)
            width = matrix(node, W).shape[2] // mean.shape[1]
            shift = mean_output(node, lost, np.repeat(mean, width, axis=1))
            shift_bias(graph, node, shift, "centred")
        return []


def _mean_key(node: gs.Node) -> Key:
    axis = knowledge(node).x_axis
    return Key(node.inputs[0].name, "mean", 1 if axis is None else axis(node))


def other_trials(piece: Workpiece, wanted: Wanted) -> tuple[list[Trial], list[Skip]]:
    """Each other pass on each layer, or group of layers, that it is for."""
    stats = _gathered(piece, wanted)
    trials: list[Trial] = []
    skips: list[Skip] = []
    if "prune" in wanted.passes:
        for part in parts(piece.model.graph, piece.context):
            count = round(PRUNED * len(part.group.channels))
            if part.obstacle or not count:
                skips.append(Skip(part.name, f"not pruned: {part.obstacle or 'too few channels'}"))
                continue
            prune = Prune(ratio=0.0, remove=(f"{part.name}={count}",))
            seen = replace(piece.context, stats=stats)
            trials.append(_trial(piece, part.name, "prune", (prune, Shrink()), seen))
    for name in (n for n in ("factorize", "cluster") if n in wanted.passes):
        for node in weighted_nodes(piece.model.graph, piece.context):
            alone = replace(piece.context, stats=stats, only=Selector(include=(node.name,)))
            trials.append(_trial(piece, node.name, name, (PASSES[name],), alone))
    return trials, skips


PASSES: dict[str, Pass] = {
    "prune": Prune(ratio=PRUNED),
    "factorize": Factorize(macs=0.5),
    "cluster": Cluster(bits=CODE, reconstruct=False),
}


def _gathered(piece: Workpiece, wanted: Wanted) -> Stats:
    rows = [PASSES[name] for name in wanted.passes if name in PASSES]
    if not rows:
        return {}
    every = All(tuple((row, piece.context) for row in rows))
    return gather(piece.model, every, piece.context, piece.calibration, piece.say, PREPARED)


def _trial(piece: Workpiece, name: str, what: str, done: Sequence[Pass], context: Context) -> Trial:
    node = next((n for n in piece.model.graph.nodes if n.name == name), None)
    saved = None
    if what == "cluster" and node is not None and (weight := weight_of(node)) is not None:
        saved = nbytes(weight) * (32 - CODE) // 32

    def edit(graph: gs.Graph) -> list[Change | Skip]:
        return [result for pass_ in done for result in pass_.apply(graph, context)]

    return Trial(name, "" if node is None else node.op, what, edit, saved)


def run_trials(
    model: Model, trials: Sequence[Trial], meter: Gauge, deadline: float, into: Sensitivities
) -> None:
    """Carry trials out one by one, until time is up. deadline: of `time.monotonic`."""
    total = _Total.of(model)
    for number, trial in enumerate(trials):
        meter.piece.say(f"analyze: trying layers {number}/{len(trials)}")
        if time.monotonic() > deadline:
            left = len(trials) - number
            into.notes.append(f"{left} of {len(trials)} trials were left out: time was up")
            return
        changed = copy(model)
        try:
            results = trial.edit(changed.graph)
            changes = [r for r in results if isinstance(r, Change)]
            if not changes:
                into.skips += _reasons(trial, results)
                continue
            into.found.append(_told(trial, changed, meter.of(changed), total))
        except PASS_ERRORS as error:
            into.skips.append(Skip(trial.node, f"{trial.what} was not tried: {_line(error)}"))


def _reasons(trial: Trial, results: Sequence[Change | Skip]) -> list[Skip]:
    mine = [r for r in results if isinstance(r, Skip) and r.node == trial.node]
    return [Skip(trial.node, f"{trial.what}: {skip.reason}") for skip in mine[:1]]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _Total:
    """Bytes of the weights and MACs of a model."""

    bytes: int
    macs: int

    @classmethod
    def of(cls, model: Model) -> _Total:
        graph, free = model.graph, free_dimensions(model.graph)
        sizes = {id(w): nbytes(w) for n in graph.nodes if (w := weight_of(n)) is not None}
        return cls(sum(sizes.values()), sum(macs(n, free) or 0 for n in graph.nodes))


def _told(trial: Trial, changed: Model, lost: Harm, total: _Total) -> Sensitivity:
    saved, work = trial.saved, trial.macs or 0
    if saved is None:
        infer(changed)
        left = _Total.of(changed)
        saved, work = total.bytes - left.bytes, max(total.macs - left.macs, 0)
    gain = saved / max(total.bytes, 1) + work / max(total.macs, 1)
    cost = lost.noise / max(gain, 1e-9)
    return Sensitivity(trial.node, trial.op, trial.what, lost.sqnr, lost.loss, saved, work, cost)
