"""Groups of channels: what goes together, what must stay and why, and that the maps are exact.

The proof of a map: the weights that read some channels are set to zero, the channels are then cut
out, and the outputs stay the same. An index that is off by one reads another channel, and shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from test_pipeline import zoo_feed
from texts import bind, context, normal, outputs, positive, reasons

from onnxc.channels.flows import FLOWS
from onnxc.channels.groups import Channels, find_channels
from onnxc.channels.recut import RECUTS
from onnxc.errors import ModelError
from onnxc.graph import Model, constant, copy, load, to_bytes, values
from onnxc.pipeline import prepare
from onnxc.runtime import Runtime, run, session
from onnxc.shapes import infer
from passes.shrink import Shrink

SHARE = 0.2
EXACT = 1e-4  # of the largest output
NOISE = 4  # times what another order of the same sums changes, where that is more


@dataclass(frozen=True)
class Case:
    """A graph, and the sizes of its groups of channels, of those that can be cut."""

    groups: list[int]
    proto: onnx.ModelProto
    feed: dict[str, NDArray[Any]] = field(default_factory=lambda: {"x": normal(2, 3, 6, 6)})


def case(groups: list[int], text: str, feed: Any = None, opset: int = 18, **weights: Any) -> Case:
    proto = bind(text, opset, **weights)
    return Case(groups, proto) if feed is None else Case(groups, proto, feed)


CASES = {
    "chain": case(
        [10],
        """g (float[N,3,6,6] x, float[10,3,3,3] A, float[10] a, float[4,10,3,3] B)
           => (float[N,4,2,2] y) { c = Conv (x, A, a) r = Relu (c) y = Conv (r, B) }""",
        A=normal(10, 3, 3, 3),
        a=normal(10),
        B=normal(4, 10, 3, 3),
    ),
    "shortcut of slices and zeros": case(
        [5, 10, 6],
        """g (float[N,3,6,6] x, float[6,3,1,1] A, float[10,6,3,3] B, float[11,10,3,3] C,
              float[4,11,1,1] D, int64[1] zero, int64[1] two, int64[1] big, int64[2] hw,
              int64[2] o, int64[2] s, int64[2] e, int64[8] p) => (float[N,4,3,3] y) {
           a = Conv (x, A)
           i = Relu (a)
           b = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (i, B)
           r = Relu (b)
           c = Conv <pads: ints = [1,1,1,1]> (r, C)
           k = Slice (i, o, e, hw, s)
           w = Pad (k, p)
           z = Add (c, w)
           y = Conv (z, D) }""",
        A=normal(6, 3, 1, 1),
        B=normal(10, 6, 3, 3),
        C=normal(11, 10, 3, 3),
        D=normal(4, 11, 1, 1),
        zero=np.array([0]),
        two=np.array([2]),
        big=np.array([9]),
        hw=np.array([2, 3]),
        o=np.array([0, 0]),
        s=np.array([2, 2]),
        e=np.array([9, 9]),
        p=np.array([0, 2, 0, 0, 0, 3, 0, 0]),
    ),
    "concatenation and split": case(
        [5, 1, 6],
        """g (float[N,3,6,6] x, float[5,3,1,1] A, float[7,3,1,1] B, float[2,6,1,1] C,
              float[2,6,1,1] D, int64[3] w) => (float[N,2,6,6] y, float[N,2,6,6] z) {
           a = Conv (x, A)
           b = Conv (x, B)
           j = Concat <axis: int = 1> (a, b, x)
           m, n, o = Split <axis: int = 1> (j, w)
           y = Conv (m, C)
           t = Sigmoid (n)
           z = Conv (t, D) }""",
        A=normal(5, 3, 1, 1),
        B=normal(7, 3, 1, 1),
        C=normal(2, 6, 1, 1),
        D=normal(2, 6, 1, 1, seed=1),
        w=np.array([6, 6, 3]),
    ),
    "every second channel, backwards": case(
        [5, 4],
        """g (float[N,3,6,6] x, float[9,3,1,1] A, float[4,5,1,1] B, float[4,9,1,1] C, int64[1] s,
              int64[1] e, int64[1] a, int64[1] t) => (float[N,4,6,6] y, float[N,4,6,6] z) {
           c = Conv (x, A)
           k = Slice (c, s, e, a, t)
           y = Conv (k, B)
           z = Conv (c, C) }""",
        A=normal(9, 3, 1, 1),
        B=normal(4, 5, 1, 1),
        C=normal(4, 9, 1, 1),
        s=np.array([-1]),
        e=np.array([np.iinfo(np.int64).min]),
        a=np.array([1]),
        t=np.array([-2]),
    ),
    "picked by number": case(
        [3, 3],
        """g (float[N,3,6,6] x, float[6,3,1,1] A, float[4,4,1,1] B, int64[4] i)
           => (float[N,4,6,6] y) {
           c = Conv (x, A)
           k = Gather <axis: int = 1> (c, i)
           y = Conv (k, B) }""",
        A=normal(6, 3, 1, 1),
        B=normal(4, 4, 1, 1),
        i=np.array([4, 0, 5, 4]),
    ),
    "depthwise": case(
        [8],
        """g (float[N,3,6,6] x, float[8,3,1,1] A, float[16,1,3,3] D, float[16] d, float[4,16,1,1] B)
           => (float[N,4,4,4] y) {
           c = Conv (x, A)
           e = Conv <group: int = 8> (c, D, d)
           r = Clip (e)
           y = Conv (r, B) }""",
        A=normal(8, 3, 1, 1),
        D=normal(16, 1, 3, 3),
        d=normal(16),
        B=normal(4, 16, 1, 1),
    ),
    "groups that go as a whole": case(
        [6],
        """g (float[N,3,6,6] x, float[12,3,1,1] A, float[18,2,3,3] G, float[4,18,1,1] B)
           => (float[N,4,4,4] y) {
           c = Conv (x, A)
           e = Conv <group: int = 6> (c, G)
           y = Conv (e, B) }""",
        A=normal(12, 3, 1, 1),
        G=normal(18, 2, 3, 3),
        B=normal(4, 18, 1, 1),
    ),
    "channel shuffle": case(
        [6, 3, 6],
        """g (float[N,3,6,6] x, float[12,3,1,1] A, float[12,6,3,3] G, float[12,6,3,3] H,
              float[4,12,1,1] B, int64[5] s, int64[4] f) => (float[N,4,2,2] y) {
           c = Conv (x, A)
           e = Conv <group: int = 2> (c, G)
           u = Reshape (e, s)
           t = Transpose <perm: ints = [0,2,1,3,4]> (u)
           v = Reshape (t, f)
           h = Conv <group: int = 2> (v, H)
           y = Conv (h, B) }""",
        A=normal(12, 3, 1, 1),
        G=normal(12, 6, 3, 3),
        H=normal(12, 6, 3, 3, seed=1),
        B=normal(4, 12, 1, 1),
        s=np.array([0, 2, 6, 4, 4]),
        f=np.array([0, 12, 4, 4]),
    ),
    "transposed convolutions": case(
        [6, 5, 5, 5],
        """g (float[N,3,6,6] x, float[6,3,1,1] A, float[6,5,2,2] T, float[5] t, float[5,1,2,2] D,
              float[5,5,1,1] P, float[5,5,1,1] Q, float[5,4,1,1] B)
           => (float[N,4,14,14] y) {
           c = Conv (x, A)
           e = ConvTranspose <strides: ints = [2,2]> (c, T, t)
           f = ConvTranspose <group: int = 5> (e, D)
           p = ConvTranspose <pads: ints = [0,0,0,0], output_padding: ints = [0,0]> (f, P)
           k = Conv <pads: ints = [0,0,1,1]> (p, Q)
           y = ConvTranspose (k, B) }""",
        A=normal(6, 3, 1, 1),
        T=normal(6, 5, 2, 2),
        t=normal(5),
        D=normal(5, 1, 2, 2),
        P=normal(5, 5, 1, 1),
        Q=normal(5, 5, 1, 1, seed=1),
        B=normal(5, 4, 1, 1),
    ),
    "pixel shuffle": case(
        [3, 5],
        """g (float[N,3,6,6] x, float[12,3,1,1] A, float[5,3,1,1] B, float[4,20,1,1] C)
           => (float[N,4,6,6] y) {
           c = Conv (x, A)
           d = DepthToSpace <blocksize: int = 2, mode: string = "CRD"> (c)
           e = Conv (d, B)
           s = SpaceToDepth <blocksize: int = 2> (e)
           y = Conv (s, C) }""",
        A=normal(12, 3, 1, 1),
        B=normal(5, 3, 1, 1),
        C=normal(4, 20, 1, 1),
    ),
    "squeeze and excite": case(
        [8, 4],
        """g (float[N,3,6,6] x, float[8,3,1,1] A, float[4,8] s, float[8,4] E,
              int64[4] f, float[4,8,1,1] B) => (float[N,4,6,6] y) {
           a = Conv (x, A)
           p = GlobalAveragePool (a)
           q = Flatten (p)
           r = Gemm <transB: int = 1> (q, s)
           t = Relu (r)
           u = Gemm <transB: int = 1> (t, E)
           v = Sigmoid (u)
           w = Reshape (v, f)
           m = Mul (a, w)
           y = Conv (m, B) }""",
        A=normal(8, 3, 1, 1),
        s=normal(4, 8),
        E=normal(8, 4),
        f=np.array([0, 8, 1, 1]),
        B=normal(4, 8, 1, 1),
    ),
    "flattened and normalized": case(
        [5, 7],
        """g (float[N,3,6,6] x, float[5,3,1,1] A, float[5] s, float[5] b, float[5] m, float[5] v,
              float[5] g1, float[5] b1, float[180,7] F, float[7] f, float[7] k, float[7,4] B,
              float[1,5,1,1] h) => (float[N,4] y) {
           a = Conv (x, A)
           n = BatchNormalization (a, s, b, m, v)
           i = InstanceNormalization (n, g1, b1)
           p = PRelu (i, h)
           l = Flatten (p)
           q = Gemm (l, F, f)
           o = Mul (q, k)
           y = MatMul (o, B) }""",
        A=normal(5, 3, 1, 1),
        s=positive(5),
        b=normal(5),
        m=normal(5, seed=1),
        v=positive(5, seed=2),
        g1=positive(5),
        b1=normal(5),
        h=normal(1, 5, 1, 1),
        F=normal(180, 7),
        f=normal(7),
        k=normal(7),
        B=normal(7, 4),
    ),
    "group normalization": case(
        [4],
        """g (float[N,3,6,6] x, float[12,3,1,1] A, float[12] s, float[12] b, float[4,12,1,1] B)
           => (float[N,4,6,6] y) {
           a = Conv (x, A)
           n = GroupNormalization <num_groups: int = 4> (a, s, b)
           y = Conv (n, B) }""",
        opset=21,
        A=normal(12, 3, 1, 1),
        s=positive(12),
        b=normal(12),
        B=normal(4, 12, 1, 1),
    ),
    "group normalization in steps": case(
        [4],
        """g (float[N,3,6,6] x, float[12,3,1,1] A, int64[3] s, float[4] o, float[4] z, int64[4] f,
              float[12,1,1] w, float[4,12,1,1] B) => (float[N,4,6,6] y) {
           a = Conv (x, A)
           r = Reshape (a, s)
           i = InstanceNormalization (r, o, z)
           t = Reshape (i, f)
           m = Mul (t, w)
           y = Conv (m, B) }""",
        A=normal(12, 3, 1, 1),
        s=np.array([0, 4, -1]),
        f=np.array([0, 12, 6, 6]),
        o=positive(4),
        z=normal(4),
        w=normal(12, 1, 1),
        B=normal(4, 12, 1, 1),
    ),
    "attention with shared keys": case(
        [2, 6],
        """g (float[N,5,8] x, float[8,16] Q, float[8,8] K, float[8,8] V, float[16,8] O, float[8] n,
              int64[4] q4, int64[4] k4, int64[5] e5, int64[4] f4, int64[3] f3, int64[1] two,
              float[8,6] A, float[6,8] B) => (float[N,5,8] y) {
           l = LayerNormalization (x, n)
           q = MatMul (l, Q)
           qr = Reshape (q, q4)
           qt = Transpose <perm: ints = [0,2,1,3]> (qr)
           k = MatMul (l, K)
           kr = Reshape (k, k4)
           kt = Transpose <perm: ints = [0,2,1,3]> (kr)
           ku = Unsqueeze (kt, two)
           ke = Expand (ku, e5)
           kf = Reshape (ke, f4)
           kk = Transpose <perm: ints = [0,1,3,2]> (kf)
           v = MatMul (l, V)
           vr = Reshape (v, k4)
           vt = Transpose <perm: ints = [0,2,1,3]> (vr)
           vu = Unsqueeze (vt, two)
           ve = Expand (vu, e5)
           vf = Reshape (ve, f4)
           s = MatMul (qt, kk)
           p = Softmax (s)
           h = MatMul (p, vf)
           ht = Transpose <perm: ints = [0,2,1,3]> (h)
           hr = Reshape (ht, f3)
           o = MatMul (hr, O)
           r = Add (o, x)
           m = MatMul (r, A)
           g = Erf (m)
           w = MatMul (g, B)
           y = Add (w, r) }""",
        {"x": normal(2, 5, 8)},
        Q=normal(8, 16),
        K=normal(8, 8),
        V=normal(8, 8, seed=1),
        O=normal(16, 8),
        n=positive(8),
        q4=np.array([0, 0, 4, 4]),
        k4=np.array([0, 0, 2, 4]),
        e5=np.array([1, 1, 2, 1, 1]),
        f4=np.array([0, 4, 5, 4]),
        f3=np.array([0, 5, 16]),
        two=np.array([2]),
        A=normal(8, 6),
        B=normal(6, 8),
    ),
    "attention as exporters write it": case(
        [3, 6],
        """g (float[N,5,8] x, float[8,36] P, float[36] p, int64[3] w, int64[1] h, int64[1] d,
              int64[1] zero, int64[1] two, int64[1] last, int64[1] big,
              int64[1] rest, float[12,8] O, float[8,6] A, float[6,8] B) => (float[N,5,8] y) {
           m = MatMul (x, P)
           a = Add (p, m)
           q, k, v = Split <axis: int = -1> (a, w)
           n = Shape (x)
           nt = Slice (n, zero, two)
           s4 = Concat <axis: int = 0> (nt, h, d)
           qr = Reshape (q, s4)
           qt = Transpose <perm: ints = [0,2,1,3]> (qr)
           kr = Reshape (k, s4)
           kt = Transpose <perm: ints = [0,2,3,1]> (kr)
           vr = Reshape (v, s4)
           vt = Transpose <perm: ints = [0,2,1,3]> (vr)
           qs = Shape (qt)
           qd = Slice (qs, last, big)
           qf = Cast <to: int = 1> (qd)
           qq = Sqrt (qf)
           qn = Div (qt, qq)
           s = MatMul (qn, kt)
           e = Softmax (s)
           c = MatMul (e, vt)
           ct = Transpose <perm: ints = [0,2,1,3]> (c)
           cs = Shape (ct)
           cn = Slice (cs, zero, two)
           s3 = Concat <axis: int = 0> (cn, rest)
           cr = Reshape (ct, s3)
           o = MatMul (cr, O)
           r = Add (o, x)
           f = MatMul (r, A)
           g = Relu (f)
           y = MatMul (g, B) }""",
        {"x": normal(2, 5, 8)},
        P=normal(8, 36),
        p=normal(36),
        w=np.array([12, 12, 12]),
        h=np.array([3]),
        d=np.array([4]),
        zero=np.array([0]),
        two=np.array([2]),
        last=np.array([-1]),
        big=np.array([np.iinfo(np.int64).max]),
        rest=np.array([-1]),
        O=normal(12, 8),
        A=normal(8, 6),
        B=normal(6, 8),
    ),
    "recurrent": case(
        [6, 5, 4],
        """g (int64[5,N] x, float[11,6] E, float[2,20,6] W, float[2,20,5] R, float[2,40] b,
              float[1,12,10] U, float[1,12,4] S, float[1,24] d, int64[3] f, float[4,3] B,
              int64[1] zero) => (float[N,3] y) {
           e = Gather (E, x)
           h, hh, hc = LSTM <direction: string = "bidirectional", hidden_size: int = 5> (e, W, R, b)
           t = Transpose <perm: ints = [0,2,1,3]> (h)
           r = Reshape (t, f)
           s, sh = GRU <hidden_size: int = 4, linear_before_reset: int = 1> (r, U, S, d)
           q = Squeeze (sh, zero)
           y = MatMul (q, B) }""",
        {"x": np.arange(10).reshape(5, 2)},
        E=normal(11, 6),
        W=normal(2, 20, 6),
        R=normal(2, 20, 5),
        b=normal(2, 40),
        U=normal(1, 12, 10),
        S=normal(1, 12, 4),
        d=normal(1, 24),
        f=np.array([0, 0, 10]),
        B=normal(4, 3),
        zero=np.array([0]),
    ),
    "sizes of its own": case(
        [4],
        """g (float[N,3,6,6] x, float[4,3,1,1] A, int64[4] z, int64[4] w, int64[4] t,
              float[3,4,1,1] B) => (float[N,3,12,12] y) {
           a = Conv (x, A)
           r = Resize (a, , , z)
           f = ConstantOfShape (w)
           m = Mul (r, f)
           k = Tile (m, t)
           y = Conv (k, B) }""",
        A=normal(4, 3, 1, 1),
        z=np.array([2, 4, 12, 12]),
        w=np.array([1, 4, 1, 1]),
        t=np.array([1, 1, 1, 1]),
        B=normal(3, 4, 1, 1),
    ),
    "one weight for two": case(
        [4],
        """g (float[N,3,6,6] x, float[4,3,1,1] A, float[4,4,1,1] B, float[2,4,1,1] C)
           => (float[N,2,6,6] y) {
           a = Conv (x, A)
           b = Conv (a, B)
           c = Conv (b, B)
           y = Conv (c, C) }""",
        A=normal(4, 3, 1, 1),
        B=normal(4, 4, 1, 1),
        C=normal(2, 4, 1, 1),
    ),
}


def opened(proto: onnx.ModelProto, feed: dict[str, Any]) -> tuple[Model, Channels]:
    model = load(proto)
    infer(model, feed)
    return model, find_channels(model.graph)


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    _, channels = opened(CASES[name].proto, CASES[name].feed)
    found = [len(group.channels) for group in channels.groups() if not group.obstacle]
    assert sorted(found) == sorted(CASES[name].groups)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_maps_are_exact(name: str, seed: int) -> None:
    model, channels = opened(CASES[name].proto, CASES[name].feed)
    assert silence(model, channels, seed)
    check_shrinking(model, CASES[name].feed)


def silence(model: Model, channels: Channels, seed: int, share: float = SHARE) -> set[int]:
    """Set the readers' weights of a random share of the channels of each group to zero."""
    random = np.random.default_rng(seed)
    gone: set[int] = set()
    for group in channels.groups():
        if not group.obstacle:
            count = min(max(1, round(share * len(group.channels))), len(group.channels) - 1)
            gone |= set(random.choice(group.channels, count, replace=False).tolist())
    nodes = {node.name: node for node in model.graph.nodes}
    for slot in channels.slots:
        which = np.isin(slot.labels, list(gone))
        if slot.role == "reads" and which.any():
            node = nodes[slot.node]
            weight = values(node.inputs[slot.position]).copy()
            np.moveaxis(weight, slot.axis, 0)[which] = 0
            name = f"{node.inputs[slot.position].name}_{slot.node}_silent"
            node.inputs[slot.position] = constant(name, weight)
    return gone


def check_shrinking(model: Model, feed: dict[str, Any], loose: bool = False) -> None:
    """Smaller, valid, with the same interface, and the same outputs."""
    before = copy(model)
    data = to_bytes(before)
    infer(model, feed)
    Shrink().apply(model.graph, context(model))
    after = to_bytes(model)
    proto = onnx.load_from_string(after)
    onnx.checker.check_model(proto, full_check=True)
    was = onnx.load_from_string(data).graph
    assert [str(p) for p in proto.graph.input] == [str(p) for p in was.input]
    assert [str(p) for p in proto.graph.output] == [str(p) for p in was.output]
    assert weighs(proto.graph) < weighs(was)
    expected, made = run(session(data), feed), run(session(after), feed)
    other = run(session(data, Runtime(level="none")), feed) if loose else expected
    for name, y in expected.items():
        scale = max(float(np.abs(y).max(initial=0)), 1e-3)
        noise = float(np.abs(y - other[name]).max(initial=0))
        limit = max(EXACT * scale, NOISE * noise)
        np.testing.assert_allclose(made[name], y, rtol=0, atol=limit)


def weighs(graph: onnx.GraphProto) -> int:
    """Elements of the constants that are no sizes."""
    floats = (t for t in graph.initializer if t.data_type != onnx.TensorProto.INT64)
    return sum(int(np.prod(t.dims)) for t in floats)


def obstacles(text: str, excluded: tuple[str, ...] = (), **weights: Any) -> str:
    model = load(bind(text, 18, **weights))
    infer(model)
    return "\n".join(g.obstacle for g in find_channels(model.graph, excluded).groups())


PAIR = {"A": normal(4, 3, 1, 1), "B": normal(2, 4, 1, 1)}
PORTS = "float[N,3,6,6] x, float[4,3,1,1] A, float[2,4,1,1] B"


@pytest.mark.parametrize(
    ("between", "why"),
    [
        ("r = LRN <size: int = 3> (c)", "LRN_1 (LRN) cannot be cut through"),
        ("r = Softmax <axis: int = 1> (c)", "Softmax_1 (Softmax) works along them"),
        ("m = ReduceMean (c, one) r = Add (c, m)", "ReduceMean_1 (ReduceMean) works along them"),
        ("r = Mul (c, u)", "Mul_1 (Mul) needs 'u' too, which cannot be cut"),
        ("s = Shape (c) r = Expand (c, s)", "Shape_1 (Shape) reads how many there are"),
    ],
)
def test_what_must_stay_says_why(between: str, why: str) -> None:
    text = f"""g ({PORTS}, float[N,4,6,6] u, int64[1] one) => (float[N,2,6,6] y)
               {{ c = Conv (x, A) {between} y = Conv (r, B) }}"""
    assert why in obstacles(text, one=np.array([1]), **PAIR)


def test_excluded_nodes_keep_their_channels() -> None:
    text = f"g ({PORTS}) => (float[N,2,6,6] y) {{ c = Conv (x, A) y = Conv (c, B) }}"
    assert "Conv_1 is excluded" in obstacles(text, ("Conv_1",), **PAIR)


def test_outputs_and_bodies_keep_their_channels() -> None:
    text = f"""g ({PORTS}, bool k) => (float[N,4,6,6] c, float[N,4,6,6] y) {{
        c = Conv (x, A)
        d = Conv (x, A)
        y = If (k) <then_branch = p () => (float[N,4,6,6] u) {{ u = Relu (d) }},
                    else_branch = q () => (float[N,4,6,6] w) {{ w = Neg (d) }}> }}"""
    model = load(bind(text, 18, **PAIR))
    infer(model)
    reasons = {g.obstacle for g in find_channels(model.graph).groups()}
    assert any("is an output of the model" in r or "nested body" in r for r in reasons)
    assert "" not in reasons


def test_an_axis_keeps_its_last_channel() -> None:
    text = f"g ({PORTS}) => (float[N,2,6,6] y) {{ c = Conv (x, A) y = Conv (c, B) }}"
    model = load(bind(text, 18, A=PAIR["A"], B=np.zeros((2, 4, 1, 1), np.float32)))
    infer(model)
    Shrink().apply(model.graph, context(model))
    assert model.graph.nodes[0].inputs[1].shape == (1, 3, 1, 1)
    assert np.all(outputs(model, {"x": normal(1, 3, 6, 6)})["y"] == 0)


def test_nothing_to_cut_is_said() -> None:
    text = f"g ({PORTS}) => (float[N,2,6,6] y) {{ c = Conv (x, A) y = Conv (c, B) }}"
    model = load(bind(text, 18, **PAIR))
    infer(model)
    assert "all 4 channels are read" in reasons(Shrink().apply(model.graph, context(model)))


def check_zoo_model(path: Path, seed: int) -> None:
    try:
        first = session(path)
        feed = zoo_feed(path, first)
        run(first, feed)
        model = load(path)
    except ModelError:
        pytest.skip("ONNX Runtime does not run this model, or it holds a map")
    prepare(model, feed)
    infer(model, feed)
    if silence(model, find_channels(model.graph), seed):
        check_shrinking(model, feed, loose=True)


@pytest.mark.parametrize("name", ["winml_mnist", "ten_vad", "yunet_120x160", "blazeface_front"])
def test_small_real_models(shared: Path, name: str) -> None:
    check_zoo_model(shared / "models" / "zoo" / f"{name}.onnx", seed=0)


@pytest.mark.slow
def test_all_real_models(shared: Path, subtests: pytest.Subtests) -> None:
    manifest = json.loads((shared / "models" / "zoo" / "manifest.json").read_text())
    for entry in manifest:
        for seed in range(3):
            with subtests.test(f"{entry['name']} {seed}"):
                check_zoo_model(shared / "models" / "zoo" / f"{entry['name']}.onnx", seed)


def test_every_row_is_an_operator_of_onnx() -> None:
    assert [op for op in (*FLOWS, *RECUTS) if not onnx.defs.has(op)] == []
