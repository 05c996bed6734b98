"""Which tensor of a rewritten graph stands for which of the original, and what makes it there.

A layer of the original makes a tensor y, behind its activation, of the tensors x that it reads. In
the rewritten graph the same names stand for them, or these with what tools put behind a name, or
they hang between Q and DQ nodes whose source has the name; where no name is left, layers of equal
weights pair up in the order of both graphs. The **unit** of a layer is all nodes between what
stands for x and what stands for y there: factors of low rank, Q/DQ of its output, or one integer
operator.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxc.core import Skip
from onnxc.macs import MACS
from onnxc.ops import is_absorbed, knowledge, weight_of

MARK = re.compile(
    r"(_(?:De)?[Qq]uantizeLinear_(?:Input|Output)|_QuantizeInput|_(?:de)?quantized|_float)(_\d+)?$"
)
LONGEST = 64  # nodes of a unit: more are no layer
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Integral:
    """An operator on integers: where its operands are, and what its output stands for.

    operands: positions of each as (tensor, scale, zero); the second is the weight of one that
    multiplies. y: positions of the (scale, zero) of the output; without them it is float.
    """

    operands: tuple[tuple[int, int, int], ...]
    y: tuple[int, int]


_TWO, _ONE = ((0, 1, 2), (3, 4, 5)), ((0, 1, 2),)
INTEGRAL = {
    **{op: Integral(_TWO, (6, 7)) for op in ("QLinearConv", "QLinearMatMul")},
    **{op: Integral(_TWO, (6, 7)) for op in ("QLinearAdd", "QLinearMul")},
    "QGemm": Integral(_TWO, (7, 8)),
    **{op: Integral(_ONE, (3, 4)) for op in ("QLinearGlobalAveragePool", "QLinearAveragePool")},
    **{op: Integral(_ONE, (3, 4)) for op in ("QLinearSigmoid", "QLinearLeakyRelu")},
    "QLinearConcat": Integral(((2, 3, 4),), (0, 1)),
}
HEAVY = {**dict.fromkeys(MACS, 1), "MatMulInteger": 1, "ConvInteger": 1, "MatMulNBits": 1}
HEAVY |= {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # where they have their weight


@dataclass(frozen=True)
class Scaled:
    """The scale and the zero point of integers, as constants of the rewritten graph."""

    scale: gs.Tensor
    zero: gs.Tensor | None


@dataclass(frozen=True)
class Twin:
    """A layer in both graphs.

    node, op: of the original; those of a graph input are its name and "input". tensor: of the
    original. stand_in: of the rewritten graph. axis: of its channels. unit: nodes that make it, in
    order. cuts: where the unit begins, each with the tensor of the original that it stands for.
    reason: why the unit is not known. heavy: whether it multiplies. carrier: the node of the
    rewritten graph that multiplies, if there is one.
    """

    node: str
    op: str
    tensor: str
    stand_in: str
    axis: int
    unit: tuple[gs.Node, ...] = ()
    cuts: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    heavy: bool = True
    carrier: gs.Node | None = None


@dataclass(frozen=True)
class Twins:
    """Layers found in both graphs, in order, and those that are not, with the reason.

    standing: the tensor of the rewritten graph for each one of the original that is read or made.
    scaled: what integers of the rewritten graph stand for, by name.
    """

    found: tuple[Twin, ...]
    lost: tuple[Skip, ...]
    standing: dict[str, str]
    scaled: dict[str, Scaled]


def match(original: gs.Graph, rewritten: gs.Graph) -> Twins:
    """Find the layers of a graph in another one that was made of it."""
    other = Rewritten(rewritten, frozenset(_names(original)))
    found: list[Twin] = []
    lost: list[gs.Node] = []
    found += [x for x in (_input(tensor, other) for tensor in original.inputs) if x is not None]
    for node in original.nodes:
        twin = _twin(node, other)
        if twin is not None:
            found.append(twin)
        elif is_heavy(node):
            lost.append(node)
    paired = _by_weights(lost, found, other)
    found += paired.values()
    order = {node.name: index for index, node in enumerate(original.nodes)}
    found.sort(key=lambda twin: order.get(twin.node, -1))
    skips = (Skip(n.name, _why(n, other)) for n in lost if n.name not in paired)
    read = {t.name for n in original.nodes for t in (*n.inputs, *n.outputs) if t.name}
    standing = {name: end.name for name in read if (end := other.end(name)) is not None}
    standing |= {twin.tensor: twin.stand_in for twin in found}
    return Twins(tuple(found), tuple(skips), standing, other.scaled)


def is_heavy(node: gs.Node) -> bool:
    """Whether a node multiplies activations, by weights or by each other."""
    return node.op in MACS


class Rewritten:
    """A graph whose tensors are looked up by the names that they had in the original."""

    def __init__(self, graph: gs.Graph, known: frozenset[str]) -> None:
        self.graph, self.known = graph, known
        self.order = {id(node): index for index, node in enumerate(graph.nodes)}
        self.family: defaultdict[str, list[gs.Tensor]] = defaultdict(list)
        self.scaled: dict[str, Scaled] = {}
        for tensor in graph.inputs:
            self._enter(tensor)
        for node in graph.nodes:
            self._enter_integers(node)
            for tensor in node.outputs:
                self._enter(tensor)

    def base(self, name: str) -> str:
        """The name in the original."""
        while name not in self.known and (cut := MARK.sub("", name)) != name:
            name = cut
        return name

    def end(self, name: str) -> gs.Tensor | None:
        """What stands for a tensor, as float where there is such a tensor; else its integers."""
        found = self.family.get(name)
        return found[-1] if found else None

    def follow(self, name: str, stand_in: str) -> None:
        """Let a tensor be represented by those of another one, whose activation it is behind."""
        self.family[name] = self.family[stand_in]

    def between(self, end: gs.Tensor, starts: Iterable[str]) -> tuple[list[gs.Node], list[str]]:
        """Nodes that make a tensor of these, in order, and those of these that they read.

        No nodes where they read something else that is no constant.
        """
        stops, cuts, nodes = frozenset(starts), dict[str, None](), dict[int, gs.Node]()
        waiting = [end]
        while waiting:
            tensor = waiting.pop()
            if tensor.name in stops and tensor is not end:
                cuts[tensor.name] = None
                continue
            if isinstance(tensor, gs.Constant) or not tensor.name:
                continue
            if not tensor.inputs or len(nodes) > LONGEST:
                return [], []
            maker = tensor.inputs[0]
            if id(maker) not in nodes:
                nodes[id(maker)] = maker
                waiting += maker.inputs
        ordered = sorted(nodes.values(), key=lambda node: self.order[id(node)])
        return ordered, list(cuts)

    def _enter(self, tensor: gs.Tensor) -> None:
        """A tensor, and the float ones that come of rounding it."""
        base = self.base(tensor.name)
        if base not in self.known:
            return
        self.family[base].append(tensor)
        for quantizer in (n for n in tensor.outputs if n.op == "QuantizeLinear"):
            rounded = quantizer.outputs[0]
            back = [n.outputs[0] for n in rounded.outputs if n.op == "DequantizeLinear"]
            known = {id(t) for t in self.family[base]}
            self.family[base] += [t for t in (rounded, *back) if id(t) not in known]

    def _enter_integers(self, node: gs.Node) -> None:
        row = INTEGRAL.get(node.op)
        if row is not None and max(row.y) < len(node.inputs):
            scale, zero = (node.inputs[i] for i in row.y)
            self.scaled[node.outputs[0].name] = Scaled(scale, zero)
        elif node.op == "QuantizeLinear":
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            self.scaled[node.outputs[0].name] = Scaled(node.inputs[1], zero)


def _names(graph: gs.Graph) -> Iterator[str]:
    yield from (tensor.name for tensor in graph.inputs)
    yield from (t.name for node in graph.nodes for t in node.outputs if t.name)


def _input(tensor: gs.Tensor, other: Rewritten) -> Twin | None:
    """A graph input that is rounded before it is read."""
    end = other.end(tensor.name)
    if end is None or not _is_rounded(end) or end.name == tensor.name:
        return None
    nodes, cuts = other.between(end, {tensor.name})
    pairs = tuple((cut, tensor.name) for cut in cuts)
    return Twin(*(tensor.name, "input", tensor.name, end.name, 1, tuple(nodes), pairs), heavy=False)


def _is_rounded(tensor: gs.Tensor) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


def _twin(node: gs.Node, other: Rewritten) -> Twin | None:
    """A layer by the names of its tensors; of other nodes, those whose output is rounded."""
    row = knowledge(node)
    if not node.outputs or is_absorbed(node) or (not is_heavy(node) and row.role == "same"):
        return None
    tensor = _made(node, other)
    end = None if tensor is None else other.end(tensor.name)
    if tensor is None or end is None or not (is_heavy(node) or _is_rounded(end)):
        return None
    return _with_unit(node, tensor, end, other)


def _made(node: gs.Node, other: Rewritten) -> gs.Tensor | None:
    """What a node makes, behind the activation that reads it, where the other graph has that."""
    made = node.outputs[0]
    behind = _behind(made)
    if behind is made or other.end(behind.name) is not None:
        return behind
    if made.name not in other.family:
        return None
    activation = made.outputs[0].op
    readers = (reader.op for t in other.family[made.name] for reader in t.outputs)
    if activation in readers:
        return made
    other.follow(behind.name, made.name)  # its integers have the bounds of the activation
    return behind


def _behind(tensor: gs.Tensor) -> gs.Tensor:
    if len(tensor.outputs) == 1 and is_absorbed(tensor.outputs[0]):
        return tensor.outputs[0].outputs[0]
    return tensor


def _with_unit(node: gs.Node, tensor: gs.Tensor, end: gs.Tensor, other: Rewritten) -> Twin:
    reads = [t.name for t in _reads(node)]
    starts = {t.name: name for name in reads for t in other.family.get(name, ())}
    nodes, cuts = other.between(end, starts)
    carrier = _carrier(end, nodes)
    if not cuts and carrier is not None and len(reads) == 1:
        starts = {carrier.inputs[0].name: reads[0]}
        nodes, cuts = other.between(end, starts)
    heavy = is_heavy(node)
    axis = knowledge(node).y_axis if weight_of(node) is not None else _axis(tensor)
    reason = "" if cuts else "what it reads is not found in the other model"
    pairs = tuple((cut, starts[cut]) for cut in cuts)
    unit = tuple(nodes) if cuts else ()
    return Twin(
        *(node.name, node.op, tensor.name, end.name, axis, unit, pairs, reason, heavy, carrier)
    )


def _reads(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that a node reads which are no constants."""
    return [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]


def _axis(tensor: gs.Tensor) -> int:
    return 1 if len(tensor.shape or ()) > 3 else -1


def _carrier(end: gs.Tensor, nodes: list[gs.Node]) -> gs.Node | None:
    """The last node that multiplies, among these or on the way back from a tensor."""
    for node in reversed(nodes):
        if node.op in HEAVY:
            return node
    steps = 0
    while end.inputs and steps < LONGEST:
        maker, steps = end.inputs[0], steps + 1
        if maker.op in HEAVY:
            return maker
        moving = [t for t in maker.inputs if t.name and not isinstance(t, gs.Constant)]
        if len(moving) != 1:
            return None
        end = moving[0]
    return None


def _by_weights(lost: list[gs.Node], found: list[Twin], other: Rewritten) -> dict[str, Twin]:
    """Layers that kept no name: by that of the node, else in order among those of equal weights."""
    taken = {id(twin.carrier) for twin in found if twin.carrier is not None}
    free = [n for n in other.graph.nodes if n.op in HEAVY and id(n) not in taken]
    mine: defaultdict[Shape, list[gs.Node]] = defaultdict(list)
    theirs: defaultdict[Shape, list[gs.Node]] = defaultdict(list)
    for node in lost:
        mine[weight_shape(node)].append(node)
    for node in free:
        theirs[weight_shape(node)].append(node)
    pairs: dict[str, Twin] = {}
    for shape, nodes in mine.items():
        partners = theirs.get(shape, [])
        if shape and len(partners) == len(nodes):
            pairs |= {n.name: _placed(n, m, other) for n, m in zip(nodes, partners, strict=True)}
    return pairs


def _placed(node: gs.Node, partner: gs.Node, other: Rewritten) -> Twin:
    """A layer whose partner is known."""
    made, behind = node.outputs[0], _behind(node.outputs[0])
    tensor, end = made, partner.outputs[0]
    beyond = _behind(end)
    if behind is not made and (beyond is not end or end.name in other.scaled):
        tensor, end = behind, beyond
    for quantizer in (n for n in end.outputs if n.op == "QuantizeLinear"):
        back = [n.outputs[0] for n in quantizer.outputs[0].outputs if n.op == "DequantizeLinear"]
        end = back[0] if back else end
    other.family[tensor.name].append(end)
    return _with_unit(node, tensor, end, other)


def weight_shape(node: gs.Node) -> Shape:
    """Of what a node multiplies by, as it is stored; empty where that is computed."""
    position = HEAVY.get(node.op, 1)
    tensor = node.inputs[position] if position < len(node.inputs) else None
    while tensor is not None and not isinstance(tensor, gs.Constant):
        maker = tensor.inputs[0] if tensor.inputs else None
        is_stored = maker is not None and maker.op in ("DequantizeLinear", "Identity", "Cast")
        tensor = maker.inputs[0] if maker is not None and is_stored else None
    return () if tensor is None else tuple(tensor.shape)


def _why(node: gs.Node, other: Rewritten) -> str:
    if not any(n.op in HEAVY for n in other.graph.nodes):
        return "the other model has no such layers"
    return f"no tensor there is called {node.outputs[0].name}, and no layer left has its weights"
