"""Images as feeds: folders, labels, every preprocessing option, damaged files."""

from __future__ import annotations

import csv
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.data import Dataset, InputSpec, Preprocess, open_data
from calib.preprocess import PRESETS, plan
from onnxc.errors import DataError, OptionError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

MEAN, STD = PRESETS["imagenet"].mean, PRESETS["imagenet"].std


def spec(*shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec("image", np.dtype(dtype), shape)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, array: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def first(dataset: Dataset) -> np.ndarray[Any, Any]:
    return next(dataset.batches(1))["image"]


def normalised(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = (array.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return x.transpose(2, 0, 1)[None]


# --- the preset ---------------------------------------------------------------------------------


def test_imagenet_only_crops_what_has_its_size_already(tmp_path: Path) -> None:
    image = pixels(256, 256)
    write(tmp_path / "a.png", image)
    x = first(open_data(tmp_path, [spec("N", 3, 224, 224)], Preprocess("imagenet")))
    assert x.shape == (1, 3, 224, 224) and x.dtype == np.float32 and x.flags.c_contiguous
    np.testing.assert_allclose(x, normalised(image[16:240, 16:240]), atol=1e-6)


def test_imagenet_with_resize_none_leaves_small_images_alone(tmp_path: Path) -> None:
    image = pixels(32, 32)
    write(tmp_path / "a.png", image)
    x = first(open_data(tmp_path, [spec("N", 3, 32, 32)], Preprocess("imagenet", resize="none")))
    np.testing.assert_allclose(x, normalised(image), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(300, 401), (500, 333), (100, 150)])
def test_imagenet_resizes_and_crops_as_torchvision_does(
    tmp_path: Path, height: int, width: int
) -> None:
    image = Image.fromarray(pixels(height, width))
    image.save(tmp_path / "a.png")
    short = min(height, width)
    resized = image.resize((int(256 * width / short), int(256 * height / short)), Image.BILINEAR)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    wanted = np.asarray(resized)[top : top + 224, left : left + 224]
    x = first(open_data(tmp_path, [spec(1, 3, 224, 224)], Preprocess("imagenet")))
    np.testing.assert_allclose(x, normalised(wanted), atol=1e-6)


def test_the_preset_follows_the_size_of_the_model() -> None:
    assert plan(spec(1, 3, 299, 299), Preprocess("imagenet")).target(600, 800)[0] == 342
    wide = plan(spec(1, 3, 240, 320), Preprocess("imagenet"))
    assert wide.target(500, 500) == (366, 366)  # covers 240x320 · 256/224
    with pytest.raises(OptionError, match=r"dynamic, so give --size"):
        plan(spec("N", 3, "H", "W"), Preprocess("imagenet"))
    assert plan(spec("N", 3, "H", "W"), Preprocess("imagenet", size=64)).size == (64, 64)


def test_every_option_overrides_the_preset() -> None:
    base = plan(spec("N", 3, "H", "W"), Preprocess("imagenet", size=64))
    other = Preprocess(
        *("imagenet", "64x96", "stretch", "none"),
        scale=1.0,
        mean=(0.0,),
        std=(2.0,),
        channels="bgr",
    )
    got = plan(spec("N", 3, "H", "W"), other)
    assert (got.size, got.stretch, got.crop, got.channels) == ((64, 96), True, False, "bgr")
    assert got.gain == (0.5,) * 3 and got.offset == (0,) * 3
    assert base.gain != got.gain and base.crop


# --- single options -----------------------------------------------------------------------------


def test_without_options_images_are_stretched_to_0_1_and_it_is_said(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(20, 30))
    image.save(tmp_path / "a.png")
    data = open_data(tmp_path, [spec(1, 3, 8, 8)])
    wanted = np.asarray(image.resize((8, 8), Image.BILINEAR)).transpose(2, 0, 1)[None] / 255
    np.testing.assert_allclose(first(data), wanted, atol=1e-6)
    assert "no preset was given" in data.notes[0]
    assert open_data(tmp_path, [spec(1, 3, 8, 8)], Preprocess("imagenet")).notes == ()


def test_layouts_and_channel_orders(tmp_path: Path) -> None:
    image = pixels(6, 5)
    write(tmp_path / "a.png", image)
    raw = Preprocess(scale=1.0)
    np.testing.assert_array_equal(first(open_data(tmp_path, [spec(1, 6, 5, 3)], raw))[0], image)
    bgr = Preprocess(scale=1.0, channels="bgr", mean=(10.0, 0.0, 0.0))
    got = first(open_data(tmp_path, [spec("N", None, 6, 5)], bgr))[0]
    np.testing.assert_array_equal(got[0], image[..., 2])  # blue comes first
    np.testing.assert_array_equal(got[2], image[..., 0] - 10.0)  # mean is given as R, G, B
    free = spec(None, None, None, None)
    last = Preprocess(scale=1.0, resize="none", layout="nhwc")
    assert first(open_data(tmp_path, [free], last)).shape == (1, 6, 5, 3)
    write(tmp_path / "b.png", image)
    for shape in ((3, 6, 5), (None, None, 3)):  # no batch dimension: one image a run
        bare = Preprocess(size="6x5", scale=1.0)
        got = [f["image"].shape for f in open_data(tmp_path, [spec(*shape)], bare).batches(8)]
        assert got == [(3, 6, 5) if shape[0] else (6, 5, 3)] * 2


def test_gray_models_get_luminance(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(6, 5))
    image.save(tmp_path / "a.png")
    got = first(open_data(tmp_path, [spec(1, 1, 6, 5)], Preprocess(scale=1.0)))
    np.testing.assert_array_equal(got[0, 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.fromarray(pixels(6, 5)).convert(mode).save(tmp_path / name)
    assert first(open_data(tmp_path, [spec(1, 3, 6, 5)])).shape == (1, 3, 6, 5)


def test_16_bit_images_keep_their_upper_bits(tmp_path: Path) -> None:
    deep = np.arange(0, 65536, 2185, dtype=np.uint16)[:30].reshape(6, 5)
    Image.fromarray(deep).save(tmp_path / "a.png")
    got = first(open_data(tmp_path, [spec(1, 1, 6, 5)], Preprocess(scale=1.0)))
    np.testing.assert_array_equal(got[0, 0], deep >> 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int32])
def test_images_come_in_the_type_of_the_input(tmp_path: Path, dtype: Any) -> None:
    image = pixels(6, 5)
    write(tmp_path / "a.png", image)
    got = first(open_data(tmp_path, [spec(1, 3, 6, 5, dtype=dtype)]))
    wanted = image.transpose(2, 0, 1)[None] / (255 if np.dtype(dtype).kind == "f" else 1)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, atol=5e-4)


def test_int8_inputs_need_a_mean(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expects int8 .* pixels become 0\.\.255"):
        plan(spec(1, 3, 6, 5, dtype=np.int8), Preprocess())
    image = pixels(6, 5)
    write(tmp_path / "a.png", image)
    got = first(open_data(tmp_path, [spec(1, 6, 5, 3, dtype=np.int8)], Preprocess(mean=(128,))))
    np.testing.assert_array_equal(got[0], image.astype(int) - 128)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "cifar"}, "preset 'cifar' is unknown; there is: imagenet"),
        ({"resize": "big"}, "--resize big"),
        ({"resize": "1/0"}, "--resize 1/0"),
        ({"size": "8by8"}, "--size 8by8"),
        ({"size": 0}, "--size 0"),
        ({"size": 16}, r"expects float32 \[1, 3, 8, 8\], so --size 16x16"),
        ({"crop": "left"}, "--crop left"),
        ({"layout": "chw"}, "--layout chw"),
        ({"layout": "nhwc"}, "8 channels"),
        ({"channels": "gray"}, "has 3 channels, but gray"),
        ({"channels": "rgba"}, "--channels rgba"),
        ({"mean": (1.0, 2.0)}, "--mean has 2 values"),
        ({"std": (0.0,)}, "--std 0"),
        ({"mean": (127.5,)}, "give --scale 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        plan(spec(1, 3, 8, 8), Preprocess(**options))


@pytest.mark.parametrize("shape", [(1, 640), (1, 4, 8, 8), (1, 3, 8, 8, 8)])
def test_inputs_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"give a \.npz|or a \.npz"):
        plan(spec(*shape), Preprocess())


def test_dynamic_sizes_need_a_size_unless_images_stay_as_they_are(tmp_path: Path) -> None:
    for k, width in enumerate((5, 5, 7)):
        write(tmp_path / f"{k}.png", pixels(6, width))
    free = spec("N", 3, "H", "W")
    with pytest.raises(OptionError, match="--size"):
        open_data(tmp_path, [free])
    data = open_data(tmp_path, [free], Preprocess(resize="none"))
    assert [f["image"].shape for f in data.batches(4)] == [(2, 3, 6, 5), (1, 3, 6, 7)]
    shorter = open_data(tmp_path, [free], Preprocess(resize=12))
    assert [f["image"].shape for f in shorter.batches(4)] == [(2, 3, 14, 12), (1, 3, 12, 14)]
    assert first(open_data(tmp_path, [free], Preprocess(size="4x6"))).shape == (1, 3, 4, 6)


def test_images_of_a_wrong_size_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good.png", pixels(8, 8))
    write(tmp_path / "small.png", pixels(6, 8))
    with pytest.raises(DataError, match=r"small\.png is 6x8 .* expects 8x8: give --resize"):
        open_data(tmp_path, [spec(1, 3, 8, 8)], Preprocess(resize="none"))
    with pytest.raises(DataError, match=r"small\.png is 6x8 .* too small for the centre crop"):
        open_data(tmp_path, [spec(1, 3, 8, 8)], Preprocess(resize="none", crop="center"))


# --- folders ------------------------------------------------------------------------------------


def test_class_folders_are_labelled_in_order_of_their_names(tmp_path: Path) -> None:
    for k, name in enumerate(["dog/b.png", "cat/x.PNG", "dog/a.png", "eel/deep/c.png"]):
        write(tmp_path / name, np.full((4, 4, 3), k, np.uint8))
    (tmp_path / "bat").mkdir()  # a class without images keeps its number
    (tmp_path / ".cache").mkdir()
    data = open_data(tmp_path, [spec("N", 3, 4, 4)], Preprocess(scale=1.0))
    assert data.labels is not None and data.labels.tolist() == [1, 2, 2, 3]
    (feed,) = data.batches(8)
    assert feed["image"][:, 0, 0, 0].tolist() == [1, 2, 0, 3]


def test_labels_csv_gives_order_and_labels(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"{k}.png", np.full((4, 4, 3), k, np.uint8))
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n2.png,7\n0.png,5\n")
    data = open_data(tmp_path, [spec("N", 3, 4, 4)], Preprocess(scale=1.0))
    assert data.labels is not None and data.labels.tolist() == [7, 5]
    assert first(data)[0, 0, 0, 0] == 2
    for text, says in (
        ("file,label\nx.png,1\ny.png,2\n", "names 2 files that do not exist: x.png, y.png"),
        ("name,class\n0.png,1\n", "needs the columns file,label"),
        ("file,label\n0.png,cat\n", "integer"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=says):
            open_data(tmp_path, [spec("N", 3, 4, 4)])


def test_flat_folders_and_single_files(tmp_path: Path) -> None:
    write(tmp_path / "b.png", pixels(4, 4))
    write(tmp_path / "a.bmp", pixels(4, 4, 1))
    (tmp_path / "README.txt").write_text("not an image")
    data = open_data(tmp_path, [spec(1, 3, 4, 4)], Preprocess(scale=1.0))
    assert len(data) == 2 and data.labels is None
    np.testing.assert_array_equal(first(data)[0].transpose(1, 2, 0), pixels(4, 4, 1))
    assert len(open_data(tmp_path / "b.png", [spec(1, 3, 4, 4)])) == 1


def test_samples_of_images_keep_their_labels(tmp_path: Path) -> None:
    for k in range(30):
        write(tmp_path / f"{k % 3}" / f"{k:02}.png", np.full((4, 4, 3), k, np.uint8))
    data = open_data(tmp_path, [spec("N", 3, 4, 4)], Preprocess(scale=1.0), samples=7, seed=3)
    got = np.concatenate([f["image"] for f in data.batches(3)])[:, 0, 0, 0]
    assert data.labels is not None and len(got) == 7
    assert (got % 3).tolist() == data.labels.tolist()


def test_images_feed_one_input_only(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pixels(4, 4))
    inputs = [spec(1, 3, 4, 4), InputSpec("im_shape", np.dtype("f4"), (1, 2))]
    with pytest.raises(DataError, match=r"the model has 'image', 'im_shape': give a \.npz"):
        open_data(tmp_path, inputs)


# --- damage -------------------------------------------------------------------------------------


def damaged(folder: Path) -> None:
    """Five sound images and four that fail in different places."""
    for k in range(5):
        write(folder / f"{k}.png", np.full((64, 64, 3), k, np.uint8))
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    write(folder / "cut.jpg", pixels(64, 64))
    cut = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    write(folder / "rotten.png", pixels(64, 64))
    rotten = bytearray((folder / "rotten.png").read_bytes())
    rotten[500:600] = bytes(100)
    (folder / "rotten.png").write_bytes(rotten)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    damaged(tmp_path)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        names = sorted(p.name for p in tmp_path.glob("*.*g"))
        csv.writer(file).writerows([("file", "label"), *((n, k) for k, n in enumerate(names))])
    wanted = [k for k, n in enumerate(names) if n[0].isdigit()]
    data = open_data(tmp_path, [spec("N", 3, 64, 64)], Preprocess(scale=1.0))
    got = np.concatenate([f["image"] for f in data.batches(4)])
    assert got[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and len(data) == 5
    assert data.labels is not None and data.labels.tolist() == wanted
    (note,) = data.notes
    assert "4 in all" in note
    assert all(name in note for name in ("text.jpg", "empty.png", "cut.jpg", "rotten.png"))


def test_samples_skips_to_readable_images(tmp_path: Path) -> None:
    for k in range(8):
        (tmp_path / f"bad{k}.png").write_text("hello")
    for k in range(4):
        write(tmp_path / f"good{k}.png", pixels(4, 4))
    data = open_data(tmp_path, [spec("N", 3, 4, 4)], Preprocess(scale=1.0), samples=4)
    assert len(data) == 4 and len(list(data.batches(1))) == 4


def test_only_unreadable_images_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    (tmp_path / "b.png").touch()
    with pytest.raises(DataError, match=r"none of the 2 images could be read: .*a\.jpg"):
        open_data(tmp_path, [spec(1, 3, 4, 4)])
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.png").unlink()
    write(tmp_path / "rotten.png", pixels(64, 64))
    rotten = bytearray((tmp_path / "rotten.png").read_bytes())
    rotten[500:600] = bytes(100)
    (tmp_path / "rotten.png").write_bytes(rotten)
    with pytest.raises(DataError, match="none of the 1 images"):
        list(open_data(tmp_path, [spec(1, 3, 64, 64)]).batches(1))


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", pixels(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OptionError, match=r'pip install "onnxc\[images\]"'):
        open_data(tmp_path, [spec(1, 3, 4, 4)])


# --- bounds and identity ------------------------------------------------------------------------


def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    for k in range(40):
        write(tmp_path / f"{k}.png", np.full((64, 64, 3), k, np.uint8))

    def peak(samples: int) -> int:
        data = open_data(tmp_path, [spec("N", 3, 64, 64)], samples=samples)
        tracemalloc.start()
        for _ in data.batches(4):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(4)  # imports and caches
    assert peak(40) < peak(8) + 4 * 3 * 64 * 64  # grows by less than one float image


def test_fingerprint_covers_pixels_and_preprocessing(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pixels(8, 8))
    inputs = [spec(1, 3, 4, 4)]
    one, two = (
        open_data(tmp_path, inputs, p).fingerprint() for p in (None, Preprocess("imagenet"))
    )
    assert one != two and one == open_data(tmp_path, inputs).fingerprint()
    write(tmp_path / "a.png", pixels(8, 8, 1))
    assert one != open_data(tmp_path, inputs).fingerprint()


def test_same_pixels_as_the_side_by_side_comparison(shared: Path) -> None:
    folder = shared / "data" / "imagenet1k" / "val"
    with (folder / "labels.csv").open() as file:
        table = list(csv.DictReader(file))[:8]
    data = open_data(folder, [spec("N", 3, 224, 224)], Preprocess("imagenet"))
    assert data.labels is not None
    assert data.labels[:8].tolist() == [int(row["label"]) for row in table]
    feed = next(data.batches(8))["image"]
    for got, row in zip(feed, table, strict=True):
        image = np.asarray(Image.open(folder / row["file"]).convert("RGB"))[16:240, 16:240]
        np.testing.assert_allclose(got[None], normalised(image), atol=1e-6)
