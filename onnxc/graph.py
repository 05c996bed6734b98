"""The border: the only place where a model becomes a graph of the graph library, and back.

A model is loaded once into normal form (`onnxc.normal`), its weights beside it (`onnxc.weights`),
its documentation in an envelope (`onnxc.envelope`); `onnxc.export` writes the graph again. Passes
edit `model.graph` with the verbs of `onnxc.edit`, which this module offers too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxc import envelope, normal, weights, wire
from onnxc.edit import (
    attributes,
    become,
    bodies,
    captured,
    clone,
    constant,
    constants,
    first_of,
    fresh,
    gathering,
    insert,
    is_spilling,
    nbytes,
    opset,
    reads,
    replace_uses,
    set_opset,
    spill,
    store,
    tidy,
    uncollected,
    values,
    walk,
)
from onnxc.elements import is_float
from onnxc.envelope import Envelope
from onnxc.errors import ModelError
from onnxc.export import exported
from onnxc.files import TemporaryFolder, alone, link, replacing
from onnxc.storage.package import plain

__all__ = [
    "Model",
    "as_declared",
    "attributes",
    "become",
    "bodies",
    "bound",
    "captured",
    "constant",
    "constants",
    "copy",
    "first_of",
    "fresh",
    "from_skeleton",
    "gathering",
    "insert",
    "is_spilling",
    "load",
    "nbytes",
    "opset",
    "read",
    "reads",
    "replace_uses",
    "runnable",
    "save",
    "set_opset",
    "size",
    "skeleton",
    "store",
    "stored",
    "tidy",
    "to_bytes",
    "to_proto",
    "unfinite",
    "values",
    "walk",
]

G_LOGGER.severity = G_LOGGER.ERROR

SPLIT = 1 << 30  # bytes of weights above which a file gets its weights beside it
BIG = 1 << 30  # bytes of a model that is not held in memory, unless asked for
OUTLINED = 32 << 20  # bytes of a file whose weights are left in it until they are asked for
BIG_SHARE = 4  # of a big model: the part that a process takes by itself
SMALL = 64 << 20  # bytes in float of a model that is always held in memory: libraries take more
_FILE_LIMIT = (1 << 31) - 1  # of a protobuf
_DEFAULT_OPSET = 21  # of a model that uses no standard operator
_MULTIPLY = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "BatchNormalization")
)


@dataclass
class Model:
    """A graph, what belongs around it, and sentences about what loading changed.

    base: the folder of external data, None for a model that came without a path. declared: tensors
    inside the graph whose type the file told; what was inferred of others is not written, for it
    changes what ONNX Runtime fuses. memory: bytes that the process may take where the model is run,
    None for no bound; see `onnxc.stages`. scratch: where large new weights of a bounded model go.
    """

    graph: gs.Graph
    envelope: Envelope = field(default_factory=Envelope)
    base: Path | None = None
    notes: tuple[str, ...] = ()
    declared: frozenset[str] = frozenset()
    memory: int | None = None
    scratch: weights.Scratch | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.scratch is not None:
            spill(self.graph, self.scratch)


def enough_memory(size: int) -> int | None:
    """Bytes that a process may take to run a model of that size; None: the model is no big one."""
    return size // BIG_SHARE if size > BIG else None


def bound(model: Model, memory: int | None) -> Model:
    """The same model, to be run in so much memory; None: in what is enough."""
    memory = memory or enough_memory(size(model))
    in_float = 4 * sum(prod(c.shape) for c in constants(model.graph))
    is_large = memory is not None and in_float > SMALL
    scratch = (model.scratch or weights.Scratch()) if is_large else None
    return replace(model, memory=memory, scratch=scratch)


def size(model: Model) -> int:
    """Bytes of the model as a file, with its external data."""
    proto, held = as_declared(model)
    return int(proto.ByteSize()) + sum(map(weights.size, held))


def load(source: str | Path | bytes | onnx.ModelProto, base: str | Path | None = None) -> Model:
    """Open a model: a path, also of a package, the bytes of a file, or a protobuf.

    base: the folder of external data, by default that of the path; external data is mapped when a
    weight is read. Raises ModelError, naming the file, when it is missing, damaged, invalid, or
    holds what onnxc cannot carry.
    """
    folder = None if base is None else Path(base)
    if isinstance(source, onnx.ModelProto | bytes):
        return _load(_parse(source), folder)
    path = Path(source)
    try:
        return _load(read(path), folder or plain(path).parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def save(model: Model, path: str | Path) -> None:
    """Write a model whole or not at all; more than 1 GiB of weights go to PATH.data.

    Raises OptionError when the path cannot be written or the disk is full.
    """
    _write(*as_declared(model), Path(path))


def to_proto(model: Model) -> onnx.ModelProto:
    """The model with all its weights."""
    proto, held = as_declared(model)
    weights.fill(proto.graph, held)
    return proto


def to_bytes(model: Model) -> bytes:
    """The model as one file. Raises ModelError above 2 GB, the limit of the format."""
    return _serialize(*as_declared(model))


@contextmanager
def runnable(model: Model) -> Iterator[bytes | Path]:
    """What a session can open: bytes, or above 1 GiB a temporary file for the time of the block."""
    with stored(*as_declared(model)) as source:
        yield source


@contextmanager
def stored(proto: onnx.ModelProto, held: list[weights.Values]) -> Iterator[bytes | Path]:
    """The same of a skeleton, which may have been edited, and its weights."""
    if sum(map(weights.size, held)) <= SPLIT:
        yield _serialize(proto, held)
        return
    with TemporaryFolder() as folder:
        path = Path(folder) / "model.onnx"
        _write(proto, held, path)
        yield path


def copy(model: Model) -> Model:
    """An independent model. Arrays of weights are shared, so they become read-only."""
    return replace(model, graph=clone(model.graph))


def skeleton(model: Model) -> tuple[onnx.ModelProto, list[weights.Values]]:
    """The model without its weights above 1 KiB, and those weights.

    In their place are external references that lead nowhere, with the right type and shape: small
    enough for shape inference whatever the model weighs.
    """
    return _exported(model, None)


def as_declared(model: Model) -> tuple[onnx.ModelProto, list[weights.Values]]:
    """A skeleton that tells no more of the tensors inside it than the file did."""
    return _exported(model, model.declared)


def _exported(
    model: Model, typed: frozenset[str] | None
) -> tuple[onnx.ModelProto, list[weights.Values]]:
    proto, held = exported(model.graph, typed)
    envelope.restore(proto, model.envelope)
    proto.ir_version = max(model.graph.ir_version or 0, normal.least_ir_version(proto))
    return proto, held


def unfinite(model: Model) -> list[str]:
    """Names of weights with NaN, or with infinity where a node multiplies by them.

    Elsewhere infinity has a meaning, as in the mask of an attention or the bounds of a Clip.
    """
    heavy = (node for inner in walk(model.graph) for node in inner.nodes if node.op in _MULTIPLY)
    factors = {id(tensor) for node in heavy for tensor in node.inputs}
    return [
        tensor.name
        for tensor in constants(model.graph)
        if is_float(tensor.dtype) and _is_bad(tensor, infinity=id(tensor) in factors)
    ]


def _is_bad(tensor: gs.Constant, infinity: bool) -> bool:
    array = values(tensor)
    return bool((~np.isfinite(array) if infinity else np.isnan(array)).any())


def read(path: Path) -> onnx.ModelProto:
    """A file as a protobuf that is ours to edit; large weights of a large file stay in the file."""
    try:
        path = plain(path)
        if path.stat().st_size < OUTLINED:
            return _parse(path.read_bytes())
        return wire.outline(path)
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror}") from error
    except google.protobuf.message.DecodeError as error:
        raise ModelError("not an ONNX model, or a truncated one") from error


def _parse(source: bytes | onnx.ModelProto) -> onnx.ModelProto:
    """A protobuf that is ours to edit."""
    model = onnx.ModelProto()
    if isinstance(source, onnx.ModelProto):
        model.CopyFrom(source)
        return model
    if not source:
        raise ModelError("the file is empty")
    try:
        model.ParseFromString(source)
    except google.protobuf.message.DecodeError as error:
        raise ModelError("not an ONNX model, or a truncated one") from error
    return model


def _write(proto: onnx.ModelProto, held: list[weights.Values], path: Path) -> None:
    """A skeleton with its weights as a file, or as two."""
    if sum(map(weights.size, held)) <= SPLIT:
        with replacing(path) as (file,):
            wire.write(proto, held, file)
        return
    beside, aside = (path.with_name(f"{path.name}.{end}") for end in ("data", "new.data"))
    with alone(path):
        if not _is_read_by(path, beside):
            _write_pair(proto, held, beside, path)
        else:  # the old model needs its weights until the new one has its name
            _write_pair(proto, held, aside, path)
            link(aside, beside)
            weights.move(proto.graph, aside.name, beside.name)
            with replacing(path) as (file,):
                file.write(proto.SerializeToString())
        aside.unlink(missing_ok=True)


def _write_pair(
    proto: onnx.ModelProto, held: list[weights.Values], beside: Path, path: Path
) -> None:
    with replacing(beside, path) as (big, file):
        weights.spill(proto.graph, held, big, beside.name)
        file.write(proto.SerializeToString())


def _is_read_by(path: Path, beside: Path) -> bool:
    """Whether a model is there whose weights are in that file."""
    try:
        return beside.exists() and beside.name in weights.locations(
            weights.tensors(read(path).graph)
        )
    except ModelError:
        return False


def _serialize(proto: onnx.ModelProto, held: list[weights.Values]) -> bytes:
    """A skeleton with its weights as bytes."""
    if sum(map(weights.size, held)) + proto.ByteSize() > _FILE_LIMIT:
        raise ModelError("the model is above 2 GB, too large for one file; save it to a path")
    weights.fill(proto.graph, held)
    data: bytes = proto.SerializeToString()
    return data


def _load(proto: onnx.ModelProto, base: Path | None) -> Model:
    with uncollected():
        return _opened(proto, base)


def _opened(proto: onnx.ModelProto, base: Path | None) -> Model:
    if not proto.HasField("graph") or not proto.graph.output:
        raise ModelError("not an ONNX model: there is no graph with outputs in it")
    if not wire.is_text(proto):
        raise ModelError("the graph is invalid: a text in it is not UTF-8")
    normal.refuse(proto)
    held = weights.detach(proto.graph, base)
    light = onnx.ModelProto.FromString(proto.SerializeToString())
    del proto  # and with it the memory of the weights' first copy
    opened = from_skeleton(light, held, base)
    return bound(opened, None) if sum(map(weights.size, held)) > BIG else opened


def from_skeleton(
    proto: onnx.ModelProto, held: list[weights.Values], base: Path | None = None
) -> Model:
    """The model of an edited skeleton and its weights. Raises ModelError when it is invalid."""
    light, notes = normal.normalize(proto)
    normal.check(light)
    declared = {value.name for _, graph in normal.graphs(light.graph) for value in graph.value_info}
    return replace(_open(light, held, base, tuple(notes)), declared=frozenset(declared))


def _open(
    proto: onnx.ModelProto, held: list[weights.Values], base: Path | None, notes: tuple[str, ...]
) -> Model:
    """Import a normal skeleton and give its constants their values."""
    kept = envelope.take(proto)
    graph = gs.import_onnx(proto)
    domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in proto.opset_import]
    standard = next((o.version for o in domains if not o.domain), _DEFAULT_OPSET)
    for inner in walk(graph):
        inner.opset, inner.import_domains = standard, domains
    weights.attach(constants(graph), held)
    return Model(graph, kept, base, notes)
