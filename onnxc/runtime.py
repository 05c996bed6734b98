"""Sessions of ONNX Runtime: the one place that sets their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxc.errors import ModelError, OptionError
from onnxc.storage.package import plain

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Runtime:
    """How a model is run: the options of a session.

    threads: intra-op threads, 0 for all cores. level: a key of LEVELS. provider: any execution
    provider of the installed ONNX Runtime, with or without the suffix "ExecutionProvider". lean:
    plan no memory ahead, which takes a second set of buffers, and let threads sleep between runs,
    where others have work; for few runs of a model. folds: compute what follows from constants
    once, when the model is opened. packs: copy weights into the order that kernels read, which pays
    from the second run on. rounds: put float weights between Q/DQ on 8 bits, one scale for all.
    """

    threads: int = 1
    level: str = "all"
    provider: str = "CPU"
    lean: bool = False
    folds: bool = field(default=True, repr=False)
    packs: bool = field(default=True, repr=False)
    rounds: bool = field(default=True, repr=False)


def provider_name(name: str) -> str:
    """Full name of an execution provider; OptionError if this ONNX Runtime does not have it."""
    full = name if name.endswith("ExecutionProvider") else f"{name}ExecutionProvider"
    known: list[str] = ort.get_available_providers()
    for candidate in known:
        if candidate.lower() == full.lower():
            return candidate
    names = ", ".join(p.removesuffix("ExecutionProvider") for p in known)
    raise OptionError(f"provider {name!r} is not in this ONNX Runtime; it has: {names}")


def session(
    model: bytes | str | Path,
    runtime: Runtime = Runtime(),
    dump: Path | None = None,
    folder: Path | None = None,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Open a model (serialized, or a path). `dump`: also write the optimized graph there.

    folder: where the external data of a serialized model lies. profile: prefix of the file that
    takes the times of all kernels, which `end_profiling` closes.

    Raises ModelError with ONNX Runtime's first line when it refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.log_severity_level = 4
    options.graph_optimization_level = LEVELS[runtime.level]
    options.enable_mem_pattern = not runtime.lean
    if runtime.lean:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if dump is not None:
        options.optimized_model_filepath = str(dump)
        options.add_session_config_entry(_DUMPED, f"{dump.name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folder is not None:
        options.add_session_config_entry(_FOLDER, str(folder))
    if not runtime.packs:
        options.add_session_config_entry("session.disable_prepacking", "1")
    source = model if isinstance(model, bytes) else str(plain(model))
    providers = list(dict.fromkeys([provider_name(runtime.provider), "CPUExecutionProvider"]))
    kept = (("ConstantFolding", runtime.folds), ("WeightBiasQuantization", runtime.rounds))
    unwanted = [name for name, is_wanted in kept if not is_wanted] or None
    try:
        return ort.InferenceSession(source, options, providers, disabled_optimizers=unwanted)
    except RUNTIME_ERRORS as error:
        raise ModelError(f"ONNX Runtime refuses the model: {first_line(error)}") from error


def run(
    opened: ort.InferenceSession, feed: dict[str, Any], outputs: list[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Outputs by name. Raises ModelError with ONNX Runtime's first line when the run fails."""
    names = outputs or [o.name for o in opened.get_outputs()]
    try:
        return dict(zip(names, opened.run(names, feed), strict=True))
    except RUNTIME_ERRORS as error:
        raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without ONNX Runtime's code prefix."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.split(" : ", 2)[-1]


def dtype_of(kind: str) -> np.dtype[Any] | None:
    """NumPy type of an ONNX Runtime type string such as "tensor(float)"; None if not a tensor."""
    return _DTYPES.get(kind)


_DUMPED = "session.optimized_model_external_initializers_file_name"
_FOLDER = "session.model_external_initializers_file_folder_path"
_NAMES = {"float": "float32", "double": "float64"}
_DTYPES: dict[str, np.dtype[Any]] = {
    f"tensor({name})": np.dtype(_NAMES.get(name, name))
    for name in (
        *("float", "double", "float16", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}
_DTYPES["tensor(string)"] = np.dtype(object)

ort.disable_telemetry_events()

_state = ort.capi.onnxruntime_pybind11_state
RUNTIME_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    ValueError,
    *(e for e in vars(_state).values() if isinstance(e, type) and issubclass(e, Exception)),
)
