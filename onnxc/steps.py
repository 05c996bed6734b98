"""The integers that hold a tensor of a rewritten graph: their step, and how far they reach.

x = s (q − z),    low = s (q_min − z),    high = s (q_max − z)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.graph import values
from onnxc.twins import Scaled, Twin


@dataclass(frozen=True)
class Steps:
    """One step and one range for a whole tensor. kind: of the integers, such as "uint8"."""

    size: float
    low: float
    high: float
    kind: str


def steps_of(twin: Twin, scaled: Mapping[str, Scaled]) -> Steps | None:
    """How the output of a layer is held; None where it stays float, or the scale is no constant."""
    if twin.stand_in in scaled:
        return of(scaled[twin.stand_in])
    makers = [n for n in twin.unit if any(t.name == twin.stand_in for t in n.outputs)]
    if not makers or makers[0].op != "DequantizeLinear":
        return None
    found = scaled.get(makers[0].inputs[0].name)
    return None if found is None else of(found)


def of(scaled: Scaled) -> Steps | None:
    """None where there is no one step, known beforehand."""
    if not isinstance(scaled.scale, gs.Constant) or np.size(values(scaled.scale)) != 1:
        return None
    zero = np.zeros((), np.uint8) if scaled.zero is None else _array(scaled.zero)
    if zero is None or zero.dtype.kind not in "iu":
        return None
    size, limits = float(values(scaled.scale).reshape(-1)[0]), np.iinfo(zero.dtype)
    low, high = (size * (int(q) - int(zero.reshape(-1)[0])) for q in (limits.min, limits.max))
    return Steps(size, low, high, zero.dtype.name)


def _array(tensor: gs.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]] | None:
    return np.asarray(values(tensor)) if isinstance(tensor, gs.Constant) else None
