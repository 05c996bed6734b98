"""Take filters out: choose channels, set what reads them to zero, let the rest make up for it.

Channels that go together form a group (`onnxc.channels.groups`). A criterion
(`onnxc.channels.criteria`) puts those of a group in order. Then every weight W that reads a part of
them is fitted to the outputs again, on the columns K that stay, with the second moments H about the
mean of the rows it multiplies and a small ridge λ:

    Ŵ_K = argmin E‖(Ŵ − W)(x − mu)‖² + λ,      b <- b + (W − Ŵ) mu

Shapes stay as they are; `shrink` takes the zero channels out. He 2017, "Channel pruning", §3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.biases import shift_bias
from onnxc.channels.criteria import Name, View, error, rank, wanted
from onnxc.channels.groups import Group, find_channels
from onnxc.channels.readers import Reader
from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import fresh, nbytes, store
from onnxc.moments import mean_output
from onnxc.numerics.covariance import pieces
from onnxc.numerics.refit import Moments, solve
from onnxc.numerics.sparse import Quadratic

Array = NDArray[Any]

NAMED = 2  # nodes that a sentence names
RIDGE = 1e-3  # λ of the update, relative to diag(H)


@dataclass(frozen=True)
class Part:
    """A group under the name of the first node that makes it. obstacle: why it stays whole."""

    name: str
    group: Group
    obstacle: str = ""


@register
@dataclass(frozen=True)
class Prune:
    """Take out the channels that are missed least, and refit what reads them.

    ratio: share of the channels of each group that goes.
    remove: how many channels of which group go, as NODE=COUNT, in place of a share.
    criterion: what tells which channels are missed least.
    update: whether the weights that stay make up for those that go.
    """

    name: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False

    ratio: float = 0.25
    remove: tuple[str, ...] = ()
    criterion: Name = "obs"
    update: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise OptionError(f"ratio is a share from 0 to 1, not {self.ratio:g}")
        self.counts  # noqa: B018 - raises where an entry cannot be read

    @property
    def counts(self) -> dict[str, int]:
        """Channels to take out by group. Raises OptionError for an entry that is not NODE=COUNT."""
        pairs = [entry.rpartition("=") for entry in self.remove]
        for name, _, count in pairs:
            if not name or not count.isdecimal():
                raise OptionError(f"remove takes NODE=COUNT, such as /layer1/Conv=4, not {name!r}")
        return {name: int(count) for name, _, count in pairs}

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        nodes = {node.name: node for node in graph.nodes}
        views = [
            View(part.group, nodes, {}) for part in self._chosen(parts(graph, context)).values()
        ]
        return [key for view in views for key in wanted(view, self.criterion)]

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        nodes = {node.name: node for node in graph.nodes}
        found = parts(graph, context)
        chosen = self._chosen(found)
        results: list[Change | Skip] = [
            Skip(part.group.nodes("makes", "reads")[0], part.obstacle)
            for part in found
            if part.obstacle
        ]
        out: dict[tuple[str, int], list[Array]] = {}
        readers: dict[tuple[str, int], Reader] = {}
        for part in chosen.values():
            view = View(part.group, nodes, context.stats, context.seed)
            picked = self._picked(part, view)
            results.append(_told(part, view, len(picked), self.criterion))
            for reader in view.readers if len(picked) else ():
                place = (reader.node.name, reader.slot.position)
                columns = reader.columns(part.group.channels[c] for c in picked)
                out.setdefault(place, []).extend(columns)
                readers[place] = reader
        for place, columns in out.items():
            results += self._rewrite(graph, readers[place], np.concatenate(columns), context)
        return results

    def _chosen(self, found: Sequence[Part]) -> dict[str, Part]:
        """The groups to take channels from, by name. Raises OptionError for one that is not."""
        free = {part.name: part for part in found if not part.obstacle}
        odd = next((name for name in self.counts if name not in free), None)
        if odd is not None:
            why = next((p.obstacle for p in found if p.name == odd), "there is no such group")
            raise OptionError(f"no channels can be taken from {odd!r}: {why}")
        return {n: p for n, p in free.items() if n in self.counts} if self.remove else free

    def _picked(self, part: Part, view: View) -> Array:
        """Numbers of the channels to take out, without those that are out already."""
        n = len(part.group.channels)
        wanted = self.counts.get(part.name, round(self.ratio * n))
        count = min(wanted, n - 1) - (n - len(view.alive))
        return rank(view, self.criterion, count).order

    def _rewrite(
        self, graph: gs.Graph, reader: Reader, columns: Array, context: Context
    ) -> Iterator[Change]:
        """Set columns of a reader's weight to zero, and fit the others to its outputs."""
        W = reader.matrix()
        cut = np.where(_spread(columns, W), 0, W)
        mu, E = error(reader, context.stats)
        new = _updated(W, cut, E) if E.blocks and self.update else cut
        old = reader.node.inputs[reader.slot.position]
        weight = reader.to_weight(new)
        made = store(graph, fresh(graph, f"{old.name}_pruned"), weight)
        reader.node.inputs[reader.slot.position] = made
        if mu is not None:
            shift = mean_output(reader.node, reader.to_weight(W - new), mu)
            shift_bias(graph, reader.node, shift, "pruned")
        what = f"{len(columns)} of {W.shape[0] * W.shape[2]} inputs out{_errors(W, cut, new, E)}"
        yield Change(reader.node.name, what, nbytes(old), nbytes(made))


def parts(graph: gs.Graph, context: Context) -> list[Part]:
    """The groups of a graph under names of their own, with what keeps each from being cut."""
    allowed, excluded = context.only.names(graph), context.only.excluded(graph)
    found: list[Part] = []
    taken: dict[str, int] = {}
    for group in find_channels(graph, excluded).groups():
        makers = group.nodes("makes")
        first = (makers or group.nodes("reads"))[0]
        taken[first] = taken.get(first, 0) + 1
        name = first if taken[first] == 1 else f"{first}#{taken[first]}"
        found.append(Part(name, group, _obstacle(group, makers, allowed)))
    return found


def _obstacle(group: Group, makers: Sequence[str], allowed: frozenset[str]) -> str:
    if group.obstacle:
        return f"{len(group.channels)} channels must stay: {group.obstacle}"
    if not group.nodes("reads"):
        return "no weight reads its channels"
    if not makers:
        return "no weight makes its channels"
    other = next((name for name in makers if name not in allowed), None)
    return "" if other is None else f"{other} makes them too, and is excluded"


def _spread(columns: Array, W: Array) -> Array:
    """A mask like W of whole columns, numbered over all groups."""
    mask = np.zeros(W.shape[0] * W.shape[2], bool)
    mask[columns] = True
    return np.broadcast_to(mask.reshape(W.shape[0], 1, W.shape[2]), W.shape)


def _updated(W: Array, cut: Array, E: Quadratic) -> Array:
    """What is left of W, fitted to the outputs of W about their mean, block by block."""
    found = []
    for (w, C), (left, _) in zip(pieces(W, E.blocks), pieces(cut, E.blocks), strict=True):
        g, M, d = w.shape
        m = Moments(C, w @ C, np.zeros((g, M)), np.zeros((g, d)), np.zeros((g, M)))
        found.append(solve(m, left, np.zeros((g, M)), left != 0, RIDGE)[0])
    return np.concatenate(found, axis=2)


def _errors(W: Array, cut: Array, new: Array, E: Quadratic) -> str:
    """Errors of a reader's outputs without and with the update, relative to their variance."""
    if not E.blocks:
        return ", without data"
    power, *errors = (E.error(D) for D in (W, W - cut, W - new))
    if power <= 0:
        return ""
    before, after = (f"{error / power:.2%}" for error in errors)
    return f", error {before} cut, {after} after the update"


def _told(part: Part, view: View, count: int, criterion: str) -> Change | Skip:
    makers, n = part.group.nodes("makes"), len(part.group.channels)
    if not count:
        return Skip(makers[0], f"all {len(view.alive)} channels stay")
    also = f", with {_some(makers[1:])}" if len(makers) > 1 else ""
    read = _some(part.group.nodes("reads"))
    return Change(makers[0], f"{count} of {n} channels out by {criterion}{also}; read by {read}")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
