"""How long each kind of layer takes here: measured once for (operator, shapes, types), then known.

A key is an operator with its attributes and the shapes and types of what it reads and makes, on
one machine with one runtime. Times of a new model are taken for keys that are not known; as
machines are faster one day than another, they are scaled by what the known ones took now,

    t(k) = t'(k) · median over known j of  t(j) / t'(j).

They order what a search tries, and share a budget among layers; what is kept is always chosen by
timing whole models. The table lies in the user's cache folder: ONNXC_CACHE, or that of the system.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import archspec.cpu
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort

from onnxc.errors import OptionError
from onnxc.files import replacing
from onnxc.graph import Model
from onnxc.profile import node_times
from onnxc.runtime import Runtime


@dataclass
class LayerTimes:
    """known: milliseconds by key. path: where they are kept, None for nowhere."""

    path: Path | None = None
    known: dict[str, float] = field(default_factory=dict)

    def of(
        self, model: Model, feed: Mapping[str, Any], runtime: Runtime = Runtime()
    ) -> dict[str, float]:
        """Milliseconds of each node of a model, and under "" of what belongs to none.

        Raises ModelError where it has to be run, and cannot be.
        """
        keys = {node.name: key_of(node) for node in model.graph.nodes}
        if keys and all(key in self.known for key in keys.values()):
            return {name: self.known[key] for name, key in keys.items()}
        times = node_times(model, feed, runtime)
        fresh = {key: times.get(name, 0.0) for name, key in keys.items() if key}
        scale = _drift(self.known, fresh)
        self.known = {**{key: scale * t for key, t in fresh.items()}, **self.known}
        self._save()
        return times

    def _save(self) -> None:
        """A table that cannot be kept is no fault of the work that it serves."""
        if self.path is None:
            return
        with suppress(OSError, OptionError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as (file,):
                file.write(json.dumps(self.known, indent=0, sort_keys=True).encode())


def kept(target: str, runtime: Runtime) -> LayerTimes:
    """The table of this machine for a target and a runtime, as other searches have left it."""
    told = [target, str(archspec.cpu.host()), os.cpu_count(), ort.__version__, asdict(runtime)]
    name = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]
    path = folder() / f"times-{name}.json"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        known = {str(key): float(t) for key, t in found.items() if float(t) >= 0}
    return LayerTimes(path, known)


def folder() -> Path:
    """Where tables are kept."""
    if given := os.environ.get("ONNXC_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "onnxc"
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", usual)) / "onnxc"


def key_of(node: gs.Node) -> str:
    """Empty where a shape is known only at run time."""
    shapes = [(_type(t), t.shape) for t in (*node.inputs, *node.outputs)]
    if any(shape is None or any(not isinstance(d, int) for d in shape) for _, shape in shapes):
        return ""
    plain = (int, float, str, list)
    attributes = sorted((n, v) for n, v in node.attrs.items() if isinstance(v, plain))
    told = " ".join(f"{kind}{list(shape)}" for kind, shape in shapes)
    return f"{node.op} {attributes} {told}"


def _type(tensor: gs.Tensor) -> str:
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return str(tensor.dtype)
    return str(np.dtype(tensor.dtype).name)


def _drift(known: Mapping[str, float], fresh: Mapping[str, float]) -> float:
    """How much slower the machine was when the known times were taken."""
    ratios = [known[k] / t for k, t in fresh.items() if known.get(k, 0) > 0 and t > 0]
    return median(ratios) if ratios else 1.0
