"""One node on the way of channel labels through a graph: what a rule sees, and what it can say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.channels.labels import Axes, Labels, Ties
from onnxc.edit import values
from onnxc.ops import is_constant

Role = Literal["makes", "reads", "carries"]
Split = Literal["outer", "inner"]
Dim = int | str | None


@dataclass(frozen=True)
class Slot:
    """An axis of a constant input whose slices belong to channels.

    role: the slices make the channels, read them (sum over them), or carry values of them along.
    labels: one for each index of the axis.
    """

    node: str
    position: int
    axis: int
    role: Role
    labels: Labels = field(repr=False, compare=False)


@dataclass
class Visit:
    """A node on the way: what a rule sees, and what it can say."""

    node: gs.Node
    x: list[Axes]
    ties: Ties
    slots: list[Slot]
    split: Split = "outer"
    fixed: str = ""  # why the constants of this node must stay
    has_choice: bool = False  # whether the other split would have been another way
    copied: dict[int, int] = field(default_factory=dict)  # axes of the output with equal values

    @property
    def where(self) -> str:
        return f"{self.node.name} ({self.node.op})"

    def shape(self, position: int) -> list[Dim]:
        """Shape of an input; raises LookupError where it is not known."""
        found = self.node.inputs[position].shape
        if found is None:
            raise LookupError(self.node.inputs[position].name)
        return [int(d) if isinstance(d, int | np.integer) else d for d in found]

    def sizes(self, position: int) -> list[int]:
        """The same, where all of it must be known."""
        found = self.shape(position)
        if not all(isinstance(d, int) for d in found):
            raise LookupError(self.node.inputs[position].name)
        return [d for d in found if isinstance(d, int)]

    def has(self, position: int) -> bool:
        return position < len(self.node.inputs) and bool(self.node.inputs[position].name)

    def slot(self, role: Role, position: int, axis: int, labels: Labels) -> Labels:
        """Say that an axis of a constant belongs to labels; one that is no constant blocks them."""
        if not self.has(position):
            return labels
        tensor = self.node.inputs[position]
        if not is_constant(tensor):
            self.ties.block(labels, f"{tensor.name} of {self.where} is computed")
        elif self.fixed:
            self.ties.block(labels, self.fixed)
        else:
            self.slots.append(Slot(self.node.name, position, axis, role, labels))
        return labels

    def block(self, labels: Iterable[Labels], why: str = "mixes the channels") -> None:
        for some in labels:
            self.ties.block(some, f"{self.where} {why}")

    def is_copy(self, labels: Labels) -> bool:
        """Whether labels are those of copies, which any others may stand for."""
        return len(labels) > 0 and int(labels[0]) in self.ties.copies

    def only(self, position: int, axes: Iterable[int], why: str = "works along them") -> Axes:
        """The labels of some axes of an input; those of the others are blocked."""
        kept = set(axes)
        self.block((some for axis, some in self.x[position].items() if axis not in kept), why)
        return {axis: some for axis, some in self.x[position].items() if axis in kept}

    def number(self, position: int) -> list[int] | None:
        """The values of a constant input of integers; None where they are computed."""
        if not self.has(position) or not is_constant(self.node.inputs[position]):
            return None
        return [int(v) for v in np.ravel(values(self.node.inputs[position]))]

    def setting(self, name: str, position: int) -> list[int] | None:
        """Integers that newer operator sets take as an input and older ones as an attribute."""
        given = self.node.attrs.get(name)
        return self.number(position) if given is None else [int(v) for v in np.ravel(given)]


Rule = Callable[[Visit], list[Axes]]


def opaque(visit: Visit) -> list[Axes]:
    """Nothing is known: all that reaches the node must stay."""
    for axes in visit.x:
        visit.block(axes.values(), "cannot be cut through")
    return [{} for _ in visit.node.outputs]


def merged(visit: Visit, shapes: Sequence[Sequence[Dim]], behind: int) -> Labels | None:
    """Labels of an axis, counted from the last one, of the output of a merge."""
    labelled, others = [], []
    for position, shape in enumerate(shapes):
        axis = len(shape) + behind
        if axis < 0:
            continue
        some = visit.x[position].get(axis)
        if some is not None:
            labelled.append(some)
        elif shape[axis] != 1:
            others.append((position, axis))
    if not labelled:
        return None
    count = max(map(len, labelled))
    full = [some for some in labelled if len(some) == count]
    visit.block((some for some in labelled if len(some) < count), "spreads it over all channels")
    for some in full[1:]:
        visit.ties.tie(full[0], some)
    for position, axis in others:
        if is_constant(visit.node.inputs[position]) and shapes[position][axis] == count:
            visit.slot("carries", position, axis, full[0])
        else:
            name = visit.node.inputs[position].name
            visit.block(full, f"needs {name!r} too, which cannot be cut")
    return full[0] if count > 1 or not others else None
