"""Proof that a rewrite kept a model whole.

`problems` takes two states of a model and says in plain sentences what the second one broke:
validity (onnx.checker, ONNX Runtime), the interface, or the numbers. A fault that the first state
already had is no problem of the rewrite. A lossless rewrite is judged by its signal-to-noise ratio

    SQNR = 10 log10(Σ ref² / Σ (ref − out)²)  dB

which ignores the scale of an output, with LOSSLESS_SQNR as the bar; an output near zero may pass by
its largest absolute error instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc import normal
from onnxc.errors import ModelError
from onnxc.fidelity import Comparison, Fidelity, compare, decibel
from onnxc.graph import Model, as_declared, copy, walk
from onnxc.kernels import Coverage, Kernel, coverage
from onnxc.runtime import Runtime, first_line
from onnxc.stages import Staged, open_stages

__all__ = [
    "Comparison",
    "Coverage",
    "Fidelity",
    "Kernel",
    "Snapshot",
    "compare",
    "coverage",
    "problems",
    "snapshot",
]

LOSSLESS_SQNR = {
    "float64": 60.0,
    "float32": 60.0,
    "float16": 40.0,
}  # dB, by the narrowest type inside
LOSSLESS_ERROR = 1e-6  # absolute error that always counts as equal
LOSSLESS_FLIPS = 1e-3  # share of integer outputs (arg-max, masks) that rounding may flip

Feed = Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """One state of a model: the model, its interface, and what it computes from one feed.

    model: as long as nobody changes it; `kept` is the same with a copy. outputs is None where no
    feed was given or the model does not run; failure then says why. proto: the skeleton that was
    run.
    """

    model: Model
    interface: tuple[str, ...]
    outputs: dict[str, Any] | None = None
    failure: str | None = None
    precision: str = "float32"
    proto: onnx.ModelProto | None = field(default=None, repr=False)

    def kept(self, changing: Model) -> Snapshot:
        """The same state when a model will be changed; its weights are shared."""
        return replace(self, model=copy(changing)) if self.model.graph is changing.graph else self


def snapshot(model: Model, feed: Feed | None, runtime: Runtime = Runtime()) -> Snapshot:
    """Run a model once."""
    failure, outputs, proto = None, None, None
    try:
        staged = _staged(model, feed, replace(runtime, lean=True))
        proto = staged.source.proto
        outputs = _outputs(staged, feed)
    except ModelError as error:
        failure = str(error)
    kind = _precision(model.graph)
    return Snapshot(model, interface(model.graph), outputs, failure, kind, proto)


def _staged(model: Model, feed: Feed | None, runtime: Runtime) -> Staged:
    """For one run, for which a model that does not fit in memory is not worth packing."""
    staged = open_stages(model, feed, runtime)
    return staged if staged.is_whole else open_stages(model, feed, replace(runtime, packs=False))


def _outputs(staged: Staged, feed: Feed | None) -> dict[str, Any] | None:
    if feed is not None:
        return staged.once(feed)
    if staged.is_whole:
        staged.opened()
    return None


def problems(
    before: Model | Snapshot, after: Model | Snapshot, feed: Feed | None, lossless: bool
) -> list[str]:
    """What `after` broke against `before`, one sentence each; empty when nothing.

    feed: one batch by input name, or None to check without running. lossless: outputs must be equal
    to rounding, else only finite where they were finite. A Snapshot saves the reference run.
    """
    old = before if isinstance(before, Snapshot) else snapshot(before, feed)
    new = after if isinstance(after, Snapshot) else snapshot(after, feed)
    found = [*_interface_problems(old, new), *_validity_problems(old, new)]
    if old.outputs is None or new.outputs is None:
        return found
    precision = min(old.precision, new.precision, key=LOSSLESS_SQNR.__getitem__)
    for name, reference in old.outputs.items():
        if name in new.outputs:
            judge = _unequal(reference, new.outputs[name], precision) if lossless else None
            reason = judge or _not_finite(reference, new.outputs[name])
            found += [f"output {name!r} {reason}"] if reason else []
    return found


def interface(graph: gs.Graph) -> tuple[str, ...]:
    """Inputs and outputs in order, a line each: side, name, type, shape with its symbols."""
    sides = (("input", graph.inputs), ("output", graph.outputs))
    return tuple(
        f"{side} {t.name!r} {_type_name(t.dtype)}{_shape_text(t)}"
        for side, tensors in sides
        for t in tensors
    )


def _type_name(kind: Any) -> str:
    if kind is None:
        return "untyped"
    name = onnx.TensorProto.DataType.Name(kind) if isinstance(kind, int) else np.dtype(kind).name
    return str(name)


def _shape_text(tensor: gs.Tensor) -> str:
    return "" if tensor.shape is None else f"[{', '.join(str(d) for d in tensor.shape)}]"


def _precision(graph: gs.Graph) -> str:
    found = {t.dtype for inner in walk(graph) for t in inner.tensors().values()}
    kinds = set(map(_type_name, found))
    return "float16" if kinds & {"float16", "FLOAT16", "bfloat16", "BFLOAT16"} else "float32"


def _interface_problems(old: Snapshot, new: Snapshot) -> Iterator[str]:
    if old.interface == new.interface:
        return
    lost = [line for line in old.interface if line not in new.interface]
    gained = [line for line in new.interface if line not in old.interface]
    if not lost and not gained:
        yield "the order of the inputs or outputs changed"
    yield from (f"the interface lost {line}" for line in lost)
    yield from (f"the interface gained {line}" for line in gained)


def _validity_problems(old: Snapshot, new: Snapshot) -> Iterator[str]:
    if new.failure and not old.failure:
        yield new.failure
    reason = _refusal(new)
    if reason and not _refusal(old):
        yield f"the model is no longer valid: {reason}"


def _refusal(state: Snapshot) -> str | None:
    return invalid(state.model) if state.proto is None else _invalid(state.proto)


def invalid(model: Model) -> str | None:
    """Why onnx.checker or strict shape inference refuses a model, in one line, or None."""
    return _invalid(as_declared(model)[0])


def _invalid(proto: onnx.ModelProto) -> str | None:
    try:
        normal.check(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (ModelError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return first_line(error)
    return None


def _unequal(reference: Any, output: Any, precision: str) -> str | None:
    """Why two values of one output are not equal to rounding, or None."""
    if not (isinstance(reference, np.ndarray) and isinstance(output, np.ndarray)):
        return _unequal_nested(reference, output, precision)
    if (reference.shape, reference.dtype) != (output.shape, output.dtype):
        return (
            f"changed from {reference.dtype}{list(reference.shape)} "
            f"to {output.dtype}{list(output.shape)}"
        )
    if reference.dtype.kind not in "fV":
        return _flips(reference, output)
    return _noise(reference.astype(np.float64), output.astype(np.float64), LOSSLESS_SQNR[precision])


def _unequal_nested(reference: Any, output: Any, precision: str) -> str | None:
    """Sequences and maps, element by element."""
    if type(reference) is not type(output):
        return f"changed from {type(reference).__name__} to {type(output).__name__}"
    if isinstance(reference, dict):
        if reference.keys() != output.keys():
            return "changed its keys"
        pairs = [(value, output[key]) for key, value in reference.items()]
    elif isinstance(reference, list):
        if len(reference) != len(output):
            return f"changed its length from {len(reference)} to {len(output)}"
        pairs = list(zip(reference, output, strict=True))
    else:
        pairs = [(np.asarray(reference), np.asarray(output))] if reference is not None else []
    reasons = (_unequal(a, b, precision) for a, b in pairs)
    return next((reason for reason in reasons if reason), None)


def _flips(reference: NDArray[Any], output: NDArray[Any]) -> str | None:
    flipped = int(np.count_nonzero(reference != output))
    if flipped <= LOSSLESS_FLIPS * reference.size:
        return None
    return f"changed in {flipped} of {reference.size} elements"


def _noise(reference: NDArray[Any], output: NDArray[Any], bar: float) -> str | None:
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(output)):
        return "is finite in other places than before"
    error = (reference - output)[finite]
    if not error.size or float(np.abs(error).max()) <= LOSSLESS_ERROR:
        return None
    ratio = decibel(float((reference[finite] ** 2).sum()), float((error**2).sum()))
    return None if ratio >= bar else f"changed: SQNR {ratio:.1f} dB, below {bar:.0f} dB"


def _not_finite(reference: Any, output: Any) -> str | None:
    """NaN or infinity where there was none; shapes that depend on the data may differ."""
    arrays = isinstance(reference, np.ndarray) and isinstance(output, np.ndarray)
    if not arrays or output.dtype.kind not in "fV":
        return None
    bad = ~np.isfinite(output.astype(np.float64))
    if bad.shape == reference.shape and reference.dtype.kind in "fV":
        bad &= np.isfinite(reference.astype(np.float64))
    elif not np.isfinite(reference.astype(np.float64)).all():
        return None
    return f"has {int(bad.sum())} values that are NaN or infinite" if bad.any() else None
