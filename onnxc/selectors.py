"""Which nodes a pass may touch: glob, regular expression, op type, or the region between two nodes.

    /layer1/*            glob over node names
    re:^/head/           regular expression, found anywhere in a node name
    op:Softmax           every node of that op type
    /a/Conv../b/Add      every node on a path from the first to the second, both included

A selector is resolved once, on the graph as loaded: `selector.resolve(graph)` holds by name from
then on, whatever the passes fold away or insert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Self

import onnx_graphsurgeon as gs

from onnxc.errors import OptionError
from onnxc.graph import walk

Names = frozenset[str]


@dataclass(frozen=True)
class Selector:
    """Patterns over node names; nothing included means everything, and exclusion wins.

    `barred` holds the names that an earlier `resolve` decided against, `pinned` those of them that
    were excluded by name; users leave both empty.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    barred: Names = field(default=frozenset(), repr=False)
    pinned: Names = field(default=frozenset(), repr=False)

    @classmethod
    def parse(cls, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Self:
        """From command-line strings; a comma or blank space around a pattern is dropped.

        Raises OptionError for an empty pattern or a regular expression that does not compile.
        """
        selector = cls(tuple(p.strip() for p in include), tuple(p.strip() for p in exclude))
        for pattern in selector.include + selector.exclude:
            _check(pattern)
        return selector

    def names(self, graph: gs.Graph) -> Names:
        """Names of the nodes, nested bodies included, that may be touched.

        Raises OptionError for a pattern that matches nothing, with the nearest names.
        """
        nodes = [node for inner in walk(graph) for node in inner.nodes]
        everything = frozenset(node.name for node in nodes)
        wanted = _union(self.include, graph, nodes) if self.include else everything
        return wanted - _union(self.exclude, graph, nodes) - self.barred

    def excluded(self, graph: gs.Graph) -> Names:
        """Names of the nodes that were excluded, and so must not even follow another one's change.

        Raises OptionError for a pattern that matches nothing, with the nearest names.
        """
        nodes = [node for inner in walk(graph) for node in inner.nodes]
        return _union(self.exclude, graph, nodes) | self.pinned

    def resolve(self, graph: gs.Graph) -> Selector:
        """The same choice by name alone, which stays valid while passes rewrite the graph."""
        if not (self.include or self.exclude):
            return self
        everything = frozenset(node.name for inner in walk(graph) for node in inner.nodes)
        barred = self.barred | (everything - self.names(graph))
        return Selector(barred=barred, pinned=self.excluded(graph))


def matches(pattern: str, graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    """Names that one pattern selects. Raises OptionError when there are none."""
    exact = frozenset(node.name for node in nodes if node.name == pattern)
    if exact:
        return exact
    found = _matcher(pattern)(pattern, graph, nodes)
    if not found:
        raise OptionError(f"pattern {pattern!r} matches no node{_nearest(pattern, nodes)}")
    return found


def _union(patterns: Iterable[str], graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    return frozenset[str]().union(*(matches(p, graph, nodes) for p in patterns))


def _check(pattern: str) -> None:
    if not pattern.removeprefix("re:").removeprefix("op:"):
        raise OptionError(f"node pattern {pattern!r} is empty; give a name such as '/layer1/*'")
    if pattern.startswith("re:"):
        _compile(pattern)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise OptionError(f"{pattern!r} is not a regular expression: {error}") from error


def _by_glob(pattern: str, graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    return frozenset(node.name for node in nodes if fnmatchcase(node.name, pattern))


def _by_expression(pattern: str, graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    search = _compile(pattern).search
    return frozenset(node.name for node in nodes if search(node.name))


def _by_op(pattern: str, graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    return frozenset(node.name for node in nodes if node.op == pattern.removeprefix("op:"))


def _by_region(pattern: str, graph: gs.Graph, nodes: Sequence[gs.Node]) -> Names:
    """Nodes of the main graph that descend from the first and lead to the second."""
    first, last = (_endpoint(name, graph) for name in pattern.split("..", 1))
    after = _reach(first, graph.nodes, forward=True)
    before = _reach(last, reversed(graph.nodes), forward=False)
    if not after & before:
        swapped = _reach(last, graph.nodes, forward=True)
        hint = f"; did you mean '{last}..{first}'?" if first in swapped else ""
        raise OptionError(f"no path leads from node {first!r} to node {last!r}{hint}")
    region = after & before
    inner = (body for node in graph.nodes if node.name in region for body in _bodies(node))
    return region | {node.name for body in inner for node in body.nodes}


def _endpoint(name: str, graph: gs.Graph) -> str:
    if any(node.name == name for node in graph.nodes):
        return name
    raise OptionError(f"there is no node {name!r} in the main graph{_nearest(name, graph.nodes)}")


def _reach(start: str, nodes: Iterable[gs.Node], forward: bool) -> Names:
    """One sweep over topologically sorted nodes: `start` and all that it reaches."""
    tensors: set[str] = set()
    reached: set[str] = set()
    for node in nodes:
        reads, writes = (_reads(node), node.outputs) if forward else (node.outputs, _reads(node))
        if node.name == start or any(t.name in tensors for t in reads):
            reached.add(node.name)
            tensors.update(t.name for t in writes if t.name)
    return frozenset(reached)


def _reads(node: gs.Node) -> list[gs.Tensor]:
    """Inputs of a node, and whatever its bodies read."""
    inner = (n for body in _bodies(node) for n in body.nodes)
    return [*node.inputs, *(t for n in inner for t in n.inputs)]


def _bodies(node: gs.Node) -> list[gs.Graph]:
    """All graphs nested in a node, at any depth."""
    return [g for body in node.attrs.values() if isinstance(body, gs.Graph) for g in walk(body)]


def _nearest(pattern: str, nodes: Iterable[gs.Node]) -> str:
    """A suggestion for an error message: the nearest names, or op types."""
    is_op = pattern.startswith("op:")
    known = sorted({node.op if is_op else node.name for node in nodes})
    wanted = re.sub(r"^(op|re):|[*?^$]", "", pattern)
    close = get_close_matches(wanted, known, 3, 0.4) or known[:3]
    return f"; the nearest: {', '.join(close)}" if close else ""


_KINDS: tuple[
    tuple[Callable[[str], bool], Callable[[str, gs.Graph, Sequence[gs.Node]], Names]], ...
]
_KINDS = (
    (lambda p: p.startswith("re:"), _by_expression),
    (lambda p: p.startswith("op:"), _by_op),
    (lambda p: ".." in p, _by_region),
    (lambda p: True, _by_glob),
)


def _matcher(pattern: str) -> Callable[[str, gs.Graph, Sequence[gs.Node]], Names]:
    return next(match for is_kind, match in _KINDS if is_kind(pattern))
