"""Samples of a search: three parts that have none in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.data import Dataset, InputSpec, open_data
from onnxc.errors import DataError
from onnxc.samples import MOST_KEPT, OTHERS, Samples, choose_samples

SPECS = [InputSpec("x", np.dtype(np.float32), ("N", 1))]


def _open(source: Any, count: int | None) -> Dataset:
    return open_data(source, SPECS, None, count)


def _chosen(count: int, val: Any = None) -> Samples:
    data = {"x": np.arange(count, dtype=np.float32)[:, None]}
    return choose_samples(SPECS, data, val, None, _open, None, 0, is_search=True)


def _values(dataset: Dataset | None) -> list[float]:
    return [] if dataset is None else [float(f["x"][0, 0]) for f in dataset.batches(1)]


@pytest.mark.parametrize("count", [3, 10, 101, 2000])
def test_parts_have_nothing_in_common(count: int) -> None:
    found = _chosen(count)
    parts = [_values(x) for x in (found.kept, found.judge, found.validation)]
    assert all(parts) and found.judges == OTHERS
    joined = [x for part in parts for x in part]
    assert len(joined) == len(set(joined))
    assert len(parts[0]) <= MOST_KEPT and (count < 513 or len(parts[0]) > MOST_KEPT / 2)
    assert sorted(joined) == list(range(count))


def test_validation_that_is_given_judges_alone() -> None:
    found = _chosen(90, {"x": np.full((5, 1), -1.0, np.float32)})
    assert len(_values(found.kept)) == 72 and len(_values(found.judge)) == 18
    assert _values(found.validation) == [-1.0] * 5


def test_those_that_choose_are_in_random_order() -> None:
    first, again = _values(_chosen(100).judge), _values(_chosen(100).judge)
    assert first == again and first != sorted(first)


def test_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="cannot make statistics, choose and judge"):
        _chosen(2)
