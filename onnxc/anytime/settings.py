"""What `onnxc compress` may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxc.anytime.metric import KNOWN
from onnxc.errors import OptionError

Objective = Literal["latency", "size", "energy-proxy"]


@dataclass(frozen=True)
class CompressSettings:
    """What to look for; the options of `onnxc compress` besides data, target and nodes.

    metric: what may drop: top1, agreement, sqnr (noise in percent of the outputs' power, 1 is 20
    dB), perplexity (percent), or MODULE:FUNCTION, a score of (outputs, labels); by default what
    suits the model.
    minimize: what is to become small: latency, size (of the file that is written, packed where it
    ends in .onnxz), or energy-proxy (of arithmetic and of fetching weights).
    """

    metric: str = ""
    minimize: Objective = "latency"

    def __post_init__(self) -> None:
        if self.metric and self.metric not in KNOWN and ":" not in self.metric:
            raise OptionError(
                f"--metric {self.metric} is unknown: give {', '.join(KNOWN)} or MODULE:FUNCTION"
            )

    @property
    def suffix(self) -> str:
        """Of the file that is written."""
        return "compressed"
