"""Run a model that is larger than the memory allowed: cut in stages, each with its own session.

The nodes, in order, are cut into consecutive **stages** (`onnxc.cuts`). A stage is opened, run over
all batches, and closed; tensors that a later stage reads are its **boundary**, kept by batch in
memory while they are few, else in a temporary file. So each weight is read once a pass over the
data, and memory holds one stage and the activations of one batch: nothing grows with the data.

Weights stay in their files: ONNX Runtime maps them, and forgets each one as it packs it. A model
that fits is one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from onnxc import weights
from onnxc.boundary import Boundary, release
from onnxc.cuts import Facts, Feed, Stage, plan
from onnxc.graph import Model, as_declared
from onnxc.normal import nested_reads
from onnxc.runtime import Runtime, run, session

Array = NDArray[Any]
Feeds = Callable[[], Iterable[Feed]]


@dataclass(frozen=True)
class Source:
    """A skeleton and its weights (see `onnxc.weights`); large arrays go to `scratch`, if any."""

    proto: ModelProto
    held: list[weights.Values]
    scratch: weights.Scratch | None = None


def open_stages(
    model: Model,
    feed: Feed | None = None,
    runtime: Runtime = Runtime(),
    outputs: Sequence[str] = (),
    taps: int = 0,
) -> Staged:
    """A model ready to run in its bound: whole, or in stages.

    feed: one batch, which sets the sizes of activations. outputs: tensors asked for, by default
    the model's outputs. taps: bytes that the caller keeps besides.
    """
    source = Source(*as_declared(model), model.scratch)
    memory = model.memory if model.scratch is not None else None
    return staged(source, memory, feed, runtime, outputs, taps)


def staged(
    source: Source,
    memory: int | None,
    feed: Feed | None = None,
    runtime: Runtime = Runtime(),
    outputs: Sequence[str] = (),
    taps: int = 0,
) -> Staged:
    """The same of a skeleton, which may have been edited; memory: None for no bound."""
    names = tuple(outputs) or tuple(value.name for value in source.proto.graph.output)
    facts = Facts(source.proto, names, feed)
    return Staged(source, facts, plan(facts, memory, taps), runtime)


class Staged:
    """A model that runs stage by stage over batches."""

    def __init__(
        self, source: Source, facts: Facts, stages: Sequence[Stage], runtime: Runtime
    ) -> None:
        self.source, self.facts, self.stages = source, facts, stages
        self.runtime = runtime if self.is_whole else replace(runtime, lean=True)
        graph = source.proto.graph
        self.known = {v.name: v for v in (*graph.value_info, *graph.output)}

    @property
    def is_whole(self) -> bool:
        """Whether the model fits, so that one session runs it."""
        return len(self.stages) == 1

    @property
    def bytes(self) -> int:
        """What the whole model takes in one session."""
        return self.facts.whole()

    def opened(self) -> ort.InferenceSession:
        """One session, whatever it takes. Raises ModelError."""
        whole = plan(self.facts, None)
        return self.session(whole[0], Boundary())

    def once(self, feed: Feed) -> dict[str, Array]:
        """Outputs of one run on one batch, copied: a view keeps all memory of its session.

        Raises ModelError.
        """
        found: dict[str, Any] = {}
        for _, _, made in self.run(lambda: (feed,)):
            found |= {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in made.items()}
        return found

    def run(self, feeds: Feeds) -> Iterator[tuple[int, int, dict[str, Array]]]:
        """(stage, batch, outputs by name), all batches of a stage before the next stage.

        feeds: gives the batches, in the same order whenever it is called. The arrays belong to
        the stage's session: copy what is to stay. Raises ModelError.
        """
        last = {name: number for number, s in enumerate(self.stages) for name in s.reads}
        with Boundary() as boundary:
            for number, stage in enumerate(self.stages):
                opened = self.session(stage, boundary)
                names = [port.name for port in opened.get_inputs()]
                for index, feed in enumerate(feeds()):
                    given = {n: feed[n] for n in names if n in feed}
                    given |= {n: boundary.get(index, n) for n in names if n in boundary}
                    found = run(opened, given, [*stage.gives, *stage.outputs])
                    for name in stage.gives:
                        boundary.put(index, name, found[name])
                    made = {name: found[name] for name in stage.outputs}
                    del given, found
                    yield number, index, made
                    del made
                del opened
                boundary.drop(name for name in stage.reads if last[name] == number)
                if not self.is_whole:
                    release()

    def session(
        self, stage: Stage, boundary: Boundary, dump: Path | None = None
    ) -> ort.InferenceSession:
        """A stage, opened; `dump`: also write the optimized graph there."""
        proto = self._part(stage, boundary)
        root = weights.refer(proto.graph, self.source.held, self.source.scratch)
        packs = self.runtime.packs or stage.packs
        runtime = replace(self.runtime, folds=stage.folds, packs=packs)
        return session(proto.SerializeToString(), runtime, dump, root)

    def _part(self, stage: Stage, boundary: Boundary) -> ModelProto:
        """The part of the model that a stage is, with types for what comes in."""
        whole, part = self.source.proto, ModelProto()
        if len(stage.nodes) == len(whole.graph.node) and [*stage.outputs] == [
            v.name for v in whole.graph.output
        ]:
            part.CopyFrom(whole)
            return part
        part.ir_version = whole.ir_version
        part.opset_import.extend(whole.opset_import)
        part.functions.extend(whole.functions)
        part.graph.name = whole.graph.name or "stage"
        part.graph.node.extend(whole.graph.node[i] for i in stage.nodes)
        named = {n for node in part.graph.node for n in nested_reads(node)} | {*stage.outputs}
        part.graph.initializer.extend(t for t in whole.graph.initializer if t.name in named)
        ports = {value.name: value for value in whole.graph.input}
        for name in stage.reads:
            declared = self.known.get(name)
            if name not in boundary:  # it is only looked at, not run
                declared = declared or self.facts.types.get(name)
            part.graph.input.append(ports.get(name) or boundary.type_of(name, declared))
        leaving = dict.fromkeys((*stage.gives, *stage.outputs))
        made = {n for node in part.graph.node for n in node.output} - leaving.keys()
        part.graph.value_info.extend(v for v in whole.graph.value_info if v.name in made)
        part.graph.output.extend(
            self.known.get(n, ports.get(n, ValueInfoProto(name=n))) for n in leaving
        )
        return part
