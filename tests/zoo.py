"""Fifty real models of many makers beside the repository, with made-up samples that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SHARED
from corpora import Subject
from numpy.typing import NDArray

from onnxc.runtime import dtype_of, session

ZOO = SHARED / "models" / "zoo"
SAMPLES = 4
CORPUS = "zoo"


def entries() -> list[dict[str, Any]]:
    """What the manifest says of each model; nothing where there is no zoo."""
    manifest = ZOO / "manifest.json"
    found: list[dict[str, Any]] = json.loads(manifest.read_text()) if manifest.is_file() else []
    return found


def subject(entry: dict[str, Any], folder: Path) -> Subject:
    """A model as commands take it, its samples in a file of the folder."""
    name, samples = entry["name"], data(entry)
    model = ZOO / f"{name}.onnx"
    if samples is None:
        return Subject(CORPUS, name, model)
    file = folder / f"{name}.npz"
    texts = {n: x.astype("U") if x.dtype.hasobject else x for n, x in samples.items()}
    np.savez(file, **texts)
    return Subject(CORPUS, name, model, file, {n: x[0] for n, x in samples.items()})


def data(entry: dict[str, Any], samples: int = SAMPLES) -> dict[str, NDArray[Any]] | None:
    """Made-up samples by input name; None, for data that onnxc makes up, without known shapes."""
    shapes = entry.get("test_input_shapes")
    if shapes is None:
        return None
    random = np.random.default_rng(0)
    ports = session(ZOO / f"{entry['name']}.onnx").get_inputs()
    return {
        p.name: _drawn(p.name, dtype_of(p.type), (samples, *shapes[p.name]), random) for p in ports
    }


def _drawn(
    name: str, kind: np.dtype[Any] | None, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    assert kind is not None
    if name == "sr":
        return np.full(shape, 16000, kind)
    if kind.kind == "f":
        return random.random(shape, np.float32).astype(kind)
    if kind.hasobject:
        return np.full(shape, "1", object)
    return random.integers(0, 2, shape).astype(kind)
