"""Observers out of a file: only what data could have left in one is taken.

A checksum tells a wrong bit, not a file that another program made. So each statistic is held
against its key and against itself: shapes, counts, finite sums, a histogram whose bins fit its
extremes, products that are symmetric with a diagonal that is not negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.moments import MomentsObserver, widths
from calib.observers import (
    BINS,
    HistogramObserver,
    MeanObserver,
    PeakObserver,
    RangeObserver,
    Streaming,
    ZerosObserver,
    exponent_of,
    observer_of,
)
from onnxc.core import Key

Array = NDArray[Any]
Facts = Iterator[tuple[bool, str]]  # of what must hold, and what is wrong where it does not

OF_THE_KEY = ("axis", "window")
LARGEST = 2**62  # of a count


def numbers(observer: Streaming) -> dict[str, Any]:
    """The fields of an observer that are plain numbers, by name."""
    plain = {name: value for name, value in _fields(observer).items() if not _is_array(value)}
    return {name: value for name, value in plain.items() if value is not None}


def arrays(observer: Streaming) -> dict[str, Array]:
    """The fields of an observer that are arrays, by name."""
    return {name: np.asarray(x) for name, x in _fields(observer).items() if _is_array(x)}


def restored(
    key: Key, given: Mapping[str, Any], array: Callable[[str], Array]
) -> tuple[Streaming, list[str]]:
    """The observer of a key, and the names of the arrays that were read for it.

    Raises ValueError with what is wrong.
    """
    observer: Any = observer_of(key)
    names = [field.name for field in fields(observer) if field.name not in OF_THE_KEY]
    plain = [name for name in names if not _is_array(getattr(observer, name))]
    if unknown := set(given) - set(plain):
        raise ValueError(f"{min(unknown)} is no part of {key.what}")
    for name in plain:
        setattr(observer, name, _number(given, name, getattr(observer, name)))
    if observer.count == 0:
        return observer, []
    held = [name for name in names if name not in plain]
    for name in held:
        empty, found = getattr(observer, name), array(name)
        if found.dtype != empty.dtype or not np.isfinite(found).all():
            raise ValueError(f"{name} holds no such numbers")
        setattr(observer, name, found)
    wrong = next((what for holds, what in FACTS[type(observer)](observer, key) if not holds), "")
    if wrong:
        raise ValueError(wrong)
    return observer, held


def _fields(observer: Any) -> dict[str, Any]:
    names = (field.name for field in fields(observer) if field.name not in OF_THE_KEY)
    return {name: getattr(observer, name) for name in names}


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)


def _number(given: Mapping[str, Any], name: str, empty: Any) -> Any:
    """A number of the type of the empty observer's; of one that has none, a count or nothing."""
    if empty is None and name not in given:
        return None
    value = given.get(name)
    if isinstance(empty, float):
        if given.get("count") == 0 and value is None:
            return empty
        if type(value) not in (int, float) or not math.isfinite(value or 0.0):
            raise ValueError(f"{name} is no finite number")
        return float(value or 0.0)
    if type(value) is not int or abs(value) > LARGEST:
        raise ValueError(f"{name} is no whole number")
    return value


def _range_facts(observer: RangeObserver, key: Key) -> Facts:
    low, high = observer.low, observer.high
    yield observer.count > 0, "a count is negative"
    is_fitting = low.shape == high.shape and low.ndim == (key.axis is not None)
    yield is_fitting, "a range has a wrong shape"
    yield bool((low <= high).all()), "a minimum is above its maximum"


def _histogram_facts(observer: HistogramObserver, key: Key) -> Facts:
    counts, largest = observer.counts, max(abs(observer.low), abs(observer.high))
    yield observer.count > 0 and observer.positions > 0, "a count is negative"
    yield counts.shape == (BINS,), "a histogram has a wrong number of bins"
    yield bool((counts >= 0).all() and (counts <= observer.count).all()), "a bin has a wrong count"
    yield 0 < int(counts.sum()) <= observer.count, "a histogram counts more values than there were"
    yield observer.low <= observer.high, "a minimum is above its maximum"
    yield observer.exponent == exponent_of(largest), "the bins do not fit the extremes"


def _mean_facts(observer: MeanObserver, key: Key) -> Facts:
    yield observer.count > 0, "a count is negative"
    yield observer.total.ndim == (key.axis is not None), "a sum has a wrong shape"
    kind = {PeakObserver: "peak", ZerosObserver: "count of zeros"}.get(type(observer))
    yield kind is None or bool((observer.total >= 0).all()), f"a {kind} is negative"


def _moments_facts(observer: MomentsObserver, key: Key) -> Facts:
    total, products = observer.total, observer.products
    yield 0 < observer.count <= observer.available, "more rows were taken than there were"
    yield observer.block is None or observer.block > 0, "a block has no columns"
    yield total.ndim == 2 and total.shape[1] > 0, "a sum of rows has a wrong shape"
    groups, d = total.shape
    kernel = math.prod(observer.window.kernel)
    yield groups == observer.window.groups and d % kernel == 0, "the rows do not fit the layer"
    count, width = widths(d, observer.block)
    yield products.shape == (groups, count, width, width), "products are not square, or of others"
    transposed = products.transpose(0, 1, 3, 2)
    yield bool((products == transposed).all()), "products are not symmetric"
    yield bool((observer.diagonal >= 0).all()), "a sum of squares is negative"


FACTS: dict[type[Any], Callable[[Any, Key], Facts]] = {
    RangeObserver: _range_facts,
    HistogramObserver: _histogram_facts,
    MeanObserver: _mean_facts,
    PeakObserver: _mean_facts,
    ZerosObserver: _mean_facts,
    MomentsObserver: _moments_facts,
}
