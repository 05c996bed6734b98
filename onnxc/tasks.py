"""TASKS: the writing commands. One row says what the settings of a command make of a model.

`onnxc.compression` carries a task out, `onnxc.api` gives it files and a report, and
`onnxc.commands` makes a command of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from onnxc import clustering, factorization, pruning, quantization, sparsification
from onnxc.clustering import ClusterSettings
from onnxc.core import Pass
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
    short. missed: sentences for what was asked for and is not reached. Steps whose name starts
    with that of the aim are what was asked for; others help.
    """

    aim: Aim
    settings: type[Settings]
    ways: Callable[[Any, Workpiece], Ways]
    rescue: Callable[[Any, Workpiece], Ways] = _no_rescue
    missed: Callable[[Any, Any], tuple[str, ...]] = _no_goal

    @property
    def name(self) -> str:
        return self.aim.name


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
