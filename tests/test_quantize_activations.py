"""Inputs of layers on few levels: the graph computes what a table on a device would, in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import Feed, apply, dataset, decibels, kernels
from texts import bind, normal, outputs, reasons

from onnxc.core import Context
from onnxc.errors import OptionError
from onnxc.graph import load, to_bytes, to_proto, values
from onnxc.pipeline import Calibration
from onnxc.quantization import QuantizeSettings, ways
from onnxc.runtime import Runtime, run, session
from onnxc.shapes import infer
from onnxc.targets import choose
from onnxc.workpiece import Workpiece
from passes.quantize import Quantize
from passes.quantize_activations import QuantizeActivations

IMAGE: Feed = {"x": normal(16, 1, 3, 10, 10)}
TOKENS: Feed = {"x": normal(16, 1, 7, 16)}
EVERY = QuantizeActivations(bits=3, keep_ends=False)


def convolved() -> onnx.ModelProto:
    return bind(
        """g (float[1,3,10,10] x, float[6,3,3,3] W, float[6,6,3,3] U, float[4,6,1,1] V)
            => (float[1,4,4,4] y) {
            c = Conv (x, W) r = Relu (c) m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
            e = Conv <pads = [1, 1, 1, 1]> (m, U) a = Add (e, m) d = Relu (a) y = Conv (d, V) }""",
        W=normal(6, 3, 3, 3),
        U=normal(6, 6, 3, 3) / 4,
        V=normal(4, 6, 1, 1),
    )


def products() -> onnx.ModelProto:
    return bind(
        """g (float[1,7,16] x, float[16,24] P, float[24,16] Q, float[24,8] V)
            => (float[1,7,8] y, float[1,7,16] z) {
            u = MatMul (x, P) y = MatMul (u, V) z = MatMul (u, Q) }""",
        P=normal(16, 24),
        Q=normal(24, 16),
        V=normal(24, 8),
    )


def levels_of(model: Any, feed: dict[str, Any], tensor: str) -> Any:
    """Distinct values that the layers behind a Gather read."""
    proto = to_proto(model)
    node = next(n for n in proto.graph.node if n.op_type == "Gather" and tensor in n.output[0])
    proto.graph.output.add(name=node.output[0])
    return np.unique(outputs(proto, feed)[node.output[0]])


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_layers_read_few_levels(target: str) -> None:
    """Unsigned codes, and signed ones, whose negative indices count from the end of the table."""
    proto = products()
    model, _ = apply(proto, Quantize(), TOKENS, target)
    plain = decibels(proto, model, TOKENS)
    model, step = apply(model, QuantizeActivations(bits=3), TOKENS, target)
    assert [change.node for change in step.changes] == []
    model, step = apply(model, EVERY, TOKENS, target)
    assert len(step.changes) == 3
    assert "8 levels" in step.changes[0].what
    for name in ("x", "u"):
        assert len(levels_of(model, {"x": TOKENS["x"][0]}, name)) <= 8
    assert 8 < decibels(proto, model, TOKENS) < plain - 10


def test_kernels_stay_and_compute_what_the_graph_says() -> None:
    model, _ = apply(convolved(), Quantize(), IMAGE, "x86")
    before = kernels(model)
    model, _ = apply(model, EVERY, IMAGE, "x86")
    assert [k for k in kernels(model) if k not in ("Cast", "Gather")] == before
    feed = {"x": IMAGE["x"][0]}
    fused = run(session(to_bytes(model)), feed)["y"]
    plain = run(session(to_bytes(model), Runtime(level="none")), feed)["y"]
    np.testing.assert_allclose(fused, plain, rtol=0, atol=0.02 * float(np.abs(plain).max()))


def test_what_moves_levels_hands_them_on_and_ends_keep_their_bits() -> None:
    model, _ = apply(convolved(), Quantize(), IMAGE, "x86")
    model, step = apply(model, QuantizeActivations(bits=3), IMAGE, "x86")
    assert len(step.changes) == 1
    assert reasons(list(step.skips)).count("first and last layers keep 8 bits") == 2
    again = to_bytes(model)
    model, step = apply(model, QuantizeActivations(bits=3), IMAGE, "x86")
    assert not step.changes
    assert "few levels already" in reasons(list(step.skips))
    assert to_bytes(model) == again


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_more_bits_lose_less(bits: int) -> None:
    proto = products()
    model, _ = apply(proto, Quantize(), TOKENS, "x86")
    model, _ = apply(model, QuantizeActivations(bits=bits, keep_ends=False), TOKENS, "x86")
    low, high = {2: (0, 12), 4: (12, 22), 6: (24, 36)}[bits]
    assert low < decibels(proto, model, TOKENS) < high


def test_zero_stays_zero() -> None:
    """Padding and what Relu cuts off are exact."""
    model, _ = apply(convolved(), Quantize(), IMAGE, "x86")
    model, _ = apply(model, EVERY, IMAGE, "x86")
    for node in model.graph.nodes:
        if node.op == "Gather":
            q = node.inputs[1].inputs[0].inputs[0].inputs[0]
            zero = int(values(q.inputs[2]))
            assert values(node.inputs[0])[zero] == zero


def test_float_layers_and_excluded_ones_stay() -> None:
    proto = products()
    model, step = apply(proto, EVERY, TOKENS)
    assert "is not quantized" in reasons(list(step.skips))
    model, _ = apply(proto, Quantize(), TOKENS, "x86")
    name = next(n.name for n in model.graph.nodes if n.op == "MatMul")
    _, step = apply(model, EVERY, TOKENS, "x86", exclude=(name,))
    assert name not in [change.node for change in step.changes]


def test_the_place_of_the_pass_and_what_the_report_says() -> None:
    model = load(convolved())
    infer(model)
    context, asked = Context(13, choose("x86-vnni")), QuantizeSettings(activation_levels=4)
    with pytest.raises(OptionError, match="give --data"):
        ways(asked, Workpiece(model, context, Calibration(None)))
    piece = Workpiece(model, context, Calibration(dataset(model, IMAGE)))
    for bits in ("auto", 4):
        found = ways(QuantizeSettings(bits=bits, activation_levels=4), piece)  # type: ignore[arg-type]
        for name, passes in found.items():
            assert name.endswith("16 levels")
            names = [pass_.name for pass_ in passes]
            place = names.index("quantize-activations")
            assert names[place - 1] == "quantize"
            assert bits == "auto" or names[place + 1] == "quantize-layers"
    assert any("still compute in 8 bits" in note for note in piece.calibration.notes)


def test_what_the_option_goes_with() -> None:
    for wrong in ({"format": "qoperator"}, {"activations": "float"}, {"scheme": "fixed"}):
        with pytest.raises(OptionError, match="--activation-levels"):
            QuantizeSettings(activation_levels=4, **wrong)  # type: ignore[arg-type]
