"""TASKS: the writing commands. One row says what the settings of a command make of a model.

`onnxc.compression` carries a task out, `onnxc.api` gives it files and a report, and
`onnxc.commands` makes a command of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from onnxc import clustering, factorization, pruning, quantization, sparsification
from onnxc.anytime.settings import CompressSettings
from onnxc.clustering import ClusterSettings
from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.factorization import FactorizeSettings
from onnxc.pruning import PruneSettings
from onnxc.quantization import QuantizeSettings
from onnxc.report import Aim
from onnxc.sparsification import SparsifySettings
from onnxc.workpiece import Workpiece

Ways = Mapping[str, tuple[Pass, ...]]


class Settings(Protocol):
    """A frozen dataclass: its fields are the options of the command besides the common ones."""

    @property
    def suffix(self) -> str: ...


def _no_rescue(settings: Any, piece: Workpiece) -> Ways:
    return {}


def _no_goal(settings: Any, found: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Task:
    """One writing command.

    settings: the class of its settings. ways: the passes that may do it, by the name of the way;
    of several, the best by measurement is kept. rescue: ways that are tried where those fall
    short. missed: sentences for what was asked for and is not reached. is_search: whether
    candidates are looked for, again and again, on samples of their own. Steps whose name starts
    with that of the aim, or with one of the parts, are what was asked for; others help.
    """

    aim: Aim
    settings: type[Settings]
    ways: Callable[[Any, Workpiece], Ways]
    rescue: Callable[[Any, Workpiece], Ways] = _no_rescue
    missed: Callable[[Any, Any], tuple[str, ...]] = _no_goal
    is_search: bool = False
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.aim.name

    def is_meant(self, step: str) -> bool:
        """Whether a step does what was asked for, and not only helps."""
        return step.startswith(self.parts or (self.name,))


def _no_ways(settings: Any, piece: Workpiece) -> Ways:
    raise OptionError("the recipe has no [[pass]]: add some, or leave --recipe out to search")


QUANTIZE = Task(
    Aim("quantize", "quantized", "integers"),
    QuantizeSettings,
    quantization.ways,
    quantization.rescue,
)
SPARSIFY = Task(Aim("sparsify", "made sparse", "zeros"), SparsifySettings, sparsification.ways)
PRUNE = Task(Aim("prune", "pruned"), PruneSettings, pruning.ways, missed=pruning.missed)
FACTORIZE = Task(
    Aim("factorize", "factorized"),
    FactorizeSettings,
    factorization.ways,
    missed=factorization.missed,
)
CLUSTER = Task(Aim("cluster", "clustered", "size"), ClusterSettings, clustering.ways)
COMPRESS = Task(
    Aim("compress", "compressed"),
    CompressSettings,
    _no_ways,
    is_search=True,
    parts=("prune", "factorize", "sparsify", "cluster", "quantize"),
)
