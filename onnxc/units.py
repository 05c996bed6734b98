"""Small graphs cut out of a rewritten one: a layer alone, fed with tensors of the original.

A unit begins behind the dequantized input of its layer, and ends behind the Q/DQ of its output. An
operator that takes integers gets them of a QuantizeLinear in front, with the scale that it expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, helper

from onnxc.graph import values
from onnxc.twins import INTEGRAL, Scaled, Twin

FLOATED = ":float"  # behind the name of integers: their values


def with_floats(proto: ModelProto, names: Sequence[str], scaled: Mapping[str, Scaled]) -> None:
    """Add the values of integers to a graph, as tensors of the name with FLOATED."""
    for name in names:
        scale = scaled[name]
        _declare(proto, scale)
        proto.graph.node.append(_dequantizer(name, name + FLOATED, scale))


def cut_out(
    twin: Twin,
    proto: ModelProto,
    scaled: Mapping[str, Scaled],
    types: Mapping[str, int],
    rounded: bool = False,
) -> ModelProto:
    """The unit of a layer as a model from the tensors of its cuts to its end.

    Its inputs are called as the tensors of the original. types: ONNX element types of these.
    rounded: inputs go through the Q/DQ that the rewritten graph has there, as kernels need them.
    """
    inside = {node.name for node in twin.unit}
    nodes = [node for node in proto.graph.node if node.name in inside]
    unit = ModelProto(ir_version=proto.ir_version)
    unit.opset_import.extend(proto.opset_import)
    unit.functions.extend(proto.functions)
    unit.graph.name = "unit"
    read = {name for node in nodes for name in node.input}
    renamed: dict[str, str] = {}
    for name, stands_for in twin.cuts:
        integers = _integers(name, twin.unit, scaled)
        behind = _rounded(name, twin.unit, scaled) if rounded else None
        renamed[name] = stands_for if integers is None and behind is None else name
        if integers is not None:
            unit.graph.node.append(_quantizer(stands_for, name, integers))
        elif behind is not None:
            unit.graph.node.append(_quantizer(stands_for, f"{name}:q", behind))
            unit.graph.node.append(_dequantizer(f"{name}:q", name, behind))
        read |= {t.name for t in _grid(integers or behind)}
    for source in dict.fromkeys(stands_for for _, stands_for in twin.cuts):
        kind = types.get(source, TensorProto.FLOAT)
        unit.graph.input.append(helper.make_tensor_value_info(source, kind, None))
    for node in nodes:
        copied = unit.graph.node.add()
        copied.CopyFrom(node)
        copied.input[:] = [renamed.get(name, name) for name in node.input]
    fed = {value.name for value in unit.graph.input}
    unit.graph.initializer.extend(
        t for t in proto.graph.initializer if t.name in read and t.name not in fed
    )
    end = twin.stand_in
    if end in scaled:
        with_floats(unit, [end], scaled)
        end += FLOATED
    unit.graph.output.append(onnx.ValueInfoProto(name=end))
    return unit


def _integers(name: str, unit: Sequence[gs.Node], scaled: Mapping[str, Scaled]) -> Scaled | None:
    """How a unit reads integers of that name; None where it reads them as float."""
    for node in unit:
        row = INTEGRAL.get(node.op)
        for x, scale, zero in row.operands if row else ():
            if node.inputs[x].name == name:
                return Scaled(node.inputs[scale], node.inputs[zero])
    return scaled.get(name)


def _rounded(name: str, unit: Sequence[gs.Node], scaled: Mapping[str, Scaled]) -> Scaled | None:
    """The scale of the Q/DQ behind which a unit reads a tensor of that name."""
    found = next((t for node in unit for t in node.inputs if t.name == name), None)
    if found is None or not found.inputs or found.inputs[0].op != "DequantizeLinear":
        return None
    return scaled.get(found.inputs[0].inputs[0].name)


def _grid(scale: Scaled | None) -> list[gs.Tensor]:
    return [] if scale is None else [t for t in (scale.scale, scale.zero) if t is not None]


def _quantizer(source: str, name: str, scale: Scaled) -> onnx.NodeProto:
    grid = [t.name for t in _grid(scale)]
    return helper.make_node("QuantizeLinear", [source, *grid], [name])


def _dequantizer(source: str, name: str, scale: Scaled) -> onnx.NodeProto:
    grid = [t.name for t in _grid(scale)]
    return helper.make_node("DequantizeLinear", [source, *grid], [name])


def _declare(proto: ModelProto, scale: Scaled) -> None:
    """Put the constants of a scale into a graph that was cut down, where they are missing."""
    held = {t.name for t in proto.graph.initializer}
    for tensor in _grid(scale):
        if isinstance(tensor, gs.Constant) and tensor.name not in held:
            made = onnx.numpy_helper.from_array(values(tensor), tensor.name)
            proto.graph.initializer.append(made)
