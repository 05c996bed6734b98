"""What `onnxc cluster` may be asked for, and the passes that do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from onnxc.core import Pass
from onnxc.errors import OptionError
from onnxc.numerics.sharing import Method
from onnxc.price_plan import planned as priced
from onnxc.storage.codebooks import NIBBLE, NIBBLE_OPSET, WIDEST, least_opset
from onnxc.vector_plan import planned
from onnxc.workpiece import Workpiece
from passes.cluster import Cluster
from passes.cluster_vectors import METHODS, ClusterVectors, VectorMethod
from passes.quantize import Quantize
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

ONLY_VALUES = (
    "init",
    "refine",
    "gains",
    "price",
    "prices",
    "grid",
)  # settings that say nothing to vectors
ONLY_VECTORS = ("rate", "length", "books", "forms")


@dataclass(frozen=True)
class ClusterSettings:
    """How weights share values; the options of `onnxc cluster` besides data, target and nodes.

    method: what finds the values that weights share; pq, rq, kernels and filters find vectors.
    format: the model computes in float, or in integers with codebooks of int8 values.
    loss: what the outputs of the model may lose, about: nats of their classes, or the share of
    noise in other outputs; of ecsq, whose prices are then chosen for each layer by what the outputs
    feel of it.
    """

    cluster: Cluster = field(default_factory=Cluster)
    vectors: ClusterVectors = field(default_factory=ClusterVectors)
    method: Method | VectorMethod = "dp"
    format: Literal["float", "int8-codebook"] = "float"
    loss: float | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and self.method != "ecsq":
            raise OptionError("--loss is for --method ecsq: add it, or leave --loss out")
        if self.loss is not None and self.loss <= 0:
            raise OptionError(f"--loss is more than 0, not {self.loss:g}")

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "clustered"


def ways(settings: ClusterSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what is shared. Raises OptionError for settings that do not agree."""
    if settings.method in METHODS:
        return _vectors(settings, piece)
    _refuse(settings.vectors, ONLY_VECTORS, settings.method)
    bits, is_float = settings.cluster.bits, settings.format == "float"
    cluster = settings.cluster if is_float else replace(settings.cluster, grid="int8")
    if settings.loss is not None:
        cluster = priced(cluster, settings.loss, piece)
    opset = NIBBLE_OPSET if bits == NIBBLE else max(map(least_opset, range(1, WIDEST + 1)))
    integers: tuple[Pass, ...] = () if is_float else (Quantize(per_tensor=True),)
    first: tuple[Pass, ...] = (UpgradeOpset(opset), cluster)
    return {cluster.summary: (*first, *integers, StoreCodebooks())}


def _vectors(settings: ClusterSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way for vectors, which are stored as they are found."""
    if settings.format != "float":
        raise OptionError(
            f"--method {settings.method} makes float weights: leave --format {settings.format} out"
        )
    _refuse(settings.cluster, ONLY_VALUES, settings.method)
    opset = max(map(least_opset, range(1, settings.vectors.bits + 1)))
    vectors = planned(settings.vectors, piece, opset)
    return {settings.vectors.summary: (UpgradeOpset(opset), vectors)}


def _refuse(given: Cluster | ClusterVectors, names: Sequence[str], method: str) -> None:
    """Raise OptionError for settings that say nothing to a method."""
    usual = {spec.name: spec.default for spec in fields(given)}
    odd = next((name for name in names if getattr(given, name) != usual[name]), None)
    if odd is not None:
        raise OptionError(f"{odd} does not go with --method {method}: leave one of them out")
