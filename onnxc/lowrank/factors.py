"""Put several layers in the place of one heavy node, which becomes the last of them.

    Conv            convolutions; each spatial axis is strided and padded where its kernel is wide
    Gemm, MatMul    products; where rows of x are taken apart, see `onnxc.lowrank.regrouped`
    LSTM, GRU       a MatMul in front, for the weight of the input: W x = B (A x)

The node keeps its name, and its output the tensor's, so that what comes behind does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.edit import fresh, insert, store, values
from onnxc.lowrank import regrouped
from onnxc.moments import matrix
from onnxc.numerics.lowrank_structures import Stage
from onnxc.ops import groups, knowledge, weight_of

Array = NDArray[Any]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """What is known of an operator that may become several.

    tensor: its weight as W (groups, o, c, *kernel). op: of the layers in front. front, last: the
    attributes of a layer in front (its number, first 0) and of the node itself. weight: the array
    of a stage, for a layer in front or, given the shape of the old weight, for the node itself.
    splits: whether rows of x are its last axis, so that they can be taken for other samples.
    """

    tensor: Callable[[gs.Node, Array], Array]
    op: str
    front: Callable[[gs.Node, Stage, int], dict[str, Any]]
    last: Callable[[gs.Node, Stage], dict[str, Any]]
    weight: Callable[[gs.Node, Array, Ints | None], Array]
    splits: bool = False


def is_chainable(node: gs.Node) -> bool:
    """Whether a node's operator may become several in a row."""
    return not node.domain and node.op in CHAINS and weight_of(node) is not None


def why_whole(node: gs.Node) -> str:
    """Why the rows that a node reads cannot be taken for other samples; empty if they can."""
    if not CHAINS[node.op].splits:
        return f"the rows that {node.op} reads cannot be taken apart"
    return regrouped.why_not(node)


def tensor(node: gs.Node) -> Array:
    """The weight of a node as W (groups, o, c, *kernel), float64."""
    weight = weight_of(node)
    assert weight is not None
    return CHAINS[node.op].tensor(node, values(weight).astype(np.float64))


def shape(node: gs.Node) -> Ints:
    """The shape of `tensor`, without reading the weight."""
    weight = weight_of(node)
    assert weight is not None
    view = np.broadcast_to(np.float32(0), tuple(weight.shape))
    return CHAINS[node.op].tensor(node, view).shape


def strides(node: gs.Node) -> Ints:
    """Of the node's spatial axes; empty where there are none, or all are 1."""
    return tuple(map(int, node.attrs.get("strides", ())))


def layout(node: gs.Node) -> tuple[str, int | None]:
    """Nodes of one layout and weight have the same factors."""
    row = knowledge(node)
    kind = CHAINS[node.op].op if row.out_axis is None else "matrix"
    return kind, row.out_axis(node) if row.out_axis else None


def before(node: gs.Node) -> gs.Node | None:
    """The node whose output goes into a node alone, as that of a factor does."""
    x = regrouped.rows(node)
    return x.inputs[0] if len(x.inputs) == 1 and len(x.outputs) == 1 else None


def behind(node: gs.Node) -> gs.Node | None:
    """The node that alone reads the output of a node, as a factor does."""
    y = node.outputs[0]
    reader = y.outputs[0] if len(y.outputs) == 1 else None
    far = None if reader is None else regrouped.taker(reader)
    return reader if far is None else far


def weights(graph: gs.Graph, node: gs.Node, stages: Sequence[Stage]) -> list[gs.Constant]:
    """The constants of the layers, named after the node's weight."""
    old = weight_of(node)
    assert old is not None
    chain, made = CHAINS[node.op], []
    for number, stage in enumerate(stages, 1):
        shape = tuple(old.shape) if number == len(stages) else None
        array = chain.weight(node, stage.weight, shape).astype(old.dtype)
        made.append(store(graph, fresh(graph, f"{old.name}_factor{number}"), array))
    return made


def put(
    graph: gs.Graph, node: gs.Node, stages: Sequence[Stage], constants: Sequence[gs.Constant]
) -> list[gs.Node]:
    """Put layers with these weights in place of a node, which becomes the last; the new nodes."""
    position, last, count = knowledge(node).weight, stages[-1], len(stages)
    made = regrouped.enter(graph, node) if last.sample else []
    x, behind = node.inputs[0], []
    for number, (stage, weight) in enumerate(zip(stages[:-1], constants, strict=False), 1):
        made += _front(graph, node, stage, weight, x, number)
        x = made[-1].outputs[0]
    if last.sample:
        made.append(regrouped.sample(graph, node, x, last.sample, count))
        x = made[-1].outputs[0]
        behind = regrouped.leave(graph, node, count)
    else:
        node.attrs.update(CHAINS[node.op].last(node, last))
    node.inputs[0], node.inputs[position] = x, constants[-1]
    insert(graph, before={node.name: made}, after={node.name: behind})
    return [*made, *behind]


def _front(
    graph: gs.Graph, node: gs.Node, stage: Stage, weight: gs.Constant, x: gs.Tensor, number: int
) -> list[gs.Node]:
    """A layer in front of a node, behind x as the samples that it takes. number: from 1."""
    chain, made = CHAINS[node.op], list[gs.Node]()
    if stage.sample:
        made.append(regrouped.sample(graph, node, x, stage.sample, number))
        x = made[-1].outputs[0]
    stem = f"{node.outputs[0].name or node.name}_factor{number}"
    y = gs.Variable(fresh(graph, stem), dtype=weight.dtype)
    name = fresh(graph, f"{node.name}_factor{number}")
    attrs = chain.front(node, stage, number - 1)
    return [*made, gs.Node(chain.op, name, attrs, [x, weight], [y])]


def _moving(node: gs.Node, stage: Stage) -> dict[str, Any]:
    """Attributes of a convolution that moves along the axes of a stage as the node did."""
    rank = stage.weight.ndim - 2
    attrs = node.attrs

    def along(name: str, other: int) -> list[int]:
        given = list(attrs.get(name) or [other] * rank)
        return [int(given[a]) if a in stage.axes else other for a in range(rank)]

    pads = list(attrs.get("pads") or [0] * (2 * rank))
    kept = {key: attrs[key] for key in ("auto_pad",) if attrs.get(key, "NOTSET") != "NOTSET"}
    if not kept:
        kept = {"pads": [int(p) if i % rank in stage.axes else 0 for i, p in enumerate(pads)]}
    return {
        "kernel_shape": list(stage.weight.shape[2:]),
        "strides": along("strides", 1),
        "dilations": along("dilations", 1),
        "group": stage.groups,
        **kept,
    }


def _conv_tensor(node: gs.Node, weight: Array) -> Array:
    g = groups(node)
    return weight.reshape(g, weight.shape[0] // g, *weight.shape[1:])


def _recurrent_weight(node: gs.Node, weight: Array, shape: Ints | None) -> Array:
    return weight.T if shape is None else weight.reshape(*shape[:2], -1)


def _is_transposed(node: gs.Node) -> bool:
    out_axis = knowledge(node).out_axis
    return out_axis is not None and out_axis(node) != 0


def _product_weight(node: gs.Node, weight: Array, shape: Ints | None) -> Array:
    is_turned = weight.ndim == 2 and _is_transposed(node)  # not where it is a convolution's
    return np.ascontiguousarray(weight.T if is_turned else weight)


CHAINS: Mapping[str, Chain] = {
    "Conv": Chain(
        _conv_tensor,
        "Conv",
        front=lambda node, stage, number: _moving(node, stage),
        last=_moving,
        weight=lambda node, weight, shape: weight,
    ),
    "Gemm": Chain(
        matrix,
        "Gemm",
        front=lambda node, stage, number: {
            "transB": int(not _is_transposed(node)),
            **({"transA": 1} if not number and node.attrs.get("transA", 0) else {}),
        },
        last=lambda node, stage: {"transA": 0} if node.attrs.get("transA", 0) else {},
        weight=_product_weight,
        splits=True,
    ),
    "MatMul": Chain(
        matrix,
        "MatMul",
        front=lambda node, stage, number: {},
        last=lambda node, stage: {},
        weight=_product_weight,
        splits=True,
    ),
    **dict.fromkeys(
        ("LSTM", "GRU"),
        Chain(
            lambda node, weight: weight.reshape(1, -1, weight.shape[-1]),
            "MatMul",
            front=lambda node, stage, number: {},
            last=lambda node, stage: {},
            weight=_recurrent_weight,
        ),
    ),
}
