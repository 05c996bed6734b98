"""What every pass must keep, on every fixture: a new pass gets this suite by being registered."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from texts import bind, context, normal, positive

import passes
from calib.collect import collect
from calib.data import InputSpec, open_data
from calib.twin import drift
from onnxc.check import problems
from onnxc.core import PASSES, Change, Context, Key, Skip
from onnxc.graph import Model, load, to_bytes, walk
from onnxc.pipeline import Step, apply_pass

for module in pkgutil.iter_modules(passes.__path__):
    importlib.import_module(f"passes.{module.name}")


@dataclass(frozen=True)
class Fixture:
    proto: onnx.ModelProto
    feed: dict[str, NDArray[Any]]


def norm(channels: int) -> dict[str, NDArray[np.float32]]:
    rows = {key: normal(channels, seed=i) for i, key in enumerate("sbm")}
    return {**rows, "v": positive(channels)}


PORTS = "float[c] s, float[c] b, float[c] m, float[c] v"
IMAGE = {"x": normal(2, 3, 8, 8)}

FIXTURES = {
    "convolutions": Fixture(
        bind(
            f"""g (float[N,3,8,8] x, float[8,3,3,3] W, float[8,1,3,3] D, float[8] B, {PORTS},
                  float[8,5] F) => (float[N,5] y) {{
                c = Conv <pads: ints = [1,1,1,1]> (x, W, B)
                n = BatchNormalization (c, s, b, m, v)
                r = Relu (n)
                d = Conv <group: int = 8> (r, D)
                e = Conv <group: int = 8> (d, D)
                p = GlobalAveragePool (e)
                f = Flatten (p)
                i = Identity (f)
                y = MatMul (i, F) }}""",
            W=normal(8, 3, 3, 3),
            D=normal(8, 1, 3, 3),
            B=normal(8),
            F=normal(8, 5),
            **norm(8),
        ),
        IMAGE,
    ),
    "shared weights": Fixture(
        bind(
            f"""g (float[N,4] x, float[4,4] W, float[4] B, {PORTS})
                => (float[N,4] y, float[N,4] z) {{
                c = Gemm (x, W, B)
                n = BatchNormalization (c, s, b, m, v)
                h = Relu (n)
                y = Gemm (h, W, B)
                z = MatMul (x, W) }}""",
            W=normal(4, 4),
            B=normal(4),
            **norm(4),
        ),
        {"x": normal(3, 4)},
    ),
    "bodies": Fixture(
        bind(
            f"""g (float[N,4] x, bool c, float[4,4] W, {PORTS}) => (float[N,4] y) {{
                a = MatMul (x, W)
                i = Identity (a)
                t = If (c) <then_branch = p () => (float[N,4] u) {{
                                k = MatMul (i, W)
                                u = Identity (k) }},
                            else_branch = q () => (float[N,4] w) {{ w = Neg (a) }}>
                y = BatchNormalization (t, s, b, m, v) }}""",
            W=normal(4, 4),
            **norm(4),
        ),
        {"x": normal(3, 4), "c": np.array(True)},
    ),
    "constants": Fixture(
        bind(
            """g (float[N,6] x, float[3,4] W, int64[2] o, float[1] e) => (float[N,3] y) {
                t = Transpose <perm: ints = [1, 0]> (W)
                u = Cast <to: int = 1> (t)
                k = Add (u, e)
                r = Reshape (x, o)
                f = MatMul (r, k)
                q = Shape (f)
                d = ConstantOfShape <value = float[1] {0.5}> (q)
                y = Add (f, d) }""",
            W=normal(3, 4),
            o=np.array([-1, 4]),
            e=normal(1),
        ),
        {"x": normal(2, 6)},
    ),
    "attention": Fixture(
        bind(
            """g (int64[N,T] t, float[11,8] E, float[8,8] Q, float[8,8] K, float[8,8] V,
                  float[8] s, float[8] b) => (float[N,T,8] y) {
                x = Gather (E, t)
                q = MatMul (x, Q)
                k = MatMul (x, K)
                v = MatMul (x, V)
                l = Transpose <perm: ints = [0, 2, 1]> (k)
                a = MatMul (q, l)
                p = Softmax (a)
                h = MatMul (p, v)
                r = Add (h, x)
                y = LayerNormalization (r, s, b) }""",
            opset=17,
            E=normal(11, 8),
            Q=normal(8, 8),
            K=normal(8, 8, seed=1),
            V=normal(8, 8, seed=2),
            s=positive(8),
            b=normal(8),
        ),
        {"t": np.arange(10).reshape(2, 5)},
    ),
    "unread channels": Fixture(
        bind(
            """g (float[1,3,8,8] x, float[6,3,3,3] W, float[6,1,3,3] D, float[4,6,1,1] V)
               => (float[1,4,4,4] y) {
                c = Conv (x, W)
                r = Relu (c)
                d = Conv <group: int = 6> (r, D)
                y = Conv (d, V) }""",
            W=normal(6, 3, 3, 3),
            D=normal(6, 1, 3, 3),
            V=normal(4, 6, 1, 1) * np.array([1, 0, 1, 1, 0, 1], np.float32).reshape(1, 6, 1, 1),
        ),
        {"x": normal(1, 3, 8, 8)},
    ),
    "transposed": Fixture(
        bind(
            f"""g (float[1,4,5,5] x, float[4,3,3,3] W, {PORTS}) => (float[1,6,7,7] y) {{
                c = ConvTranspose <group: int = 2> (x, W)
                n = BatchNormalization (c, s, b, m, v)
                d, k = Dropout (n)
                y = Sigmoid (d) }}""",
            W=normal(4, 3, 3, 3),
            **norm(6),
        ),
        {"x": normal(1, 4, 5, 5)},
    ),
}
for fixture in FIXTURES.values():
    for index, node in enumerate(fixture.proto.graph.node):
        node.name = f"{node.op_type}_{index}"

every_pass = pytest.mark.parametrize("name", sorted(PASSES))
every_fixture = pytest.mark.parametrize("on", FIXTURES)


def prepared(name: str, model: Model, feed: dict[str, Any], **only: tuple[str, ...]) -> Context:
    """A context with the statistics that the pass wants of this model."""
    bare = context(model, **only)
    keys = list(PASSES[name]().wants(model.graph, bare))
    if not keys:
        return bare
    ports = tuple(InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape)) for t in model.graph.inputs)
    data = open_data(feed, ports)
    observed = [key for key in keys if key.what != "drift"]
    stats: dict[Key, Any] = dict(collect(model, observed, data, threads=1).stats)
    for key in set(keys) - set(observed):  # the reference is the model itself: nothing drifted
        found = drift(model, model, [key.tensor], data, key.axis or 0)
        stats |= {key: found[key.tensor]} if key.tensor in found else {}
    return replace(bare, stats=stats)


@cache
def applied(name: str, on: str) -> tuple[Model, Step]:
    """The model that a pass makes of a fixture, and what it says of it; only to be read."""
    proto, feed = FIXTURES[on].proto, FIXTURES[on].feed
    model = load(proto)
    return model, apply_pass(model, PASSES[name](), prepared(name, model, feed), feed)


@every_pass
def test_defaults_construct(name: str) -> None:
    cls = PASSES[name]
    assert is_dataclass(cls)
    assert cls() == cls()
    assert cls.name == name == name.lower()
    assert isinstance(cls.lossless, bool)
    assert all(field.name.isidentifier() for field in fields(cls))
    assert (cls.__doc__ or "").strip()
    with pytest.raises(AttributeError):
        cls().name = "other"  # type: ignore[misc]


@every_pass
@every_fixture
def test_valid_out_and_interface_kept(name: str, on: str) -> None:
    proto, feed = FIXTURES[on].proto, FIXTURES[on].feed
    model, done = applied(name, on)
    assert not done.problems
    assert problems(load(proto), model, feed, PASSES[name].lossless) == []
    if not done.changes:
        assert to_bytes(model) == to_bytes(load(proto))


@every_pass
@every_fixture
def test_deterministic_and_settled(name: str, on: str) -> None:
    feed, written = FIXTURES[on].feed, to_bytes(applied(name, on)[0])
    model = load(FIXTURES[on].proto)
    PASSES[name]().apply(model.graph, prepared(name, model, feed))
    assert to_bytes(model) == written
    again = PASSES[name]().apply(model.graph, prepared(name, model, feed))
    assert all(isinstance(result, Skip) for result in again)
    assert to_bytes(model) == written


@every_pass
@every_fixture
def test_excluded_nodes_are_untouched(name: str, on: str) -> None:
    feed, original = FIXTURES[on].feed, load(FIXTURES[on].proto)
    everything = tuple(node.name for inner in walk(original.graph) for node in inner.nodes)
    model = load(FIXTURES[on].proto)
    results = PASSES[name]().apply(model.graph, prepared(name, model, feed, exclude=everything))
    assert not any(isinstance(result, Change) for result in results)
    assert to_bytes(model) == to_bytes(original)


@every_pass
@every_fixture
def test_reports_name_real_nodes(name: str, on: str) -> None:
    original = load(FIXTURES[on].proto)
    known = {node.name for inner in walk(original.graph) for node in inner.nodes}
    _, done = applied(name, on)
    results = (*done.changes, *done.skips)
    assert {result.node for result in results} <= known
    assert all(r.reason if isinstance(r, Skip) else r.what for r in results)
