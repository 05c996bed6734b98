"""Passes that work layer after layer: each step gets the statistics of what the steps before left.

    for each step:   wants → gather (both models move on to that layer) → apply

Both models run once, side by side (`calib.walk`). What comes out is one pass to the pipeline: one
proof and one row of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from calib.data import Dataset
from calib.walk import Pair
from onnxc.core import Change, Context, Key, Pass, Sequential, Skip
from onnxc.graph import Model

MOST = 512  # samples: what crosses a place of the graph is kept of each

Progress = Callable[[str], None]


@dataclass(frozen=True)
class InTurn:
    """A sequential pass together with what its steps take.

    model: the rewritten one, which `apply` gets the graph of. progress: told "reconstruct: 3", for
    the third step.
    """

    pass_: Pass
    model: Model
    original: Model
    dataset: Dataset
    max_memory: int | None = None
    threads: int = 1
    progress: Progress | None = None
    name: ClassVar[str] = "in-turn"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        """Gather and apply step after step. Raises ModelError, DataError."""
        assert isinstance(self.pass_, Sequential)
        results: list[Change | Skip] = []
        used = spread(self.dataset)
        bounds = (self.max_memory, self.threads)
        pair = Pair(self.original, self.model, used, *bounds)
        with pair, threadpool_limits(1, user_api="blas"):  # idle threads of BLAS spin
            for number, step in enumerate(self.pass_.steps(graph, context), 1):
                if self.progress is not None:
                    self.progress(f"{self.pass_.name}: {number}")
                stats = pair.gather(tuple(step.wants(graph, context)))
                results += step.apply(graph, replace(context, stats=stats))
        return results


def spread(dataset: Dataset, most: int = MOST) -> Dataset:
    """At most so many samples, evenly spread over the dataset."""
    count = min(most, len(dataset))
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.intp))
