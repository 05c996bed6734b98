"""What `onnxc sparsify` may be asked for, and the passes that do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxc.core import Pass
from onnxc.workpiece import Workpiece
from passes.reconstruct import Reconstruct
from passes.sparsify import Sparsify


@dataclass(frozen=True)
class SparsifySettings:
    """How to make weights zero; the options of `onnxc sparsify` besides data, target and nodes.

    reconstruct: whether layers are refit to the original's outputs, one after the other.
    """

    sparsify: Sparsify = field(default_factory=Sparsify)
    reconstruct: bool = True

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "sparse"


def ways(settings: SparsifySettings, piece: Workpiece) -> Mapping[str, tuple[Pass, ...]]:
    """The one way, named by what becomes zero."""
    refit: tuple[Pass, ...] = (Reconstruct(),) if settings.reconstruct else ()
    return {settings.sparsify.summary: (settings.sparsify, *refit)}
