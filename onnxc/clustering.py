"""What `onnxc cluster` may be asked for, and the passes that do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxc.codebooks import NIBBLE, NIBBLE_OPSET, WIDEST, least_opset
from onnxc.core import Pass
from onnxc.workpiece import Workpiece
from passes.cluster import Cluster
from passes.reconstruct import Reconstruct
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset


@dataclass(frozen=True)
class ClusterSettings:
    """How weights share values; the options of `onnxc cluster` besides data, target and nodes.

    reconstruct: whether layers are refit to the original's outputs, one after the other.
    """

    cluster: Cluster = field(default_factory=Cluster)
    reconstruct: bool = True

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "clustered"


def ways(settings: ClusterSettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what is shared."""
    bits = settings.cluster.bits
    opset = NIBBLE_OPSET if bits == NIBBLE else max(map(least_opset, range(1, WIDEST + 1)))
    refit: tuple[Pass, ...] = (Reconstruct(),) if settings.reconstruct else ()
    passes: tuple[Pass, ...] = (UpgradeOpset(opset), settings.cluster, *refit, StoreCodebooks())
    return {settings.cluster.summary: passes}
