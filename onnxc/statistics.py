"""Statistics files: what calibration saw, tied to the model and the data that it saw.

A file is an .npz: arrays `k/field` of the k-th statistic, and `meta`, JSON with the sha256 of the
model, the fingerprint of the data, batch size, runtime version and provider, and all scalars.
Loading it for another model is an error, for the names of tensors prove nothing.
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

from calib.observers import OBSERVERS, Streaming
from onnxc.core import Key
from onnxc.errors import DataError
from onnxc.files import replacing

FORMAT = 1
BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Origin:
    """Where statistics come from. model: sha256 of the file; data: fingerprint of the data set."""

    model: str
    data: str
    samples: int
    batch: int
    runtime: str
    provider: str


def digest(model: str | Path) -> str:
    """sha256 of a model file, in hex."""
    with Path(model).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(path: str | Path, stats: Mapping[Key, Streaming], origin: Origin) -> None:
    """Write a statistics file, whole or not at all. Raises OptionError when it cannot be written."""
    arrays: dict[str, Any] = {}
    entries = []
    for number, (key, observer) in enumerate(sorted(stats.items(), key=_order)):
        held = {f.name: getattr(observer, f.name) for f in fields(observer)}  # type: ignore[arg-type]
        grids = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{number}/{name}": value for name, value in grids.items()}
        scalars = {name: value for name, value in held.items() if name not in grids}
        entries.append({**asdict(key), "scalars": scalars})
    meta = json.dumps({"format": FORMAT, "origin": asdict(origin), "statistics": entries})
    with replacing(path) as (file,):
        np.savez(file, meta=np.frombuffer(meta.encode(), np.uint8), **arrays)


def load(path: str | Path, model: str | Path) -> tuple[dict[Key, Streaming], Origin]:
    """Read a statistics file for a model file.

    Raises DataError when the file is damaged, of another format, or made with another model.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            origin = Origin(**meta["origin"])
            stats = dict(_restore(archive, n, e) for n, e in enumerate(meta["statistics"]))
    except BROKEN as error:
        raise DataError(f"{path} is not a statistics file, or a damaged one") from error
    if meta["format"] != FORMAT:
        raise DataError(f"{path} has format {meta['format']}, but this onnxc reads {FORMAT}")
    if origin.model != digest(model):
        raise DataError(f"{path} was made with another model than {model}; calibrate this one")
    return stats, origin


def _restore(archive: Any, number: int, entry: Mapping[str, Any]) -> tuple[Key, Streaming]:
    key = Key(entry["tensor"], entry["what"], entry["axis"])
    prefix = f"{number}/"
    names = [name for name in archive.files if name.startswith(prefix)]
    grids = {name.removeprefix(prefix): archive[name] for name in names}
    return key, OBSERVERS[key.what](**entry["scalars"], **grids)


def _order(item: tuple[Key, Streaming]) -> tuple[str, str, int]:
    key, _ = item
    return key.tensor, key.what, -1 if key.axis is None else key.axis
