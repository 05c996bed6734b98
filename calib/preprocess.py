"""What becomes of an image before the model sees it: options, presets, and the plan they make.

For a pixel p in 0..255 of channel c the model sees  x = (p·scale - mean[c]) / std[c].
Resizing and cropping round as torchvision's Resize and CenterCrop do: the shorter side becomes n
and the longer one int(n·long/short), bilinear with antialiasing; a crop starts at
round((side - n) / 2). An image that has the asked size already is not resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calib.inputs import Dims, InputSpec
from onnxc.elements import is_float
from onnxc.errors import DataError, OptionError

CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}


@dataclass(frozen=True)
class Preprocess:
    """What to do to an image before the model sees it. None: as the preset says, else the default.

    preset: a row of PRESETS; every other field overrides it.
    size: height and width that the model gets, 224 or "240x320" (height x width); default: the
        model's input shape. Needed where that is dynamic.
    resize: "none"; "stretch" to the size, ignoring the aspect ratio (default); 256: shorter side to
        256 pixels; "256/224": to that multiple of the size, so that the image covers it.
    crop: "center" cuts the size out of the middle; "none" (default).
    scale: factor on pixels 0..255; default 1/255 for float inputs, 1 for integer inputs.
    mean, std: (p·scale - mean) / std, one number or one a channel in the order R, G, B, whatever
        `channels` says; default 0 and 1.
    layout: "nchw", "nhwc" or "auto" (default): by where the model has 1 or 3 channels.
    channels: "rgb", "bgr", "gray" or "auto" (default): gray for one channel, else rgb.
    """

    preset: str | None = None
    size: int | str | tuple[int, int] | None = None
    resize: int | str | None = None
    crop: str | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None
    channels: str | None = None


DEFAULTS = Preprocess(
    resize="stretch", crop="none", mean=(0.0,), std=(1.0,), layout="auto", channels="auto"
)
PRESETS = {
    "imagenet": Preprocess(
        resize="256/224",
        crop="center",
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
}


def resolved(preprocess: Preprocess) -> Preprocess:
    """Every field from the first that sets it: the options, the preset, the defaults.

    Raises OptionError for an unknown preset.
    """
    if preprocess.preset is not None and preprocess.preset not in PRESETS:
        raise OptionError(
            f"preset {preprocess.preset!r} is unknown; there is: {', '.join(PRESETS)}"
        )
    layers = (preprocess, PRESETS.get(preprocess.preset or "", DEFAULTS), DEFAULTS)
    names = [f.name for f in fields(Preprocess)]
    return Preprocess(
        **{n: next((v for p in layers if (v := getattr(p, n)) is not None), None) for n in names}
    )


class Size(NamedTuple):
    """Pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Plan:
    """A Preprocess worked out for one input of a model: nothing is left to decide."""

    name: str
    dtype: np.dtype[Any]
    rank: int  # 4, or 3 for a model without a batch dimension
    size: Size | None  # None: as the image is
    stretch: bool
    box: Size | None  # the image is scaled, aspect kept, until it covers this
    crop: bool
    channels: str
    last: bool  # channels last
    gain: tuple[float, ...]
    offset: tuple[float, ...]

    @property
    def mode(self) -> str:
        return "L" if self.channels == "gray" else "RGB"

    def target(self, height: int, width: int) -> Size:
        """Size of an image after resizing."""
        if self.stretch and self.size:
            return self.size
        if not self.box:
            return Size(height, width)
        if self.box.height * width >= self.box.width * height:
            return Size(self.box.height, int(self.box.height * width / height))
        return Size(int(self.box.width * height / width), self.box.width)

    def check(self, path: Path, height: int, width: int) -> None:
        """Raise DataError when an image of this size does not become one the model takes."""
        got = self.target(height, width)
        if self.size is None or got == self.size:
            return
        if not self.crop:
            raise DataError(
                f"{path} is {got} (height x width) after resizing, but input {self.name!r} expects "
                f"{self.size}: give --resize stretch or --crop center"
            )
        if got.height < self.size.height or got.width < self.size.width:
            raise DataError(
                f"{path} is {got} (height x width) after resizing, too small for the centre crop "
                f"{self.size} of input {self.name!r}: give another --resize"
            )

    def cropped(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The middle of an array (height, width[, channels]): a view."""
        if not self.crop or self.size is None:
            return pixels
        top = round((pixels.shape[0] - self.size.height) / 2)
        left = round((pixels.shape[1] - self.size.width) / 2)
        return pixels[top : top + self.size.height, left : left + self.size.width]


def plan(spec: InputSpec, preprocess: Preprocess) -> Plan:
    """Work a Preprocess out for an input of shape [N, C, H, W], [N, H, W, C], or without N.

    Raises OptionError when an option does not fit the input, or a size is missing.
    """
    p = resolved(preprocess)
    dims, last, depth = _layout(spec, _choice("layout", p.layout, ("auto", "nchw", "nhwc")))
    channels = _channels(spec, _choice("channels", p.channels, ("auto", *CHANNELS)), depth)
    crop = _choice("crop", p.crop, ("none", "center")) == "center"
    size = _size(spec, p.size, dims)
    if size is None and (crop or str(p.resize) == "stretch" or "/" in str(p.resize)):
        raise OptionError(
            f"{spec.expects}: its height and width are dynamic, so give --size (or --resize none)"
        )
    gain, offset = _normalisation(spec, p, channels)
    box = _box(p.resize, size)
    stretch = str(p.resize) == "stretch"
    rank = len(spec.shape or ())
    return Plan(
        *(spec.name, spec.dtype, rank, size, stretch, box, crop, channels, last, gain, offset)
    )


def _choice(option: str, value: str | None, known: Sequence[str]) -> str:
    if value is None or value not in known:
        raise OptionError(f"--{option} {value} is unknown; choose from: {', '.join(known)}")
    return value


def _layout(spec: InputSpec, layout: str) -> tuple[Dims, bool, int | str | None]:
    """(height, width) as the model has them, whether channels come last, and how many there are."""
    dims = spec.shape or ()
    if len(dims) not in (3, 4):
        raise OptionError(
            f"{spec.expects}, which is no image: give a .npz with arrays by input name"
        )
    image = dims[-3:]
    first_fits, last_fits = (image[k] in (1, 3) for k in (0, 2))
    if layout == "auto" and not (first_fits or last_fits or not isinstance(image[0], int)):
        raise OptionError(
            f"{spec.expects}, which has no axis of 1 or 3 channels: give --layout, or a .npz"
        )
    if layout == "nhwc" or (layout == "auto" and last_fits and not first_fits):
        return image[:2], True, image[2]
    return image[1:], False, image[0]


def _channels(spec: InputSpec, channels: str, depth: int | str | None) -> str:
    if channels == "auto":
        channels = "gray" if depth == 1 else "rgb"
    if isinstance(depth, int) and depth != CHANNELS[channels]:
        raise OptionError(
            f"{spec.expects}, which has {depth} channels, but {channels} images have "
            f"{CHANNELS[channels]}: give --channels or --layout"
        )
    return channels


def _size(spec: InputSpec, asked: int | str | tuple[int, int] | None, dims: Dims) -> Size | None:
    """The asked size, or the one of the model where both sides are fixed."""
    fixed = [d for d in dims if isinstance(d, int)]
    if asked is None:
        return Size(*fixed) if len(fixed) == 2 else None
    size = _parsed_size(asked)
    if any(isinstance(d, int) and d != side for d, side in zip(dims, size, strict=True)):
        raise OptionError(f"{spec.expects}, so --size {size} (height x width) cannot be fed")
    return size


def _parsed_size(asked: int | str | tuple[int, int]) -> Size:
    parts = asked if isinstance(asked, tuple | list) else str(asked).lower().split("x")
    try:
        sides = [int(side) for side in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise OptionError(f"--size {asked} is no size: give 224, or 240x320 (height x width)")
    return Size(sides[0], sides[-1])


def _box(resize: int | str | None, size: Size | None) -> Size | None:
    if str(resize) in ("none", "stretch"):
        return None
    try:
        number = Fraction(str(resize))
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0 or (size is None and "/" in str(resize)):
        raise OptionError(f"--resize {resize} is unknown: give none, stretch, 256 or 256/224")
    if "/" in str(resize) and size is not None:
        return Size(round(size.height * number), round(size.width * number))
    return Size(int(number), int(number))


def _normalisation(
    spec: InputSpec, p: Preprocess, channels: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """gain = scale / std and offset = -mean / std, in the order that the model sees."""
    depth = CHANNELS[channels]
    scale = p.scale if p.scale is not None else 1 / 255 if is_float(spec.dtype) else 1.0
    mean, std = (_per_channel(n, getattr(p, n), depth, spec) for n in ("mean", "std"))
    if p.scale is None and max(map(abs, mean)) > 255 * scale:
        raise OptionError(
            f"--mean {mean[0]:g} lies outside the pixels 0..1: give --scale 1 with it"
        )
    if 0 in std:
        raise OptionError("--std 0 cannot be divided by: give positive numbers")
    order = range(depth)[::-1] if channels == "bgr" else range(depth)
    gain, offset = [scale / std[c] for c in order], [-mean[c] / std[c] for c in order]
    _check_range(spec, gain, offset)
    return tuple(gain), tuple(offset)


def _check_range(spec: InputSpec, gain: Sequence[float], offset: Sequence[float]) -> None:
    if is_float(spec.dtype) or spec.dtype.kind not in "iu":
        return
    ends = [g * p + o for g, o in zip(gain, offset, strict=True) for p in (0, 255)]
    info = np.iinfo(spec.dtype)
    if min(ends) < info.min - 0.5 or max(ends) > info.max + 0.5:
        span = f"{min(ends):g}..{max(ends):g}"
        raise OptionError(f"{spec.expects}, but pixels become {span}: give --scale or --mean")


def _per_channel(option: str, values: Any, depth: int, spec: InputSpec) -> tuple[float, ...]:
    given = tuple(values) if isinstance(values, tuple | list) else (values,)
    if len(given) not in (1, depth):
        raise OptionError(
            f"--{option} has {len(given)} values, but input {spec.name!r} has {depth} channels"
        )
    return given * depth if len(given) == 1 else given
