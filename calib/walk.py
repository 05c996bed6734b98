"""The original and a rewritten model, led side by side through all the data, layer by layer.

A model is run part by part: `reach` runs the nodes that some tensors need and that were not run
yet, over all batches, and keeps what the nodes behind them will read (`onnxc.boundary`: in memory
while it is little, else in a temporary file). Nodes that were not reached yet may be rewritten in
between, so a pass may solve a layer with the layers before it solved already, and each node is
still run once. What is kept is what crosses one place of the graph, residuals included, for a few
hundred samples; memory holds one part of one model, and one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from calib import tap
from calib.data import Dataset
from calib.goals import Cut, GoalObserver, RowsObserver
from calib.inputs import Feed, fixed_batch
from calib.observe import rows_of
from calib.observers import Streaming, observer_of
from onnxc.boundary import Boundary
from onnxc.core import Key
from onnxc.cuts import Facts
from onnxc.errors import DataError, ModelError
from onnxc.graph import Model, as_declared
from onnxc.numerics.patches import Window
from onnxc.runtime import Runtime
from onnxc.stages import Source, staged
from onnxc.weights import Values

Array = NDArray[Any]
Observed = GoalObserver | RowsObserver | Streaming

LIVE = 64 << 20  # activations of a batch
LARGEST_BATCH = 64


@dataclass
class Walk:
    """One model on its way over batches.

    inputs: its inputs, by batch. held: what it made so far and still needs. made: all that it made.
    is_fixed: nobody rewrites the model meanwhile.
    """

    model: Model
    inputs: Boundary
    batches: int
    threads: int = 1
    held: Boundary = field(default_factory=Boundary)
    made: set[str] = field(default_factory=set)
    is_fixed: bool = False

    @cached_property
    def _whole(self) -> tuple[ModelProto, list[Values]]:
        return as_declared(self.model)

    def reach(self, names: Collection[str]) -> None:
        """Make tensors, and forget what nothing behind them reads. Raises ModelError."""
        proto, weights = self._whole if self.is_fixed else as_declared(self.model)
        ports = {port.name for port in proto.graph.input}
        unknown = set(names) - tap.produced(proto.graph) - ports
        if unknown:
            raise ModelError(f"tensor {min(unknown)!r} is not in the model")
        part = _missing(proto, names, self.held)
        self.made |= {name for node in part for name in node.output if name}
        behind = [node for node in proto.graph.node if not self.made.issuperset(node.output)]
        needed = set(names).union(*map(tap.reads, behind))
        kept = [n for node in part for n in node.output if n in needed]
        if part:
            self._run(Source(self._cut(proto, part, kept), weights, self.model.scratch))
        self.held.drop({*self.held.near, *self.held.far} - needed)

    def get(self, batch: int, name: str) -> Array:
        """A tensor that was reached, or an input."""
        return (self.inputs if name in self.inputs else self.held).get(batch, name)

    def _cut(self, proto: ModelProto, part: list[NodeProto], made: list[str]) -> ModelProto:
        """The part of the model that the nodes are, with types for what comes in."""
        read = set().union(*map(tap.reads, part))
        known = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
        cut = ModelProto(ir_version=proto.ir_version)
        cut.opset_import.extend(proto.opset_import)
        cut.functions.extend(proto.functions)
        cut.graph.name = proto.graph.name or "part"
        cut.graph.node.extend(part)
        cut.graph.initializer.extend(t for t in proto.graph.initializer if t.name in read)
        cut.graph.input.extend(i for i in proto.graph.input if i.name in read)
        crossing = sorted(n for n in read if n in self.held)
        cut.graph.input.extend(self.held.type_of(name, known.get(name)) for name in crossing)
        cut.graph.output.extend(tap.output(proto.graph, made))
        return cut

    def _run(self, source: Source) -> None:
        names = [port.name for port in source.proto.graph.input]

        def feeds() -> Iterator[Feed]:
            for index in range(self.batches):
                yield {name: self.get(index, name) for name in names}

        memory = self.model.memory if self.model.scratch is not None else None
        opened = staged(source, memory, next(feeds()), Runtime(self.threads, lean=True))
        for _, index, found in opened.run(feeds):
            for name, array in found.items():
                if not isinstance(array, np.ndarray) or array.dtype.hasobject:
                    raise ModelError(f"tensor {name!r} holds no numbers, so it cannot be kept")
                self.held.put(index, name, array)


def _missing(proto: ModelProto, names: Iterable[str], held: Boundary) -> list[NodeProto]:
    """The nodes between what is held and some tensors, in order."""
    wanted = {name for name in names if name not in held}
    part = []
    for node in reversed(proto.graph.node):
        if not wanted.isdisjoint(node.output):
            part.append(node)
            wanted |= {name for name in tap.reads(node) if name not in held}
    return part[::-1]


class Pair:
    """The original and the rewritten model, side by side, for as long as the block lasts."""

    def __init__(
        self,
        original: Model,
        current: Model,
        dataset: Dataset,
        max_memory: int | None = None,
        threads: int = 1,
    ) -> None:
        self.inputs, self.samples = Boundary(), list[int]()
        for index, feed in enumerate(dataset.batches(_batch(original, dataset, max_memory))):
            self.samples.append(rows_of(feed, dataset.source.axes))
            for name, array in feed.items():
                self.inputs.put(index, name, array)
        count = len(self.samples)
        self.original = Walk(original, self.inputs, count, threads, is_fixed=True)
        self.current = Walk(current, self.inputs, count, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for kept in (self.inputs, self.original.held, self.current.held):
            kept.__exit__(kind, error, trace)

    def gather(self, keys: Collection[Key]) -> dict[Key, Observed]:
        """Statistics of tensors of the rewritten model as it is, and of goals in the original.

        Raises ModelError for a tensor that is not there, DataError for one that is not finite.
        """
        if not keys:
            return {}
        goals = [key.goal for key in keys if key.goal is not None]
        self.original.reach([goal.tensor for goal in goals])
        less = [key.minus for key in keys] + [goal.minus for goal in goals]
        self.current.reach([*(key.tensor for key in keys), *filter(None, less)])
        found = {key: _empty(key, sum(self.samples)) for key in keys}
        for index in range(len(self.samples)):
            for key, observer in found.items():
                self._observe(key, observer, index)
        for key, observer in found.items():
            if not observer.is_finite:
                raise DataError(f"tensor {key.tensor!r} or its goal holds NaN or infinity")
        return found

    def _observe(self, key: Key, observer: Observed, index: int) -> None:
        x, samples = self._less(self.current, index, key.tensor, key.minus), self.samples[index]
        if not isinstance(observer, GoalObserver | RowsObserver):
            observer.update(x, samples)
            return
        assert key.goal is not None
        name, minus = key.goal.tensor, key.goal.minus
        if isinstance(observer, GoalObserver):
            observer.update(x, self._less(self.original, index, name, minus), samples)
            return
        added = None if minus is None else self.current.get(index, minus)
        observer.update(x, self.original.get(index, name), samples, added)

    def _less(self, walk: Walk, index: int, name: str, minus: str | None) -> Array:
        """A tensor of one of the models, less one of the rewritten model."""
        x = walk.get(index, name)
        return x if minus is None else np.asarray(x - self.current.get(index, minus))


def _empty(key: Key, samples: int) -> Observed:
    """What observes a key over so many samples."""
    if key.goal is None:
        return observer_of(key)
    cut = Cut(1 if key.axis is None else key.axis, key.window or Window(), key.goal.axis)
    return RowsObserver(cut, samples) if key.what == "rows" else GoalObserver(cut)


def _batch(model: Model, dataset: Dataset, max_memory: int | None) -> int:
    """Samples in a run: what activations leave room for."""
    group = fixed_batch(dataset.inputs, dataset.source.axes)
    if group:
        return group
    proto, _ = as_declared(model)
    outputs = tuple(value.name for value in proto.graph.output)
    live = Facts(proto, outputs, next(iter(dataset.batches(1)))).live()
    room = LIVE if max_memory is None else min(LIVE, max_memory // 8)
    return int(np.clip(room // max(live, 1), 1, min(LARGEST_BATCH, len(dataset))))
