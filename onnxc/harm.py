"""What the outputs of a model lose by a change, on samples that no statistic saw.

    noise = mean over outputs of Σ (y − ŷ)² / Σ y²,      SQNR = −10 log10 noise
    loss  = share of decisions that an error of that size is expected to turn

The loss is told from scores (`onnxc.numerics.decisions`): unlike a count of turned decisions it
needs few samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.data import Dataset
from onnxc.damage import Outputs, outputs
from onnxc.fidelity import decibel
from onnxc.graph import Model
from onnxc.numerics.decisions import Contest, logits
from onnxc.workpiece import Workpiece

Array = NDArray[Any]

FEWEST = 4  # samples that judge, whatever that takes


@dataclass(frozen=True)
class Harm:
    """What outputs lose. noise: relative power of the error."""

    noise: float
    loss: float | None

    @property
    def sqnr(self) -> float:
        return decibel(1.0, self.noise)


@dataclass(frozen=True)
class Gauge:
    """What tells how far the outputs of a changed model are from those of the original."""

    piece: Workpiece
    samples: Dataset
    reference: Outputs

    def of(self, model: Model) -> Harm:
        """Raises ModelError where the model does not run."""
        made = outputs(replace(self.piece, model=model), self.samples)
        return harm(self.reference, made)


def gauge(piece: Workpiece, samples: Dataset, runs: int, seconds: float) -> Gauge:
    """One with as many of the samples as can be run so often in that time, but a few."""
    start = time.perf_counter()
    outputs(piece, samples.subset([0]))
    middle = time.perf_counter()
    some = samples.subset(list(range(min(len(samples), 4))))
    outputs(piece, some)
    fixed, moving = middle - start, time.perf_counter() - middle
    each = max((moving - fixed) / max(len(some) - 1, 1), 1e-4)
    most = (seconds / max(runs, 1) - 2 * fixed) / each  # building takes as long as opening
    count = int(np.clip(most, min(FEWEST, len(samples)), len(samples)))
    chosen = samples.subset([i * len(samples) // count for i in range(count)])
    return Gauge(piece, chosen, outputs(piece, chosen))


def harm(reference: Outputs, made: Outputs) -> Harm:
    """The loss of outputs, batch by batch as they were made."""
    noises: list[float] = []
    loss = None
    for name, first in reference[0].items():
        if first.dtype.kind != "f":
            continue
        y, z = (np.concatenate([_flat(b[name]) for b in some]) for some in (reference, made))
        if y.shape != z.shape:
            continue
        power = float((y**2).sum())
        noises.append(float(((y - z) ** 2).sum()) / power if power > 0 else 0.0)
        if loss is None and first.ndim >= 2 and y.shape[1] > 1:
            loss = float(Contest.of(logits(y), logits(z)).disagreement.mean())
    return Harm(float(np.mean(noises)) if noises else 0.0, loss)


def _flat(x: Array) -> Array:
    """(decisions, classes), float64."""
    while x.ndim > 2 and x.shape[-1] == 1:
        x = x[..., 0]
    return x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1).astype(np.float64)
