"""What a heavy node ought to give, whatever the nodes before it do by now.

    t = y                where y is what the node gives in the original
    t = s − r̂           where y only goes into a sum s = y + r; r̂ of the rewritten graph

so that what the residual stream has gone wrong by is made good at each block (He 2017, "Channel
pruning for accelerating very deep neural networks", §3.2 on multi-branch networks).
"""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_graphsurgeon as gs

from onnxc.core import Context, Goal, Key
from onnxc.graph import captured
from onnxc.moments import is_wide, moments_key, why_no_moments
from onnxc.ops import (
    QUANTIZERS,
    bounds,
    data_inputs,
    is_absorbed,
    is_constant,
    is_odd_bias,
    knowledge,
    weight_of,
)


def goal_of(node: gs.Node, graph: gs.Graph, context: Context, sums: bool = True) -> Goal:
    """What a node ought to give. sums: what its sum leaves for it, where it goes into one."""
    own = Goal(node.outputs[0].name, knowledge(node).y_axis)
    return (_sum_goal(node, graph, context) if sums else None) or own


def key_of(node: gs.Node, goal: Goal, what: str = "goal") -> Key:
    """Of a node's input together with its goal. what: "goal" or "rows"."""
    key = moments_key(node, what)
    assert key is not None
    return replace(key, goal=goal)


def why_no_goal(node: gs.Node, context: Context) -> str:
    """Why a heavy node cannot be fitted to what it ought to give; empty if it can."""
    reason, weight = why_no_moments(node), weight_of(node)
    if reason or weight is None:
        return f"{reason}"
    row = knowledge(node)
    assert row.window is not None
    if len(weight.shape) > 2 and not row.window(node).kernel:
        return f"the outputs of {node.op} overlap"
    d = math.prod(weight.shape) // _channels(node)[0]
    if is_wide(row.window(node).groups, d):
        return f"with {d} inputs it is too wide"
    other = next((user for user in weight.outputs if user is not node), None)
    if other is not None:
        return f"its weight is shared with {other.name}"
    if is_odd_bias(node):
        return "its bias is not one constant for each output"
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        return "it multiplies its output or its bias by a factor"
    if context.original is None:
        return "the original model is not known"
    maker = _maker(node.outputs[0].name, context.original)
    if maker is None:
        return "it is not in the original"
    is_heavy = knowledge(maker).role == "weighted" and weight_of(maker) is not None
    is_cut = is_heavy and _channels(maker) != _channels(node)
    return "it has other channels than in the original" if is_cut else ""


def _channels(node: gs.Node) -> tuple[int]:
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.out_axis is not None
    return (int(weight.shape[row.out_axis(node)]),)


def _sum_goal(node: gs.Node, graph: gs.Graph, context: Context) -> Goal | None:
    """What the original's sum leaves for this node, where its output only goes into one."""
    pinned = {t.name for t in graph.outputs} | captured(graph)
    y = _behind_quantizers(node.outputs[0], pinned)
    if len(y.outputs) != 1 or y.name in pinned or not knowledge(y.outputs[0]).adds:
        return None
    add = y.outputs[0]
    others = [t for t in data_inputs(add) if t is not y]
    if len(others) != 1 or is_constant(others[0]):
        return None
    shapes = [t.shape for t in (y, others[0], add.outputs[0])]
    if None in shapes or any(list(shape) != list(shapes[0]) for shape in shapes):
        return None
    if not _has_same_sum(add, context) or _depends_on_later(others[0], node, graph):
        return None
    return Goal(add.outputs[0].name, knowledge(node).y_axis, others[0].name)


def _behind_quantizers(tensor: gs.Tensor, pinned: set[str]) -> gs.Tensor:
    """What nodes read that read a tensor in few bits."""
    while len(tensor.outputs) == 1 and tensor.name not in pinned:
        if tensor.outputs[0].op not in QUANTIZERS:
            break
        tensor = tensor.outputs[0].outputs[0]
    return tensor


def _has_same_sum(add: gs.Node, context: Context) -> bool:
    """Whether the original has a sum of that name."""
    assert context.original is not None
    maker = _maker(add.outputs[0].name, context.original)
    return maker is not None and knowledge(maker).adds


def _maker(tensor: str, graph: gs.Graph) -> gs.Node | None:
    return next((n for n in graph.nodes if any(t.name == tensor for t in n.outputs)), None)


def _depends_on_later(tensor: gs.Tensor, node: gs.Node, graph: gs.Graph) -> bool:
    """Whether a heavy node that comes behind `node` has a part in a tensor."""
    order = {id(n): position for position, n in enumerate(graph.nodes)}
    pending, seen = [tensor], set[int]()
    while pending:
        for maker in pending.pop().inputs:
            if id(maker) in seen or id(maker) not in order:
                continue
            seen.add(id(maker))
            is_later = order[id(maker)] > order[id(node)]
            if is_later and knowledge(maker).role == "weighted":
                return True
            pending += [t for t in maker.inputs if not is_constant(t)]
    return False


def ceiling(node: gs.Node, goal: Goal, graph: gs.Graph) -> float | None:
    """The largest output of the ReLU that alone reads a node's output, or the sum it goes into."""
    y = node.outputs[0] if goal.minus is None else node.outputs[0].outputs[0].outputs[0]
    pinned = {t.name for t in graph.outputs} | captured(graph)
    is_alone = len(y.outputs) == 1 and y.name not in pinned
    return bounds(y.outputs[0])[1] if is_alone and is_absorbed(y.outputs[0]) else None
