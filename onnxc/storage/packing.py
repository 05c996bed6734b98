"""Pack a model file and unpack it again: checks, and what to report."""

from __future__ import annotations

import time
from pathlib import Path

from onnxc.cost import external_files, file_bytes
from onnxc.errors import ModelError, OptionError
from onnxc.files import TemporaryFolder
from onnxc.graph import Model, read, save
from onnxc.paths import check_output, existing
from onnxc.report import Packed
from onnxc.request import ModelPath, Progress, counting, naming
from onnxc.storage import package
from onnxc.storage.rans import libraries
from onnxc.workpiece import silent

SUFFIX = ".onnxz"


def check_packing(output: Path) -> None:
    """Raise OptionError where a file of this name could not be packed."""
    if output.suffix == SUFFIX:
        libraries()


def store(model: Model, output: Path) -> None:
    """Write a model; packed, where the name of the file says so. Raises ModelError, OptionError."""
    if output.suffix != SUFFIX:
        save(model, output)
        return
    with TemporaryFolder(output.parent) as folder:
        plain = Path(folder) / f"{output.stem}.onnx"
        save(model, plain)
        package.write(plain, output, False, counting(silent, "packing"))


def pack(
    model: ModelPath,
    output: ModelPath | None = None,
    *,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Store a model with its tensors entropy-coded; `unpack` gives the same bytes back.

    output: by default MODEL with the suffix .onnxz. thorough: try every coder in full on every
    tensor, which is slow and seldom smaller.

    Raises ModelError or OptionError; nothing is written then.
    """
    start, path = time.perf_counter(), existing(model)
    if package.is_package(path):
        raise OptionError(f"{path} is packed already")
    place = check_output(output or path.with_suffix(SUFFIX), path, *external_files(path))
    with naming(path):
        proto = read(path)
        if not proto.HasField("graph") or not proto.graph.output:
            raise ModelError("not an ONNX model: there is no graph with outputs in it")
        ways = package.write(path, place, thorough, counting(progress or silent, "packing"))
    return Packed(
        source=str(path),
        output=str(place),
        before=file_bytes(path),
        after=place.stat().st_size,
        ways=dict(sorted(ways.items(), key=lambda way: -way[1].before)),
        seconds=time.perf_counter() - start,
    )


def unpack(model: ModelPath, output: ModelPath, *, progress: Progress | None = None) -> Packed:
    """Write the model file that a package holds, byte for byte, and its external data beside it.

    Raises ModelError for a package that is damaged, or OptionError, also where a file of the
    external data exists; nothing is written then.
    """
    start, path = time.perf_counter(), existing(model)
    if not package.is_package(path):
        raise ModelError(f"{path} is no package of onnxc pack")
    place = check_output(output, path)
    with naming(path):
        files = package.unpack(path, place, counting(progress or silent, "unpacking"))
    return Packed(
        source=str(path),
        output=str(place),
        before=path.stat().st_size,
        after=sum(file.stat().st_size for file in files),
        files=tuple(map(str, files)),
        seconds=time.perf_counter() - start,
    )
