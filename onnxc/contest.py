"""Candidates compared with one original on the same samples: independent tasks, here or elsewhere.

Only comparisons are spread. Latency is measured by one process, while the workers have nothing to
do. Models that are not held in memory do not travel, so they are compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.cluster import Crew
from calib.data import Dataset
from calib.remote import check_files
from onnxc.check import Comparison, compare
from onnxc.pairs import Subject
from onnxc.runtime import Runtime

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Contest:
    """Candidates by name, the original, and the samples; batch: of them in a run."""

    original: Subject
    candidates: Mapping[str, Subject]
    heldout: Dataset
    runtime: Runtime
    batch: int

    def compare(self, name: str) -> Comparison:
        models = self.original, self.candidates[name]
        return compare(*models, self.heldout, self.runtime, batch=self.batch)

    @property
    def can_travel(self) -> bool:
        return all(isinstance(m, bytes) for m in (self.original, *self.candidates.values()))


def compared(contest: Contest, client: Client | None = None) -> Iterator[Comparison]:
    """In the order of the candidates; client: of a Dask cluster, whose workers compare."""
    if client is None or not contest.can_travel:
        yield from map(contest.compare, contest.candidates)
        return
    for found, skipped in Crew(client).each(judge, contest, contest.candidates):
        contest.heldout.source.skipped.update(skipped)
        yield found


def judge(contest: Contest, name: str) -> tuple[Comparison, dict[int, str]]:
    """A task: the comparison of one candidate, and images that could not be read."""
    check_files(contest.heldout)
    return contest.compare(name), dict(contest.heldout.source.skipped)
