"""Drop initial states of LSTM, GRU and RNN that are zero, which is what they are when left out.

PyTorch exports zeros of shape (layers, batch, hidden), computed from the shape of the input at
every run: Shape, Gather, Unsqueeze, Concat, ConstantOfShape and Slice, for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import nbytes, tidy, values

STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
MOVES = frozenset(  # operators that only move or repeat the values of their first input
    ("Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)
STANDARD = (None, "", "ai.onnx")


@register
@dataclass(frozen=True)
class DropZeroStates:
    """Drop initial states of LSTM, GRU and RNN that are zero, which is what they are by default."""

    name: ClassVar[str] = "drop-zero-states"
    lossless: ClassVar[bool] = True

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        results: list[Change | Skip] = []
        for node in graph.nodes:
            given = [p for p in STATES.get(node.op, ()) if _is_given(node, p)]
            if not given or node.domain not in STANDARD:
                continue
            zeros = [p for p in given if _is_zero(node.inputs[p])]
            if node.name not in allowed:
                results.append(Skip(node.name, "excluded"))
            elif not zeros:
                results.append(Skip(node.name, "its initial states are not known to be zero"))
            else:
                results.append(_drop(node, zeros))
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results


def _drop(node: gs.Node, zeros: list[int]) -> Change:
    before = sum(nbytes(t) for p in zeros if isinstance(t := node.inputs[p], gs.Constant))
    for position in zeros:
        node.inputs[position] = gs.Variable.empty()
    while not node.inputs[-1].name:
        node.inputs.pop()
    return Change(node.name, "initial states of zeros dropped", before)


def _is_given(node: gs.Node, position: int) -> bool:
    return position < len(node.inputs) and bool(node.inputs[position].name)


def _is_zero(tensor: gs.Tensor) -> bool:
    """Whether all values are zero, whatever the inputs are."""
    while not isinstance(tensor, gs.Constant):
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or maker.domain not in STANDARD:
            return False
        if maker.op == "ConstantOfShape":
            fill = maker.attrs.get("value")
            return fill is None or not values(fill).any()
        if maker.op not in MOVES:
            return False
        tensor = maker.inputs[0]
    return not values(tensor).any()
