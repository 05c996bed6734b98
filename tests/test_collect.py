"""Statistics of a running model: right values, whatever the batch, the segments and the memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, normal

from calib import merge, tap
from calib.collect import Collected, collect
from calib.data import Dataset, InputSpec, open_data
from calib.observers import BINS, OBSERVERS, is_equal
from calib.plan import ARENA, BASE, WEIGHT_COPIES, plan_runs
from onnxc.core import Key
from onnxc.errors import DataError, ModelError, OptionError
from onnxc.graph import Model, load, to_proto
from onnxc.runtime import run, session

Array = NDArray[Any]
IMAGES = normal(10, 3, 8, 8)
SPEC = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))


def network() -> onnx.ModelProto:
    return bind(
        """g (float[N,3,8,8] x, float[6,3,3,3] A, float[6,6,3,3] B, float[6,4] C)
             => (float[N,4] y) {
            a = Conv <pads: ints = [1,1,1,1]> (x, A)
            r = Relu (a)
            b = Conv <pads: ints = [1,1,1,1]> (r, B)
            s = Add (b, r)
            p = GlobalAveragePool (s)
            f = Flatten (p)
            y = MatMul (f, C) }""",
        A=normal(6, 3, 3, 3, seed=1),
        B=normal(6, 6, 3, 3, seed=2),
        C=normal(6, 4, seed=3),
    )


TENSORS = ("x", "r", "b", "s", "f", "y")
KEYS = [Key(name, "histogram") for name in TENSORS]


def dataset(images: Array = IMAGES) -> Dataset:
    return open_data({"x": images}, [SPEC])


def gather(
    what: str = "histogram", proto: onnx.ModelProto | None = None, **options: Any
) -> Collected:
    keys = [Key(name, what) for name in TENSORS]
    return collect(load(proto or network()), keys, options.pop("data", dataset()), **options)


def by_hand(proto: onnx.ModelProto, name: str, images: Array = IMAGES) -> Array:
    if name == "x":
        return images
    return run(session(tap.tapped(proto, [name]).SerializeToString()), {"x": images})[name]


@pytest.mark.parametrize("batch", [None, 1, 3, 10])
def test_ranges_are_those_of_the_tensors(batch: int | None) -> None:
    found = gather("range", batch=batch)
    for name in TENSORS:
        values, seen = by_hand(network(), name), found.stats[Key(name, "range")]
        assert seen.count == values.size
        np.testing.assert_allclose(
            [seen.low, seen.high], [values.min(), values.max()], rtol=1e-5, atol=1e-6
        )
    assert found.samples == 10 and found.segments == 1


def test_a_key_can_ask_for_channels_and_for_several_statistics() -> None:
    keys = [Key("s", "mean", 1), Key("s", "range", 1), Key("s", "histogram"), Key("x", "mean", 1)]
    found = collect(load(network()), keys, dataset()).stats
    values = by_hand(network(), "s")
    np.testing.assert_allclose(found[keys[0]].mean, values.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found[keys[1]].high, values.max(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found[keys[3]].mean, IMAGES.mean(axis=(0, 2, 3)), atol=1e-6)
    assert found[keys[2]].count == values.size


def room_for(taps: int) -> int:
    """max_memory for that many taps of one sample, beside the three tensors alive at Add."""
    weights = tap.weight_bytes(to_proto(load(network())).graph)
    histograms = 2 * len(TENSORS) * 8 * BINS
    return BASE + WEIGHT_COPIES * weights + histograms + int((taps + 3) * ARENA * 6 * 8 * 8 * 4)


def test_segments_keep_the_estimate_below_the_bound_and_the_statistics_the_same() -> None:
    whole = gather(batch=1)
    for taps in (1, 2):
        bound = room_for(taps)
        split = gather(max_memory=bound)
        assert split.segments > 1
        assert split.estimate <= bound < whole.estimate
        assert any("read the data" in note for note in split.notes)
        for key, observer in whole.stats.items():
            assert split.stats[key].count == observer.count
            np.testing.assert_allclose(
                [split.stats[key].low, split.stats[key].high],
                [observer.low, observer.high],
                rtol=1e-5,
                atol=1e-6,
            )


def test_a_bound_that_cannot_hold_is_named_and_the_work_done() -> None:
    found = gather("range", max_memory=1 << 20)
    assert any("more than the 1 MiB" in note for note in found.notes)
    assert len(found.stats) == len(TENSORS)


def test_the_plan_does_not_depend_on_how_many_samples_there_are() -> None:
    proto, taps = to_proto(load(network())), ["r", "s"]
    few, many = (
        plan_runs(proto, taps, KEYS, dataset(normal(n, 3, 8, 8)), room_for(3)) for n in (20, 80)
    )
    assert few == replace(many, parts=few.parts)
    assert few.batch == 1


def test_memory_allows_for_larger_batches() -> None:
    proto = to_proto(load(network()))
    plan = plan_runs(proto, ["r", "s"], [], dataset(normal(80, 3, 8, 8)))
    assert plan.batch == 64
    assert len(plan.segments) == 1


def test_the_same_call_gives_the_same_statistics_bit_by_bit() -> None:
    first, second = gather(), gather()
    assert all(is_equal(first.stats[key], second.stats[key]) for key in first.stats)


def test_progress_counts_every_sample_of_every_segment() -> None:
    seen: list[tuple[int, int]] = []
    found = gather(max_memory=room_for(1), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (10 * found.segments, 10 * found.segments)


def test_memory_of_the_process_is_reported() -> None:
    found = gather("range")
    assert 1 << 24 < found.rss <= found.peak_rss * 1.05 < 1 << 40


def test_a_model_of_fixed_batch_is_run_one_by_one() -> None:
    proto = network()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    data = open_data({"x": IMAGES}, [replace(SPEC, shape=(1, 3, 8, 8))])
    found, free = gather("range", proto, data=data), gather("range")
    assert found.batch == 1
    for key, seen in free.stats.items():
        assert found.stats[key].count == seen.count
        np.testing.assert_allclose(found.stats[key].high, seen.high, rtol=1e-5)


def test_a_model_that_only_declares_a_free_batch_is_run_one_by_one_with_a_note() -> None:
    proto = bind(
        """g (float[N,3,8,8] x, int64[2] shape, float[192,4] W) => (float[N,4] y) {
            f = Reshape (x, shape)
            y = MatMul (f, W) }""",
        shape=np.array([1, 192]),
        W=normal(192, 4),
    )
    found = collect(load(proto), [Key("f", "range"), Key("x", "range")], dataset(), batch=5)
    assert found.batch == 1
    assert any("does not run on 5 samples at once" in note for note in found.notes)
    assert {seen.count for seen in found.stats.values()} == {IMAGES.size}


BRANCH = """g (float[N,3,8,8] x, bool[1] flag, float[1] k) => (float[N,3,8,8] y) {
    c = Mul (x, k)
    d = If (flag) <
        then_branch = t () => (float[N,3,8,8] p) { q = Neg (c) p = Abs (q) },
        else_branch = e () => (float[N,3,8,8] n) { n = Neg (c) } >
    y = Relu (d) }"""


def test_a_tensor_inside_a_body_is_skipped_with_a_note_and_one_it_captures_is_not() -> None:
    proto = bind(BRANCH, flag=np.array([True]), k=np.array([2.0], np.float32))
    keys = [Key(n, "range") for n in ("c", "d", "q")]
    found = collect(load(proto), keys, dataset())
    assert set(found.stats) == set(keys[:2])
    assert any("'q' is inside a nested body" in note for note in found.notes)
    np.testing.assert_allclose(found.stats[keys[1]].high, np.abs(2 * IMAGES).max(), rtol=1e-6)


def test_a_constant_is_skipped_with_a_note() -> None:
    found = collect(load(network()), [Key("A", "range"), Key("x", "range")], dataset())
    assert set(found.stats) == {Key("x", "range")}
    assert any("'A' is constant" in note for note in found.notes)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(OptionError, match="tensor 'nowhere' is not in the model"):
        collect(load(network()), [Key("nowhere", "range")], dataset())
    with pytest.raises(OptionError, match="statistic 'mode' is unknown; use one of range"):
        collect(load(network()), [Key("x", "mode")], dataset())


def unary(op: str) -> Model:
    return load(bind(f"g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ h = {op} (x) y = Relu (h) }}"))


@pytest.mark.parametrize("what", list(OBSERVERS))
def test_nan_names_the_tensor_and_infinity_leaves_it_out(what: str) -> None:
    with pytest.raises(DataError, match="'h' holds NaN"):
        collect(unary("Log"), [Key("h", what)], dataset(-np.abs(IMAGES) - 1))
    keys = [Key("h", what), Key("x", what)]
    found = collect(unary("Log"), keys, dataset(np.zeros_like(IMAGES)))
    assert set(found.stats) == {keys[1]}
    assert any("'h' holds infinite values" in note for note in found.notes)


def test_without_keys_nothing_is_run() -> None:
    assert collect(load(network()), [], dataset()).stats == {}


def test_shapes_of_every_tensor_are_found_with_symbols_and_without_declarations() -> None:
    proto = bind(
        """g (float[N,T] x) => (float[a,b] y) {
            k = Shape (x)
            n = NonZero (x)
            f = Cast <to: int = 1> (n)
            y = Relu (f) }"""
    )
    x = np.array([[1, 0, 2], [0, 0, 3]], np.float32)
    layouts = tap.layouts(proto, {"x": x})
    assert {n: v.shape for n, v in layouts.items()} == {
        "k": (2,),
        "n": (2, 3),
        "f": (2, 3),
        "y": (2, 3),
    }
    assert [layouts[n].nbytes for n in "knf"] == [16, 48, 24]


def test_a_model_that_makes_no_tensor_inside_has_no_shapes_to_observe() -> None:
    proto = bind(
        """g (float[N] x) => (int64 y) {
            s = SequenceConstruct (x, x)
            y = SequenceLength (s) }"""
    )
    x = np.zeros(3, np.float32)
    assert set(tap.layouts(proto, {"x": x})) == {"y"}


def test_the_peak_counts_live_tensors_and_keeps_taps() -> None:
    nodes = [onnx.helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise("abcd")]
    sizes = {"b": 10, "c": 20, "d": 40}
    assert tap.peak(nodes, sizes, ()) == 60
    assert tap.peak(nodes, sizes, ("b",)) == 70


def test_a_tapped_model_holds_only_what_its_taps_need() -> None:
    cut = tap.tapped(network(), ["r"])
    assert [n.op_type for n in cut.graph.node] == ["Conv", "Relu"]
    assert [w.name for w in cut.graph.initializer] == ["A"]
    captured = tap.tapped(bind(BRANCH, flag=np.array([True]), k=np.ones(1, np.float32)), ["d"])
    assert {w.name for w in captured.graph.initializer} == {"flag", "k"}


def test_a_digest_follows_the_weights() -> None:
    proto = network()
    first = merge.digest(load(proto))
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(normal(6, 3, 3, 3), "A"))
    assert merge.digest(load(network())) == first != merge.digest(load(proto))


def test_a_model_that_does_not_run_is_an_error() -> None:
    data = open_data({"x": normal(4, 3, 8, 8)}, [SPEC])
    proto = bind(
        """g (float[N,3,8,8] x, int64[1] shape) => (float[M] y) {
            r = Reshape (x, shape)
            y = Relu (r) }""",
        shape=np.array([7]),
    )
    with pytest.raises(ModelError, match="cannot run"):
        collect(load(proto), [Key("y", "range")], data)
