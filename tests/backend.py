"""The models of ONNX's own tests under every pass: one operator each, and the packaged ones.

Most of the one-operator models hold no weights, so a pass finds little to do. Each is also taken
with all inputs but the first float one as constants: then it is a layer with weights.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import onnx.backend.test.case.node as backend
from outcomes import Outcome

import passes
from calib.data import Dataset, InputSpec, open_data
from onnxc.check import Snapshot, interface, invalid, snapshot
from onnxc.core import PASSES, Context
from onnxc.errors import ModelError, OnnxcError
from onnxc.fidelity import decibel
from onnxc.graph import Model, copy, load, opset, to_bytes
from onnxc.pipeline import PREPARATION, Calibration, Step, apply_pass, compress, prepare
from onnxc.runtime import Runtime, dtype_of, run, session
from onnxc.targets import choose

for found in pkgutil.iter_modules(passes.__path__):
    importlib.import_module(f"passes.{found.name}")

MODULES = [
    found.name
    for found in pkgutil.walk_packages(backend.__path__, f"{backend.__name__}.")
    if not found.ispkg
]
DATA = Path(onnx.backend.test.__file__).parent / "data"
PACKAGED = ("simple", "pytorch-converted", "pytorch-operator")
TARGET = "portable"  # its sums saturate on no processor
EIGHT_BITS = 15.0  # dB that weights and activations of 8 bits keep, however small the model
FEW = {  # passes that take away what a tiny layer cannot spare: they promise to stay finite
    *("cluster", "cluster-vectors", "factorize", "prune", "quantize-activations"),
    *("quantize-layers", "quantize-levels", "shrink", "sparsify"),
}
UNDONE = {  # a fixed If lets ONNX Runtime see that Range gets tensors of rank 1, not scalars
    ("fold-constants", "test_affine_grid_2d_expanded"),
    ("fold-constants", "test_affine_grid_2d_align_corners_expanded"),
}

Feed = Mapping[str, Any]
Ending = tuple[str, str, bool]


@dataclass(frozen=True)
class Case:
    """A model with one feed, or None where its inputs are not tensors."""

    name: str
    model: onnx.ModelProto
    feed: Feed | None


@cache
def one_operator(module: str) -> tuple[Case, ...]:
    """The models of a module of ONNX's tests; its import makes them, 12 s for all modules."""
    known = len(backend._NodeTestCases)
    importlib.import_module(module)
    return tuple(
        Case(c.name, c.model, _feed(c.model, c.data_sets[0][0]))
        for c in backend._NodeTestCases[known:]
    )


def packaged(folder: str) -> Iterator[Case]:
    """The models of a folder with the inputs that lie beside them."""
    for place in sorted((DATA / folder).iterdir()):
        model = onnx.load(place / "model.onnx")
        files = sorted(place.glob("test_data_set_0/input_*.pb"))
        try:
            inputs = [onnx.numpy_helper.to_array(onnx.load_tensor(file)) for file in files]
        except (TypeError, ValueError, KeyError):  # sequences
            inputs = [None]
        yield Case(place.name, model, _feed(model, inputs))


def _feed(model: onnx.ModelProto, inputs: list[Any]) -> Feed | None:
    if not all(isinstance(x, np.ndarray) for x in inputs):
        return None
    return dict(zip([port.name for port in model.graph.input], inputs, strict=False))


def with_weights(case: Case) -> Case | None:
    """The case with all inputs but the first float one as constants; None where there is none."""
    if case.feed is None or len(case.feed) < 2:
        return None
    kept = next((n for n, x in case.feed.items() if x.dtype.kind == "f" and x.size), None)
    if kept is None:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    ports = [port for port in model.graph.input if port.name == kept]
    del model.graph.input[:]
    model.graph.input.extend(ports)
    rest = {name: x for name, x in case.feed.items() if name != kept}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(x, n) for n, x in rest.items())
    return Case(f"{case.name} with weights", model, {kept: case.feed[kept]})


def every_pass(corpus: str, case: Case) -> Iterator[Outcome]:
    """What each pass made of a model with its defaults: a preparation of the model as it is.

    Others get the prepared model, as they do from every command.
    """
    try:
        original = load(case.model)
    except ModelError as error:
        yield Outcome(corpus, case.name, "load", "refused", str(error))
        return
    ready = copy(original)
    prepare(ready, case.feed)
    data = _dataset(case)
    first = {pass_.name for pass_ in PREPARATION}
    for source, names in ((original, first), (ready, PASSES.keys() - first)):
        bench = Bench(case, source, data)
        for name in sorted(names):
            yield Outcome(corpus, case.name, name, *bench.applied(name))


def _dataset(case: Case) -> Dataset | None:
    """The feed as the only sample; None where it cannot be one."""
    try:
        ports = session(case.model.SerializeToString(), Runtime(level="none")).get_inputs()
    except ModelError:
        return None
    kinds = {port.name: dtype_of(port.type) for port in ports}
    specs = [InputSpec(p.name, k, tuple(p.shape)) for p in ports if (k := kinds[p.name])]
    if case.feed is None or len(specs) < len(ports) or not specs:
        return None
    try:
        data = open_data({name: np.asarray(case.feed[name])[None] for name in kinds}, specs)
        next(iter(data.batches(1)))
    except OnnxcError:  # empty arrays, NaN or infinity: no data that statistics are made of
        return None
    return data


class Bench:
    """A model to try passes on, one after the other, each on the model as it was given."""

    def __init__(self, case: Case, original: Model, data: Dataset | None) -> None:
        self.case, self.original, self.model = case, original, copy(original)
        self.before, self.given = snapshot(original, case.feed), to_bytes(original)
        is_fed = data is not None and self.before.outputs is not None
        self.calibration = Calibration(data, original=original) if is_fed else None

    def applied(self, name: str) -> Ending:
        """The ending of a pass: a word, a reason, and whether that is a fault."""
        done = self._done(name)
        is_same = to_bytes(self.model) == self.given
        if not done.changes and not is_same:
            ending = "other bytes", "it reports no change", True
        elif done.problems:
            ending = "undone", done.problems[0], (name, self.case.name) not in UNDONE
        elif not done.changes:
            ending = _left(done)
        else:
            fault = _fault(name, self.case, self.model, self.before)
            ending = ("broken", fault, True) if fault else ("changed", "", False)
        if not is_same:
            self.model = copy(self.original)
        return ending

    def _done(self, name: str) -> Step:
        context = Context(opset(self.model.graph), choose(TARGET))
        if self.calibration is None:
            return apply_pass(self.model, PASSES[name](), context, self.case.feed, self.before)
        how = (context, self.calibration, self.case.feed, None, self.before)
        (done,) = compress(self.model, [PASSES[name]()], *how)
        return done


def _left(done: Step) -> Ending:
    if not done.skips:
        return "nothing to do", "", False
    reason = done.skips[0].reason
    return "left alone", f"{done.name}: {reason}", not reason


def _fault(name: str, case: Case, model: Model, before: Snapshot) -> str:
    """What a pass broke, looked at without the engine's own checks; empty if nothing."""
    if interface(model.graph) != before.interface:
        return "the interface changed"
    reason = invalid(model)
    if reason and not invalid(before.model):
        return reason
    if before.outputs is None or case.feed is None:
        return ""
    after = run(session(to_bytes(model)), dict(case.feed))
    bar = 60.0 if PASSES[name].lossless else None if name in FEW else EIGHT_BITS
    pairs = ((output, value, after[output]) for output, value in before.outputs.items())
    found = (f"{o}: {told}" for o, x, y in pairs if (told := _differs(x, y, bar)))
    return next(found, "")


def _differs(x: Any, y: Any, bar: float | None) -> str:
    """How two values of an output differ by more than a pass promises; empty if they do not."""
    if not isinstance(x, np.ndarray):
        return "" if type(x) is type(y) else f"{type(x).__name__} became {type(y).__name__}"
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"{x.dtype}{x.shape} became {y.dtype}{y.shape}"
    if x.dtype.kind != "f" or not np.isfinite(x).all():
        return ""
    if not np.isfinite(y).all():
        return "is no longer finite"
    x, y = x.astype(np.float64), y.astype(np.float64)
    quality = decibel(float((x**2).sum()), float(((x - y) ** 2).sum()))
    least = 40.0 if bar == 60.0 and x.dtype == np.float16 else bar
    is_equal = np.allclose(x, y, rtol=0, atol=1e-6)
    return "" if least is None or is_equal or quality >= least else f"{quality:.1f} dB"
