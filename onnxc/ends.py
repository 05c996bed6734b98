"""Which heavy nodes of a graph stand at its ends: few bits cost most there."""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from onnxc.ops import data_inputs, knowledge


def ends(graph: gs.Graph) -> frozenset[str]:
    """Names of heavy nodes that no other heavy node comes before, or behind."""
    heavy = [node for node in graph.nodes if knowledge(node).window is not None]
    return frozenset(_leading(graph.nodes, heavy) | _leading(graph.nodes[::-1], heavy, True))


def _leading(nodes: Collection[gs.Node], heavy: list[gs.Node], back: bool = False) -> set[str]:
    """Heavy nodes that depend on none, of nodes in order."""
    are_heavy, behind, found = {id(n) for n in heavy}, set[int](), set[str]()
    for node in nodes:
        near = node.outputs if back else _read(node)
        linked = [n for t in near for n in (t.outputs if back else t.inputs)]
        is_behind = any(id(n) in behind or id(n) in are_heavy for n in linked)
        if is_behind:
            behind.add(id(node))
        elif id(node) in are_heavy:
            found.add(node.name)
    return found


def _read(node: gs.Node) -> list[gs.Tensor]:
    """The activations that a node depends on; of what is looked up in a table, the indices."""
    is_table = knowledge(node).role == "lookup"
    return list(node.inputs) if is_table else data_inputs(node) or list(node.inputs)
