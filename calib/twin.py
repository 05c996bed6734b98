"""How far a rewritten model's layers drift from the original's, layer after layer.

For each listed tensor t (the output of a heavy node, of one name in both models), with the mean
over all axes but the channel's,

    d = mean(t_original) - mean(t_current),    t' = t_current + d,

and t' goes on in place of t. So one forward pass of the current model measures every layer with all
the layers before it already corrected, which is what adding d to their biases makes of them (Nagel
2019, "Data-free quantization", section 4.2, with data; Finkelstein 2019). Correcting all layers by
drifts that were measured at once overshoots.

The means of the original are gathered first, batch by batch; then the original is closed and the
current model is run on the same batches, so that memory holds one model at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from calib import tap
from calib.data import Dataset
from calib.inputs import Feed, fixed_batch
from calib.observe import rows_of
from calib.plan import ARENA, BASE, MIB, WEIGHT_COPIES
from onnxc.cuts import Facts
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, as_declared, to_proto
from onnxc.runtime import Runtime
from onnxc.stages import Source, staged

ENOUGH = 2  # fewer follow the single sample rather than the data
LIVE = 96 * MIB  # activations of a batch


def drift(
    original: Model,
    current: Model,
    tensors: Sequence[str],
    dataset: Dataset,
    axis: int | Mapping[str, int] = 1,
    *,
    samples: int = 32,
    max_memory: int | None = None,
    threads: int = 1,
    notes: list[str] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """What to add to the channels of each tensor, float64 (channels,), averaged over the samples.

    axis: the channel axis, one for all tensors or by name. samples: how many of the dataset are
    used, evenly spread. max_memory: bytes that the process may take. notes: gets sentences for the
    report. Raises OptionError for a tensor that is not in both models, DataError for one whose
    values are not finite.
    """
    if not tensors:
        return {}
    used = _spread(dataset, samples)
    channel = {n: axis if isinstance(axis, int) else axis[n] for n in tensors}
    feed = next(iter(used.batches(1)))
    halves, layouts = _halves(original, current, channel, feed)
    bound = max_memory if max_memory is not None and current.scratch is not None else None
    runs = Runs(halves, used, threads, bound)
    size = _batch(halves, layouts, used, max_memory)
    try:
        drifts = runs.measure(size)
    except ModelError:
        if size == 1:
            raise
        size = 1
        drifts = runs.measure(size)
    if notes is not None and size < min(ENOUGH, len(used)):
        notes.append(
            f"biases were corrected by the means of {size} sample(s) at a time, not of many"
        )
    return _average(drifts, tensors)


def _halves(
    original: Model, current: Model, channel: Mapping[str, int], feed: Feed
) -> tuple[tuple[Source, Source], dict[str, tap.Layout]]:
    """The measuring original, the correcting current model, and the layouts of the latter."""
    first, second = (Source(*as_declared(m), m.scratch) for m in (original, current))
    for name in channel:
        if any(name not in tap.produced(source.proto.graph) for source in (first, second)):
            raise OptionError(f"tensor {name!r} is not made by both models, so it has no drift")
    if current.scratch is None:
        layouts = tap.layouts(to_proto(current), feed)
    else:
        layouts = _inferred(second, channel, feed)
    return (
        replace(first, proto=measuring(first.proto, channel, layouts)),
        replace(second, proto=correcting(second.proto, channel, layouts)),
    ), layouts


def _inferred(source: Source, names: Iterable[str], feed: Feed) -> dict[str, tap.Layout]:
    """Layouts that need no run, as far as they go. Raises OptionError where one is missing."""
    types = Facts(source.proto, tuple(names), feed).types
    found = {n: known for n, v in types.items() if (known := tap.declared(v.type, {})) is not None}
    for name in names:
        if name not in found:
            raise OptionError(f"the shape of tensor {name!r} is not known, so it has no drift")
    return found


def measuring(
    proto: ModelProto, channel: Mapping[str, int], layouts: Mapping[str, tap.Layout]
) -> ModelProto:
    """The model cut down to the channel means `t:mean` of the tensors."""
    half = tap.tapped(proto, list(channel))
    del half.graph.output[:]
    for name, axis in channel.items():
        half.graph.node.append(_mean(half, name, f"{name}:mean", axis, layouts[name]))
        half.graph.output.add(name=f"{name}:mean")
    return half


def correcting(
    proto: ModelProto, channel: Mapping[str, int], layouts: Mapping[str, tap.Layout]
) -> ModelProto:
    """The model with inputs `t:mean` and outputs `t:drift`, each tensor corrected as it is made."""
    half = tap.tapped(proto, list(channel))
    nodes, corrected = list(half.graph.node), dict[str, str]()
    del half.graph.node[:], half.graph.output[:]
    for node in nodes:
        _rename(node, corrected)
        half.graph.node.append(node)
        for name in channel.keys() & set(node.output):
            corrected[name] = f"{name}:corrected"
            half.graph.node.extend(_correction(half, name, channel[name], layouts[name]))
    return half


def _correction(half: ModelProto, name: str, axis: int, layout: tap.Layout) -> list[NodeProto]:
    """d = goal - mean(t); t' = t + d."""
    element = layout.element or onnx.TensorProto.FLOAT
    half.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}:mean", element, None))
    half.graph.output.add(name=f"{name}:drift")
    return [
        _mean(half, name, f"{name}:seen", axis, layout),
        onnx.helper.make_node("Sub", [f"{name}:mean", f"{name}:seen"], [f"{name}:drift"]),
        onnx.helper.make_node("Add", [name, f"{name}:drift"], [f"{name}:corrected"]),
    ]


def _mean(half: ModelProto, name: str, to: str, axis: int, layout: tap.Layout) -> NodeProto:
    """Mean over every axis but the channel's, dimensions kept; axes are an input since opset 18."""
    rank = len(layout.shape)
    axes = [i for i in range(rank) if i != axis % rank]
    opset = next(o.version for o in half.opset_import if o.domain in ("", "ai.onnx"))
    if opset < 18:
        return onnx.helper.make_node("ReduceMean", [name], [to], axes=axes, keepdims=1)
    weight = onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{to}:axes")
    half.graph.initializer.append(weight)
    return onnx.helper.make_node("ReduceMean", [name, weight.name], [to], keepdims=1)


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let a node and its bodies read the new names; a body never redefines an outer name."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    for body in tap.bodies(node):
        for inner in body.node:
            _rename(inner, names)
        for output in body.output:
            output.name = names.get(output.name, output.name)


def _spread(dataset: Dataset, samples: int) -> Dataset:
    """At most that many samples, evenly spread over the dataset."""
    count = min(samples, len(dataset))
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.intp))


def _batch(
    halves: Sequence[Source],
    layouts: Mapping[str, tap.Layout],
    dataset: Dataset,
    max_memory: int | None,
) -> int:
    """Samples in a run: all where activations are small, fewer where memory or the model asks."""
    group = fixed_batch(dataset.inputs, dataset.source.axes)
    if group:
        return group
    sizes = {n: int(ARENA * x.nbytes) for n, x in layouts.items()}
    sizes |= {f"{n}:corrected": size for n, size in sizes.items()}
    live = max(tap.peak(half.proto.graph.node, sizes, ()) for half in halves)
    room = LIVE
    if max_memory is not None and halves[1].scratch is not None:
        room = min(room, (max_memory - BASE) // 3)
    elif max_memory is not None:
        weights = max(tap.weight_bytes(half.proto.graph) for half in halves)
        room = min(room, max_memory - BASE - WEIGHT_COPIES * weights)
    return int(np.clip(room // max(live, 1), 1, len(dataset)))


@dataclass(frozen=True)
class Runs:
    """Both halves, run one after the other. memory: bytes of the process, None for no bound."""

    halves: tuple[Source, Source]
    dataset: Dataset
    threads: int
    memory: int | None

    def measure(self, size: int) -> list[tuple[int, Feed]]:
        """(rows, drifts by output name) of each batch of `size` samples."""
        goals = self._run(self.halves[0], size)
        return self._run(self.halves[1], size, goals)

    def _run(
        self, half: Source, size: int, goals: Sequence[tuple[int, Feed]] = ()
    ) -> list[tuple[int, Feed]]:
        def feeds() -> Iterator[Feed]:
            for index, feed in enumerate(self.dataset.batches(size)):
                yield {**feed, **goals[index][1]} if goals else feed

        opened = staged(half, self.memory, next(feeds()), Runtime(self.threads, lean=True))
        axes = self.dataset.source.axes
        results: list[tuple[int, Feed]] = [(rows_of(feed, axes), {}) for feed in feeds()]
        for _, index, found in opened.run(feeds):
            results[index][1].update({n: x.copy() for n, x in found.items()})  # no view of an arena
        return results


def _average(
    drifts: Sequence[tuple[int, Feed]], tensors: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    rows = [count for count, _ in drifts]
    means = {}
    for name in tensors:
        seen = [d[f"{name}:drift"].astype(np.float64).ravel() for _, d in drifts]
        means[name] = np.average(seen, axis=0, weights=rows)
        if not np.isfinite(means[name]).all():
            raise DataError(f"tensor {name!r} holds NaN or infinity, so its bias was not corrected")
    return means
