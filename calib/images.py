"""Images as feeds: found in folders, checked by their headers, decoded one at a time."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.inputs import Axes, Feed
from calib.preprocess import Plan
from onnxc.elements import is_float
from onnxc.errors import DataError, OptionError

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pnm", ".avif", ".jp2"),
}
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # a file without its end mark is decoded to be sure
PIXELS = 1 << 26  # that an image may have, however small its file is
EXPANSION = 64  # pixels for each byte of its file, that one with more may have
NAMED = 5  # files that a note or an error names


def pillow() -> ModuleType:
    """Pillow's Image module, imported on first use; OptionError names the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise OptionError('reading images needs Pillow: pip install "onnxc[images]"') from error
    return Image


def decode(path: Path, plan: Plan) -> NDArray[Any]:
    """One image in the type, layout and rank of the plan's input. Raises one of `unreadable()`."""
    with pillow().open(path) as image:
        pixels = plan.cropped(np.asarray(_resized(_converted(image, plan.mode), plan)))
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    if plan.channels == "bgr":
        planes = planes[..., ::-1]
    height, width, depth = planes.shape
    x = np.empty((height, width, depth) if plan.last else (depth, height, width), np.float32)
    for c in range(depth):  # plane by plane stays in cache
        plane = x[..., c] if plan.last else x[c]
        np.copyto(plane, planes[..., c])
        plane *= np.float32(plan.gain[c])
        plane += np.float32(plan.offset[c])
    if not is_float(plan.dtype):
        np.rint(x, out=x)
    return x.astype(plan.dtype, copy=False)[(None,) * (plan.rank - 3)]


def _resized(image: Any, plan: Plan) -> Any:
    size = plan.target(image.height, image.width)
    if size == (image.height, image.width):
        return image
    return image.resize((size.width, size.height), pillow().Resampling.BILINEAR)


def _converted(image: Any, mode: str) -> Any:
    """8 bits a channel: of 16-bit images the upper 8."""
    if image.mode.startswith("I"):
        high = np.asarray(image) >> 8
        image = pillow().fromarray(high.clip(0, 255, out=high).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit float images are not supported")
    return image if image.mode == mode else image.convert(mode)


def unreadable() -> tuple[type[BaseException], ...]:
    """What Pillow raises for a damaged file."""
    bomb = pillow().DecompressionBombError
    plain = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)
    return (*plain, MemoryError, RuntimeError, struct.error, zlib.error, bomb)


class Images:
    """A source over image files. Headers are read at once, pixels when a sample is asked for.

    A file that cannot be read is left out: it is in `skipped`, with the reason.
    """

    rows = 1

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None, plan: Plan) -> None:
        self.files, self.plan = files, plan
        self.axes: Axes = {plan.name: 0 if plan.rank == 4 else None}
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.notes: list[str] = []
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def is_readable(self, index: int) -> bool:
        """Whether the file's header is sound and its end is there.

        Raises DataError when the image is sound but of a size that the model cannot take.
        """
        path = self.files[index]
        try:
            with pillow().open(path) as image:
                height, width = image.height, image.width
                if height * width > max(PIXELS, EXPANSION * path.stat().st_size):
                    raise ValueError(f"{width} x {height} pixels in a file that is too small")
                if ENDS.get(image.format or "", b"") not in _tail(path):
                    image.load()
        except unreadable() as error:
            self._skip(index, error)
            return False
        self.plan.check(path, height, width)
        return True

    def feed(self, index: int) -> Feed | None:
        """The prepared image by input name, or None where it cannot be decoded."""
        if index in self.skipped:
            return None
        try:
            return {self.plan.name: decode(self.files[index], self.plan)}
        except unreadable() as error:
            self._skip(index, error)
            return None

    def file(self, index: int) -> Path:
        return self.files[index]

    def __getstate__(self) -> dict[str, Any]:
        """It travels with full paths, for another process may run elsewhere."""
        return {**vars(self), "files": [file.absolute() for file in self.files]}

    def content(self, index: int) -> Iterator[bytes]:
        yield self.files[index].read_bytes()
        yield repr(self.plan).encode()

    def _skip(self, index: int, error: BaseException) -> None:
        is_unknown = "cannot identify" in str(error)
        self.skipped[index] = f"{self.files[index]} ({'not an image' if is_unknown else error})"


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read()


def image_files(folder: Path) -> tuple[list[Path], list[int] | None]:
    """Images below a folder and their labels: labels.csv, else flat, else class folders by name.

    Raises DataError for a faulty labels.csv; an empty list means that there are no images.
    """
    table = folder / "labels.csv"
    if table.is_file():
        return _labelled(table)
    flat = _images(folder.iterdir())
    if flat:
        return flat, None
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    pairs = [(f, label) for label, d in enumerate(classes) for f in _images(d.rglob("*"))]
    return [f for f, _ in pairs], [label for _, label in pairs]


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        p
        for p in paths
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _labelled(table: Path) -> tuple[list[Path], list[int]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        files = [table.parent / row["file"] for row in rows]
        labels = [int(row["label"]) for row in rows]
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise DataError(
            f"{table} needs the columns file,label with a file name and an integer a row: {error}"
        ) from error
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        names = ", ".join(missing[:NAMED])
        raise DataError(f"{table} names {len(missing)} files that do not exist: {names}")
    return files, labels
