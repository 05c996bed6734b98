"""Extra outputs on an exported model, cut down to what they need, and the memory that a run takes.

Taps go onto the ONNX protocol buffer, so that the graph that passes rewrite is never touched. The
memory of a run is estimated by a sweep over the nodes in order: a tensor lives from the node that
makes it to the last one that reads it, a tap lives to the end. Scratch space inside an operator
(im2col of a convolution whose layout ONNX Runtime cannot block) is not known and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto

from calib.inputs import Feed
from onnxc.runtime import Runtime, run, session


class Layout(NamedTuple):
    """ONNX element type (0 where unknown, taken for 4 bytes) and shape of a tensor."""

    element: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        kind = onnx.helper.tensor_dtype_to_np_dtype(self.element) if self.element else None
        return math.prod(self.shape) * (kind.itemsize if kind is not None else 4)


def tapped(proto: ModelProto, taps: Sequence[str]) -> ModelProto:
    """A copy of the model whose outputs are the taps, with only the nodes and weights they need."""
    kept = needed(proto.graph, taps)
    read = {name for node in kept for name in reads(node)}
    cut = ModelProto(ir_version=proto.ir_version)
    cut.opset_import.extend(proto.opset_import)
    cut.functions.extend(proto.functions)
    cut.graph.name = proto.graph.name
    cut.graph.node.extend(kept)
    cut.graph.input.extend(i for i in proto.graph.input if i.name in read)
    cut.graph.initializer.extend(i for i in proto.graph.initializer if i.name in read)
    cut.graph.output.extend(output(proto.graph, taps))
    return cut


def output(graph: GraphProto, names: Iterable[str]) -> list[ValueInfoProto]:
    """Declarations of tensors as outputs, with their types where the graph tells them."""
    known = {v.name: v for v in (*graph.value_info, *graph.output)}
    return [known.get(name, ValueInfoProto(name=name)) for name in names]


def needed(graph: GraphProto, tensors: Iterable[str]) -> list[NodeProto]:
    """The nodes that make the tensors, directly or not, in the graph's order."""
    wanted = set(tensors)
    kept = []
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output):
            continue
        kept.append(node)
        wanted.update(reads(node))
    return kept[::-1]


def reads(node: NodeProto) -> set[str]:
    """Names that a node reads, with all that its bodies mention."""
    names = set(filter(None, node.input))
    for body in bodies(node):
        names.update(o.name for o in body.output)
        names.update(*(reads(inner) for inner in body.node))
    return names


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds as attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def produced(graph: GraphProto) -> set[str]:
    """Tensors that the nodes of the main graph make."""
    return {name for node in graph.node for name in node.output if name}


def inner(graph: GraphProto) -> set[str]:
    """Tensors that only exist inside nested bodies, where no output can reach them."""
    nested = [body for node in graph.node for body in bodies(node)]
    names = set().union(*(produced(b) | inner(b) | {i.name for i in b.input} for b in nested))
    return names - produced(graph)


def weight_bytes(graph: GraphProto) -> int:
    """Bytes of all initializers."""
    return sum(Layout(i.data_type, tuple(i.dims)).nbytes for i in graph.initializer)


def layouts(proto: ModelProto, feed: Feed) -> dict[str, Layout]:
    """Type and shape of every tensor that the main graph's nodes make, when it runs on `feed`.

    Declared shapes are used where the feed settles their symbols; the others are observed in one
    run that returns only shapes. Anything but a tensor (a sequence, a map) is left out.
    """
    symbols = _symbols(proto.graph, feed)
    types = (*proto.graph.value_info, *proto.graph.output)
    known = {v.name: found for v in types if (found := declared(v.type, symbols)) is not None}
    unknown = sorted(produced(proto.graph) - known.keys())
    return known | _observed(proto, unknown, feed) if unknown else known


def peak(nodes: Iterable[NodeProto], sizes: Mapping[str, int], kept: Collection[str]) -> int:
    """Largest sum of bytes alive at once when nodes run in order and `kept` is never freed."""
    order = list(nodes)
    last = {name: index for index, node in enumerate(order) for name in reads(node)}
    live = highest = 0
    for index, node in enumerate(order):
        live += sum(sizes.get(name, 0) for name in node.output)
        highest = max(highest, live)
        over = {n for n in reads(node) if last[n] == index and n not in kept}
        unread = {n for n in node.output if n not in last and n not in kept}
        live -= sum(sizes.get(name, 0) for name in over | unread)
    return highest


def _symbols(graph: GraphProto, feed: Feed) -> dict[str, int]:
    """What the feed makes of the symbolic dimensions of the inputs."""
    pairs = (
        (dim.dim_param, size)
        for i in graph.input
        if i.name in feed
        for dim, size in zip(i.type.tensor_type.shape.dim, feed[i.name].shape, strict=False)
    )
    return {symbol: size for symbol, size in pairs if symbol}


def declared(type_: TypeProto, symbols: Mapping[str, int]) -> Layout | None:
    """What a type says, sizes in place of symbols; None where the shape is not settled."""
    tensor = type_.tensor_type
    if not type_.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    dims = [
        d.dim_value if d.HasField("dim_value") else symbols.get(d.dim_param, -1)
        for d in tensor.shape.dim
    ]
    return None if -1 in dims else Layout(tensor.elem_type, tuple(dims))


def _observed(proto: ModelProto, names: Sequence[str], feed: Feed) -> dict[str, Layout]:
    """Layouts seen in one run."""
    types = _types(tapped(proto, names))
    tensors = [n for n in names if n not in types or types[n].HasField("tensor_type")]
    if not tensors:
        return {}
    probe = tapped(proto, tensors)
    del probe.graph.output[:]
    for name in tensors:
        probe.graph.node.add(op_type="Shape", input=[name], output=[f"{name}:shape"])
        probe.graph.output.add(name=f"{name}:shape")
    opened = session(probe.SerializeToString(), Runtime(lean=True))
    shapes = run(opened, {i.name: feed[i.name] for i in opened.get_inputs()})
    elements = {n: types[n].tensor_type.elem_type if n in types else 0 for n in tensors}
    return {n: Layout(elements[n], tuple(shapes[f"{n}:shape"].tolist())) for n in tensors}


def _types(light: ModelProto) -> dict[str, TypeProto]:
    """Types of tensors by ONNX's own inference; the model loses its weights and outputs to it."""
    for weight in light.graph.initializer:
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        )
    del light.graph.initializer[:], light.graph.output[:]
    inferred = onnx.shape_inference.infer_shapes(light)
    return {v.name: v.type for v in inferred.graph.value_info}
