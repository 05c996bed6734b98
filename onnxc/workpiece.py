"""A prepared model with what may be measured of it, for whoever has to choose passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from calib.data import Dataset
from onnxc.core import Context
from onnxc.graph import Model
from onnxc.layer_times import LayerTimes
from onnxc.pipeline import Calibration, Progress
from onnxc.runtime import Runtime

T = TypeVar("T")

PATIENCE = 300.0  # seconds of measuring before a choice


def silent(text: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Workpiece:
    """feed: one batch by input name. judge: samples that no statistic sees, to choose by.

    patience: seconds that measuring before a choice may take. memo: what was measured. times: of
    layers, where some are known.
    """

    model: Model
    context: Context
    calibration: Calibration
    feed: Mapping[str, Any] = field(default_factory=dict)
    runtime: Runtime = Runtime()
    say: Progress = silent
    judge: Dataset | None = None
    patience: float = PATIENCE
    times: LayerTimes = field(default_factory=LayerTimes, repr=False, compare=False)
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made for a key, made once for this model."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found

    @property
    def has_data(self) -> bool:
        return self.calibration.dataset is not None

    @property
    def is_measured(self) -> bool:
        """Whether statistics are of samples that were given, not of made-up ones."""
        dataset = self.calibration.dataset
        return self.calibration.known is not None or (
            dataset is not None and not dataset.is_synthetic
        )
