"""The reduce step: statistics files, and two of them made into one.

A file is one .npz: the arrays of every observer, and a JSON entry that says which model, data,
runtime and batch they came from. Observers are commutative monoids, so machines that each saw a
part of the data give, merged in any order, the statistics of all of it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from calib.observers import OBSERVERS, Array, Streaming
from onnxc import weights
from onnxc.core import Key
from onnxc.errors import DataError, OptionError
from onnxc.files import replacing
from onnxc.graph import Model, as_declared

VERSION = 1
HEADER = "statistics"


@dataclass(frozen=True)
class Statistics:
    """Statistics with their origin.

    model: sha256 of the model's bytes. data: fingerprints of the datasets that were seen. runtime:
    ONNX Runtime's version. batch: samples in a run.
    """

    stats: Mapping[Key, Streaming]
    model: str
    data: tuple[str, ...]
    batch: int
    runtime: str = onnxruntime.__version__
    provider: str = "CPUExecutionProvider"


def digest(model: Model) -> str:
    """sha256, in hex, of the graph and of its weights, wherever a file keeps them."""
    proto, held = as_declared(model)
    found = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for values in held:
        for piece in weights.pieces(values):
            found.update(piece)
    return found.hexdigest()


def save(statistics: Statistics, path: str | Path) -> None:
    """Write a statistics file whole or not at all; the same statistics give the same bytes.

    Raises OptionError when the path cannot be written.
    """
    keys = sorted(statistics.stats, key=lambda key: (key.name, key.what, str(key.axis)))
    about = {f.name: getattr(statistics, f.name) for f in fields(Statistics) if f.name != "stats"}
    header = {"version": VERSION, **about, "keys": [asdict(key) for key in keys]}
    entries: dict[str, Any] = {HEADER: np.array(json.dumps(header))}
    for index, key in enumerate(keys):
        values = vars(statistics.stats[key]).items()
        entries |= {f"{index}.{name}": value for name, value in values if value is not None}
    with replacing(path) as (file,):
        np.savez_compressed(file, **entries)


def load(path: str | Path, model: str | None = None) -> Statistics:
    """Read a statistics file; `model`: the digest of the model that it is to be used with.

    Raises DataError when the file is missing, damaged or not one of ours, and OptionError when it
    was made from another model.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            statistics = _parse(dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a statistics file that this version can read") from error
    if model is not None and statistics.model != model:
        raise OptionError(f"{path} holds the statistics of another model: calibrate this one")
    return statistics


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both data.

    Raises OptionError when models or keys differ, or when both saw the same data.
    """
    if a.model != b.model:
        raise OptionError("statistics of two different models cannot be merged")
    if twice := set(a.data) & set(b.data):
        raise OptionError(f"both hold the statistics of the same data ({min(twice)[:12]})")
    if a.stats.keys() != b.stats.keys():
        raise OptionError("statistics of different tensors cannot be merged: use the same options")
    stats = {key: observer.merge(b.stats[key]) for key, observer in a.stats.items()}
    data = tuple(sorted((*a.data, *b.data)))
    return Statistics(stats, a.model, data, max(a.batch, b.batch), a.runtime, a.provider)


def _parse(arrays: Mapping[str, Array]) -> Statistics:
    header = json.loads(str(arrays[HEADER]))
    if header.pop("version") != VERSION:
        raise ValueError("another version")
    stats: dict[Key, Streaming] = {}
    for index, entry in enumerate(header.pop("keys")):
        key, prefix = Key(**entry), f"{index}."
        named = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        stats[key] = _observer(OBSERVERS[key.what](key.axis), named)
    header["data"] = tuple(header["data"])
    return Statistics(stats, **header)


def _observer(observer: Streaming, arrays: Mapping[str, Array]) -> Streaming:
    """An observer with its fields, each in the type that it has when empty."""
    for name, empty in vars(observer).items():
        if empty is not None:
            kind: Any = type(empty)
            setattr(observer, name, arrays[name] if kind is np.ndarray else kind(arrays[name]))
    return observer
