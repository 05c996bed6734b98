"""Statistics are a commutative monoid, and so are their files: parts merge to the whole."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import onnxc
from calib import merge
from calib.data import Preprocess
from calib.moments import MomentsObserver
from calib.observers import OBSERVERS, is_equal
from calib.statistics import Made, Statistics, load, save
from onnxc.core import Key
from onnxc.errors import DataError, OptionError
from onnxc.numerics.patches import Window, length

Array = NDArray[Any]
EXACT = ("range", "histogram")
CNN = Path(__file__).resolve().parents[1] / "models" / "digits_cnn.onnx"
CNN_DATA = CNN.with_name("digits_cnn_calib.npz")
ROUNDING = 1e-12  # of a sum, relative to that of the magnitudes

VALUES = st.floats(-(2.0**40), 2.0**40, width=32) | st.sampled_from([0.0, -0.0, 2.0**-140, 6.0])
WINDOWS = st.sampled_from(
    [
        Window(),
        Window(groups=2),
        Window((3, 3), pads=(1, 1, 1, 1)),
        Window((3, 2), (2, 1), (1, 2), (1, 0, 0, 1)),
        Window((3, 3), (2, 2), auto_pad="SAME_UPPER", groups=4),
        Window((1, 1), (2, 2), groups=2),
    ]
)


def image_batches() -> st.SearchStrategy[Array]:
    shape = st.tuples(st.integers(0, 3), st.just(4), st.just(5), st.just(6))
    return hnp.arrays(np.float32, shape, elements=VALUES)


def empty(what: str, window: Window, block: int | None) -> Any:
    if what == "moments":
        return OBSERVERS[what](1, window, block)
    return OBSERVERS[what](1 if what in ("mean", "peak", "zeros") else None)


def see(observer: Any, batch: Array) -> Any:
    observer.update(batch, len(batch))
    if isinstance(observer, MomentsObserver):
        observer.settle()
    return observer


def sums(observer: Any) -> list[Array]:
    names = ("total", "products")
    return [np.asarray(getattr(observer, n)) for n in names if hasattr(observer, n)]


def assert_same(a: Any, b: Any, magnitudes: Any = None) -> None:
    """Equal to the bit; sums to ROUNDING of those of the magnitudes."""
    if magnitudes is None:
        assert is_equal(a, b)
        return
    for name in ("count", "available"):
        assert getattr(a, name, 0) == getattr(b, name, 0)
    for mine, theirs, scale in zip(sums(a), sums(b), sums(magnitudes), strict=True):
        if mine.size and theirs.size:
            assert np.all(np.abs(mine - theirs) <= ROUNDING * np.abs(scale) + 1e-300)
        else:
            assert mine.size == theirs.size or not (mine.any() or theirs.any())


def magnitude(observer: Any, whole: Array) -> Any:
    """An observer of Σ |x|, Σ |x_i x_j| over the same rows; None for what is exact."""
    if not hasattr(observer, "total"):
        return None
    if not isinstance(observer, MomentsObserver):
        observer.update(np.abs(whole), len(whole))
        return observer
    multiply = observer._multiply  # the rows are chosen before their signs are gone
    observer._multiply = lambda taken: multiply(np.abs(taken))  # type: ignore[method-assign]
    return see(observer, whole)


@pytest.mark.parametrize("what", list(OBSERVERS))
@settings(deadline=None)
@given(
    parts=st.lists(image_batches(), min_size=3, max_size=3),
    window=WINDOWS,
    block=st.sampled_from([None, 1, 3, 8]),
)
def test_observers_are_commutative_monoids(
    what: str, parts: list[Array], window: Window, block: int | None
) -> None:
    whole = np.concatenate(parts)
    scale = magnitude(empty(what, window, block), whole)
    a, b, c = (see(empty(what, window, block), part) for part in parts)
    together = see(empty(what, window, block), whole)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), scale)  # associative
    assert_same(a.merge(b), b.merge(a), scale)  # commutative
    nothing = empty(what, window, block)
    assert_same(nothing.merge(a), a, scale)  # identity, on either side
    assert_same(a.merge(nothing), a, scale)
    assert_same(a.merge(b).merge(c), together, scale)  # observe(a + b) = observe(a) · observe(b)
    one_by_one = empty(what, window, block)
    for sample in whole:
        see(one_by_one, sample[None])
    assert_same(one_by_one, together, scale)


@given(window=WINDOWS, block=st.sampled_from([None, 1, 3]))
def test_merging_changes_neither_part(window: Window, block: int | None) -> None:
    x = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)
    for what in OBSERVERS:
        a, b = (see(empty(what, window, block), x + i) for i in range(2))
        before = [np.copy(s) for s in (*sums(a), *sums(b))]
        merged = a.merge(b)
        for array in sums(merged):
            array[...] = 7
        assert all(np.array_equal(x, y) for x, y in zip(before, (*sums(a), *sums(b)), strict=True))


def test_blocks_of_two_widths_do_not_merge() -> None:
    x = np.ones((2, 4, 5, 6), np.float32)
    with pytest.raises(OptionError, match="--max-memory"):
        see(empty("moments", Window(), 1), x).merge(see(empty("moments", Window(), 2), x))
    assert length(x.shape, 1, Window((3, 3))) == 36


# --- files


KEYS = {
    Key("x", "histogram"): Window(),
    Key("x", "range"): Window(),
    Key("x", "peak", 1): Window(),
    Key("x", "moments", 1, window=Window(groups=2)): Window(groups=2),
}
IMAGES = np.random.default_rng(0).standard_normal((9, 4, 5, 6)).astype(np.float32)


def part(start: int, stop: int, **changed: Any) -> Statistics:
    stats = {key: see(empty(key.what, w, None), IMAGES[start:stop]) for key, w in KEYS.items()}
    samples = tuple(bytes([i]) * 16 for i in range(start, stop))
    return replace(Statistics(stats, "m" * 64, "g" * 64, samples, (Made.here(1),)), **changed)


def saved(folder: Path, *parts: Statistics) -> list[Path]:
    paths = [folder / f"{number}.stats" for number in range(len(parts))]
    for path, one in zip(paths, parts, strict=True):
        save(one, path)
    return paths


def test_files_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    paths = saved(tmp_path, part(0, 2), part(2, 5), part(5, 9))
    made = set()
    for number, order in enumerate(permutations(paths)):
        save(merge.merge(order), tmp_path / f"m{number}")
        made.add((tmp_path / f"m{number}").read_bytes())
    assert len(made) == 1


def test_merged_in_steps_or_at_once_is_what_one_run_finds(tmp_path: Path) -> None:
    paths = saved(tmp_path, part(0, 2), part(2, 5), part(5, 9))
    at_once, whole = merge.merge(paths), part(0, 9)
    save(merge.merge(paths[:2]), tmp_path / "first")
    in_steps = merge.merge([tmp_path / "first", paths[2]])
    for found in (at_once, in_steps):
        assert replace(found, stats={}, path="") == replace(whole, stats={})
        for key, window in KEYS.items():
            scale = None if key.what in EXACT else magnitude(empty(key.what, window, None), IMAGES)
            assert_same(found.stats[key], whole.stats[key], scale)


def test_what_does_not_go_together_names_both_files(tmp_path: Path) -> None:
    def refused(error: type[Exception], *parts: Statistics) -> str:
        with pytest.raises(error) as caught:
            merge.merge(saved(tmp_path, *parts))
        told = str(caught.value)
        assert "0.stats" in told and "1.stats" in told
        return told

    first, second = part(0, 2), part(2, 5)
    assert "two different models" in refused(OptionError, first, replace(second, model="n" * 64))
    assert "prepare the model" in refused(OptionError, first, replace(second, graph="h" * 64))
    other = replace(second, preparation="else")
    assert "prepared with different" in refused(
        OptionError, replace(first, preparation="so"), other
    )
    fewer = replace(second, stats={k: o for k, o in second.stats.items() if k.what != "peak"})
    told = refused(OptionError, first, fewer)
    assert "0.stats holds peak of tensor 'x' and" in told and "--what" in told
    assert "2 samples would count twice" in refused(OptionError, first, part(0, 3))
    assert "1 sample would count twice" in refused(OptionError, first, part(1, 3))
    (tmp_path / "0.stats").write_text("no")
    with pytest.raises(DataError, match=r"0\.stats is no statistics file"):
        merge.merge([tmp_path / "0.stats", tmp_path / "1.stats"])


def test_blocks_that_differ_name_file_and_tensor(tmp_path: Path) -> None:
    key = Key("x", "moments", 1, window=Window(groups=2))
    narrow = {**part(2, 5).stats, key: see(empty("moments", Window(groups=2), 1), IMAGES[2:5])}
    paths = saved(tmp_path, part(0, 2), part(2, 5, stats=narrow))
    with pytest.raises(OptionError, match=r"\.stats, tensor 'x': .* --max-memory"):
        merge.merge(paths)


def test_one_file_twice_counts_twice(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, part(0, 2))
    with pytest.raises(OptionError, match="2 samples would count twice"):
        merge.merge([path, path])


def test_a_tensor_that_held_infinity_in_one_part_is_lost_in_all(tmp_path: Path) -> None:
    key = Key("x", "histogram")
    first = part(0, 2)
    first = replace(
        first, stats={k: o for k, o in first.stats.items() if k != key}, lost=frozenset({key})
    )
    found = merge.merge(saved(tmp_path, first, part(2, 5)))
    assert found.lost == {key} and key not in found.stats
    assert found.stats.keys() == KEYS.keys() - {key}


def test_other_runtimes_are_noted(tmp_path: Path) -> None:
    old = part(2, 5, made=(replace(Made.here(1), runtime="1.0"),))
    paths = saved(tmp_path, part(0, 2), old)
    report = onnxc.merge_statistics(paths, output=tmp_path / "m")
    assert any("different versions of ONNX Runtime: 1.0, " in note for note in report.notes)
    assert report.samples == 5
    assert report.sources == tuple(map(str, paths))
    assert len(load(tmp_path / "m").made) == 2


# --- end to end


def halves(count: int, cut: int) -> list[NDArray[np.intp]]:
    order = np.random.default_rng(3).permutation(count)
    return [np.sort(order[:cut]), np.sort(order[cut:])]


def assert_union(folder: Path, whole: Statistics) -> None:
    parts = [folder / "0.stats", folder / "1.stats"]
    found = merge.merge(parts[::-1])
    assert found.samples == whole.samples
    assert found.stats.keys() == whole.stats.keys()
    for key, observer in whole.stats.items():
        other: Any = found.stats[key]
        if key.what in EXACT:
            assert is_equal(observer, other), key
            continue
        for mine, theirs, scale in zip(sums(observer), sums(other), bounds(observer), strict=True):
            assert np.all(np.abs(mine - theirs) <= ROUNDING * scale), key


def bounds(observer: Any) -> list[Array]:
    """Bounds of Σ |x| and Σ |x_i x_j|: √(n Σ x²) and √(Σ x_i² Σ x_j²), by Cauchy and Schwarz."""
    if not isinstance(observer, MomentsObserver):
        return [np.abs(observer.total)]  # peaks are not negative
    squares = observer.diagonal * observer.count
    width = observer.products.shape[-1]
    blocks = np.zeros((len(squares), observer.products.shape[1] * width))
    blocks[:, : squares.shape[1]] = squares
    blocks = blocks.reshape(*observer.products.shape[:2], width)
    return [np.sqrt(observer.count * squares), np.sqrt(blocks[..., None] * blocks[..., None, :])]


@pytest.mark.parametrize("cut", [1, 13])
def test_a_network_on_parts_of_the_data_is_the_network_on_all_of_it(
    tmp_path: Path, cut: int
) -> None:
    x = np.load(CNN_DATA)["image"][:24]
    what = ("range", "histogram", "peak", "moments")
    onnxc.calibrate(CNN, data=x, output=tmp_path / "whole", what=what)
    for number, chosen in enumerate(halves(24, cut)):
        onnxc.calibrate(CNN, data=x[chosen], output=tmp_path / f"{number}.stats", what=what)
    assert_union(tmp_path, load(tmp_path / "whole"))


def test_mobilenet_on_parts_of_the_data_is_mobilenet_on_all_of_it(
    tmp_path: Path, shared: Path
) -> None:
    model = shared / "models" / "mobilenetv2.onnx"
    images = sorted((shared / "data" / "imagenet1k" / "calib").rglob("*.jp*g"))[:8]
    if not model.is_file() or len(images) < 8:
        pytest.skip("mobilenetv2.onnx or its images are not there")
    groups = {
        "whole": images,
        "0.stats": images[::3],
        "1.stats": sorted({*images} - {*images[::3]}),
    }
    for name, files in groups.items():
        folder = tmp_path / f"images of {name}"
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(file)
        preset = Preprocess(preset="imagenet")
        onnxc.calibrate(model, data=folder, output=tmp_path / name, preprocess=preset)
    whole = load(tmp_path / "whole")
    assert {key.what for key in whole.stats} == {"histogram", "peak", "moments"}
    assert_union(tmp_path, whole)


def test_the_reduction_is_that_of_python(tmp_path: Path) -> None:
    parts = [part(i, i + 1) for i in range(4)]
    key = Key("x", "histogram")
    folded: Any = reduce(lambda a, b: a.merge(b), (p.stats[key] for p in parts))
    assert is_equal(merge.merge(saved(tmp_path, *parts)).stats[key], folded)
