"""One normal form for every model, so that passes meet no surprises.

    constants      Constant nodes become initializers; an initializer is no input as well
    order          nodes sorted, stably: a node comes after all that it and its bodies read
    names          every node has a name of its own; no body hides a name of the graph around it
    functions      inlined, as ONNX Runtime does
    versions       the domain "ai.onnx" is ""; ir_version 8, or what opset and types need, to 10

What changes for the user is told in a sentence. What the graph library cannot hold is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from onnxc import weights
from onnxc.errors import ModelError

_LOWEST_IR, _HIGHEST_IR = 8, 10  # initializers need no input · what ONNX Runtime 1.22 reads
_FLOAT8E8M0 = 24  # TensorProto has the name from onnx 1.19 on
_IR_OF_TYPES = (  # element types that came with an ir_version
    (range(TensorProto.FLOAT8E4M3FN, TensorProto.UINT4), 9),
    (range(TensorProto.UINT4, TensorProto.FLOAT4E2M1), 10),
    (range(TensorProto.FLOAT4E2M1, _FLOAT8E8M0), 11),
    (range(_FLOAT8E8M0, _FLOAT8E8M0 + 1), 12),
    (range(_FLOAT8E8M0 + 1, 64), 13),
)
_KINDS = frozenset(TensorProto.DataType.values())
_UNCHECKED = "unchecked"
_EXPERIMENTAL = frozenset(  # ops of opset 1 without a schema: the checker prints that it skips them
    ("ATen", "Affine", "ConstantFill", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill")
) | {"ImageScaler", "ParametricSoftplus", "Scale", "ScaledTanh"}
_REFUSED_INPUTS = {
    "map_type": "a map",
    "optional_type": "optional",
    "sparse_tensor_type": "a sparse tensor",
}


def graphs(graph: GraphProto, scope: str = "") -> Iterator[tuple[str, GraphProto]]:
    """A graph and its nested bodies with their scopes: "" and "node.attribute", depth first."""
    pending = [(scope, graph)]
    while pending:
        name, current = pending.pop()
        yield name, current
        inner = [
            (f"{node.name}.{attribute.name}", attribute.g)
            for node in current.node
            for attribute in node.attribute
            if attribute.HasField("g")
        ]
        pending += reversed(inner)


def refuse(model: ModelProto) -> None:
    """Raise ModelError for what would be lost or misread on the way through the graph library."""
    for value in model.graph.input:
        kind = value.type.WhichOneof("value") or ""
        if kind in _REFUSED_INPUTS:
            what = _REFUSED_INPUTS[kind]
            raise ModelError(f"input {value.name!r} is {what}; onnxc takes tensors and sequences")
    counts = Counter((f.domain, f.name, f.overload) for f in model.functions)
    for (domain, name, _), count in counts.items():
        if count > 1:  # one of them would be taken, by chance
            raise ModelError(
                f"there are {count} local functions {domain}.{name}; give each its own name"
            )
    for _, graph in graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _refuse_type(value)
        for sparse in graph.sparse_initializer:
            raise ModelError(
                f"initializer {sparse.values.name!r} is sparse, which onnxc cannot carry; "
                f"store it dense"
            )
        for node in graph.node:
            _refuse_node(node)


def normalize(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """The model in normal form, and what a user should know. Edits its argument."""
    notes: list[str] = []
    _set_domains(model)
    model = _inline(model, notes)
    _drop_training(model, notes)
    for step in (_drop_default_inputs, _lower_constants, _name_graphs):
        step(model, notes)
    taken = {name for _, graph in graphs(model.graph) for name in _defined(graph)}
    _unhide(model.graph, frozenset(), _fresh(taken))
    _sort(model.graph)
    _name_nodes(model.graph)
    _set_ir_version(model, notes)
    return model, notes


def check(model: ModelProto) -> None:
    """Raise ModelError with the first complaint of the ONNX checker about a skeleton."""
    hollow = ModelProto()
    hollow.CopyFrom(model)
    weights.empty(hollow.graph)
    hollow.opset_import.append(onnx.helper.make_opsetid(_UNCHECKED, 1))
    for _, graph in graphs(hollow.graph):
        for node in graph.node:
            if node.op_type in _EXPERIMENTAL and not node.domain:
                node.domain = _UNCHECKED
    try:
        onnx.checker.check_model(hollow)
    except onnx.checker.ValidationError as error:
        lines = [line.removeprefix("==> Context: ") for line in str(error).splitlines() if line]
        raise ModelError(f"the graph is invalid: {'; '.join(lines[:2])}") from error


def least_ir_version(model: ModelProto) -> int:
    """The lowest ir_version that the operator sets and element types of a skeleton allow."""
    known = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    kinds = {tensor.data_type for tensor in weights.tensors(model.graph)}
    for _, graph in graphs(model.graph):
        ports = (*graph.input, *graph.output, *graph.value_info)
        kinds |= {value.type.tensor_type.elem_type for value in ports}
    needed = [version for types, version in _IR_OF_TYPES if kinds.intersection(types)]
    return max(_LOWEST_IR, min(known, _HIGHEST_IR), *needed)


def assign(field: Any, items: Iterable[Any]) -> None:
    """Set a repeated field to some of its own messages, in this order."""
    copies = []
    for item in items:
        copies.append(type(item)())
        copies[-1].CopyFrom(item)
    del field[:]
    field.extend(copies)


def _refuse_node(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPHS:
            raise ModelError(
                f"{node.op_type} node {node.name!r} has a list of graphs as attribute "
                f"{attribute.name!r}, which onnxc cannot carry"
            )
        if node.op_type != "Constant" and attribute.t.data_location == TensorProto.EXTERNAL:
            raise ModelError(
                f"{node.op_type} node {node.name!r} keeps attribute {attribute.name!r} in an "
                f"external file, which onnxc cannot carry"
            )


def _refuse_type(value: ValueInfoProto) -> None:
    kind = value.type.tensor_type.elem_type
    if kind not in _KINDS:
        raise ModelError(
            f"tensor {value.name!r} is of the element type {kind}, which this onnxc does not know"
        )


def _set_domains(model: ModelProto) -> None:
    versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    if not versions and model.ir_version < 3:
        versions = {"": 1}  # before ir_version 3 there was one operator set, and no field for it
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in versions.items())
    for _, graph in graphs(model.graph):
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""


def _inline(model: ModelProto, notes: list[str]) -> ModelProto:
    if not model.functions:
        return model
    count = len(model.functions)
    try:
        inlined = onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the local functions cannot be inlined: {reason}") from error
    done = count - len(inlined.functions)
    if done:
        what = "local function was" if done == 1 else "local functions were"
        notes.append(f"{done} {what} inlined, as ONNX Runtime does")
    return inlined


def _drop_training(model: ModelProto, notes: list[str]) -> None:
    if model.training_info:
        del model.training_info[:]
        notes.append("training information was dropped")


def _drop_default_inputs(model: ModelProto, notes: list[str]) -> None:
    dropped: list[str] = []
    for _, graph in graphs(model.graph):
        constant = {tensor.name for tensor in graph.initializer}
        plain = [value for value in graph.input if value.name not in constant]
        if graph is model.graph:
            dropped = [value.name for value in graph.input if value.name in constant]
        if len(plain) < len(graph.input):
            assign(graph.input, plain)
    if dropped and model.ir_version >= 4:
        some = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
        notes.append(
            f"{len(dropped)} weights were also inputs with a default ({some}); they are fixed now"
        )


def _lower_constants(model: ModelProto, notes: list[str]) -> None:
    for _, graph in graphs(model.graph):
        outputs = {value.name for value in graph.output}
        kept = []
        for node in graph.node:
            tensor = None if outputs.intersection(node.output) else _value(node)
            if tensor is None:
                kept.append(node)
                continue
            graph.initializer.append(tensor)
            graph.initializer[-1].name = node.output[0]
        if len(kept) < len(graph.node):
            assign(graph.node, kept)


def _value(node: NodeProto) -> TensorProto | None:
    """What a Constant node holds; None for other nodes and for sparse values."""
    if node.op_type != "Constant" or node.domain or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value" and attribute.HasField("t"):
        value: TensorProto = attribute.t
        return value
    read = _READ.get(attribute.name)
    return read(attribute) if read else None


_READ: dict[str, Callable[[AttributeProto], TensorProto]] = {
    "value_float": lambda a: weights.to_tensor("", np.array(a.f, np.float32)),
    "value_floats": lambda a: weights.to_tensor("", np.array(a.floats, np.float32)),
    "value_int": lambda a: weights.to_tensor("", np.array(a.i, np.int64)),
    "value_ints": lambda a: weights.to_tensor("", np.array(a.ints, np.int64)),
    "value_string": lambda a: weights.to_tensor("", np.array(a.s, object)),
    "value_strings": lambda a: weights.to_tensor("", np.array(list(a.strings), object)),
}


def _name_graphs(model: ModelProto, notes: list[str]) -> None:
    """The checker wants a name for every graph; exporters leave it blank."""
    for number, (_, graph) in enumerate(graphs(model.graph)):
        graph.name = graph.name or f"graph_{number}"


def _defined(graph: GraphProto) -> set[str]:
    made = {name for node in graph.node for name in node.output if name}
    return made | {t.name for t in graph.initializer} | {v.name for v in graph.input}


def _fresh(taken: set[str]) -> Callable[[str], str]:
    """A function from a wanted name to one that is neither taken nor given out before."""
    given = Counter[str]()

    def fresh(name: str) -> str:
        candidate = name
        while candidate in taken:
            given[name] += 1
            candidate = f"{name}_{given[name]}"
        taken.add(candidate)
        return candidate

    return fresh


def _unhide(graph: GraphProto, outer: frozenset[str], fresh: Callable[[str], str]) -> None:
    """Rename what a nested body defines under a name of the graph around it."""
    hidden = _defined(graph) & outer
    if hidden:
        _rename(graph, {name: fresh(name) for name in sorted(hidden)})
    visible = outer | _defined(graph)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _unhide(attribute.g, visible, fresh)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                own = _defined(attribute.g)
                _rename(attribute.g, {a: b for a, b in names.items() if a not in own})


def nested_reads(node: NodeProto) -> set[str]:
    """Names that a node reads, with all that its bodies mention."""
    names = set(node.input)
    for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
        for _, inner in graphs(body):
            names.update(name for n in inner.node for name in n.input)
            names.update(value.name for value in inner.output)
    names.discard("")
    return names


def _sort(graph: GraphProto) -> None:
    for _, inner in graphs(graph):
        order = _order(inner)
        if order != sorted(order):
            assign(inner.node, [inner.node[i] for i in order])


def _order(graph: GraphProto) -> list[int]:
    """Kahn's algorithm; among nodes that are ready the first in the file goes first."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needs = [{maker[r] for r in nested_reads(node) if r in maker} for node in graph.node]
    users: list[list[int]] = [[] for _ in needs]
    for user, makers in enumerate(needs):
        for made_by in makers:
            users[made_by].append(user)
    waiting = [len(makers) for makers in needs]
    ready = [i for i, count in enumerate(waiting) if not count]
    heapify(ready)
    order = []
    while ready:
        order.append(heappop(ready))
        for user in users[order[-1]]:
            waiting[user] -= 1
            if not waiting[user]:
                heappush(ready, user)
    if len(order) < len(needs):
        stuck = graph.node[next(i for i, count in enumerate(waiting) if count)]
        raise ModelError(
            f"the graph is invalid: {stuck.op_type} node {stuck.name!r} is part of a cycle"
        )
    return order


def _name_nodes(graph: GraphProto) -> None:
    """Blank names become {op}_{position}; a repeated name gets a number, the first keeps it."""
    nodes = [node for _, inner in graphs(graph) for node in inner.node]
    fresh = _fresh({node.name for node in nodes})
    seen = {""}
    for position, node in enumerate(nodes):
        if node.name in seen:
            node.name = fresh(node.name or f"{node.op_type}_{position}")
        seen.add(node.name)


def _set_ir_version(model: ModelProto, notes: list[str]) -> None:
    old, least = model.ir_version, least_ir_version(model)
    model.ir_version = max(least, min(old, _HIGHEST_IR))
    if model.ir_version != old:
        how = "raised" if old < model.ir_version else "lowered"
        notes.append(f"ir_version {how} from {old} to {model.ir_version}")
