"""Which samples make statistics, which choose among results, and which judge the one chosen.

                    make                        choose                      judge
    --data          four of five                the fifth                   the same, or --val
    --stats, --data statistics, four of five    a fifth, of unseen ones     the same, or --val
    --stats, --val  statistics                  a fifth of --val            the rest of it
    --stats         statistics                  synthesized                 the same
    nothing         synthesized                 others, synthesized         the same, or --val

No sample that statistics saw chooses or judges. A search looks at the samples that choose again and
again, so it gets more of them, and never the ones that judge:

    --data          four of five, 256 at most   the rest                    --val
    --data          three of five, 256 at most  half of the rest            the other half
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.data import Dataset, synthesize
from calib.inputs import InputSpec
from calib.observers import HistogramObserver
from calib.statistics import Statistics
from onnxc.core import Key
from onnxc.errors import DataError

HELD_OUT = 0.2  # share of the samples that judge the result
MOST_HELD_OUT = 32
MADE_UP = 16  # samples of each kind where they are synthesized
OF_VALIDATION = "of the validation data"
OTHERS = "others of --data"
MOST_KEPT = 256  # samples that a search makes statistics of
Open = Callable[[Any, int | None], Dataset]  # of a source, and how many samples of it


@dataclass(frozen=True)
class Samples:
    """kept: what statistics are gathered of, None where that is not possible. judge: samples to
    choose by, and to judge by where there is no validation; whose: where they come from, in words.
    left_out: how many could not judge, because statistics saw them. judges: where those of
    `validation` come from.
    """

    kept: Dataset | None
    judge: Dataset
    validation: Dataset | None = None
    whose: str = "held out of them"
    left_out: int = 0
    judges: str = OF_VALIDATION


def choose_samples(
    specs: list[InputSpec],
    data: Any,
    val: Any,
    known: Statistics | None,
    open_source: Open,
    count: int | None,
    seed: int,
    is_search: bool = False,
) -> Samples:
    """The samples of a request; `open_source` opens and tries one.

    Raises DataError where statistics saw all that could judge, or saw images prepared otherwise.
    """
    validation = None if val is None else open_source(val, None)
    left_out = 0
    if validation is not None and known is not None:
        total, validation = len(validation), _unseen(validation, known, "--val")
        left_out = total - len(validation)
    if data is None:
        return _without_data(specs, validation, known, count or MADE_UP, seed, left_out)
    samples = open_source(data, count)
    if known is None:
        if is_search:
            return _searched(samples, validation, seed)
        return Samples(*split(samples), validation)
    return _beside(samples, validation, known, left_out)


def split(dataset: Dataset, fresh: Sequence[int] | None = None) -> tuple[Dataset, Dataset]:
    """Calibration samples and held-out ones, every fifth; both the same where there is only one.

    fresh: positions of the samples that may be held out; None for all.
    """
    count = len(dataset)
    if count < 2:
        return dataset, dataset
    step = max(round(1 / HELD_OUT), -(-count // MOST_HELD_OUT), 2 if count < 5 else 0)
    held = [i for i in range(count) if i % step == step - 1] or [count - 1]
    if fresh is not None and not set(held) <= set(fresh):
        wanted = min(len(held), len(fresh))
        held = [fresh[i * len(fresh) // wanted] for i in range(wanted)]
    kept = [i for i in range(count) if i not in set(held)]
    return dataset.subset(kept), dataset.subset(held)


def _searched(samples: Dataset, validation: Dataset | None, seed: int) -> Samples:
    """For a search, in random order, as it often looks at the first ones only.

    Raises DataError where there are not enough to judge what it finds.
    """
    count = len(samples)
    if count < 3 and validation is None:
        raise DataError(
            f"{count} samples cannot make statistics, choose and judge: give more --data, or --val"
        )
    fifths = 1 if validation is not None else 2
    wanted = min(max(fifths, count * fifths // 5), count - 1)
    held = {(i + 1) * count // wanted - 1 for i in range(wanted)}
    kept = [i for i in range(count) if i not in held]
    kept = kept[:: -(-len(kept) // MOST_KEPT)]
    others = [i for i in range(count) if i not in set(kept)] or kept
    rest = np.random.default_rng(seed).permutation(others)
    if validation is not None:
        return Samples(samples.subset(kept), samples.subset(rest), validation)
    chooses, judges = samples.subset(rest[::2]), samples.subset(rest[1::2])
    return Samples(samples.subset(kept), chooses, judges, judges=OTHERS)


def _without_data(
    specs: list[InputSpec],
    validation: Dataset | None,
    known: Statistics | None,
    count: int,
    seed: int,
    left_out: int,
) -> Samples:
    if known is None:
        kept = synthesize(specs, count, seed)
        judge = synthesize(specs, count, seed + 1)
        return Samples(kept, judge, validation, "others, synthesized too")
    if validation is None:
        judge = synthesize(specs, count, seed, known=_histograms(specs, known))
        return Samples(None, judge, whose="synthesized ones")
    rest, judge = split(validation)
    return Samples(None, judge, rest, OF_VALIDATION, left_out)


def _histograms(specs: list[InputSpec], known: Statistics) -> dict[str, HistogramObserver]:
    """Those of the model's inputs."""
    found = {spec.name: known.stats.get(Key(spec.name, "histogram")) for spec in specs}
    return {name: o for name, o in found.items() if isinstance(o, HistogramObserver)}


def _beside(
    samples: Dataset, validation: Dataset | None, known: Statistics, left_out: int
) -> Samples:
    """Data for what statistics do not hold; of samples that they saw, none chooses."""
    check_preparation(samples, known)
    fresh = fresh_positions(samples, known)
    if len(fresh):
        kept, judge = split(samples, fresh)
        return Samples(kept, judge, validation, left_out=left_out + len(samples) - len(fresh))
    if validation is None:
        raise DataError(
            f"statistics {known.path} saw all {len(samples)} samples of --data, so none can judge "
            "the result: give --val with other samples"
        )
    rest, judge = split(validation)
    return Samples(samples, judge, rest, OF_VALIDATION, left_out + len(samples))


def _unseen(dataset: Dataset, known: Statistics, option: str) -> Dataset:
    check_preparation(dataset, known)
    fresh = fresh_positions(dataset, known)
    if len(fresh) == len(dataset):
        return dataset
    if not fresh:
        raise DataError(
            f"statistics {known.path} saw all {len(dataset)} samples of {option}, so none can "
            "judge the result: give other samples"
        )
    return dataset.subset(np.asarray(fresh))


def fresh_positions(dataset: Dataset, known: Statistics) -> list[int]:
    """Positions of the samples that statistics have not seen."""
    return [i for i, digest in enumerate(dataset.digests()) if digest not in known.seen]


def check_preparation(dataset: Dataset, known: Statistics) -> None:
    """Raise DataError where statistics are of images that were prepared otherwise."""
    mine, theirs = dataset.preparation, known.preparation
    if mine and theirs and mine != theirs:
        raise DataError(
            f"statistics {known.path} are of images prepared with other options: give those that "
            "onnxc calibrate was given, such as --preset"
        )
