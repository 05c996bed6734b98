"""The linear layers of a graph that several thinner ones may replace: nodes of one weight.

A layer is one node, or all nodes that multiply by the same weight in the same way: they get the
same factors, so that these are stored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.core import Context
from onnxc.lowrank import factors
from onnxc.moments import WIDEST, why_no_moments
from onnxc.numerics import lowrank
from onnxc.numerics.lowrank_structures import STRUCTURES
from onnxc.ops import has_bias, knowledge, weight_of

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """Nodes that multiply by one weight, under the name of the first. obstacle: why it stays."""

    nodes: tuple[gs.Node, ...]
    obstacle: str = ""

    @property
    def name(self) -> str:
        return str(self.nodes[0].name)

    @property
    def shape(self) -> Ints:
        """(groups, o, c, *kernel)."""
        return factors.shape(self.nodes[0])

    @property
    def size(self) -> int:
        """Numbers in its weight."""
        weight = weight_of(self.nodes[0])
        return 0 if weight is None else int(np.prod(weight.shape))

    @property
    def strides(self) -> Ints:
        return factors.strides(self.nodes[0])

    def why_not(self, method: str) -> str:
        """Why a structure is not for it; empty where it is."""
        reason = lowrank.why_not(method, self.shape)
        if reason or not STRUCTURES[method].splits:
            return reason
        return next(filter(None, map(factors.why_whole, self.nodes)), "")


def find_layers(graph: gs.Graph, context: Context) -> list[Layer]:
    """The heavy nodes that may be touched, those of one weight together, in order of the graph."""
    allowed = context.only.names(graph)
    heavy = [n for n in graph.nodes if n.name in allowed and knowledge(n).window is not None]
    found: dict[Any, list[gs.Node]] = {}
    for node in heavy:
        is_chainable = factors.is_chainable(node)
        place = (id(weight_of(node)), factors.layout(node)) if is_chainable else node.name
        found.setdefault(place, []).append(node)
    return [Layer(tuple(nodes), _obstacle(nodes)) for nodes in found.values()]


def _obstacle(nodes: Sequence[gs.Node]) -> str:
    """Why a layer stays whole whatever the ranks; empty where it need not."""
    first, weight = nodes[0], weight_of(nodes[0])
    if weight is None:
        return "its weight is not a constant of floats"
    if not factors.is_chainable(first):
        return f"there is no chain of layers in place of {first.op}"
    reasons = (why_no_moments(node) or _is_factor(node) for node in nodes)
    reason = next(filter(None, reasons), "") or _shared(weight, nodes)
    if reason:
        return reason
    _, o, *rest = factors.shape(first)
    if min(o, int(np.prod(rest))) < 2:
        return "it makes one output of each group, which has no smaller rank"
    return "" if np.prod(rest) <= WIDEST else f"with {np.prod(rest)} inputs it is too wide"


def _shared(weight: gs.Constant, nodes: Iterable[gs.Node]) -> str:
    own = [id(node) for node in nodes]
    other = next((user for user in weight.outputs if id(user) not in own), None)
    return "" if other is None else f"its weight is shared with {other.name}"


def _is_factor(node: gs.Node) -> str:
    """Why a node is one of several that make up one linear layer; empty if it is not."""
    maker, reader = factors.before(node), factors.behind(node)
    if maker is not None and _is_bare(maker):
        return "it is a factor already, of one layer with the node before it"
    if reader is not None and _is_bare(node) and weight_of(reader) is not None:
        return "it is a factor already, of one layer with the node behind it"
    return ""


def _is_bare(node: gs.Node) -> bool:
    """A heavy linear node without a bias."""
    is_linear = knowledge(node).role == "weighted" and weight_of(node) is not None
    return is_linear and not has_bias(node)
