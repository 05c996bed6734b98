"""The reduce step: statistics of parts of the data made into those of all of it.

Observers are commutative monoids, so machines that each saw a part give together what one machine
would have found: ranges, counts and histograms to the bit, sums of means and moments to the
rounding of float64. Parts are taken in the order of the digests of their samples, so that the order
in which they are named changes nothing at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from calib.observers import Streaming
from calib.statistics import Statistics, load
from onnxc import weights
from onnxc.core import Key
from onnxc.errors import OptionError
from onnxc.graph import Model, as_declared

Named = tuple[str, Statistics]


def digest(model: Model) -> str:
    """sha256, in hex, of the graph and of its weights, wherever a file keeps them."""
    proto, held = as_declared(model)
    found = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for values in held:
        for piece in weights.pieces(values):
            found.update(piece)
    return found.hexdigest()


def merge(files: Sequence[str | Path]) -> Statistics:
    """The statistics of the data of all files, one at least; no more than two are held at a time.

    Raises DataError for a file that cannot be read, and OptionError naming two whose models,
    preparation, statistics or block widths differ, or that saw a sample in common.
    """
    named = sorted(((str(f), _origin(load(f))) for f in files), key=lambda part: part[1].data)
    for (first, a), (second, b) in pairwise(named):
        _check_alike(first, a, second, b)
    _check_apart(named)
    (first, _), *others = named
    total = load(first)
    for name, _ in others:
        total = _both(name, total, load(name))
    return total


def _origin(part: Statistics) -> Statistics:
    """A part without its statistics: the keys alone."""
    stats: dict[Key, Any] = dict.fromkeys(part.stats)
    return replace(part, stats=stats)


def _check_alike(first: str, a: Statistics, second: str, b: Statistics) -> None:
    """Whether two files hold the same statistics of one model."""
    cannot = f"{first} and {second} cannot be merged"
    if a.model != b.model:
        raise OptionError(f"{cannot}: they are of two different models")
    if a.graph != b.graph:
        raise OptionError(f"{cannot}: their versions of onnxc prepare the model differently")
    if a.preparation and b.preparation and a.preparation != b.preparation:
        raise OptionError(f"{cannot}: their images were prepared with different options")
    asked = [{*part.stats, *part.lost} for part in (a, b)]
    if asked[0] != asked[1]:
        odd = min(asked[0] ^ asked[1], key=lambda key: (key.name, key.what))
        one, other = (first, second) if odd in asked[0] else (second, first)
        raise OptionError(
            f"{cannot}: {one} holds {odd.what} of tensor {odd.name!r} and {other} does not; "
            "gather both with the same --what"
        )


def _check_apart(named: Sequence[Named]) -> None:
    """Whether no sample was seen twice."""
    for index, (first, a) in enumerate(named):
        for second, b in named[index + 1 :]:
            shared = len(a.seen & b.seen)
            if shared:
                raise OptionError(
                    f"{first} and {second} cannot be merged: {shared} sample{'s'[: shared != 1]} "
                    "would count twice; calibrate on parts that share none"
                )


def _both(name: str, a: Statistics, b: Statistics) -> Statistics:
    """What was merged before, and a file of this name."""
    lost = a.lost | b.lost
    kept = [key for key in a.stats if key not in lost]
    return Statistics(
        {key: _merged(name, key, a.stats[key], b.stats[key]) for key in kept},
        a.model,
        a.graph,
        tuple(sorted((*a.samples, *b.samples))),
        tuple(sorted({*a.made, *b.made})),
        a.preparation or b.preparation,
        lost,
    )


def _merged(name: str, key: Key, a: Streaming, b: Streaming) -> Streaming:
    try:
        return a.merge(b)
    except OptionError as error:
        raise OptionError(f"{name}, tensor {key.name!r}: {error}") from error
