"""The contracts that passes, calibration and the engine share.

A **pass** reads a graph and statistics, rewrites the graph in place, and returns what it changed
and what it skipped, with reasons. It never runs the model and never reads data: it names the
statistics that it needs (`wants`), and the engine gathers them from the graph as it stands before
`apply`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.numerics.patches import Window
from onnxc.selectors import Selector
from onnxc.targets import Target


@dataclass(frozen=True)
class Goal:
    """What a layer ought to give: a tensor of the original, less one of the graph as it is.

    tensor: of the original graph. axis: of its channels. minus: of the rewritten graph, or None.
    """

    tensor: str
    axis: int = 1
    minus: str | None = None


@dataclass(frozen=True)
class Key:
    """One statistic of one tensor.

    what: a row of `calib.observers.OBSERVERS`, "drift" (see `Perturbs`), "goal" or "rows" (see
    `Sequential`). axis: the channel axis of a per-channel statistic, or None for one over the whole
    tensor. minus: the statistic is of the difference from this tensor. window: how the layer that
    reads the tensor cuts it into rows, for "moments", "goal" and "rows". goal: for the latter two.
    """

    tensor: str
    what: str
    axis: int | None = None
    minus: str | None = None
    window: Window | None = None
    goal: Goal | None = None

    @property
    def name(self) -> str:
        """What is observed, as a tensor name."""
        return self.tensor if self.minus is None else f"{self.tensor} - {self.minus}"


@dataclass(frozen=True)
class Change:
    """A rewrite of one node, with the bytes of its constants before and after."""

    node: str
    what: str
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Skip:
    """A node that was considered and left alone, with the reason in a user's words."""

    node: str
    reason: str


class Observer(Protocol):
    """A statistic that streams over batches: a commutative monoid under `merge`."""

    def update(self, x: NDArray[Any]) -> None: ...
    def merge(self, other: Self) -> Self: ...


Stats = Mapping[Key, Any]


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph. original: the graph before any lossy pass."""

    opset: int
    target: Target
    stats: Stats = field(default_factory=dict)
    seed: int = 0
    only: Selector = Selector()
    original: gs.Graph | None = field(default=None, repr=False, compare=False)


class Pass(Protocol):
    """A rewrite: a frozen dataclass whose fields are its command-line options and recipe keys."""

    name: ClassVar[str]
    lossless: ClassVar[bool]  # outputs must stay equal to rounding; else only valid and finite

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]: ...
    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]: ...


@runtime_checkable
class Perturbs(Protocol):
    """A pass that wants "drift": how far the outputs of nodes move when `perturb` edits a copy."""

    def perturb(self, graph: gs.Graph, context: Context) -> None: ...


@runtime_checkable
class Sequential(Protocol):
    """A pass that works layer after layer, each with statistics of what the ones before it left.

    `steps` gives passes in the order of the graph: what a step wants is gathered once the steps
    before it are applied, and a step changes no node that an earlier step's tensors depend on. Only
    steps may want "goal", the moments of a layer's input in the rewritten graph together with what
    it ought to give, and "rows", some rows of both: see `calib.goals`.
    """

    def steps(self, graph: gs.Graph, context: Context) -> Iterable[Pass]: ...


@runtime_checkable
class Rescales(Protocol):
    """A pass that leaves what the graph computes, but not what its tensors hold, or how much.

    Later passes compare with the graph that it leaves, not with the original.
    """

    @property
    def rescales(self) -> bool: ...


@runtime_checkable
class Keeps(Protocol):
    """A pass that says whether statistics of the graph that it got hold for the one it leaves."""

    @property
    def keeps_statistics(self) -> bool: ...


PASSES: dict[str, type[Pass]] = {}


P = TypeVar("P", bound=Pass)


def register(cls: type[P]) -> type[P]:
    """Class decorator: enter a pass into PASSES under its name."""
    PASSES[cls.name] = cls
    return cls
