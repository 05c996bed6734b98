"""What a search may do to a model: moves, on ladders from mild to harsh, for each objective.

A move is one task of onnxc with its settings; its name is what the command line calls it, such as
`prune --macs 0.9`. A plan is a move from each of some slots, in the order of SLOTS:

    prune → factorize → code

Channels go first, as all that follows is fitted to what is left; then layers get thinner; then
weights and activations get fewer bits, or share values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onnxc.anytime.settings import Objective
from onnxc.clustering import ClusterSettings
from onnxc.factorization import FactorizeSettings
from onnxc.pruning import PruneSettings
from onnxc.quantization import QuantizeSettings
from onnxc.storage.packing import SUFFIX
from onnxc.tasks import CLUSTER, FACTORIZE, PRUNE, QUANTIZE, Settings, Task
from passes.cluster import Cluster
from passes.cluster_vectors import ClusterVectors

Slot = Literal["prune", "factorize", "code"]

SLOTS: tuple[Slot, ...] = ("prune", "factorize", "code")
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
BITS = (8.0, 6.0, 5.5, 5.0, 4.75, 4.5, 4.25, 4.0, 3.75, 3.5, 3.25, 3.0, 2.75, 2.5)
LOSSES = (
    *(0.002, 0.0025, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
)
FASTER = {"latency": True, "params": False, "macs": False}  # whether factors must be, here
FLOAT = (5, 3, 2, 1)  # layers that stay float
CODES = (6, 5, 4, 3, 2)
JOINT = " + "  # between the names of moves


@dataclass(frozen=True)
class Move:
    """A task with its settings."""

    task: Task
    settings: Settings

    @property
    def name(self) -> str:
        """As the command line calls it."""
        return " ".join((self.task.name, *_options(self.settings)))


Plan = tuple[Move, ...]


def name_of(plan: Plan) -> str:
    """A plan in words."""
    return JOINT.join(move.name for move in plan) or "original"


@dataclass(frozen=True)
class Ladder:
    """Moves of one slot, from mild to harsh; first: the one that is tried before others."""

    slot: Slot
    moves: tuple[Move, ...]
    first: int = 0


def ladders(objective: Objective, output: Path) -> tuple[Ladder, ...]:
    """What is worth trying for an objective; a package is judged by what is left of it packed."""
    if objective == "size":
        return (_shared(output.suffix == SUFFIX), _averages(), _pruned(), _factorized("params"))
    unit = "latency" if objective == "latency" else "macs"
    return (_integers(), _pruned(), _factorized(unit))


def _integers() -> Ladder:
    kept = (QuantizeSettings(keep_float=count) for count in FLOAT)
    rows = (*kept, QuantizeSettings(rounding="descent"), QuantizeSettings())
    return Ladder("code", tuple(Move(QUANTIZE, row) for row in rows), first=len(rows) - 1)


def _averages() -> Ladder:
    return Ladder("code", tuple(Move(QUANTIZE, QuantizeSettings(bits=b)) for b in BITS), first=5)


def _shared(is_packed: bool) -> Ladder:
    """Shared values: entropy-coded ones for packages, of whole bits for plain files."""
    if not is_packed:
        values = tuple(Move(CLUSTER, ClusterSettings(Cluster(bits=b))) for b in CODES)
        vectors = ClusterSettings(vectors=ClusterVectors(), method="pq")
        return Ladder("code", (*values, Move(CLUSTER, vectors)), first=2)
    cluster = Cluster(bits=6, method="ecsq")
    rows = (ClusterSettings(cluster, method="ecsq", loss=loss) for loss in LOSSES)
    return Ladder("code", tuple(Move(CLUSTER, row) for row in rows), first=LOSSES.index(0.03))


def _pruned() -> Ladder:
    moves = tuple(Move(PRUNE, PruneSettings(macs=share)) for share in SHARES)
    return Ladder("prune", moves, first=1)


def _factorized(unit: str) -> Ladder:
    usual = FactorizeSettings(faster=FASTER[unit])
    given: list[dict[str, Any]] = [{unit: share} for share in SHARES]
    rows = (replace(usual, **budget) for budget in given)
    return Ladder("factorize", tuple(Move(FACTORIZE, row) for row in rows), first=1)


def ordered(chosen: Mapping[Slot, Move]) -> Plan:
    """The plan of some moves."""
    return tuple(chosen[slot] for slot in SLOTS if slot in chosen)


def _options(settings: Any) -> Sequence[str]:
    """What differs from the defaults, as options."""
    found: list[str] = []
    usual = type(settings)()
    for spec in fields(settings):
        value, default = getattr(settings, spec.name), getattr(usual, spec.name)
        if is_dataclass(value):
            found += _options(value)
        elif value != default:
            found.append(_option(spec.name.replace("_", "-"), value))
    return list(dict.fromkeys(found))


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name}"
    return f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
