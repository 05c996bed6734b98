"""What it costs at the outputs of a model to take channels out of each of its groups.

For each group and a few counts k the model is built without the first k channels that a criterion
names, the weights that read the others updated, and run on samples that no statistic saw (those
that weights were fitted to would call every fit a good one):

    D(k) = mean over outputs of  E KL(softmax y ‖ softmax ŷ)        of (N, classes)
                                 E‖y − ŷ‖² / E‖y − E[y]‖²           of other floats

Between them, curves have the shape of the error at the group's own readers. A group that the
network hardly feels may have a large error there, and the other way round: on ResNet-20, allocation
by measured damage keeps 1.3 points more than by the readers' errors, and on SqueezeNet the
divergence of classes 2 points more than squared errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.data import Dataset
from calib.inputs import fixed_batch
from onnxc.channels.criteria import View, rank
from onnxc.core import Change, Context, Key, Pass, Skip
from onnxc.errors import ModelError
from onnxc.graph import copy, is_spilling, runnable
from onnxc.matrices import Layer, layers, put
from onnxc.numerics.allocation import Curve, through
from onnxc.runtime import run, session
from onnxc.workpiece import Workpiece
from passes.prune import Part, Prune

Array = NDArray[Any]
Outputs = list[dict[str, Array]]

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of a group's channels, at which damage is measured
MOST = 0.75  # of a group's channels that may go
FEWEST = 2  # samples in each run, whatever that takes
BATCH = 16  # samples in a run, where the model takes them
FEW = 1e-9  # of the power of a layer's outputs: nothing
MOST_FELT = 1e3  # of g: a layer with next to no error tells nothing
WORST = 10.0  # damage beyond which it makes no difference


@dataclass(frozen=True)
class Measured:
    """A group with its curve of damage. multiple: of channels that the rest is counted in."""

    part: Part
    curve: Curve


@dataclass(frozen=True)
class Judge:
    """What tells the damage that a pass does to a model. reference: its outputs for the samples.

    is_noise: the damage is E‖y − ŷ‖² / E‖y‖² of all outputs, classes or not, as SQNR has it.
    """

    piece: Workpiece
    samples: Dataset
    reference: Outputs
    is_noise: bool = False

    def damage(self, pass_: Pass, stats: Mapping[Key, Any]) -> float:
        """D of the model that a pass makes with these statistics; at most WORST."""
        changed = copy(self.piece.model)
        pass_.apply(changed.graph, replace(self.piece.context, stats=stats))
        try:
            made = outputs(replace(self.piece, model=changed), self.samples)
        except ModelError:
            return WORST
        return min(_distance(self.reference, made, _noise if self.is_noise else _apart), WORST)


def judge_of(piece: Workpiece, is_noise: bool = False) -> Judge | None:
    """A judge by the samples to choose by; None without data, or where memory holds no copy."""
    if piece.judge is None or not piece.has_data or is_spilling(piece.model.graph):
        return None
    return Judge(piece, piece.judge, outputs(piece, piece.judge), is_noise)


def felt(judge: Judge | None, layer: Layer, made: Array, lost: float) -> float:
    """g: what the outputs of the model lose for each unit that a layer alone loses; 1 if unknown.

    made: its weight, changed such that the layer loses `lost` of the power of its outputs.
    """
    if judge is None:
        return 1.0
    damage = judge.damage(Placed(layer.name, made), judge.piece.context.stats)
    return min(damage / max(lost, FEW), MOST_FELT)


@dataclass(frozen=True)
class Placed:
    """Put a weight, as a matrix, in place of that of one layer, to be judged."""

    layer: str
    weight: Array
    name: ClassVar[str] = "placed"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        found = layers(graph, context.only.names(graph), everything=True)
        layer = next(layer for layer in found if layer.name == self.layer)
        return list(put(graph, layer, self.weight, context, "tried", "tried"))


def measure(
    piece: Workpiece, prune: Prune, parts: Sequence[Part], stats: Mapping[Key, Any], multiple: int
) -> list[Measured]:
    """The damage of each group, on the samples to choose by where there are data.

    multiple: of channels that kernels work in, which large groups keep to.
    """
    found = [_ranked(piece, prune, part, stats, multiple) for part in parts]
    samples = piece.judge
    if samples is None or not piece.has_data or is_spilling(piece.model.graph):
        return found
    counts = [_counts(one.curve) for one in found]
    total, done = sum(map(len, counts)), 0
    samples = affordable(piece, samples, total)
    judge = Judge(piece, samples, outputs(piece, samples))
    for number, (one, some) in enumerate(zip(found, counts, strict=True)):
        errors = []
        for count in some:
            piece.say(f"prune: measuring {done}/{total}")
            only = replace(prune, remove=(f"{one.part.name}={count}",))
            errors.append(judge.damage(only, stats))
            done += 1
        curve = replace(one.curve, damage=through(one.curve.damage, some, errors))
        found[number] = replace(one, curve=curve)
    return found


def affordable(piece: Workpiece, samples: Dataset, runs: int) -> Dataset:
    """As many of the samples as can be run so often in the time there is, but a few."""
    start = time.perf_counter()
    outputs(piece, samples.subset([0]))
    most = piece.patience / (max(runs, 1) * (time.perf_counter() - start))
    count = min(len(samples), max(FEWEST, int(most)))
    return samples.subset([i * len(samples) // count for i in range(min(count, len(samples)))])


def _ranked(
    piece: Workpiece, prune: Prune, part: Part, stats: Mapping[Key, Any], multiple: int
) -> Measured:
    """A group with the damage at its own readers."""
    nodes = {node.name: node for node in piece.model.graph.nodes}
    n = len(part.group.channels)
    view = View(part.group, nodes, stats, piece.context.seed)
    ranking = rank(view, prune.criterion, min(int(np.ceil(MOST * n)), n - 1))
    step = 1
    while 2 * step <= min(multiple, n // 4):
        step *= 2
    return Measured(part, Curve(ranking.damage, n, 1 - MOST, step))


def _counts(curve: Curve) -> list[int]:
    """Allowed counts near SHARES of the channels."""
    allowed = curve.counts[curve.counts > 0]
    if not len(allowed):
        return []
    wanted = (allowed[np.argmin(np.abs(allowed - share * curve.classes))] for share in SHARES)
    return sorted({int(k) for k in wanted})


def outputs(piece: Workpiece, samples: Dataset) -> Outputs:
    """What a model gives for samples, batch by batch; one by one where it takes no batches."""
    with runnable(piece.model) as source:
        opened = session(source, replace(piece.runtime, threads=piece.calibration.threads))
    if not fixed_batch(samples.inputs, samples.source.axes):
        try:
            return [run(opened, feed) for feed in samples.batches(BATCH)]
        except ModelError:  # a first state for one sample, or the like
            pass
    return [run(opened, feed) for feed in samples.batches(1)]


def _distance(reference: Outputs, made: Outputs, apart: Callable[[Array, Array], float]) -> float:
    """D of what was made in place of the reference."""
    names = [n for n, y in reference[0].items() if y.dtype.kind == "f"]
    pairs = [[np.concatenate([b[n] for b in some]) for some in (reference, made)] for n in names]
    found = [apart(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
    return float(np.mean(found)) if found else 0.0


def _noise(reference: Array, made: Array) -> float:
    y, z = reference.astype(np.float64), made.astype(np.float64)
    power = float(np.mean(y**2))
    return float(np.mean((y - z) ** 2)) / power if power > 0 else 0.0


def _apart(reference: Array, made: Array) -> float:
    y, z = reference.astype(np.float64), made.astype(np.float64)
    if y.ndim == 2 and y.shape[1] > 1:
        p, q = _log_shares(y), _log_shares(z)
        return float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))
    variance = float(y.var())
    return float(np.mean((y - z) ** 2)) / variance if variance > 0 else 0.0


def _log_shares(scores: Array) -> Array:
    """log softmax of rows; of rows that are probabilities already, their logarithm."""
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, 1e-12)))
    moved = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(moved - np.log(np.exp(moved).sum(axis=1, keepdims=True)))
