"""Fixed-point files in integers alone give what ONNX Runtime makes of them, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from quantizing import dataset, kernels
from texts import bind, normal

import onnxc
from calib.data import Preprocess, open_data
from onnxc.compression import Plan, compress_model
from onnxc.errors import ModelError
from onnxc.fixed_graph import Trace, run_in_integers
from onnxc.graph import Model, load, to_proto, values
from onnxc.pipeline import Calibration
from onnxc.quantization import QuantizeSettings
from onnxc.request import input_specs
from onnxc.runtime import Runtime, run, session
from onnxc.targets import choose
from onnxc.tasks import QUANTIZE

Array = NDArray[Any]
MODELS = Path(__file__).resolve().parents[1] / "models"


def quantized(source: Any, data: Any, target: str = "x86", **settings: Any) -> Model:
    plan = Plan(QUANTIZE, QuantizeSettings(scheme="fixed", **settings), choose(target))
    model = load(source)
    return compress_model(plan, model, Calibration(data), data).model


def by_runtime(model: Model, trace: Trace, feed: dict[str, Array], level: str) -> dict[str, Array]:
    """The same integers and outputs as ONNX Runtime makes them."""
    proto = to_proto(model)
    known = {port.name for port in proto.graph.output}
    more = [onnx.ValueInfoProto(name=name) for name in trace.integers if name not in known]
    proto.graph.output.extend(more)
    return run(session(proto.SerializeToString(), Runtime(level=level)), feed)


def assert_equal(model: Model, feed: dict[str, Array], least: int, level: str = "none") -> Trace:
    trace = run_in_integers(model, feed)
    found = by_runtime(model, trace, feed, level)
    assert len(trace.integers) >= least
    for name, q in trace.integers.items():
        assert q.dtype == found[name].dtype
        np.testing.assert_array_equal(q, found[name], err_msg=name)
    return trace


NET = bind(
    """g (float[N,4,12,12] x, float[8,4,3,3] A, float[8] a, float[8,4,3,3] G, float[8] b,
          float[8,16,1,1] C, float[48,5] F, float[5] f) => (float[N,5] y) {
        c = Conv <pads: ints = [1,1,1,1], strides: ints = [2,1]> (x, A, a)
        r = Relu (c)
        d = Conv <pads: ints = [1,1,1,1], group: int = 2> (r, G, b)
        s = Add (d, r)
        e = Clip (s, zero, six)
        m = MaxPool <kernel_shape: ints = [3,3], strides: ints = [2,2], ceil_mode: int = 1> (e)
        v = AveragePool <kernel_shape: ints = [3,2], strides: ints = [2,2],
                         ceil_mode: int = 1, pads: ints = [1,0,1,0]> (m)
        p = MaxPool <kernel_shape: ints = [2,2], strides: ints = [2,2], ceil_mode: int = 1> (m)
        u = Slice (v, first, last, axes)
        j = Concat <axis: int = 1> (u, p)
        k = Conv (j, C)
        l = Relu (k)
        t = Transpose <perm: ints = [0,2,3,1]> (l)
        h = Flatten (t)
        y = Gemm (h, F, f) }""",
    opset=21,
    A=normal(8, 4, 3, 3) / 3,
    a=normal(8),
    G=normal(8, 4, 3, 3, seed=1) / 4,
    b=normal(8, seed=2),
    C=normal(8, 16, 1, 1, seed=3),
    F=normal(48, 5, seed=4),
    f=normal(5, seed=5),
    zero=np.float32(0),
    six=np.float32(6),
    first=np.int64([0, 0]),
    last=np.int64([2, 99]),
    axes=np.int64([2, 3]),
)
X = {"x": normal(16, 4, 12, 12)}


@pytest.mark.parametrize("level", ["none", "all"])
@pytest.mark.parametrize("bits", [8, 4])
def test_pools_sums_and_moves_are_integers_and_shifts(bits: int, level: str) -> None:
    model = quantized(NET, dataset(load(NET), X), bits=bits)
    trace = assert_equal(model, X, 8, level)
    assert all(width <= 32 for width in trace.widths.values()) and len(trace.widths) == 4


def test_a_bound_that_is_no_end_of_a_format_is_kept_behind_the_kernel() -> None:
    proto = bind(
        """g (float[N,4,8,8] x, float[6,4,3,3] A, float[6] a, float[3,6,1,1] B)
             => (float[N,3,6,6] y) {
            c = Conv (x, A, a)
            e = Clip (c, zero, six)
            y = Conv (e, B) }""",
        A=normal(6, 4, 3, 3),
        a=normal(6),
        B=normal(3, 6, 1, 1),
        zero=np.float32(0),
        six=np.float32(6),
    )
    feed = {"x": np.abs(normal(16, 4, 8, 8))}
    model = quantized(proto, dataset(load(proto), feed), rounding="nearest")
    trace = assert_equal(model, feed, 3)
    assert kernels(model).count("QLinearConv") == 2
    before, behind = (trace.integers[f"{name}_quantized"] for name in "ce")
    scale = next(n for n in model.graph.nodes if n.outputs[0].name == "e_quantized").inputs[1]
    high = round(6 / float(values(scale)))
    np.testing.assert_array_equal(np.minimum(before, high), behind)
    assert before.max() > high


def test_digits_to_the_bit() -> None:
    path = MODELS / "digits_cnn.onnx"
    data = open_data(str(MODELS / "digits_cnn_calib.npz"), input_specs(path), samples=12)
    model = quantized(path, data, bits=4, ranges="minmax", rounding="nearest")
    feed = next(iter(data.batches(2)))
    trace = assert_equal(model, feed, 10)
    (name, y), *_ = trace.outputs.items()
    found = by_runtime(model, trace, feed, "none")[name]
    np.testing.assert_array_equal(np.float32(y), found)


@pytest.mark.parametrize("target", ["x86", "x86-vnni"])
def test_a_real_network_to_the_bit(shared: Path, target: str) -> None:
    path = shared / "models" / "resnet20.onnx"
    images = str(shared / "data" / "cifar10" / "calib")
    ready = Preprocess(preset="imagenet", resize="none")
    data = open_data(images, input_specs(path), ready, 24)
    model = quantized(path, data, target, rounding="nearest")
    trace = assert_equal(model, next(iter(data.batches(3))), 30)
    assert max(trace.widths.values()) <= 24  # where float32 is exact
    assert len(trace.widths) == 20 and "logits" in trace.outputs


def test_sums_of_sixteen_bits_differ_by_what_float32_rounds() -> None:
    model = quantized(NET, dataset(load(NET), X), bits=16)
    trace = run_in_integers(model, X)
    found = by_runtime(model, trace, X, "none")
    assert max(trace.widths.values()) > 24
    for name, q in trace.integers.items():
        assert np.abs(q.astype(np.int64) - found[name]).max() <= 4


def test_what_is_not_in_fixed_point_is_told() -> None:
    affine = QuantizeSettings(format="qdq")
    model = load(NET)
    data = dataset(model, X)
    made = compress_model(Plan(QUANTIZE, affine, choose("x86")), model, Calibration(data), data)
    with pytest.raises(ModelError, match=r"is not in fixed point: .*(power of two|zero point)"):
        run_in_integers(made.model, X)
    text = """g (float[1,4] x) => (float[1,4] y) {
        s = Softmax (x)
        q = QuantizeLinear (s, scale, zero)
        y = DequantizeLinear (q, scale, zero) }"""
    proto = bind(text, scale=np.float32(0.5), zero=np.int8(0))
    with pytest.raises(ModelError, match=r"\(Softmax\) computes in float"):
        run_in_integers(load(proto), {"x": normal(1, 4)})
    with pytest.raises(ModelError, match="no input 's' in the feed"):
        cut = bind(
            "g (float[1,4] s) => (float[1,4] y) { q = QuantizeLinear (s, scale, zero)\n"
            "y = DequantizeLinear (q, scale, zero) }",
            scale=np.float32(0.5),
            zero=np.int8(0),
        )
        run_in_integers(load(cut), {})


def test_the_facade_takes_a_file(tmp_path: Path) -> None:
    model = quantized(NET, dataset(load(NET), X), bits=8)
    path = tmp_path / "fixed.onnx"
    path.write_bytes(to_proto(model).SerializeToString())
    first, second = onnxc.run_in_integers(path, X), run_in_integers(model, X)
    for name, q in second.integers.items():
        np.testing.assert_array_equal(first.integers[name], q)
