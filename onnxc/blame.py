"""Which layers of a rewritten model make its error: what each one passes on, and what it adds.

For a layer that makes y of x in the original, and z of w in the rewritten model (`onnxc.twins`),

    sqnr = SQNR(y, z)            all error up to here
    own  = SQNR(y, layer_z(x))   the error of this layer alone: it is fed what the original has

Both are sums over a few samples. Tensors are tapped in segments, so that memory holds the taps of a
segment and one batch; the second figure takes another pass over the data, in which the layers of
the rewritten model run as small models of their own (`onnxc.units`). On a processor whose kernels
saturate, a layer also has the error that its kernel adds to exact sums of the same integers. Where
equalization scaled the channels of a tensor, it is compared behind the fit of `onnxc.distortion`,
and fed as it is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from calib import tap
from calib.data import Dataset
from onnxc.core import Skip
from onnxc.cost import quantized_as
from onnxc.distortion import Distortion, Fit, Relative
from onnxc.errors import ModelError
from onnxc.fidelity import decibel
from onnxc.graph import Model, copy, load, to_proto
from onnxc.pairs import excess
from onnxc.pipeline import prepare
from onnxc.report import Blame
from onnxc.runtime import Runtime, run, session
from onnxc.steps import Steps, steps_of
from onnxc.targets import choose
from onnxc.twins import Twin, Twins, match
from onnxc.units import FLOATED, cut_out, with_floats
from onnxc.workpiece import silent

Array = NDArray[Any]
Feed = dict[str, Array]
Progress = Callable[[str], None]

SAMPLES = 8  # that are looked at
BATCH = 4  # of them in a run
ENOUGH = 60.0  # dB of an error that needs no cause
WIDE = 0.4  # share of a range below which it is too wide
ROOM = 96 << 20  # bytes of the taps of a segment, both models together
STAGED = "layers were not compared: the models do not fit into --max-memory whole"


@dataclass(frozen=True)
class Examined:
    """A layer of both models with what it passes on and what it adds.

    own: None where the layer could not be run alone, and reason says why. fit: how its tensor was
    scaled. low, high: the range of y. steps: of the integers that hold z, None where it is float;
    beyond, clipping: the share of y that lies outside of what they reach, and the SQNR that this
    alone leaves. saturating: the SQNR that sums which saturate in the kernel leave, None where none
    do. rounding: the SQNR that steps of this size leave.
    """

    twin: Twin
    sqnr: float
    own: float | None = None
    fit: Fit | None = None
    low: float = 0.0
    high: float = 0.0
    steps: Steps | None = None
    beyond: float = 0.0
    clipping: float | None = None
    saturating: float | None = None
    rounding: float | None = None
    reason: str = ""

    @property
    def blame(self) -> Blame:
        twin = self.twin
        return Blame(twin.node, twin.op, twin.tensor, self.sqnr, self.own, self.cause)

    @property
    def cause(self) -> str:
        """What makes most of its own error, in words; empty where that is not known."""
        own, steps = self.own, self.steps
        if own is None or own >= ENOUGH:
            return ""
        if self.saturating is not None:
            return "sums that saturate in its kernel"
        if steps is not None and self.clipping is not None and self.clipping < own + 3:
            return f"cutting at {steps.low:.3g} to {steps.high:.3g}"
        if self.rounding is None:
            return "its weights or bias" if steps is None else ""
        if self.rounding > own + 3:
            return "its weights or bias"
        share = (self.high - self.low) / max(steps.high - steps.low, 1e-30) if steps else 1.0
        if share < WIDE:
            return f"a range {1 / max(share, 1e-6):.1f}x too wide"
        return "rounding its output"


@dataclass(frozen=True)
class Examination:
    """All layers in the order of the graph. unmatched: those that were not found, or not alike."""

    layers: tuple[Examined, ...]
    unmatched: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def blames(self) -> tuple[Blame, ...]:
        return tuple(layer.blame for layer in self.layers)


def examine(
    original: Model,
    result: Model,
    dataset: Dataset,
    runtime: Runtime = Runtime(),
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Examination:
    """What each layer has to do with the error of the result, seen from the prepared original.

    Raises ModelError.
    """
    few = spread(dataset, samples)
    feed = next(iter(few.batches(1)))
    if excess([original, result], feed):
        return Examination((), notes=(STAGED,))
    reference = copy(original)
    prepare(reference, feed)
    twins = match(reference.graph, result.graph)
    pair = Pair(to_proto(reference), to_proto(result), twins, few, runtime, reference.graph)
    say = progress or silent
    try:
        return pair.examine(say)
    except ModelError:
        if pair.batch == 1:
            raise
        pair.batch = 1  # a first state for one sample, or the like
        return pair.examine(say)


def examine_files(
    first: Path | Model,
    second: Path | Model,
    dataset: Dataset,
    runtime: Runtime = Runtime(),
    progress: Progress | None = None,
) -> Examination:
    """The same of files, where the second is quantized; of others, nothing.

    Models in place of files are those that memory does not hold.
    """
    if isinstance(first, Model) or isinstance(second, Model):
        return Examination((), notes=(STAGED,))
    result = load(second)
    if quantized_as(result.graph) is None:
        return Examination(())
    original = load(first)
    if quantized_as(original.graph) is not None:
        return Examination(())
    return examine(original, result, dataset, runtime, progress=progress)


def spread(dataset: Dataset, samples: int) -> Dataset:
    """At most that many samples, evenly spread over the dataset."""
    count = min(samples, len(dataset))
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.intp))


@dataclass
class Alone:
    """A layer of the rewritten model as a model of its own, and the error that it made so far.

    kernels: the same on rounded inputs, as the runtime computes it, and in exact sums.
    """

    twin: Twin
    opened: Any
    steps: Steps | None
    kernels: tuple[Any, ...] = ()
    error: Relative = field(default_factory=Relative)
    clipped: Relative = field(default_factory=Relative)
    saturated: Relative = field(default_factory=Relative)
    beyond: int = 0
    count: int = 0
    reason: str = ""

    def see(self, known: Feed, fits: Mapping[str, Fit]) -> None:
        """Run it on what the original has, scaled as the rewritten model has it."""
        twin, y = self.twin, known[self.twin.tensor]
        fed = {x: fits[x](known[x]) if x in fits else known[x] for _, x in twin.cuts}
        (z,) = run(self.opened, fed).values()
        fit = fits.get(twin.tensor)
        if z.shape != y.shape:
            self.reason = "alone it makes another shape"
            return
        self.error.update(y, z if fit is None else fit.undone(z))
        if self.kernels and not self.saturated.power:  # one batch tells; exact sums are slow
            made = [next(iter(run(kernel, fed).values())) for kernel in self.kernels]
            if fit is not None:
                made = [fit.undone(each) for each in made]
            self.saturated.update(y, y + (made[1] - made[0]))
        if self.steps is None:
            return
        scaled = y if fit is None else fit(y)
        held = np.clip(scaled, self.steps.low, self.steps.high)
        self.clipped.update(y, held if fit is None else fit.undone(held))
        self.beyond += int((np.abs(scaled - held) > self.steps.size / 2).sum())
        self.count += y.size


@dataclass
class Pair:
    """Both models, what stands for what, and the samples. graph: of the first one."""

    first: ModelProto
    second: ModelProto
    twins: Twins
    dataset: Dataset
    runtime: Runtime
    graph: gs.Graph
    batch: int = BATCH

    def __post_init__(self) -> None:
        read = {*self.twins.standing.values(), *(t.stand_in for t in self.twins.found)}
        with_floats(self.second, sorted(read & self.twins.scaled.keys()), self.twins.scaled)
        self.batch = min(self.batch, len(self.dataset))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the tensors of a sample."""
        found = tap.layouts(self.first, next(iter(self.dataset.batches(1))))
        return {name: layout.nbytes for name, layout in found.items()}

    @cached_property
    def types(self) -> dict[str, int]:
        """Element types of tensors, as ONNX numbers them."""
        inputs = {v.name: v.type.tensor_type.elem_type for v in self.first.graph.input}
        made = (t for node in self.graph.nodes for t in node.outputs)
        return {t.name: _element(t) for t in made} | inputs

    @property
    def inputs(self) -> set[str]:
        return {value.name for value in self.first.graph.input}

    def examine(self, say: Progress) -> Examination:
        say("comparing layers")
        passed = self._passed()
        fits = {name: fit for name, d in passed.items() if (fit := d.fit) is not None}
        alike = [twin for twin in self.twins.found if twin.tensor in passed]
        alone = self._alone([twin for twin in alike if twin.unit], fits, say)
        layers = (_examined(t, passed[t.tensor], alone.get(t.node), fits) for t in alike)
        lost = (
            Skip(t.node, "its output has another shape in the other model")
            for t in self.twins.found
            if t.tensor not in passed
        )
        made = {twin.tensor for twin in alike}
        notes = (_scaled_note(len(fits.keys() & made)),) if fits.keys() & made else ()
        return Examination(tuple(layers), (*self.twins.lost, *lost), notes)

    def _passed(self) -> dict[str, Distortion]:
        """The error of every tensor that layers read or make, by its name in the original."""
        axes = {x: self._axis(x) for twin in self.twins.found for _, x in twin.cuts}
        axes |= {twin.tensor: twin.axis for twin in self.twins.found}
        stand_ins = {n: self._float(s) for n in axes if (s := self.twins.standing.get(n))}
        found = {name: Distortion(axis) for name, axis in axes.items()}
        odd: set[str] = set()
        for segment in self._segments(list(stand_ins), lambda name: (name,)):
            mine = [n for n in segment if n not in self.inputs]
            theirs = [stand_ins[n] for n in segment if stand_ins[n] != n or n in mine]
            first, second = self._tapped(self.first, mine), self._tapped(self.second, theirs)
            for feed in self.dataset.batches(self.batch):
                pair = {**feed, **_run(first, feed)}, {**feed, **_run(second, feed)}
                for name in segment:
                    x, z = pair[0][name], pair[1][stand_ins[name]]
                    if x.shape != z.shape or not _are_numbers(x, z):
                        odd.add(name)
                    else:
                        found[name].update(x, z)
        return {name: d for name, d in found.items() if d.count and name not in odd}

    def _alone(
        self, twins: Sequence[Twin], fits: Mapping[str, Fit], say: Progress
    ) -> dict[str, Alone]:
        """The error of each layer on what the original feeds it, by node."""
        found: dict[str, Alone] = {}
        for segment in self._segments(twins, _tensors):
            say(f"comparing layers {len(found)}/{len(twins)}")
            units = [self._unit(twin) for twin in segment]
            names = {name for twin in segment for name in _tensors(twin)} - self.inputs
            opened = self._tapped(self.first, sorted(names))
            for feed in self.dataset.batches(self.batch):
                known = {**feed, **_run(opened, feed)}
                for unit in (u for u in units if not u.reason):
                    _see(unit, known, fits)
            found |= {unit.twin.node: unit for unit in units}
            for unit in units:
                unit.opened, unit.kernels = None, ()
        return found

    def _unit(self, twin: Twin) -> Alone:
        steps = steps_of(twin, self.twins.scaled)
        unit = cut_out(twin, self.second, self.twins.scaled, self.types)
        try:
            opened = session(unit.SerializeToString(), self.runtime)
            return Alone(twin, opened, steps, self._kernels(twin))
        except ModelError as error:
            return Alone(twin, None, steps, reason=f"it does not run alone: {error}")

    def _kernels(self, twin: Twin) -> tuple[Any, ...]:
        """The kernel of a layer and exact sums, where they may differ."""
        if not twin.heavy or not choose("auto").reduce_range or self.runtime.level == "none":
            return ()
        unit = cut_out(twin, self.second, self.twins.scaled, self.types, rounded=True)
        ways = (self.runtime, replace(self.runtime, level="none"))
        return tuple(session(unit.SerializeToString(), way) for way in ways)

    def _tapped(self, proto: ModelProto, names: Sequence[str]) -> Any:
        if not names:
            return None
        return session(tap.tapped(proto, names).SerializeToString(), self.runtime)

    def _segments(
        self, items: Sequence[Any], tensors: Callable[[Any], Sequence[str]]
    ) -> Iterator[list[Any]]:
        """Consecutive items whose tensors are together no more than ROOM."""
        segment: list[Any] = []
        held = 0
        for item in items:
            need = 2 * self.batch * sum(self.sizes.get(n, 0) for n in tensors(item))
            if segment and held + need > ROOM:
                yield segment
                segment, held = [], 0
            segment.append(item)
            held += need
        if segment:
            yield segment

    def _axis(self, name: str) -> int:
        """Of the channels of a tensor that no layer makes: of images 1, else the last."""
        known = {v.name: v for v in (*self.first.graph.input, *self.first.graph.value_info)}
        shape = known[name].type.tensor_type.shape.dim if name in known else ()
        return 1 if len(shape) > 3 else -1

    def _float(self, name: str) -> str:
        return name + FLOATED if name in self.twins.scaled else name


def _examined(
    twin: Twin, passed: Distortion, alone: Alone | None, fits: Mapping[str, Fit]
) -> Examined:
    low, high, fit = passed.low, passed.high, fits.get(twin.tensor)
    if alone is None or alone.reason:
        reason = twin.reason if alone is None else alone.reason
        return Examined(twin, passed.sqnr, None, fit, low, high, reason=reason)
    beyond = alone.beyond / max(alone.count, 1)
    clipping = None if alone.steps is None else alone.clipped.sqnr
    power, error, steps = alone.error.power, alone.error.noise, alone.steps
    added = power * alone.saturated.noise / max(alone.saturated.power, 1e-300)
    own, saturating = decibel(power, error + added), alone.saturated.sqnr
    rounding = None
    if steps is not None and fit is None and alone.count:
        rounding = decibel(power / alone.count, steps.size**2 / 12)
    return Examined(
        *(twin, passed.sqnr, own, fit, low, high, steps, beyond, clipping),
        *(saturating if added > error / 4 else None, rounding),
    )


def _see(unit: Alone, known: Feed, fits: Mapping[str, Fit]) -> None:
    try:
        unit.see(known, fits)
    except ModelError as error:
        unit.reason = f"it does not run alone: {error}"


def _tensors(twin: Twin) -> tuple[str, ...]:
    """What a layer reads and makes, in the original."""
    return (twin.tensor, *(x for _, x in twin.cuts))


def _run(opened: Any, feed: Feed) -> Feed:
    if opened is None:
        return {}
    names = [port.name for port in opened.get_inputs()]
    return run(opened, {name: feed[name] for name in names})


def _are_numbers(*tensors: Any) -> bool:
    return all(isinstance(t, np.ndarray) and t.dtype.kind == "f" for t in tensors)


def _element(tensor: gs.Tensor) -> int:
    if not tensor.dtype:
        return int(TensorProto.FLOAT)
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def _scaled_note(count: int) -> str:
    many = "one tensor holds" if count == 1 else f"{count} tensors hold"
    return (
        f"{many} other numbers for the same network, as behind an equalization: compared up to the "
        "gain and the offset of each channel"
    )
