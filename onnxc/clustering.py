"""What `onnxc cluster` may be asked for, and the passes that do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from onnxc.codebooks import NIBBLE, NIBBLE_OPSET, WIDEST, least_opset
from onnxc.core import Pass
from onnxc.workpiece import Workpiece
from passes.cluster import Cluster
from passes.quantize import Quantize
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset


@dataclass(frozen=True)
class ClusterSettings:
    """How weights share values; the options of `onnxc cluster` besides data, target and nodes.

    format: the model computes in float, or in integers with codebooks of int8 values.
    """

    cluster: Cluster = field(default_factory=Cluster)
    format: Literal["float", "int8-codebook"] = "float"

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "clustered"


def ways(settings: ClusterSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what is shared."""
    bits, is_float = settings.cluster.bits, settings.format == "float"
    cluster = settings.cluster if is_float else replace(settings.cluster, grid="int8")
    opset = NIBBLE_OPSET if bits == NIBBLE else max(map(least_opset, range(1, WIDEST + 1)))
    integers: tuple[Pass, ...] = () if is_float else (Quantize(per_tensor=True),)
    first: tuple[Pass, ...] = (UpgradeOpset(opset), cluster)
    return {cluster.summary: (*first, *integers, StoreCodebooks())}
