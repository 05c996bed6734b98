"""Refit heavy nodes to the outputs of the original model, one after the other.

Each Conv, Gemm or MatMul whose weight or input is not what it was is refit (`onnxc.refits`) to
what it ought to give (`onnxc.goals`), on its input with all nodes before it already refit. No label
and no gradient is used.

With `nonlinear`, what counts is the error behind the activation, where a ReLU follows the node or
its sum: see `onnxc.numerics.nonlinear` (Zhang 2016, §3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Pass, Skip, register
from onnxc.goals import ceiling, goal_of, why_no_goal
from onnxc.moved import moved
from onnxc.ops import knowledge
from onnxc.refits import RefitNode


@register
@dataclass(frozen=True)
class Reconstruct:
    """Refit the weights that are not zero, layer after layer, to the original's outputs.

    blocks: where an output only goes into a sum, let the sum come out as in the original.
    nonlinear: where a ReLU follows, let what comes out of it be as in the original, which takes
    several times as long.
    """

    name: ClassVar[str] = "reconstruct"
    lossless: ClassVar[bool] = False

    blocks: bool = True
    nonlinear: bool = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        for step in self.steps(graph, context):
            yield from step.wants(graph, context)

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        steps = list(self.steps(graph, context))
        return [result for step in steps for result in step.apply(graph, context)]

    def steps(self, graph: gs.Graph, context: Context) -> Iterator[Pass]:
        """One step a heavy node, in the order of the graph."""
        kept = context.only.excluded(graph)  # the others follow what was done to any node
        changed = set[str]() if context.original is None else moved(graph, context.original)
        for node in list(graph.nodes):
            if knowledge(node).role == "weighted":
                reason = "excluded" if node.name in kept else why_no_goal(node, context)
                goal = None if reason else goal_of(node, graph, context, self.blocks)
                if goal is not None and changed.isdisjoint((node.outputs[0].name, goal.minus)):
                    reason = "it computes what it did in the original"
                high = ceiling(node, goal, graph) if goal is not None and self.nonlinear else None
                yield RefitNode(node.name, goal, reason, high)
