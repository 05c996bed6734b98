"""Where Q/DQ pairs go: which nodes compute in integers, and which tensors carry a scale.

A node computes in integers when its input, its weight and (for a convolution) its output are
quantized. From those heavy nodes the integers spread over the cheap operators between them:

    heavy      Conv, Gemm, MatMul with constant weights: the reason for all of it
    sum        Add, Mul, Concat, pools, Sigmoid …: join where everything they read is quantized; for
               an Add one summand is enough, as quantizing the other costs less than adding in float
    same       MaxPool, Reshape, Slice …: join likewise, and keep the scale of what they read
    absorbed   Relu or Clip behind a joined node: its bounds become those of the output's range

and only where integers lead to another heavy node: at the end of a graph they would cost accuracy
and save nothing. Tensors that a Concat alone reads share its output's scale: it copies integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Context, Key
from onnxc.graph import captured
from onnxc.integer import weighted_nodes
from onnxc.ops import bounds, data_inputs, is_absorbed, is_constant, knowledge


@dataclass
class Placement:
    """Integer nodes in graph order, and the tensors that carry Q/DQ pairs.

    scale_of: the tensor whose scale a quantized tensor shares.
    """

    integer: list[gs.Node] = field(default_factory=list)
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    scale_of: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """The tensor whose values settle the scale of another one."""
        while self.scale_of.get(name, name) != name:
            name = self.scale_of[name]
        return name

    def keys(self) -> dict[str, Key]:
        """The statistic that settles the range of each root."""
        roots = {name: self.root(name) for name in self.tensors}
        shared = {root for name, root in roots.items() if name != root}
        integer = {id(node) for node in self.integer}
        return {root: self._key(root, shared, integer) for root in roots.values()}

    def touching(self, roots: set[str]) -> Iterator[gs.Node]:
        """Integer nodes that read or make a tensor with the scale of one of these roots."""
        for node in self.integer:
            made = (behind_activation(t, set()) for t in node.outputs)
            names = (t.name for t in (*data_inputs(node), *node.outputs, *made))
            if any(name in self.tensors and self.root(name) in roots for name in names):
                yield node

    def add(self, tensor: gs.Tensor, scale_of: gs.Tensor | None = None) -> None:
        """Give a tensor a Q/DQ pair, with its own scale or that of another one."""
        if tensor.name not in self.tensors:
            self.tensors[tensor.name] = tensor
            self.scale_of[tensor.name] = (scale_of or tensor).name

    def _key(self, root: str, shared: set[str], integer: set[int]) -> Key:
        """That of its values x, or where an Add and a clamp f alone read them, of f(x + s) − s.

        s is the other summand: a value counts no further than they let it through.
        """
        tensor = self.tensors[root]
        if root in shared or len(tensor.outputs) != 1 or id(tensor.outputs[0]) not in integer:
            return Key(root, "histogram")
        reader = tensor.outputs[0]
        others = [t for t in data_inputs(reader) if t is not tensor]
        behind = behind_activation(reader.outputs[0], set())
        if not knowledge(reader).adds or len(others) != 1 or behind is reader.outputs[0]:
            return Key(root, "histogram")
        return Key(behind.name, "histogram", minus=others[0].name)


def place(
    graph: gs.Graph,
    context: Context,
    spread: bool = True,
    ops: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
) -> Placement:
    """Choose the integer nodes of a graph and the tensors between them.

    spread: cheap operators join. ops: heavy nodes of these operators only. leave: names of nodes
    that stay float.
    """
    placement = Placement()
    left = frozenset(leave)
    heavy = {id(n) for n in weighted_nodes(graph, context, ops) if n.name not in left}
    allowed = context.only.names(graph) - left if spread else frozenset[str]()
    pinned = {t.name for t in graph.outputs} | captured(graph)
    wanted = _leading(graph, heavy)
    for node in graph.nodes:
        if id(node) in heavy:
            placement.add(node.inputs[0])
        elif not (node.name in allowed and _can_join(node, placement, wanted)):
            continue
        for summand in data_inputs(node) if knowledge(node).adds else ():
            placement.add(summand)
        placement.integer.append(node)
        _place_output(node, placement, wanted, pinned)
        if knowledge(node).copies:
            _share_scale(node, placement, pinned)
    return placement


def differences(graph: gs.Graph) -> Iterator[Key]:
    """The statistics of f(x + s) − s that any placement in this graph may want, see `keys`."""
    for node in graph.nodes:
        summands = data_inputs(node) if knowledge(node).adds else []
        behind = behind_activation(node.outputs[0], set()) if len(summands) == 2 else None
        if behind is None or behind is node.outputs[0] or any(map(is_constant, summands)):
            continue
        for tensor, other in (summands, summands[::-1]):
            if len(tensor.outputs) == 1 and tensor is not other and _are_float(node):
                yield Key(behind.name, "histogram", minus=other.name)


def behind_activation(tensor: gs.Tensor, pinned: set[str]) -> gs.Tensor:
    """The tensor behind a Relu or Clip(0, h) that alone reads this one, or the tensor itself."""
    while len(tensor.outputs) == 1 and tensor.name not in pinned:
        reader = tensor.outputs[0]
        if not is_absorbed(reader) or reader.inputs[0] is not tensor:
            break
        tensor = reader.outputs[0]
    return tensor


def _leading(graph: gs.Graph, heavy: set[int]) -> set[str]:
    """Names of the tensors that a heavy node reads, directly or through operators that may join."""
    leading: set[str] = set()
    for node in reversed(graph.nodes):
        if id(node) in heavy:
            leading.add(node.inputs[0].name)
        elif _may_carry(node) and any(t.name in leading for t in node.outputs):
            leading.update(t.name for t in data_inputs(node))
    return leading


def _may_carry(node: gs.Node) -> bool:
    """Whether an operator has a kernel on integers, and reads activations alone."""
    row = knowledge(node)
    fits = row.role in ("sum", "same", "activation") and (row.fits is None or row.fits(node))
    return fits and not any(map(is_constant, data_inputs(node)))


def _can_join(node: gs.Node, placement: Placement, wanted: set[str]) -> bool:
    """All that it reads is quantized, and integers that it makes are read by a heavy node."""
    if knowledge(node).role == "activation" or not _may_carry(node):
        return False
    held = [t.name in placement.tensors for t in data_inputs(node)]
    is_held = all(held) or (knowledge(node).adds and any(held) and _are_float(node))
    return is_held and any(t.name in wanted for t in node.outputs)


def _are_float(node: gs.Node) -> bool:
    return all(t.dtype == np.float32 for t in data_inputs(node))


def _share_scale(node: gs.Node, placement: Placement, pinned: set[str]) -> None:
    """Give tensors that a Concat alone reads the scale of its output, so that it copies integers.

    It would round to that scale anyway. A clamped tensor keeps its own scale beside one with other
    bounds: the kernel that makes it could not absorb the clamp.
    """
    result = behind_activation(node.outputs[0], pinned)
    clamps = {t.name: _clamp(t) for t in data_inputs(node)}
    for tensor in data_inputs(node):
        is_root = placement.scale_of.get(tensor.name) == tensor.name
        is_alone = len(tensor.outputs) == 1 and tensor.name not in pinned
        fits = clamps[tensor.name] is None or len(set(clamps.values())) == 1
        if is_root and is_alone and fits:
            placement.scale_of[tensor.name] = result.name


def _clamp(tensor: gs.Tensor) -> tuple[float, float] | None:
    """Bounds of the activation that makes a tensor; None for another maker."""
    is_clamped = bool(tensor.inputs) and is_absorbed(tensor.inputs[0])
    return bounds(tensor.inputs[0]) if is_clamped else None


def _place_output(node: gs.Node, placement: Placement, wanted: set[str], pinned: set[str]) -> None:
    row = knowledge(node)
    for output in node.outputs:
        behind = output if row.role == "same" else behind_activation(output, pinned)
        is_needed = behind.name in wanted or not row.float_output
        if is_needed and output.name and output.dtype in (None, np.float32):
            placement.add(behind, data_inputs(node)[0] if row.role == "same" else None)
