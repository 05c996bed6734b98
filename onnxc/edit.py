"""The verbs that passes rewrite a graph with; each is one linear sweep.

Tensors and nodes of the graph library compare by name or structure and are unhashable: compare with
`is`, key by name. Nodes stay in topological order; new ones go in with `insert`, dead ones go out
with `tidy`. Constants are never written to: put a new one in place.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.misc import SynchronizedList

from onnxc import weights

MANY = 200_000  # objects, of a graph with some 20,000 nodes, which the collector walks for long

_Insertions = Mapping[str, Sequence[gs.Node]]


def opset(graph: gs.Graph) -> int:
    """Version of the standard operator set."""
    return int(graph.opset)


def set_opset(graph: gs.Graph, version: int) -> None:
    """Set the version of the standard operator set, in every place that records it."""
    domains = [o for o in graph.import_domains or () if o.domain]
    domains.insert(0, onnx.helper.make_opsetid("", version))
    for inner in walk(graph):
        inner.opset, inner.import_domains = version, domains


def bodies(node: gs.Node) -> list[gs.Graph]:
    """The graphs in a node's attributes: branches of If, bodies of Loop and Scan."""
    if not node.attrs:
        return []
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph, then its nested bodies, depth first."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        pending += reversed([body for node in current.nodes for body in bodies(node)])


def captured(graph: gs.Graph) -> set[str]:
    """Names of the tensors of `graph` that nested bodies read."""
    inner = [body for body in walk(graph) if body is not graph]
    wanted = {tensor.name for body in inner for tensor in reads(body)}
    return wanted & _names(graph) if wanted else set()


def fresh(graph: gs.Graph, name: str) -> str:
    """A name that no tensor or node of the graph or its bodies has, nor was given out before.

    Constant time while nodes are appended; one sweep after `graph.nodes` was assigned anew.
    """
    nodes, taken = graph.__dict__.get("_taken", (None, set()))
    if nodes is not graph.nodes:
        taken |= {n for inner in walk(graph) for n in (*_names(inner), *_node_names(inner))}
        graph.__dict__["_taken"] = (graph.nodes, taken)
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def values(constant: gs.Constant) -> NDArray[Any]:
    """Values of a constant, read-only. External data is mapped, and forgotten after use."""
    held = constant._values
    array: NDArray[Any] = held.load() if isinstance(held, LazyValues) else held
    view: NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


def constant(name: str, array: Any) -> gs.Constant:
    """A constant of any shape and type, 0-d and low-bit ml_dtypes included."""
    return gs.Constant(name, np.asarray(array))


def store(graph: gs.Graph, name: str, array: Any) -> gs.Constant:
    """The same; a large one of a graph that does not fit in memory is kept on disk."""
    made = constant(name, array)
    scratch: weights.Scratch | None = graph.__dict__.get("_scratch")
    if scratch is not None and weights.size(made._values) >= weights.LARGE:
        made._values = scratch.keep(made._values)
    return made


def spill(graph: gs.Graph, scratch: weights.Scratch) -> None:
    """From now on, large values that are stored in a graph go to disk."""
    graph.__dict__["_scratch"] = scratch


def is_spilling(graph: gs.Graph) -> bool:
    """Whether a graph does not fit in memory, so that its weights are worked on one by one."""
    return "_scratch" in graph.__dict__


def nbytes(constant: gs.Constant) -> int:
    """Bytes that a constant takes in a file; low-bit types are packed."""
    return weights.size(constant._values)


def become(graph: gs.Graph, other: gs.Graph) -> None:
    """Give `graph` all that `other` holds; for a pass whose result is a whole new graph."""
    kept = graph.__dict__.get("_taken")
    graph.__dict__.update(other.__dict__)
    graph.__dict__["_taken"] = (None, kept[1] if kept else set())


def constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant that a node of the graph or its bodies reads, or that is an output, once."""
    found: dict[int, gs.Constant] = {}
    for inner in walk(graph):
        for tensor in reads(inner):
            if isinstance(tensor, gs.Constant):
                found[id(tensor)] = tensor
    return list(found.values())


def tidy(graph: gs.Graph) -> None:
    """Drop nodes that no output needs, here and in nested bodies; constants go with their users.

    Inputs and outputs of the graph, and outputs of the nodes that remain, keep their positions.
    """
    makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    pending = [tensor.name for tensor in graph.outputs]
    alive: set[int] = set()
    while pending:
        node = makers.pop(pending.pop(), None)
        if node is not None and id(node) not in alive:
            alive.add(id(node))
            pending += (tensor.name for tensor in _node_reads(node))
    _disconnect([node for node in graph.nodes if id(node) not in alive])
    graph.nodes = [node for node in graph.nodes if id(node) in alive]
    for node in graph.nodes:
        for body in bodies(node):
            tidy(body)


@contextmanager
def uncollected() -> Iterator[None]:
    """For making many objects that stay: the collector would walk them again and again.

    Where they are very many, they join the oldest ones in the end, and are not even walked once.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        is_frozen = gc.get_freeze_count() > 0  # somebody keeps objects from the collector
        if gc.get_count()[0] > MANY and not is_frozen:
            gc.freeze()
            gc.unfreeze()
        if was_on:
            gc.enable()


def clone(graph: gs.Graph) -> gs.Graph:
    """An independent graph, as it would be read again from a file; values are shared."""
    with uncollected():
        return _clone(graph, {})


def _clone(graph: gs.Graph, seen: dict[int, gs.Tensor]) -> gs.Graph:
    """seen: clones of tensors, also of the graphs around it, by the identity of the original."""
    made = gs.Graph(
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=[onnx.helper.make_opsetid(o.domain, o.version) for o in _domains(graph)],
        producer_name=graph.producer_name,
        producer_version=graph.producer_version,
        ir_version=graph.ir_version,
    )
    made.inputs = [_twin(tensor, seen) for tensor in graph.inputs]
    made.outputs = [_twin(tensor, seen) for tensor in graph.outputs]
    made.nodes = [_twin_node(node, seen) for node in graph.nodes]
    return made


def replace_uses(old: gs.Tensor, new: gs.Tensor, keep: Sequence[gs.Node] = ()) -> None:
    """Let every node that reads `old`, nested bodies included, read `new`; not those in `keep`.

    Outputs of the graph stay as they are.
    """
    kept = {id(node) for node in keep}
    users = list(old.outputs)
    list.__setitem__(old.outputs, slice(None), [user for user in users if id(user) in kept])
    for user in (user for user in users if id(user) not in kept):
        for position, tensor in enumerate(user.inputs):
            if tensor is old:  # by the list itself: gs would look through all users for each
                list.__setitem__(user.inputs, position, new)
                list.append(new.outputs, user)


def insert(
    graph: gs.Graph,
    before: Mapping[str, Sequence[gs.Node]] | None = None,
    after: Mapping[str, Sequence[gs.Node]] | None = None,
) -> None:
    """Place new nodes before and after existing ones, by node name, in one sweep.

    Within `gathering`, the sweep comes at its end. Raises KeyError for a name that no node has.
    """
    noted: _Noted | None = graph.__dict__.get("_noted")
    if noted is None:
        _sweep(graph, before or {}, after or {})
        return
    if noted.made & {*(before or {}), *(after or {})}:  # beside a node that is not in place yet
        _place(graph, noted)
    noted.add(before or {}, after or {})


@contextmanager
def gathering(graph: gs.Graph) -> Iterator[None]:
    """For many insertions: new nodes are placed in one sweep at the end, bodies included."""
    graphs = list(walk(graph))
    for inner in graphs:
        inner.__dict__["_noted"] = _Noted()
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for inner in graphs:
            noted = inner.__dict__.pop("_noted")
            if is_done:
                _place(inner, noted)


def first_of(graph: gs.Graph, nodes: Sequence[gs.Node]) -> gs.Node:
    """The one of some nodes that comes first in a graph; constant time while nodes stay in place.

    Raises ValueError where none is in it.
    """
    found = _positions(graph, nodes)
    noted = graph.__dict__.get("_noted")
    if noted is not None and noted.made and len(found) < len(nodes):  # one is not in place yet
        _place(graph, noted)
        found = _positions(graph, nodes)
    first: gs.Node = graph.nodes[min(found)]
    return first


def _positions(graph: gs.Graph, nodes: Sequence[gs.Node]) -> list[int]:
    """Where nodes lie in a graph."""
    known, count, places = graph.__dict__.get("_places", (None, 0, {}))
    found = [places[id(node)] for node in nodes if id(node) in places]
    is_known = known is graph.nodes and count == len(known) and len(found) == len(nodes)
    if not is_known or any(graph.nodes[p] is not n for p, n in zip(found, nodes, strict=True)):
        places = {id(node): position for position, node in enumerate(graph.nodes)}
        graph.__dict__["_places"] = (graph.nodes, len(graph.nodes), places)
        found = [places[id(node)] for node in nodes if id(node) in places]
    return found


@dataclass
class _Noted:
    """New nodes by the name of an existing one, and the names of all of them."""

    ahead: dict[str, list[gs.Node]] = field(default_factory=dict)
    behind: dict[str, list[gs.Node]] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def add(self, before: _Insertions, after: _Insertions) -> None:
        for name, nodes in before.items():
            self.ahead.setdefault(name, []).extend(nodes)
        for name, nodes in after.items():
            self.behind[name] = [*nodes, *self.behind.get(name, ())]
        self.made |= {node.name for some in (before, after) for ns in some.values() for node in ns}


def _place(graph: gs.Graph, noted: _Noted) -> None:
    if noted.made:
        _sweep(graph, noted.ahead, noted.behind)
    noted.ahead, noted.behind, noted.made = {}, {}, set()


def _sweep(graph: gs.Graph, ahead: _Insertions, behind: _Insertions) -> None:
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes += ahead.get(node.name, ())
        nodes.append(node)
        nodes += behind.get(node.name, ())
    unknown = (ahead.keys() | behind.keys()) - {node.name for node in graph.nodes}
    if unknown:
        raise KeyError(min(unknown))
    graph.nodes = nodes


def attributes(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Tensors in the attributes of nodes, nested bodies included."""
    for inner in walk(graph):
        for node in inner.nodes:
            yield from (v for v in node.attrs.values() if isinstance(v, gs.Constant))


def reads(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """What the nodes of one graph read, and its outputs."""
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs


def _node_reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads, its nested bodies included."""
    yield from node.inputs
    for body in bodies(node):
        for inner in walk(body):
            yield from reads(inner)


def _domains(graph: gs.Graph) -> Sequence[onnx.OperatorSetIdProto]:
    return graph.import_domains or ()


def _twin(tensor: gs.Tensor, seen: dict[int, gs.Tensor]) -> gs.Tensor:
    """The clone of a tensor, without makers and readers at first; values are shared from now on."""
    made = seen.get(id(tensor))
    if made is None:
        made = seen[id(tensor)] = object.__new__(type(tensor))
        made.__dict__.update(tensor.__dict__)
        for side, other in (("inputs", "outputs"), ("outputs", "inputs")):
            made.__dict__[side] = SynchronizedList(made, field_name=other, initial=[])
        if isinstance(made, gs.Variable) and isinstance(made.shape, list):
            made.shape = list(made.shape)
        held = made.__dict__.get("_values")
        if isinstance(held, np.ndarray):
            held.flags.writeable = False
    return made


def _twin_node(node: gs.Node, seen: dict[int, gs.Tensor]) -> gs.Node:
    made = object.__new__(gs.Node)  # what its constructor checks was checked before
    made.__dict__.update(node.__dict__)
    made.__dict__["attrs"] = {name: _copied(value, seen) for name, value in node.attrs.items()}
    for side, other in (("inputs", "outputs"), ("outputs", "inputs")):
        twins = [_twin(tensor, seen) for tensor in node.__dict__[side]]
        made.__dict__[side] = SynchronizedList(made, field_name=other, initial=twins)
    return made


def _copied(value: Any, seen: dict[int, gs.Tensor]) -> Any:
    """The value of an attribute for another node."""
    if isinstance(value, gs.Graph):
        return _clone(value, seen)
    if isinstance(value, gs.Tensor):
        return _twin(value, seen)
    return list(value) if isinstance(value, list) else value


def _names(graph: gs.Graph) -> set[str]:
    named = {t.name for t in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        named.update(t.name for t in (*node.inputs, *node.outputs))
    return named - {""}


def _node_names(graph: gs.Graph) -> set[str]:
    return {node.name for node in graph.nodes}


def _disconnect(dead: list[gs.Node]) -> None:
    """Take dead nodes and their bodies out of the lists of the tensors that they touch.

    Each list is rebuilt once: removing one by one, as gs does, compares all pairs of users.
    """
    nested = (n for node in dead for body in bodies(node) for g in walk(body) for n in g.nodes)
    gone = {id(node): node for node in (*dead, *nested)}
    touched = {id(t): t for node in gone.values() for t in (*node.inputs, *node.outputs)}
    for tensor in touched.values():
        for users in (tensor.inputs, tensor.outputs):
            list.__setitem__(users, slice(None), [n for n in users if id(n) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)
