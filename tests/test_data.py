"""Feeds from every source but images: what is accepted, how it is batched, what is refused."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.data import Dataset, InputSpec, Preprocess, open_data, synthesize
from calib.sources import Blocks
from onnxc.errors import DataError, OptionError

X = InputSpec("x", np.dtype(np.float32), ("N", 3))
IDS = InputSpec("ids", np.dtype(np.int64), ("batch", "seq"))
MASK = InputSpec("mask", np.dtype(np.int64), ("batch", "seq"))
VAD = [
    InputSpec("input", np.dtype(np.float32), ("batch", "sequence")),
    InputSpec("state", np.dtype(np.float32), (2, "batch", 4)),
    InputSpec("sr", np.dtype(np.int64), ()),
]


def spec(name: str, dtype: Any, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def rows(count: int, width: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def joined(dataset: Dataset, name: str, size: int = 4) -> np.ndarray[Any, Any]:
    return np.concatenate([feed[name] for feed in dataset.batches(size)])


def sizes(dataset: Dataset, name: str, size: int) -> list[int]:
    return [len(feed[name]) for feed in dataset.batches(size)]


# --- files --------------------------------------------------------------------------------------


def test_npy_feeds_the_only_input_in_order_and_again(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(10))
    data = open_data(tmp_path / "x.npy", [X])
    assert len(data) == 10 and data.labels is None and data.notes == ()
    assert sizes(data, "x", 4) == [4, 4, 2]
    for _ in range(2):
        np.testing.assert_array_equal(joined(data, "x"), rows(10))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_by_input_name_with_labels(tmp_path: Path, save: Any) -> None:
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), np.int32)
    save(tmp_path / "d.npz", ids=ids, mask=mask, labels=np.array([3, 1, 2, 0], np.uint8))
    data = open_data(str(tmp_path / "d.npz"), [IDS, MASK])
    feed = next(data.batches(4))
    np.testing.assert_array_equal(feed["ids"], ids)
    assert feed["mask"].dtype == np.int64
    assert data.labels is not None and data.labels.tolist() == [3, 1, 2, 0]


def test_uncompressed_npz_is_mapped_not_read(tmp_path: Path) -> None:
    fortran = np.asfortranarray(rows(6))
    np.savez(tmp_path / "d.npz", x=fortran)
    data = open_data(tmp_path / "d.npz", [X])
    assert isinstance(data.source, Blocks)
    base: Any = data.source._arrays(0)["x"]
    while not isinstance(base, np.memmap) and base is not None:
        base = base.base
    assert isinstance(base, np.memmap)
    np.testing.assert_array_equal(joined(data, "x"), rows(6))


def test_npz_names_with_slash_and_colon(tmp_path: Path) -> None:
    name = "gpu_0/data:0"
    np.savez(tmp_path / "d.npz", **{name: rows(2)})
    assert len(open_data(tmp_path / "d.npz", [spec(name, "f4", 1, 3)])) == 2


def test_one_input_takes_any_array_name_and_labels_may_be_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "any.npz", arr_0=rows(2), labels=np.arange(2))
    assert len(open_data(tmp_path / "any.npz", [X])) == 2
    np.savez(tmp_path / "labels.npz", labels=rows(2))
    data = open_data(tmp_path / "labels.npz", [spec("labels", "f4", "N", 3)])
    assert data.labels is None and len(data) == 2


def test_folder_of_npz_may_be_ragged_and_keeps_the_order(tmp_path: Path) -> None:
    lengths = [5, 5, 7, 5]
    for k, n in enumerate(lengths):
        np.savez(tmp_path / f"{k}.npz", ids=np.full((n,), k), mask=np.ones(n, int), labels=k)
    data = open_data(tmp_path, [IDS, MASK])
    shapes = [feed["ids"].shape for feed in data.batches(8)]
    assert shapes == [(2, 5), (1, 7), (1, 5)]
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 3]
    assert [int(feed["ids"][0, 0]) for feed in data.batches(1)] == [0, 1, 2, 3]


def test_folder_of_batches_is_split_into_samples(tmp_path: Path) -> None:
    for k in range(3):
        np.save(tmp_path / f"{k}.npy", rows(4) + 100 * k)
    data = open_data(tmp_path, [X])
    assert len(data) == 12 and sizes(data, "x", 5) == [5, 5, 2]
    assert joined(data, "x")[4, 0] == 100


def write_set(folder: Path, arrays: dict[str, np.ndarray[Any, Any]], names: bool = True) -> None:
    folder.mkdir(parents=True)
    for k, (name, array) in enumerate(arrays.items()):
        tensor = onnx.numpy_helper.from_array(array, name if names else "")
        (folder / f"input_{k}.pb").write_bytes(tensor.SerializeToString())


@pytest.mark.parametrize("names", [True, False])
def test_onnx_test_data_sets(tmp_path: Path, names: bool) -> None:
    for k in (0, 2, 10):
        arrays = {"ids": np.full((2, 3), k), "mask": np.zeros((2, 3), np.int64)}
        if names:  # matched by name, not by position
            arrays = dict(reversed(arrays.items()))
        write_set(tmp_path / f"test_data_set_{k}", arrays, names)
    data = open_data(tmp_path, [IDS, MASK])
    assert len(data) == 3
    assert [int(feed["ids"].max()) for feed in data.batches(1)] == [0, 2, 10]
    assert all(feed["mask"].max() == 0 for feed in data.batches(1))
    assert len(open_data(tmp_path / "test_data_set_2", [IDS, MASK])) == 1


def test_a_test_data_set_is_one_whole_feed(tmp_path: Path) -> None:
    inputs = [spec("x", "f4", None, None), spec("state", "f4", 2, None, 4), spec("sr", "i8")]
    arrays = {"x": np.ones((3, 8), np.float32), "state": np.ones((2, 3, 4), np.float32)}
    write_set(tmp_path / "test_data_set_0", {**arrays, "sr": np.array(16000)})
    (feed,) = open_data(tmp_path, inputs).batches(1)
    assert {n: x.shape for n, x in feed.items()} == {"x": (3, 8), "state": (2, 3, 4), "sr": ()}


# --- callables ----------------------------------------------------------------------------------

MODULE = """
import itertools
import numpy as np

def arrays():
    for k in range(3):
        yield np.full((2, 3), k, np.float32)

def feeds():
    for k in range(5):
        yield {"ids": np.full((1, k + 1), k), "mask": np.ones((1, k + 1), int), "labels": [k]}

def pairs():
    return [(np.zeros(4, int), np.ones(4, int))] * 3

def endless():
    return (np.full(3, k, np.float32) for k in itertools.count())

listed = [[1.0, 2.0, 3.0]]

def empty():
    return []

def rubbish():
    return ["no", object()]

def raises():
    yield 1 / 0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"feeds_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    return name


def test_callable_is_imported_from_the_current_directory(module: str) -> None:
    path = list(sys.path)
    data = open_data(f"{module}:arrays", [X])
    assert len(data) == 6 and joined(data, "x")[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert sys.path == path
    assert len(open_data(f"{module}:listed", [X])) == 1


def test_callable_yields_feeds_with_labels_or_tuples(module: str) -> None:
    data = open_data(f"{module}:feeds", [IDS, MASK])
    assert [f["ids"].shape for f in data.batches(4)] == [(1, k + 1) for k in range(5)]
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 3, 4]
    feed = next(open_data(f"{module}:pairs", [IDS, MASK]).batches(8))
    assert feed["ids"].shape == (3, 4) and feed["mask"].min() == 1


def test_samples_of_an_endless_callable_are_the_first(module: str) -> None:
    data = open_data(f"{module}:endless", [X], samples=4)
    assert joined(data, "x")[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere:f", "ModuleNotFoundError"),
        ("{m}:nothing", "AttributeError"),
        ("{m}_broken:f", "SyntaxError"),
        ("{m}:raises", "ZeroDivisionError"),
        ("{m}:empty", "yields nothing"),
        ("{m}:rubbish", "item 0"),
    ],
)
def test_callable_that_fails_is_a_sentence(module: str, name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_data(name.format(m=module), [X])


def test_python_objects_are_data_too() -> None:
    assert len(open_data(rows(4), [X])) == 4
    assert len(open_data({"ids": [[1, 2]], "mask": [[1, 1]]}, [IDS, MASK])) == 1
    assert len(open_data(lambda: iter([rows(2), rows(3)]), [X])) == 5


# --- samples, batches, shapes -------------------------------------------------------------------


def test_samples_is_a_seeded_subset_with_its_labels() -> None:
    given = {"x": rows(100), "labels": np.arange(100)}
    a, b, c = (open_data(given, [X], samples=20, seed=s) for s in (1, 1, 2))
    assert len(a) == 20 and a.labels is not None and b.labels is not None and c.labels is not None
    assert a.labels.tolist() == b.labels.tolist() == sorted(a.labels) != c.labels.tolist()
    np.testing.assert_array_equal(joined(a, "x"), rows(100)[a.labels])
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    many = open_data(given, [X], samples=1000)
    assert len(many) == 100 and "1000 samples were asked for" in many.notes[0]


def test_subset_by_slice_and_by_numbers() -> None:
    data = open_data({"x": rows(10), "labels": np.arange(10)}, [X])
    part = data.subset(slice(2, 8)).subset([0, 3])
    assert part.labels is not None and part.labels.tolist() == [2, 5]
    np.testing.assert_array_equal(joined(part, "x"), rows(10)[[2, 5]])


def test_a_fixed_batch_overrides_the_asked_size() -> None:
    given = {"x": rows(10), "labels": np.arange(10)}
    one = open_data(given, [spec("x", "f4", 1, 3)])
    assert sizes(one, "x", 64) == [1] * 10 and one.notes == ()
    four = open_data(given, [spec("x", "f4", 4, 3)])
    assert sizes(four, "x", 1) == [4, 4] and len(four) == 8
    assert four.labels is not None and len(four.labels) == 8
    assert "2 of 10 samples are left over" in four.notes[0]
    dozen = open_data(given, [spec("x", "f4", 12, 3)])
    assert sizes(dozen, "x", 1) == [12] and dozen.labels is not None
    assert dozen.labels.tolist() == [*range(10), 0, 1] and "repeated" in dozen.notes[0]


def test_arrays_that_are_whole_fixed_batches_are_fed_as_they_are() -> None:
    data = open_data(np.zeros((5, 4, 3), np.float32), [spec("x", "f4", 4, 3)])
    assert len(data) == 5 and sizes(data, "x", 9) == [4] * 5


def test_fixed_batch_refuses_mixed_shapes() -> None:
    data = open_data(lambda: [np.zeros(5), np.zeros(6)], [spec("x", "f4", 2, "T")])
    with pytest.raises(DataError, match="2 samples a run"):
        list(data.batches(1))


@pytest.mark.parametrize("sr", [np.array(16000), np.full(6, 16000)])
def test_scalars_and_a_state_with_a_named_batch_axis(sr: np.ndarray[Any, Any]) -> None:
    state = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    for given in (state, state.transpose(1, 0, 2)):  # as the model has it, or samples first
        data = open_data({"input": rows(6, 512), "state": given, "sr": sr}, VAD)
        feeds = list(data.batches(4))
        assert [f["input"].shape for f in feeds] == [(4, 512), (2, 512)]
        assert feeds[0]["sr"].shape == () and feeds[0]["sr"] == 16000
        assert all(f["state"].flags.c_contiguous for f in feeds)
        np.testing.assert_array_equal(np.concatenate([f["state"] for f in feeds], 1), state)


def test_samples_with_different_scalars_do_not_share_a_batch() -> None:
    rate = np.array([8000, 8000, 16000])
    data = open_data({"input": rows(3, 8), "state": np.zeros((2, 3, 4)), "sr": rate}, VAD)
    assert [(len(f["input"]), int(f["sr"])) for f in data.batches(8)] == [(2, 8000), (1, 16000)]


def test_a_state_without_a_sample_axis_ties_runs_to_one_sample() -> None:
    inputs = [spec("mix", "f4", 1, 3), spec("cache", "f4", 2, 1, 4)]
    caches = np.arange(32, dtype=np.float32).reshape(4, 2, 1, 4)
    data = open_data({"mix": rows(4), "cache": caches}, inputs)
    assert [f["cache"][0, 0, 0] for f in data.batches(8)] == [0, 8, 16, 24]
    shared = open_data({"mix": rows(4), "cache": caches[0]}, inputs)
    assert len(shared) == 4 and sizes(shared, "mix", 8) == [1] * 4
    zeros = open_data({"mix": rows(4), "cache": np.zeros((1, 4))}, [X2, spec("cache", "f4", 1, 4)])
    assert len(zeros) == 4 and sizes(zeros, "mix", 8) == [1] * 4


X2 = spec("mix", "f4", 1, 3)


# --- types and values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "u1", "?"])
def test_numbers_are_cast_to_a_float_input(dtype: str) -> None:
    (feed,) = open_data(np.ones((2, 3), dtype), [X]).batches(2)
    assert feed["x"].dtype == np.float32 and feed["x"].flags.c_contiguous


def test_float16_inputs_get_float16_and_overflow_is_an_error() -> None:
    half = spec("x", "f2", "N", 3)
    (feed,) = open_data(rows(2), [half]).batches(2)
    assert feed["x"].dtype == np.float16
    with pytest.raises(DataError, match=r"sample 1 .*infinity.*float16"):
        list(open_data(np.array([[1, 2, 3], [1, 1e6, 2]]), [half]).batches(2))


def test_strings_and_booleans() -> None:
    (feed,) = open_data({"s": [["a"], ["b"]]}, [spec("s", object, "N", 1)]).batches(2)
    assert feed["s"].dtype == object and feed["s"].ravel().tolist() == ["a", "b"]
    (feed,) = open_data(np.array([[0, 1]]), [spec("b", "?", "N", 2)]).batches(2)
    assert feed["b"].dtype == bool
    with pytest.raises(DataError, match=r"expects bool .* outside 0\.\.1"):
        list(open_data(np.array([[0, 2]]), [spec("b", "?", "N", 2)]).batches(2))


def test_uint8_pixels_for_a_float_input_are_noted() -> None:
    assert "0..255" in open_data(np.full((2, 3), 200, np.uint8), [X]).notes[0]
    assert open_data(np.ones((2, 3), np.uint8), [X]).notes == ()


def test_preprocessing_of_arrays_is_ignored_and_said() -> None:
    assert "ignored" in open_data(rows(2), [X], Preprocess("imagenet")).notes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_sample(tmp_path: Path, bad: float) -> None:
    x = rows(5)
    x[3, 1] = bad
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(DataError, match=r"sample 3 of .*d\.npz, 'x', holds NaN or infinity"):
        list(open_data(tmp_path / "d.npz", [X]).batches(2))


@pytest.mark.parametrize(
    ("given", "inputs", "says"),
    [
        ({"y": 1, "z": 2}, [X], "inputs are 'x', but the arrays are 'y', 'z'"),
        ({"ids": rows(2)}, [IDS, MASK], "inputs are 'ids', 'mask', but the arrays are 'ids'"),
        ({"ids": [[1]], "mask": [[1], [1]]}, [IDS, MASK], "different numbers of samples"),
        (rows(4, 5), [X], r"'x' expects float32 \[N, 3\], but .* has shape \(4, 5\)"),
        (np.zeros((0, 3)), [X], "is empty"),
        (rows(4), [spec("x", "i8", "N", 3)], r"expects int64 \[N, 3\], but .* is float32"),
        (np.zeros((2, 3), complex), [X], "is complex128"),
        (np.array([[{}]]), [X], "not an array of numbers"),
        ({"x": rows(2), "labels": [1]}, [X], "1 labels for 2 samples"),
        ({"x": rows(2), "labels": [1.5, 2]}, [X], "labels .* must be integers"),
        (np.zeros((9, 8, 8, 3)), [spec("i", "f4", 1, 3, 8, 8)], "transpose it from NHWC to NCHW"),
        (np.zeros((9, 3, 8, 8)), [spec("i", "f4", 1, 8, 8, 3)], "transpose it from NCHW to NHWC"),
        (rows(2), [], "no inputs"),
        ("no/such/place", [X], "'no/such/place' does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, inputs: list[InputSpec], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_data(given, inputs)


def test_integers_beyond_the_input_type_are_refused() -> None:
    data = open_data(np.array([[1, 2**40]]), [spec("x", "i4", "N", 2)])
    with pytest.raises(DataError, match=r"expects int32 .* values outside"):
        list(data.batches(1))


@pytest.mark.parametrize("name", ["d.npz", "d.npy", "c.npz"])
@pytest.mark.parametrize("keep", [0, 30, 90])
def test_truncated_files_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    if name == "d.npy":
        np.save(path, rows(50))
    else:
        (np.savez_compressed if name == "c.npz" else np.savez)(path, x=rows(50))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot read"):
        open_data(path, [X])


def test_a_truncated_npy_with_a_whole_header_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(50))
    whole = (tmp_path / "d.npy").read_bytes()
    (tmp_path / "d.npy").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot read"):
        list(open_data(tmp_path / "d.npy", [X]).batches(1))


def test_compressed_garbage_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((100, 3))
    np.savez_compressed(tmp_path / "d.npz", x=noise)
    raw = bytearray((tmp_path / "d.npz").read_bytes())
    raw[1000:1200] = bytes(200)
    (tmp_path / "d.npz").write_bytes(raw)
    with pytest.raises(DataError, match="cannot read"):
        list(open_data(tmp_path / "d.npz", [X]).batches(1))


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [[1], [2, 3]]
    np.savez(tmp_path / "d.npz", x=ragged)
    with pytest.raises(DataError, match="never unpickled"):
        open_data(tmp_path / "d.npz", [X])


def test_broken_tensor_files_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "test_data_set_0", {"x": rows(1)})
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\x0f\xffnot a tensor")
    with pytest.raises(DataError, match=r"input_0\.pb is not an ONNX tensor"):
        open_data(tmp_path, [X])
    with pytest.raises(DataError, match=r"has 1 input_.* for the inputs 'ids', 'mask'"):
        open_data(tmp_path, [IDS, MASK])


def test_folders_and_files_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        open_data(tmp_path, [X])
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is no data"):
        open_data(tmp_path / "notes.txt", [X])
    np.savez(tmp_path / "none.npz")
    with pytest.raises(DataError, match="holds no arrays"):
        open_data(tmp_path / "none.npz", [X])


def test_numbers_of_samples_and_batches_must_be_positive() -> None:
    with pytest.raises(OptionError, match="--samples 0"):
        open_data(rows(2), [X], samples=0)
    with pytest.raises(OptionError, match="--samples 0"):
        synthesize([X], 0)
    with pytest.raises(OptionError, match="batch of 0"):
        list(open_data(rows(2), [X]).batches(0))


def test_fingerprint_is_of_content_not_of_place_or_batching(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(4))
    np.savez_compressed(tmp_path / "b.npz", x=rows(4))
    a, b = (open_data(tmp_path / f"{n}.npz", [X]).fingerprint() for n in "ab")
    assert a == b and len(a) == 64
    assert a != open_data(rows(4) + 1, [X]).fingerprint()
    assert a != open_data(rows(3), [X]).fingerprint()


# --- no data ------------------------------------------------------------------------------------


def test_synthetic_feeds_fit_and_repeat() -> None:
    image = spec("image", "f4", None, 3, None, None)
    inputs = [image, IDS, MASK, spec("flag", "?", 1), spec("q", "i1", 1, 640)]
    data = synthesize(inputs, 5, seed=7)
    assert len(data) == 5 and "synthesized" in data.notes[0]
    feeds = list(data.batches(1))
    shapes = {n: x.shape for n, x in feeds[0].items()}
    assert shapes["image"] == (1, 3, 224, 224) and shapes["ids"] == shapes["mask"] == (1, 16)
    assert {n: x.dtype for n, x in feeds[0].items()} == {i.name: i.dtype for i in inputs}
    assert 0 <= feeds[0]["ids"].min() <= feeds[0]["ids"].max() < 10
    assert feeds[0]["mask"].min() == 1 and feeds[0]["q"].min() < -100
    for again, feed in itertools.zip_longest(data.batches(1), feeds):
        np.testing.assert_array_equal(again["image"], feed["image"])
    assert data.fingerprint() == synthesize(inputs, 5, seed=7).fingerprint()
    assert data.fingerprint() != synthesize(inputs, 5, seed=8).fingerprint()
    assert abs(float(feeds[0]["image"].std()) - 1) < 0.05


def test_synthetic_shapes_can_be_given_and_are_shared_by_symbol() -> None:
    data = synthesize([IDS, MASK], 2, shapes={"ids": (1, 47)})
    assert next(data.batches(2))["mask"].shape == (2, 47)
    for shapes, length in (({"input": [1, 64], "sr": []}, 64), (None, 512)):
        feed = next(synthesize(VAD, 2, shapes=shapes).batches(1))
        assert feed["input"].shape == (1, length) and feed["state"].shape == (2, 1, 4)
        assert feed["sr"] == 16000
    unnamed = [spec("x", "f4", None, None), spec("state", "f4", 2, None, 4)]
    assert next(synthesize(unnamed, 1).batches(1))["state"].shape == (2, 1, 4)
    last = synthesize([spec("i", "f4", 1, None, None, 3)], 1)
    assert next(last.batches(1))["i"].shape == (1, 224, 224, 3)


def test_a_fixed_batch_is_synthesized_whole() -> None:
    data = synthesize([spec("x", "f4", 8, 3)], 2)
    assert sizes(data, "x", 1) == [8, 8]


def test_what_cannot_be_made_up_is_refused() -> None:
    with pytest.raises(DataError, match="'s' expects string"):
        synthesize([spec("s", object, 1)], 1)
    with pytest.raises(DataError, match="any shape"):
        synthesize([InputSpec("x", np.dtype("f4"), None)], 1)
    with pytest.raises(DataError, match=r"'x' has no rows, \[0, 3\]: nothing can be run"):
        synthesize([spec("x", "f4", 0, 3)], 1)
    with pytest.raises(OptionError, match=r"expects float32 \[N, 3\]"):
        synthesize([X], 1, shapes={"x": (1, 4)})
    with pytest.raises(OptionError, match="inputs are x"):
        synthesize([X], 1, shapes={"y": (1, 4)})
