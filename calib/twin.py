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

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from calib import tap
from calib.data import Dataset
from calib.inputs import Feed, fixed_batch
from calib.observe import rows_of
from calib.plan import ARENA, BASE, MIB, WEIGHT_COPIES
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, to_proto
from onnxc.runtime import Runtime, run, session

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
    halves, layouts = _halves(original, current, channel, next(iter(used.batches(1))))
    size = _batch(halves, layouts, used, max_memory)
    try:
        drifts = _measure(halves, used, size, threads)
    except ModelError:
        if size == 1:
            raise
        size = 1
        drifts = _measure(halves, used, size, threads)
    if notes is not None and size < min(ENOUGH, len(used)):
        notes.append(
            f"biases were corrected by the means of {size} sample(s) at a time, not of many"
        )
    return _average(drifts, tensors)


def _halves(
    original: Model, current: Model, channel: Mapping[str, int], feed: Feed
) -> tuple[tuple[ModelProto, ModelProto], dict[str, tap.Layout]]:
    """The measuring original, the correcting current model, and the layouts of the latter."""
    protos = to_proto(original), to_proto(current)
    for name in channel:
        if any(name not in tap.produced(p.graph) for p in protos):
            raise OptionError(f"tensor {name!r} is not made by both models, so it has no drift")
    layouts = tap.layouts(protos[1], feed)
    return (
        measuring(protos[0], channel, layouts),
        correcting(protos[1], channel, layouts),
    ), layouts


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
    halves: Sequence[ModelProto],
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
    live = max(tap.peak(half.graph.node, sizes, ()) for half in halves)
    weights = max(tap.weight_bytes(half.graph) for half in halves)
    room = LIVE
    if max_memory is not None:
        room = min(room, max_memory - BASE - WEIGHT_COPIES * weights)
    return int(np.clip(room // max(live, 1), 1, len(dataset)))


def _measure(
    halves: tuple[ModelProto, ModelProto], dataset: Dataset, size: int, threads: int
) -> list[tuple[int, Feed]]:
    """(rows, drifts by output name) of each batch."""
    goals = _run(halves[0], dataset, size, threads)
    return _run(halves[1], dataset, size, threads, goals)


def _run(
    half: ModelProto,
    dataset: Dataset,
    size: int,
    threads: int,
    goals: Sequence[tuple[int, Feed]] = (),
) -> list[tuple[int, Feed]]:
    opened = session(half.SerializeToString(), Runtime(threads, lean=True))
    names = [i.name for i in opened.get_inputs()]
    results = []
    for index, feed in enumerate(dataset.batches(size)):
        given = {**feed, **goals[index][1]} if goals else feed
        rows = rows_of(feed, dataset.source.axes)
        found = run(opened, {name: given[name] for name in names})
        results.append((rows, {n: x.copy() for n, x in found.items()}))  # no view of the arena
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
