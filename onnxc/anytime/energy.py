"""A proxy for the energy of one inference: arithmetic, and fetching the weights.

    E = Σ_l n_l e_l + e_byte B

n_l: multiply-accumulates of a heavy node, e_l: picojoules of one in what its kernel computes with,
B: bytes of the file, fetched once from DRAM. Horowitz 2014, "Computing's
energy problem", 45 nm. No machine was measured: it ranks candidates, it predicts no battery.
"""

from __future__ import annotations

from onnxc.cost import macs_by_node
from onnxc.graph import Model, size
from onnxc.kernels import coverage
from onnxc.runtime import Runtime

MAC = {"float": 3.7 + 0.9, "integer": 0.2 + 0.1}  # pJ: multiply and add, 32-bit float or 8-bit
BYTE = 640 / 4  # pJ of a byte from DRAM


def energy(model: Model, runtime: Runtime = Runtime()) -> float:
    """Picojoules of one sample."""
    integer = {kernel.node for kernel in coverage(model, runtime).kernels if kernel.integer}
    counts = macs_by_node(model)
    arithmetic = sum(
        count * MAC["integer" if name in integer else "float"] for name, count in counts.items()
    )
    return arithmetic + BYTE * size(model)
