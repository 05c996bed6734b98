"""Data as feeds of a model: one interface over images, arrays, test sets, callables and noise.

A Dataset is sized, can be iterated again and again, and reads each sample when it is asked for, so
that memory does not grow with their number. Batches keep the order of the samples, so that outputs
line up with `labels`; only neighbours of equal shape share a batch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.callables import call, spool
from calib.images import NAMED, SUFFIXES, Images, image_files
from calib.inputs import Array, Axes, Feed, InputSpec, fixed_batch
from calib.observers import HistogramObserver
from calib.preprocess import PRESETS, Preprocess, plan
from calib.sources import Blocks, Source, mapping, numpy_file, onnx_set
from calib.synthetic import Synthetic, guessed_shapes
from onnxc.elements import is_float
from onnxc.errors import DataError, OptionError

__all__ = ["PRESETS", "Dataset", "InputSpec", "Preprocess", "open_data", "synthesize"]

CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
Given = str | Path | Mapping[str, Any] | Array | Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of a source, by `indices` into it, as feeds of a model with `inputs`."""

    inputs: tuple[InputSpec, ...]
    source: Source
    indices: NDArray[np.intp]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._usable())

    @property
    def labels(self) -> Array | None:
        """int64 labels, first axis the samples in the order of the batches; None without."""
        return None if self.source.labels is None else self.source.labels[self._usable()]

    @property
    def is_synthetic(self) -> bool:
        """Whether samples are made up."""
        return isinstance(self.source, Synthetic)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the report: what was skipped, dropped or assumed."""
        skipped = list(self.source.skipped.values())
        names = ", ".join(skipped[:NAMED]) + (", ..." if len(skipped) > NAMED else "")
        many = f"unreadable images were skipped, {len(skipped)} in all: {names}"
        return (*self.remarks, *self.source.notes, *([many] if skipped else []))

    def batches(self, size: int) -> Iterator[Feed]:
        """Feeds of up to `size` samples; of the model's own number where its batch is fixed.

        Raises DataError naming the sample that holds NaN, infinity or values out of range, or when
        a fixed batch would mix shapes.
        """
        if size < 1:
            raise OptionError(f"a batch of {size} samples is too small: give 1 or more")
        group, axes = self._group(), self.source.axes
        full = min(group or size, len(self))
        batch: _Batch | None = None
        for feed in self._feeds():
            if batch and not batch.takes(feed):
                if group:
                    raise DataError(
                        f"the model takes {group} samples a run, but their shapes differ"
                    )
                yield batch.feed()
                batch = None
            batch = batch or _Batch(feed, axes, full)
            batch.add(feed)
            if batch.count == full:
                yield batch.feed()
                batch = None
        if batch and not group:
            yield batch.feed()

    def subset(self, chosen: slice | Sequence[int] | NDArray[np.integer[Any]]) -> Dataset:
        """The samples at these positions, as a Dataset over the same source."""
        positions = chosen if isinstance(chosen, slice) else np.asarray(chosen, np.intp)
        return Dataset(self.inputs, self.source, self._usable()[positions], self.remarks)

    def part(self, chosen: slice) -> Dataset:
        """These of all the samples: the same ones whatever turned out to be unreadable since."""
        return Dataset(self.inputs, self.source, self.indices[chosen], self.remarks)

    def unreachable(self) -> Path | None:
        """A file of these samples that this process may not read; None where it may read all."""
        files = (self.source.file(int(index)) for index in self.indices)
        return next((f for f in files if f is not None and not os.access(f, os.R_OK)), None)

    def fingerprint(self) -> str:
        """sha256, in hex, over the content of the samples and their preprocessing."""
        digest = hashlib.sha256(repr(self.inputs).encode())
        for index in self.indices:
            for chunk in self.source.content(int(index)):
                digest.update(hashlib.sha256(chunk).digest())
        return digest.hexdigest()

    def digests(self) -> list[bytes]:
        """16 bytes for each sample by its content and preparation, in the order of the batches."""
        return [self._digest(int(index)) for index in self._usable()]

    def _digest(self, index: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.source.content(index):
            digest.update(hashlib.blake2b(chunk).digest())
        return digest.digest()

    @property
    def preparation(self) -> str:
        """How images become feeds, in full; empty for arrays, which are fed as they are."""
        return repr(self.source.plan) if isinstance(self.source, Images) else ""

    def _feeds(self) -> Iterator[Feed]:
        feeds = (self.source.feed(int(index)) for index in self._usable())
        is_empty = True
        for feed in feeds:
            if feed is not None:
                is_empty = False
                yield feed
        if is_empty:
            raise DataError(_all_skipped(self.source))

    def _group(self) -> int | None:
        """Samples in a run of a model whose batch is fixed."""
        batch = fixed_batch(self.inputs, self.source.axes)
        return None if batch is None else max(1, batch // self.source.rows)

    def _usable(self) -> NDArray[np.intp]:
        """Indices without the skipped ones, in whole groups; too few are repeated to make one."""
        alive = self.indices[~np.isin(self.indices, list(self.source.skipped))]
        group = self._group() or 1
        if 0 < len(alive) < group:
            return np.resize(alive, group)
        return alive[: len(alive) - len(alive) % group]


class _Batch:
    """Feeds of equal shape, each copied once into room for `full` of them."""

    def __init__(self, first: Feed, axes: Axes, full: int) -> None:
        self.count = 0
        self._axes, self._first = axes, first
        self._room = {
            name: np.empty(_times(x.shape, axis, full), x.dtype)
            for name, x in first.items()
            if (axis := axes[name]) is not None and full > 1
        }

    def takes(self, feed: Feed) -> bool:
        """Whether shapes agree, and values too where an input has no sample axis."""
        return all(
            x.shape == feed[name].shape
            and (self._axes[name] is not None or np.array_equal(x, feed[name]))
            for name, x in self._first.items()
        )

    def add(self, feed: Feed) -> None:
        for name, room in self._room.items():
            self._part(name, room, self.count, self.count + 1)[...] = feed[name]
        self.count += 1

    def feed(self) -> Feed:
        parts = {name: self._part(name, room, 0, self.count) for name, room in self._room.items()}
        return {**self._first, **{name: np.ascontiguousarray(x) for name, x in parts.items()}}

    def _part(self, name: str, room: Array, start: int, stop: int) -> Array:
        axis = self._axes[name] or 0
        rows = self._first[name].shape[axis]
        return room[(slice(None),) * axis + (slice(start * rows, stop * rows),)]


def _times(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * count, *shape[axis + 1 :])


def open_data(
    source: Given,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open data for a model.

    source: a folder of images (flat, class folders, or with a labels.csv), .npy, .npz, a folder of
    these, ONNX test_data_set folders, or "module:function"; in Python also a dict of arrays, one
    array, or a callable. samples: a seeded subset of that many (of a callable: the first).

    Raises DataError when the data is missing, damaged or does not fit the inputs; OptionError when
    the preprocessing does not fit them.
    """
    if samples is not None and samples < 1:
        raise OptionError(f"--samples {samples} is too few: give 1 or more")
    if not inputs:
        raise DataError("the model has no inputs, so no data can be fed to it")
    opened = _opened(source, inputs, preprocess or Preprocess(), samples)
    chosen = _chosen(opened, samples, None if _is_call(source) else seed)
    dataset = Dataset(tuple(inputs), opened, chosen)
    remarks = _remarks(dataset, preprocess or Preprocess(), samples)
    return Dataset(tuple(inputs), opened, chosen, remarks)


def synthesize(
    inputs: Sequence[InputSpec],
    samples: int,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    known: Mapping[str, HistogramObserver] | None = None,
) -> Dataset:
    """Made-up feeds for a model without data; `shapes` fixes the shape of inputs by name.

    known: histograms of float inputs by name, which their values are drawn from.

    Raises DataError for inputs that cannot be made up (strings), OptionError for a wrong shape.
    """
    if samples < 1:
        raise OptionError(f"--samples {samples} is too few: give 1 or more")
    source = Synthetic(inputs, guessed_shapes(inputs, shapes or {}), samples, seed, known or {})
    source.feed(0)
    return Dataset(tuple(inputs), source, np.arange(samples))


def _opened(
    source: Given, inputs: Sequence[InputSpec], preprocess: Preprocess, samples: int | None
) -> Source:
    if isinstance(source, Mapping):
        return Blocks(inputs, [mapping(source, "the data")])
    if isinstance(source, np.ndarray):
        return Blocks(inputs, [mapping({"": source}, "the data")])
    if not isinstance(source, str | Path):
        return Blocks(inputs, list(spool(source(), inputs, "the data", samples)))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, inputs, preprocess)
    if path.is_file():
        return _file(path, inputs, preprocess)
    if CALLABLE.fullmatch(str(source)):
        return Blocks(inputs, call(str(source), inputs, samples))
    raise DataError(f"data {str(source)!r} does not exist")


def _is_call(source: Given) -> bool:
    if isinstance(source, str):
        return CALLABLE.fullmatch(source) is not None and not Path(source).exists()
    return callable(source)


def _folder(folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess) -> Source:
    files, labels = image_files(folder)
    if files:
        return _images(files, labels, inputs, preprocess)
    arrays = sorted(f for f in folder.iterdir() if f.suffix in (".npy", ".npz"))
    if arrays:
        return Blocks(inputs, [numpy_file(f) for f in arrays])
    sets = sorted(folder.glob("test_data_set_*"), key=lambda d: (len(d.name), d.name))
    sets = [folder] if any(folder.glob("input_*.pb")) else sets
    if sets:
        return Blocks(inputs, [onnx_set(d, inputs) for d in sets])
    raise DataError(f"{folder} holds no images, no .npz or .npy files and no test_data_set folders")


def _file(path: Path, inputs: Sequence[InputSpec], preprocess: Preprocess) -> Source:
    if path.suffix.lower() in SUFFIXES:
        return _images([path], None, inputs, preprocess)
    if path.suffix not in (".npy", ".npz"):
        raise DataError(
            f"{path} is no data: give a folder of images, .npy, .npz or module:function"
        )
    return Blocks(inputs, [numpy_file(path)])


def _images(
    files: list[Path], labels: list[int] | None, inputs: Sequence[InputSpec], preprocess: Preprocess
) -> Images:
    if len(inputs) > 1:
        names = ", ".join(repr(i.name) for i in inputs)
        raise DataError(f"images feed one input, but the model has {names}: give a .npz instead")
    return Images(files, labels, plan(inputs[0], preprocess))


def _chosen(source: Source, samples: int | None, seed: int | None) -> NDArray[np.intp]:
    """A seeded choice in the order of the source, of readable images only."""
    total, order = len(source), np.arange(len(source))
    if samples is not None and samples < total and seed is not None:
        order = np.random.default_rng(seed).permutation(total)
    chosen: list[int] = []
    for index in map(int, order):
        if len(chosen) == (samples or total):
            break
        if not isinstance(source, Images) or source.is_readable(index):
            chosen.append(index)
    if not chosen:
        raise DataError(_all_skipped(source))
    return np.sort(np.asarray(chosen, np.intp))


def _all_skipped(source: Source) -> str:
    names = ", ".join(list(source.skipped.values())[:NAMED])
    return f"none of the {len(source.skipped)} images could be read: {names}"


def _remarks(dataset: Dataset, given: Preprocess, samples: int | None) -> tuple[str, ...]:
    """What was dropped, repeated, assumed or ignored."""
    total, used = len(dataset.indices), len(dataset)
    is_image = isinstance(dataset.source, Images)
    is_plain = (given.preset, given.scale, given.mean, given.std) == (None,) * 4
    pixels = "0..1" if is_float(dataset.inputs[0].dtype) else "0..255"
    batch = "the model takes a fixed batch:"
    sentences = (
        (total < (samples or 0), f"{samples} samples were asked for, but there are {total}"),
        (used < total, f"{batch} {total - used} of {total} samples are left over and unused"),
        (used > total, f"{batch} {total} samples are repeated to make {used}"),
        (is_image and is_plain, f"no preset was given: pixels go to the model as {pixels}"),
        (not is_image and given != Preprocess(), "preprocessing is for images, and is ignored"),
    )
    return tuple(sentence for holds, sentence in sentences if holds)
