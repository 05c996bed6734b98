"""Structures of low rank: planted factors come back, and data beats none."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxc.numerics.choices import choose
from onnxc.numerics.lowrank import (
    factorize,
    macs,
    parameters,
    pick,
    ranks,
    sketch,
    why_not,
)
from onnxc.numerics.lowrank_ranks import Rule
from onnxc.numerics.lowrank_structures import STRUCTURES, Stage, halves
from onnxc.numerics.multilinear import compose, error, refine

Array = NDArray[Any]
Ints = tuple[int, ...]

KERNELS = sorted(name for name, row in STRUCTURES.items() if row.kernel)
every_kernel = pytest.mark.parametrize("method", KERNELS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def metric(d: int, seed: int = 0) -> Array:
    """Second moments of inputs of very different size that hang together; (1, d, d)."""
    rows = rng(seed).standard_normal((4 * d, d)) @ rng(seed + 1).standard_normal((d, d))
    rows *= np.geomspace(0.05, 1, d)
    return np.asarray(rows.T @ rows / len(rows))[None]


def planted(method: str, shape: Ints, rank: Ints, seed: int = 0) -> Array:
    """A weight (1, o, c, *kernel) that these ranks make exactly."""
    row, (_, o, c, *kernel) = STRUCTURES[method], shape
    parts = [math.prod(kernel)] if row.parts == 1 else [kernel[0], math.prod(kernel[1:])]
    sizes = row.shapes((o, c, *parts), rank)
    made = compose(row.spec, [rng(seed + i).standard_normal(s) for i, s in enumerate(sizes)])
    return made.reshape(1, o, c, *kernel)


def test_halves_of_a_size_are_as_near_as_there_are() -> None:
    sizes = (1, 12, 36, 1280, 97)
    assert [halves(n) for n in sizes] == [(1, 1), (4, 3), (6, 6), (40, 32), (97, 1)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_a_planted_train_comes_back(r: int, seed: int) -> None:
    """A sum of r Kronecker products, in any metric."""
    W = planted("tt", (1, 24, 20), (r,), seed)
    parts = W.reshape(6, 4, 4, 5).transpose(0, 2, 1, 3).reshape(24, 20)
    assert np.linalg.matrix_rank(parts) == r
    for H in (None, metric(20, seed)):
        assert factorize("tt", W, H, (r,)).error < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_a_train_is_never_worse_with_data(seed: int) -> None:
    """On rows that it was not fitted to, and beside its closed form alone."""
    W, mixed = rng(seed).standard_normal((1, 24, 30)), rng(seed + 1).standard_normal((30, 30))
    train, held = (rng(seed + i).standard_normal((600, 30)) @ mixed for i in (2, 3))
    H, other = ((x.T @ x / len(x))[None] for x in (train, held))
    for r in (1, 3, 6, 12):
        blind, seeing = factorize("tt", W, None, (r,)), factorize("tt", W, H, (r,))
        assert lost(W, seeing.made, other) < 0.95 * lost(W, blind.made, other)
        row = STRUCTURES["tt"]
        start = compose(row.spec, row.start(W[0].reshape(6, 4, 5, 6), H[0], (r,)))
        assert seeing.error <= lost(W, start.reshape(W.shape), H) * (1 + 1e-9)


def test_the_last_core_is_the_least_squares_solution() -> None:
    """Against the normal equations of all outputs at once, by their features."""
    row, H = STRUCTURES["tt"], metric(20)[0]
    W = rng().standard_normal((6, 4, 4, 5))
    factors = row.start(W, np.eye(20), (3,))
    solved = refine(row.spec, factors, W, H, 1)
    basis = np.eye(12).reshape(12, 3, 4)
    M = compose(row.spec, [solved[0], basis]).reshape(12, 4, 20)
    left = np.linalg.cholesky(H)
    A, b = (M @ left).reshape(12, -1), (W.reshape(6, 4, 20) @ left).reshape(6, -1)
    expected = np.linalg.lstsq(A.T, b.T, rcond=None)[0].T.reshape(6, 3, 4)
    np.testing.assert_allclose(solved[1], expected, atol=1e-8)


def lost(W: Array, made: Array, H: Array) -> float:
    """E‖(W − Ŵ) x‖² / E‖W x‖², by another route."""
    D, V = ((a.reshape(-1, H.shape[1])) for a in (W - made, W))
    return float(np.trace(D @ H[0] @ D.T) / np.trace(V @ H[0] @ V.T))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(6, 14), st.integers(6, 14), st.integers(0, 99))
def test_a_matrix_of_rank_r_comes_back(r: int, o: int, d: int, seed: int) -> None:
    W = planted("svd", (1, o, d), (r,), seed)
    for H in (None, metric(d, seed)):
        found = factorize("svd", W, H, (r,))
        A, B = found.stages
        np.testing.assert_allclose(B.weight @ A.weight, W[0], atol=1e-6 * np.abs(W).max(), rtol=0)
        assert found.error < 1e-14  # the square of what rounding to float32 does


@pytest.mark.parametrize(
    ("method", "rank", "tolerance"),
    [
        ("channel", (5,), 1e-14),
        ("spatial", (5,), 1e-14),
        ("tucker", (4, 6), 1e-14),
        ("cp", (4,), 1e-8),
        ("depthwise", (2,), 1e-14),
        ("grouped", (2, 5), 1e-14),
    ],
)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (3, 3, 3)])
def test_planted_factors_come_back(method: str, rank: Ints, tolerance: float, kernel: Ints) -> None:
    W = planted(method, (1, 16, 8, *kernel), rank)
    assert factorize(method, W, None, rank).error < tolerance


@pytest.mark.parametrize("rank", [(4, 6), (3, 8)])
def test_planted_tucker_factors_come_back_in_a_metric(rank: Ints) -> None:
    W = planted("tucker", (1, 16, 8, 3, 3), rank)
    assert factorize("tucker", W, metric(72), rank).error < 1e-12


@every_kernel
def test_data_is_never_worse_than_none(method: str) -> None:
    W, H = rng().standard_normal((1, 16, 8, 3, 3)), metric(72)
    rank = pick(method, W.shape, 0.6)
    assert rank
    blind, seeing = factorize(method, W, None, rank), factorize(method, W, H, rank)
    assert lost(W, seeing.made, H) < 0.8 * lost(W, blind.made, H)
    assert seeing.error == pytest.approx(lost(W, seeing.made, H), rel=1e-6)


@every_kernel
def test_more_rank_is_never_worse(method: str) -> None:
    W, H = rng().standard_normal((1, 12, 8, 3, 3)), metric(72)
    tried = [pick(method, W.shape, share) for share in (0.3, 0.5, 0.8)]
    errors = [factorize(method, W, H, r).error for r in tried if r]
    assert errors == sorted(errors, reverse=True)


def applied(stages: tuple[Stage, ...], x: Array) -> Array:
    """What the layers make of one patch x (groups · c, *kernel): each one takes its own axes."""
    for stage in stages:
        x = x.reshape(-1, *stage.sample[1:]) if stage.sample else x
        g, (m, _, *kernel) = stage.groups, stage.weight.shape
        split = x.reshape(g, -1, *x.shape[1:])
        weight = stage.weight.reshape(g, m // g, *stage.weight.shape[1:])
        size = x.shape[1:]
        left = [n - k + 1 for n, k in zip(size, kernel, strict=True)]
        out = np.zeros((g, m // g, *left))
        for place in itertools.product(*map(range, left)):
            part = tuple(slice(p, p + k) for p, k in zip(place, kernel, strict=True))
            patch = split[(slice(None), slice(None), *part)]
            out[(slice(None), slice(None), *place)] = np.einsum(
                "gmcx,gcx->gm",
                weight.reshape(g, m // g, weight.shape[2], -1),
                patch.reshape(g, patch.shape[1], -1),
            )
        x = out.reshape(m, *left)
    return x.reshape(-1)


@every_kernel
@pytest.mark.parametrize("groups", [1, 2])
def test_layers_in_a_row_do_what_they_claim(method: str, groups: int) -> None:
    W = rng().standard_normal((groups, 8, 8, 3, 3))
    rank = pick(method, W.shape, 0.7)
    assert rank
    found = factorize(method, W, None, rank)
    x = rng(1).standard_normal((groups * 8, 3, 3))
    expected = np.einsum("gocij,gcij->go", found.made, x.reshape(groups, 8, 3, 3)).reshape(-1)
    np.testing.assert_allclose(applied(found.stages, x), expected, atol=1e-9)


@every_kernel
def test_costs_are_those_of_the_layers(method: str) -> None:
    shape = (2, 16, 8, 3, 3)
    for rank in ranks(method, shape)[::5]:
        made = sketch(method, shape, rank)
        size = sum(stage.weight.size for stage in made)
        assert parameters(method, shape, rank) == pytest.approx(size / (2 * 16 * 8 * 9))
        assert macs(method, shape, rank) == pytest.approx(parameters(method, shape, rank))
        assert macs(method, shape, rank, (2, 2)) >= macs(method, shape, rank)


def test_a_train_does_what_it_claims_and_costs_what_is_told() -> None:
    W = rng().standard_normal((1, 24, 30))
    for (r,) in ranks("tt", W.shape)[::4]:
        found = factorize("tt", W, None, (r,))
        right, left = found.stages
        x = rng(1).standard_normal(30)
        middle = x.reshape(-1, *right.sample) @ right.weight.T
        y = left.weight[:, :, 0] @ middle.reshape(left.sample)
        np.testing.assert_allclose(y.reshape(-1), found.made[0] @ x, atol=1e-9)
        size = right.weight.size + left.weight.size
        assert parameters("tt", W.shape, (r,)) == pytest.approx(size / W.size)
        assert macs("tt", W.shape, (r,)) == pytest.approx(r * (1 / 6 + 1 / 6))
        assert [s.weight.shape for s in sketch("tt", W.shape, (r,))] == [
            s.weight.shape for s in found.stages
        ]
    assert factorize("tt", W, None, ranks("tt", W.shape)[-1]).error < 1e-12


def test_none_takes_more_macs_than_the_layer() -> None:
    """A train of few weights may multiply more than the matrix does."""
    shape = (1, 64, 64)
    picked = pick("tt", shape, 0.5, unit="params")
    assert picked == (4,) and macs("tt", shape, picked) == 1.0
    assert parameters("tt", shape, (16,)) <= 0.5 < macs("tt", shape, (16,))


def test_large_ranks_keep_to_multiples() -> None:
    assert {r % 16 for (r,) in ranks("channel", (1, 256, 256, 3, 3), 16)} == {0}
    assert (10,) in ranks("channel", (1, 16, 16, 3, 3), 16)
    assert (11,) not in ranks("channel", (1, 16, 16, 3, 3), 16)


@pytest.mark.parametrize(
    ("method", "shape", "reason"),
    [
        ("svd", (1, 8, 8, 3, 3), "has a kernel"),
        ("channel", (1, 8, 8), "has none"),
        ("spatial", (1, 8, 8, 3), "two axes"),
        ("spatial", (8, 1, 1, 3, 3), "one output of each group"),
        ("cp", (1, 8, 8, 1, 3), "two axes"),
        ("tt", (1, 8, 8, 3, 3), "has a kernel"),
        ("tt", (1, 8, 13), "13 is a prime"),
        ("tt", (1, 7, 8), "7 is a prime"),
    ],
)
def test_what_a_structure_is_not_for(method: str, shape: Ints, reason: str) -> None:
    assert reason in why_not(method, shape)


def test_sweeps_never_raise_the_error() -> None:
    row, H = STRUCTURES["cp"], metric(36)[0]
    W = rng().standard_normal((6, 4, 3, 3))
    found = row.start(W, np.eye(36), (8,))
    errors = [error(W - compose(row.spec, found), H)]
    for _ in range(6):
        found = refine(row.spec, found, W, H, 1)
        errors.append(error(W - compose(row.spec, found), H))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


def test_components_of_cp_do_not_grow_against_each_other() -> None:
    """x x y + x y x + y x x is the limit of tensors of rank 2, whose components diverge."""
    e = np.eye(2)
    parts = [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    W = sum(np.einsum("o,c,i->oci", e[a], e[b], e[c]) for a, b, c in parts).reshape(1, 2, 2, 2, 1)
    row = STRUCTURES["cp"]
    W = np.concatenate([W, np.zeros_like(W)], axis=4)
    start = row.start(W[0], np.eye(8), (2,))
    C, tall, wide, B = refine(row.spec, start, W[0], np.eye(8), 300, ridge=1e-7)
    sizes = np.prod([np.linalg.norm(C, axis=1), np.linalg.norm(tall, axis=1)], axis=0)
    sizes *= np.linalg.norm(wide, axis=1) * np.linalg.norm(B, axis=0)
    assert sizes.max() < 1e3 * np.linalg.norm(W)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 999), st.floats(0.1, 1.0))
def test_choices_are_the_best_there_are(layers: int, seed: int, share: float) -> None:
    source = rng(seed)
    costs = [np.append(1.0, source.random(3)) for _ in range(layers)]
    losses = [np.append(0.0, source.random(3)) for _ in range(layers)]
    found = choose(costs, losses, share * layers)

    def total(values: list[Array], picked: Any) -> float:
        return sum(float(v[i]) for v, i in zip(values, picked, strict=True))

    every = itertools.product(range(4), repeat=layers)
    allowed = [p for p in every if total(costs, p) <= share * layers * (1 + 1e-9)]
    if not allowed:
        assert total(costs, found) == pytest.approx(sum(c.min() for c in costs), abs=1e-12)
        return
    assert total(costs, found) <= share * layers * (1 + 1e-6)
    best = min(total(losses, p) for p in allowed)
    assert total(losses, found) == pytest.approx(best, abs=1e-12)


def test_vbmf_finds_the_kronecker_products_under_noise() -> None:
    W = planted("tt", (1, 64, 64), (2,)) + 0.3 * rng(9).standard_normal((1, 64, 64))
    assert Rule("vbmf").ranks("tt", W, None) == (2,)
