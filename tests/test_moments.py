"""Second moments: sums in float64, in blocks, for every heavy layer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from texts import bind, normal

from calib.collect import collect
from calib.data import Dataset, InputSpec, open_data
from calib.moments import MomentsObserver, bytes_of, widths
from calib.observers import is_equal
from calib.plan import BASE, MIB, MOST_PARTS, parts
from onnxc.core import Key
from onnxc.errors import OptionError
from onnxc.graph import load
from onnxc.moments import matrix, moments_key, moments_keys, why_no_moments
from onnxc.numerics.patches import Window, rows

Array = NDArray[Any]
ALL = 10**9


def test_mean_second_moments_and_diagonal_are_those_of_the_rows() -> None:
    x = normal(6, 4, 5, 5) + np.float32(0.3)
    observer = MomentsObserver(1, Window((3, 3), pads=(1, 1, 1, 1)))
    for image in x:
        observer.update(image[None])
    observer.settle()
    taken = np.concatenate([rows(i[None], 1, observer.window, 8)[0][0] for i in x]).astype(float)
    assert observer.count == len(taken)
    assert observer.available == 6 * 25
    np.testing.assert_allclose(observer.mean[0], taken.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(observer.second[0], taken.T @ taken / len(taken), rtol=1e-12)
    np.testing.assert_allclose(observer.diagonal[0], (taken**2).mean(axis=0), rtol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(-12, 12))
def test_sums_are_within_the_error_bound_of_exact_arithmetic(
    seed: int, count: int, magnitude: int
) -> None:
    """|S − Σ x_i x_j| ≤ n · 2⁻⁵³ · Σ |x_i x_j|, the exact sum taken in fractions."""
    x = normal(count, 3, seed=seed) * np.float32(10.0) ** magnitude
    observer = MomentsObserver(-1)
    for part in np.array_split(x, 3):
        observer.update(part)
    observer.settle()
    for i in range(3):
        for j in range(3):
            terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in x[:, [i, j]]]
            error = abs(Fraction(float(observer.products[0, 0, i, j])) - sum(terms))
            assert error <= Fraction(count, 2**53) * sum(map(abs, terms))


@pytest.mark.parametrize("block", [1, 3, 4, 7, 10, 99])
def test_blocks_hold_the_diagonal_of_all_moments(block: int) -> None:
    x = normal(50, 10)
    whole, cut = MomentsObserver(-1), MomentsObserver(-1, block=block)
    for observer in (whole, cut):
        observer.update(x)
        observer.settle()
    count, width = widths(10, block)
    assert width <= max(block, 1) or block >= 10
    mask = np.kron(np.eye(count), np.ones((width, width)))[:10, :10]
    np.testing.assert_allclose(cut.second[0], whole.second[0] * mask, rtol=1e-12)
    np.testing.assert_allclose(cut.diagonal, whole.diagonal, rtol=1e-12)
    assert cut.products.nbytes + cut.total.nbytes == bytes_of(x.shape, 1, Window(), block)


def test_different_rows_or_blocks_do_not_merge() -> None:
    with pytest.raises(OptionError, match="differently cut rows"):
        MomentsObserver(-1).merge(MomentsObserver(1))
    with pytest.raises(OptionError, match="same --max-memory"):
        MomentsObserver(-1).merge(MomentsObserver(-1, block=8))


def network() -> Any:
    return bind(
        """g (float[N,3,8,8] x, float[8,3,3,3] A, float[8,1,3,3] D, float[8,4,2,2] T,
              float[4,5] G, float[5,2] M)
             => (float[N,2] y) {
            a = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (x, A)
            d = Conv <group: int = 8, pads: ints = [1,1,1,1]> (a, D)
            t = ConvTranspose <strides: ints = [2,2]> (d, T)
            p = GlobalAveragePool (t)
            f = Flatten (p)
            g = Gemm (f, G)
            y = MatMul (g, M) }""",
        A=normal(8, 3, 3, 3, seed=1),
        D=normal(8, 1, 3, 3, seed=2),
        T=normal(8, 4, 2, 2, seed=3),
        G=normal(4, 5, seed=4),
        M=normal(5, 2, seed=5),
    )


SPEC = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))


def dataset(count: int = 40, seed: int = 0) -> Dataset:
    return open_data({"x": normal(count, 3, 8, 8, seed=seed)}, [SPEC])


def test_every_heavy_layer_has_moments_of_the_shape_of_its_weight() -> None:
    model = load(network())
    keys = moments_keys(model.graph)
    found = collect(model, keys.values(), dataset()).stats
    shapes = [found[key].second.shape for key in keys.values()]
    assert [n.op for n in model.graph.nodes if n.name in keys] == [
        *("Conv", "Conv", "ConvTranspose", "Gemm", "MatMul")
    ]
    assert shapes == [(1, 27, 27), (8, 9, 9), (1, 8, 8), (1, 4, 4), (1, 5, 5)]


def test_layers_that_read_one_tensor_alike_share_their_moments() -> None:
    model = load(
        bind(
            "g (float[N,4] x, float[4,3] A, float[4,5] B) => (float[N,3] y, float[N,5] z) {"
            " y = MatMul (x, A) z = MatMul (x, B) }",
            A=normal(4, 3),
            B=normal(4, 5),
        )
    )
    assert len(set(moments_keys(model.graph).values())) == 1


def test_why_a_layer_has_no_moments() -> None:
    model = load(
        bind(
            "g (float[2,4] x, float[2,4,4] c, float[2,4,3] B, float[2,4] K, float[4,2] W)"
            " => (float[2,4] r, float[2,4,4] y, float[2,4,3] z, float[2,2] k) {"
            " r = Relu (x) y = MatMul (c, c) z = MatMul (c, B) k = MatMul (K, W) }",
            B=normal(2, 4, 3),
            K=normal(2, 4),
            W=normal(4, 2),
        )
    )
    reasons = {node.outputs[0].name: why_no_moments(node) for node in model.graph.nodes}
    assert "no weight" in reasons["r"]
    assert "not a constant" in reasons["y"]
    assert "3 axes" in reasons["z"]
    assert "input is a constant" in reasons["k"]
    assert all(moments_key(node) is None for node in model.graph.nodes)


def test_memory_decides_the_blocks_and_the_report_says_so() -> None:
    model = load(
        bind(
            "g (float[N,1200] x, float[1200,4] W) => (float[N,4] y) {"
            " h = Relu (x) y = MatMul (h, W) }",
            W=normal(1200, 4),
        )
    )
    data = open_data({"x": normal(20, 1200)}, [InputSpec("x", np.dtype(np.float32), ("N", 1200))])
    key = moments_keys(model.graph).popitem()[1]
    whole = collect(model, [key], data)
    bound = BASE + 16 * MIB
    cut = collect(model, [key], data, max_memory=bound)
    assert whole.stats[key].block is None and not whole.notes
    assert cut.stats[key].block == 600
    assert any("in blocks of 600 of its 1200 columns" in note for note in cut.notes)
    assert cut.estimate <= bound < whole.estimate
    np.testing.assert_array_equal(
        cut.stats[key].second[0, :600, :600], whole.stats[key].second[0, :600, :600]
    )


def test_a_weight_without_inputs_is_a_matrix_without_columns() -> None:
    text = "g (float[N,0] x, float[0,4] W) => (float[N,4] y) { y = MatMul (x, W) }"
    (node,) = load(bind(text, W=np.zeros((0, 4), np.float32))).graph.nodes
    assert matrix(node, np.zeros((0, 4))).shape == (1, 4, 0)


def test_moments_of_very_wide_layers_are_kept_in_blocks() -> None:
    d = 4700
    text = f"g (float[N,{d}] x) => (float[N,1] y) {{ h = Relu (x) y = MatMul (h, W) }}"
    model = load(bind(text.replace("x)", f"x, float[{d},1] W)", 1), W=normal(d, 1)))
    data = open_data({"x": normal(3, d)}, [InputSpec("x", np.dtype(np.float32), ("N", d))])
    key = moments_keys(model.graph).popitem()[1]
    found = collect(model, [key], data)
    assert found.stats[key].products.shape == (1, 5, 940, 940)
    assert any("in blocks of 1024 of its 4700 columns" in note for note in found.notes)


def test_statistics_do_not_depend_on_threads() -> None:
    model = load(network())
    keys = [*moments_keys(model.graph).values(), Key("a", "histogram"), Key("t", "mean", 1)]
    one, two = (collect(model, keys, dataset(100), threads=n).stats for n in (1, 2))
    assert all(is_equal(one[key], two[key]) for key in keys)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_parts_cover_the_samples_once_in_whole_batches(samples: int, batch: int) -> None:
    found = parts(samples, batch)
    assert [i for part in found for i in range(samples)[part]] == list(range(samples))
    assert all(part.start % batch == 0 for part in found)
    assert 1 <= len(found) <= MOST_PARTS
    assert all(len(range(samples)[part]) > 0 for part in found)
