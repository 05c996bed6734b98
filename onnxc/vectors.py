"""ONNX test vectors: a model with inputs and the outputs to expect, for any other runtime.

folder/model.onnx
folder/test_data_set_k/input_i.pb, output_i.pb
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.data import Dataset
from onnxc.cost import external_files
from onnxc.errors import ModelError
from onnxc.files import TemporaryFolder
from onnxc.graph import Model
from onnxc.pairs import Subject
from onnxc.runtime import Runtime, run, session
from onnxc.stages import open_stages
from onnxc.storage.package import plain

SETS = 10  # test_data_set folders written


def write_vectors(
    reference: Subject,
    candidate: Path,
    dataset: Dataset,
    folder: Path,
    runtime: Runtime = Runtime(),
) -> None:
    """Write the candidate as the model, and the reference's outputs as those to expect.

    The folder appears whole or not at all. Raises ModelError for an output that is not a tensor.
    """
    compute = _running(reference, next(iter(dataset.batches(1))), runtime)
    with TemporaryFolder(folder.parent) as temporary:
        made = Path(temporary) / "vectors"
        _copy_model(candidate, made / "model.onnx")
        for number, feed in enumerate(islice(dataset.batches(1), SETS)):
            place = made / f"test_data_set_{number}"
            place.mkdir()
            _write_tensors(place, "input", {spec.name: feed[spec.name] for spec in dataset.inputs})
            _write_tensors(place, "output", compute(feed))
        if folder.exists():
            folder.rmdir()  # empty, as checked
        made.rename(folder)


def _running(
    model: Subject, feed: dict[str, NDArray[Any]], runtime: Runtime
) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    if isinstance(model, Model):
        return open_stages(model, feed, runtime).once
    return partial(run, session(model, runtime))


def _copy_model(model: Path, target: Path) -> None:
    """Copy a model with the files of its external data."""
    model = plain(model)
    target.parent.mkdir()
    shutil.copyfile(model, target)
    for file in external_files(model):
        place = target.parent / file.relative_to(model.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _write_tensors(folder: Path, side: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    for number, (name, array) in enumerate(arrays.items()):
        if not isinstance(array, np.ndarray):
            raise ModelError(f"{side} {name!r} is not a tensor, so no vectors can be saved")
        tensor = onnx.numpy_helper.from_array(array, name)
        (folder / f"{side}_{number}.pb").write_bytes(tensor.SerializeToString())
