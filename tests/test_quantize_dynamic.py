"""QuantizeDynamic: fused by ONNX Runtime, close to float, shared where possible, safe elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from texts import bind, changed, context, exact_sums, normal, ops, outputs, positive, reasons

from calib.data import InputSpec, open_data
from onnxc.check import compare, coverage
from onnxc.graph import Model, constants, load, to_bytes, values
from onnxc.pipeline import apply_pass
from onnxc.runtime import Runtime
from onnxc.targets import TARGETS
from passes.quantize_dynamic import QuantizeDynamic

X = normal(8, 64)


def quantized(proto: onnx.ModelProto, feed: dict[str, Any], decibels: float = 28) -> Model:
    """The model quantized, checked, and close to the original."""
    model = load(proto)
    done = apply_pass(model, QuantizeDynamic(smallest=0), context(model), feed)
    assert not done.problems
    assert done.changes
    before, after = outputs(proto, feed), outputs(model, feed)
    for name, expected in before.items():
        signal, error = np.square(expected).sum(), np.square(after[name] - expected).sum()
        assert 10 * np.log10(signal / error) > decibels
    return model


def kernels(model: Model) -> Counter[str]:
    return Counter(kernel.op for kernel in coverage(model).kernels)


@exact_sums
def test_products_of_one_tensor_share_its_quantization() -> None:
    proto = bind(
        """g (float[N,64] x, float[64,48] Q, float[64,48] K, float[64,32] V)
            => (float[N,48] q, float[N,48] k, float[N,32] v) {
            q = MatMul (x, Q) k = MatMul (x, K) v = MatMul (x, V) }""",
        Q=normal(64, 48),
        K=normal(64, 48, seed=1),
        V=normal(64, 32),
    )
    model = quantized(proto, {"x": X})
    assert ops(model).count("DynamicQuantizeLinear") == 1
    assert kernels(model) == {"MatMulIntegerToFloat": 3}


@exact_sums
def test_single_product_is_one_kernel() -> None:
    proto = bind(
        """g (float[N,64] x, float[64,48] W, float[48] B) => (float[N,48] y) {
            h = MatMul (x, W) y = Add (B, h) }""",
        W=normal(64, 48) * positive(48),
        B=normal(48),
    )
    assert kernels(quantized(proto, {"x": X})) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("turned", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("bias", ["none", "row", "scalar", "computed"])
@exact_sums
def test_gemm(alpha: float, beta: float, turned: tuple[int, int], bias: str) -> None:
    ports = {
        "none": "",
        "row": ", float[48] C",
        "scalar": ", float C",
        "computed": ", float[1,48] d",
    }
    term = {"none": "", "computed": ", c"}.get(bias, ", C")
    made = "c = Neg (d)" if bias == "computed" else ""
    x, w = (X.T.copy() if turned[0] else X), normal(64, 48)
    given = {"row": {"C": normal(48)}, "scalar": {"C": np.array(2, np.float32)}}.get(bias, {})
    proto = bind(
        f"""g (float[a,b] x, float[k,n] W{ports[bias]}) => (float[m,o] y) {{
            {made}
            y = Gemm <transA: int = {turned[0]}, transB: int = {turned[1]},
                      alpha: float = {alpha}, beta: float = {beta}> (x, W{term}) }}""",
        W=w.T.copy() if turned[1] else w,
        **given,
    )
    feed = {"x": x} | ({"d": normal(1, 48)} if bias == "computed" else {})
    model = quantized(proto, feed)
    assert "Gemm" not in ops(model)
    assert coverage(model).integer == 1


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("bias", [True, False])
@exact_sums
def test_lstm(direction: str, bias: bool) -> None:
    ways = 2 if direction == "bidirectional" else 1
    given, used = (f", float[{ways},128] B", ", B") if bias else ("", "")
    proto = bind(
        f"""g (float[T,2,24] x, float[d,64,24] W, float[d,64,16] R{given}) =>
              (float[T,d,2,16] y, float[d,2,16] h) {{
            y, h = LSTM <hidden_size: int = 16, direction: string = "{direction}"> (x, W, R{used})
        }}""",
        W=normal(ways, 64, 24) / 5,
        R=normal(ways, 64, 16) / 5,
        **({"B": normal(ways, 128) / 5} if bias else {}),
    )
    model = quantized(proto, {"x": normal(7, 2, 24)})
    assert kernels(model) == {"DynamicQuantizeLSTM": 1}


def test_shared_weight_is_stored_once() -> None:
    proto = bind(
        """g (float[N,64] x, float[64,64] W) => (float[N,64] y) {
            h = MatMul (x, W) r = Relu (h) y = Gemm (r, W) }""",
        W=normal(64, 64) / 8,
    )
    model = load(proto)
    results = QuantizeDynamic().apply(model.graph, context(model))
    assert [(r.before, r.after) for r in results] == [(4 * 64 * 64, 64 * 64 + 4 * 64), (0, 0)]
    assert sum(values(c).dtype == np.int8 for c in constants(model.graph)) == 1


@exact_sums
def test_table_behind_a_transpose_keeps_its_float_copy() -> None:
    proto = bind(
        """g (int64[N] t, float[40,64] E) => (float[N,40] y) {
            x = Gather (E, t)
            w = Transpose <perm: ints = [1, 0]> (E)
            y = MatMul (x, w) }""",
        E=normal(40, 64),
    )
    model = quantized(proto, {"t": np.array([1, 5, 39])})
    assert "Transpose" not in ops(model)
    [change] = [
        r for r in QuantizeDynamic().apply(load(proto).graph, context(load(proto))) if changed([r])
    ]
    assert change.before == 0
    assert change.after == 40 * 64 + 4 * 40


@exact_sums
def test_nested_bodies_quantize_for_themselves() -> None:
    proto = bind(
        """g (float[N,64] x, bool c, float[64,64] W) => (float[N,64] y) {
            t = If (c) <then_branch = p () => (float[N,64] u) { u = MatMul (x, W) },
                        else_branch = q () => (float[N,64] v) { v = Neg (x) }>
            a = MatMul (x, W)
            y = Add (t, a) }""",
        W=normal(64, 64),
    )
    for chosen in (True, False):
        model = quantized(proto, {"x": X, "c": np.array(chosen)})
        assert coverage(model).integer == 2


SKIPS = {
    "Conv": (
        "g (float[1,8,8,8] x, float[8,8,3,3] W) => (float[1,8,6,6] y) { y = Conv (x, W) }",
        normal(8, 8, 3, 3),
        "4 to 16 times slower",
    ),
    "GRU": (
        """g (float[T,2,24] x, float[1,48,24] W, float[1,48,16] R) => (float[T,1,2,16] y) {
            y = GRU <hidden_size: int = 16> (x, W, R) }""",
        normal(1, 48, 24),
        "no kernel quantizes GRU on the fly",
    ),
    "batch first": (
        """g (float[2,T,24] x, float[1,64,24] W, float[1,64,16] R) => (float[2,T,1,16] y) {
            y = LSTM <hidden_size: int = 16, layout: int = 1> (x, W, R) }""",
        normal(1, 64, 24),
        "batch first",
    ),
    "half": (
        "g (float16[N,64] x, float16[64,64] W) => (float16[N,64] y) { y = MatMul (x, W) }",
        normal(64, 64).astype(np.float16),
        "half precision",
    ),
    "two activations": (
        """g (float[64,64] x, float[64,64] W) => (float[64,64] y) {
            a = MatMul (x, x) y = Add (a, W) }""",
        normal(64, 64),
        "multiplies two activations",
    ),
    "weight first": (
        "g (float[64,N] x, float[64,64] W) => (float[64,N] y) { y = MatMul (W, x) }",
        normal(64, 64),
        "its weight is the first operand",
    ),
    "batched": (
        "g (float[2,N,64] x, float[2,64,64] W) => (float[2,N,64] y) { y = MatMul (x, W) }",
        normal(2, 64, 64),
        "its weight has 3 axes",
    ),
    "small": (
        "g (float[N,4] x, float[4,4] W) => (float[N,4] y) { y = MatMul (x, W) }",
        normal(4, 4),
        "its weight has 64 bytes, fewer than 1024",
    ),
    "output": (
        """g (float[N,64] x, float[64,64] W) => (float[N,64] y, float[64,64] W) {
            y = MatMul (x, W) }""",
        normal(64, 64),
        "is an output of the graph",
    ),
    "not finite": (
        "g (float[N,64] x, float[64,64] W) => (float[N,64] y) { y = MatMul (x, W) }",
        np.full((64, 64), np.inf, np.float32),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", SKIPS)
def test_what_stays_keeps_its_bytes(name: str) -> None:
    text, weight, reason = SKIPS[name]
    extra = {"R": normal(1, weight.shape[1], 16)} if "R)" in text else {}
    model = load(bind(text, opset=14, W=weight, **extra))
    before = to_bytes(model)
    results = QuantizeDynamic().apply(model.graph, context(model))
    assert changed(results) == []
    assert reason in reasons(results)
    assert to_bytes(model) == before


def test_products_of_a_vector_stay() -> None:
    text = "g (float[64] x, float[64,64] W) => (float[64] y) { y = MatMul (x, W) }"
    model = load(bind(text, W=normal(64, 64)))
    results = QuantizeDynamic().apply(model.graph, context(model))
    assert reasons(results) == "multiplies a vector"


PLAIN = "g (float[N,64] x, float[64,64] W) => (float[N,64] y) { y = MatMul (x, W) }"


def test_excluded_nodes_and_second_run() -> None:
    model = load(bind(PLAIN, W=normal(64, 64)))
    results = QuantizeDynamic().apply(model.graph, context(model, exclude=("op:MatMul",)))
    assert reasons(results) == "excluded"
    QuantizeDynamic().apply(model.graph, context(model))
    done = to_bytes(model)
    assert changed(QuantizeDynamic().apply(model.graph, context(model))) == []
    assert to_bytes(model) == done


def test_target_decides() -> None:
    model = load(bind(PLAIN, W=normal(64, 64)))
    far = replace(context(model), target=TARGETS["tensorrt"])
    assert "tensorrt does not quantize it" in reasons(QuantizeDynamic().apply(model.graph, far))
    old = replace(context(model), target=TARGETS["x86"])
    assert changed(QuantizeDynamic().apply(model.graph, old))
    codes = [values(c) for c in constants(model.graph) if values(c).dtype == np.int8]
    assert np.abs(codes[0]).max() == 63


@pytest.mark.parametrize(("name", "decibels"), [("sst2", 40), ("agnews", 40), ("stories260k", 25)])
@exact_sums
def test_real_models(shared: Path, name: str, decibels: float) -> None:
    source = shared / "models" / f"{name}.onnx"
    model = load(source)
    data = open_data(
        {"input_ids": np.load(shared / "data" / name / "calib.npz")["input_ids"][:10]},
        [InputSpec("input_ids", np.dtype(np.int64), ("batch", "length"))],
    )
    apply_pass(model, QuantizeDynamic(), context(model))
    assert compare(source, model, data, Runtime()).sqnr > decibels
    assert coverage(model).integer >= 3
