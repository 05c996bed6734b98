"""Raise the opset of a model with onnx.version_converter, and mend what the converter leaves wrong.

    before   operators that ONNX retired become the expression that defines them
             ImageScaler  y = s x + b[c]        Affine  y = α x + β
             Crop         y = x[:, :, top : −bottom, left : −right]
    after    a Resize that was an Upsample, or a Resize of opset 10, samples x = y / scale and
             rounds down: coordinate_transformation_mode "asymmetric", nearest_mode "floor" (the
             converter leaves the defaults of opset 11, "half_pixel" and "round_prefer_floor")
    after    attributes that no longer exist (consumed_inputs) and made-up shapes are dropped

Large weights stay outside what is converted. The opset belongs to the whole file, so selectors do
not limit this pass. A model that the converter refuses stays as it is, and the Skip says why; that
the outputs stay equal is checked by the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxc import weights
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import ModelError
from onnxc.graph import Model, become, fresh, from_skeleton, skeleton
from onnxc.runtime import first_line

SCAN_WITHOUT_BATCH = 9  # the first opset whose Scan has no batch axis
NEWEST_ASYMMETRIC = 10  # the last opset whose Resize had no coordinate mode

CONVERTER_ERRORS: tuple[type[Exception], ...] = (
    *(ModelError, RuntimeError, ValueError, IndexError),
    *(onnx.version_converter.ConvertError, onnx.checker.ValidationError),
    onnx.shape_inference.InferenceError,
)

TYPED = ("value_info", "input", "output")  # kept as they were: the converter makes some up

Fresh = Callable[[str], str]
Rewrite = Callable[[NodeProto, Fresh], list[NodeProto]]


@register
@dataclass(frozen=True)
class UpgradeOpset:
    """Raise the model to a newer operator set, where it computes the same there.

    version: the opset to reach; a model at it or above is left alone.
    """

    version: int = 13

    name: ClassVar[str] = "upgrade-opset"
    lossless: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        if context.opset >= self.version or not graph.nodes:
            return []
        first = graph.nodes[0].name
        try:
            upgraded = from_skeleton(*_converted(graph, context.opset, self.version)).graph
        except CONVERTER_ERRORS as error:
            reason = f"the model stays at opset {context.opset}: {first_line(error)}"
            return [Skip(first, reason)]
        ports = zip(_ports(upgraded), _ports(graph), strict=True)
        for new, known in ports:
            new.dtype, new.shape = known.dtype, known.shape
        become(graph, upgraded)
        return [Change(first, f"opset raised from {context.opset} to {self.version}")]


def _converted(graph: gs.Graph, old: int, new: int) -> tuple[ModelProto, list[weights.Values]]:
    """A skeleton of its own at the new opset, and the weights. Raises CONVERTER_ERRORS."""
    proto, large = skeleton(Model(graph))
    typed = {field: list(getattr(proto.graph, field)) for field in TYPED}
    for inner in _graphs(proto.graph):
        if old < SCAN_WITHOUT_BATCH and any(node.op_type == "Scan" for node in inner.node):
            raise ModelError(f"Scan of opset {old} loops over batches, which later ones do not")
        _retire(inner, partial(fresh, graph))
    done = onnx.version_converter.convert_version(proto, new)
    for inner in _graphs(done.graph):
        _mend(inner, old)
    for field, values in typed.items():
        done.graph.ClearField(field)
        getattr(done.graph, field).extend(values)
    for port in (*done.graph.input, *done.graph.output):
        if not port.HasField("type"):  # a sequence or map, which is kept beside the graph
            port.CopyFrom(helper.make_tensor_value_info(port.name, TensorProto.FLOAT, []))
    return done, large


def _ports(graph: gs.Graph) -> list[gs.Tensor]:
    return [*graph.inputs, *graph.outputs]


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _retire(graph: GraphProto, fresh: Fresh) -> None:
    if not any(node.op_type in RETIRED and not node.domain for node in graph.node):
        return
    nodes = [new for node in graph.node for new in RETIRED.get(node.op_type, _keep)(node, fresh)]
    del graph.node[:]
    graph.node.extend(nodes)


def _mend(graph: GraphProto, old: int) -> None:
    for node in graph.node:
        stale = [a for a in node.attribute if a.name == "consumed_inputs"]
        for attribute in stale:
            node.attribute.remove(attribute)
        if node.op_type == "Resize" and not node.domain and old <= NEWEST_ASYMMETRIC:
            _sample_as_before(node)


def _sample_as_before(node: NodeProto) -> None:
    modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    kept = [a for a in node.attribute if a.name not in modes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in modes.items())


def _keep(node: NodeProto, fresh: Fresh) -> list[NodeProto]:
    return [node]


def _image_scaler(node: NodeProto, fresh: Fresh) -> list[NodeProto]:
    scale, bias = _attribute(node, "scale", 1.0), _attribute(node, "bias", [])
    rows = [len(bias), 1, 1] if bias else []
    return _scale_and_shift(node, fresh, scale, bias or [0.0], rows)


def _affine(node: NodeProto, fresh: Fresh) -> list[NodeProto]:
    alpha, beta = _attribute(node, "alpha", 1.0), _attribute(node, "beta", 0.0)
    return _scale_and_shift(node, fresh, alpha, [beta], [])


def _scale_and_shift(
    node: NodeProto, fresh: Fresh, scale: float, shift: list[float], dims: list[int]
) -> list[NodeProto]:
    """y = scale · x + shift as Mul and Add with constants."""
    x, y = node.input[0], node.output[0]
    factor, summand, scaled = (fresh(f"{y}_{part}") for part in ("factor", "summand", "scaled"))
    return [
        _constant(factor, [scale], []),
        helper.make_node("Mul", [x, factor], [scaled], fresh(f"{node.name}_scale")),
        _constant(summand, shift, dims),
        helper.make_node("Add", [scaled, summand], [y], node.name),
    ]


def _crop(node: NodeProto, fresh: Fresh) -> list[NodeProto]:
    """Cut off a border, or with `scale` keep that height and width inside its top left corner."""
    left, top, right, bottom = _attribute(node, "border", [0, 0, 0, 0])
    size = _attribute(node, "scale", [])
    end = 2**31 - 1
    ends = [-bottom or end, -right or end]
    if size:
        ends = [top + size[0], left + size[1]]
    cut = helper.make_node(
        "Slice", node.input, node.output, node.name, axes=[2, 3], starts=[top, left], ends=ends
    )
    return [cut]


def _constant(name: str, numbers: list[float], dims: list[int]) -> NodeProto:
    tensor = helper.make_tensor(name, TensorProto.FLOAT, dims, numbers)
    return helper.make_node("Constant", [], [name], name, value=tensor)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(found, default)


RETIRED: dict[str, Rewrite] = {"ImageScaler": _image_scaler, "Affine": _affine, "Crop": _crop}
