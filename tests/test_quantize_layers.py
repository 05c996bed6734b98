"""Layers rounded to few bits one after the other, and the integers that kernels then get."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from problems import problem
from quantizing import dataset, decibels
from texts import bind, normal

from onnxc.core import Context, Pass
from onnxc.ends import ends
from onnxc.errors import OptionError
from onnxc.graph import Model, load, opset, values
from onnxc.numerics import fixed
from onnxc.numerics.affine import Grid
from onnxc.numerics.rounding import METHODS, Wish, rounded
from onnxc.pipeline import Calibration, Step, compress
from onnxc.quantization import QuantizeSettings
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import choose
from passes.equalize import Equalize
from passes.quantize import Quantize
from passes.quantize_constants import QuantizeConstants
from passes.quantize_layers import QuantizeLayers
from passes.quantize_weights import QuantizeWeights
from passes.store_codebooks import StoreCodebooks
from passes.upgrade_opset import UpgradeOpset

Array = NDArray[Any]

NOISE = normal(24, 3, 8, 8)
X = {"x": NOISE + np.roll(NOISE, 1, -1) + np.roll(NOISE, 1, -2)}  # neighbours look alike
NET = bind(
    """g (float[N,3,8,8] x, float[16,3,3,3] A, float[16,16,3,3] B, float[16,16,3,3] C,
          float[16] a, float[16] b, float[16] c, float[16,5] F) => (float[N,5] y) {
        i = Conv <pads: ints = [1,1,1,1]> (x, A, a)
        r = Relu (i)
        j = Conv <pads: ints = [1,1,1,1]> (r, B, b)
        s = Relu (j)
        k = Conv <pads: ints = [1,1,1,1]> (s, C, c)
        t = Add (k, r)
        u = Relu (t)
        p = GlobalAveragePool (u)
        f = Flatten (p)
        y = MatMul (f, F) }""",
    A=normal(16, 3, 3, 3),
    B=normal(16, 16, 3, 3, seed=1) / 6,
    C=normal(16, 16, 3, 3, seed=2) / 6,
    a=normal(16, seed=3),
    b=normal(16, seed=4),
    c=normal(16, seed=5),
    F=normal(16, 5, seed=6),
)


def done(
    passes: list[Pass],
    source: onnx.ModelProto = NET,
    target: str = "x86-vnni",
    has_goals: bool = True,
    **only: tuple[str, ...],
) -> tuple[Model, list[Step]]:
    """Passes with the statistics of X, each checked."""
    model = load(source)
    data = dataset(model, X)
    first = next(iter(data.batches(4)))
    infer(model, first)
    context = Context(opset(model.graph), choose(target), only=Selector(**only))
    origin = load(source) if has_goals else None
    if origin is not None:
        infer(origin, first)
    steps = compress(model, passes, context, Calibration(data, original=origin), first)
    assert not [problem for step in steps for problem in step.problems]
    return model, steps


def codes(model: Model, least: int = 100) -> dict[str, Array]:
    """Integers of the weights in front of DequantizeLinear, by the node that reads them."""
    found = {}
    for node in model.graph.nodes:
        for tensor in node.inputs[1:2]:
            maker = tensor.inputs[0] if tensor.inputs else None
            if maker is not None and maker.op == "DequantizeLinear":
                stored = maker.inputs[0]
                if isinstance(stored, gs.Constant) and values(stored).size > least:
                    found[node.op + node.outputs[0].name] = values(stored)
    return found


def weights(model: Model) -> list[Array]:
    return [values(node.inputs[1]) for node in model.graph.nodes if node.op == "Conv"]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_kernels_get_exactly_the_integers_that_were_found(bits: Any) -> None:
    layers = QuantizeLayers(bits=bits, keep_ends=False)
    plain, _ = done([layers])
    model, _ = done([layers, Quantize()])
    grids = list(codes(model).values())
    assert len(grids) >= 3
    found = [node for node in model.graph.nodes if node.op == "Conv"]
    for node, weight, array in zip(found, weights(plain), grids, strict=False):
        maker = node.inputs[1].inputs[0]
        q, scale = array, values(maker.inputs[1])
        assert len(np.unique(q)) <= 2**bits
        made = q.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(made, weight)


@pytest.mark.parametrize("rounding", ["descent", "stochastic"])
def test_fixed_point_keeps_its_integers_in_the_file(rounding: Any) -> None:
    layers = QuantizeLayers(4, rounding, keep_ends=False, power_of_two=True)
    quantize = Quantize(weights=False, power_of_two=True)
    plain, (_, step) = done([quantize, layers])
    assert all(change.what.startswith("4 bits as Q") for change in step.changes)
    model, _ = done([quantize, layers, QuantizeConstants(power_of_two=True), StoreCodebooks()])
    for node in model.graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            fixed.fraction_bits(values(node.inputs[1]))
    unpacked, _ = done([quantize, layers, QuantizeConstants(power_of_two=True)])
    grids, convolutions = codes(unpacked), weights(plain)
    assert len(grids) >= 3 and all(len(np.unique(q)) <= 16 for q in grids.values())
    for weight in convolutions:
        assert fixed.is_on_grid(weight, 0, Grid(4))
    found = [node for node in unpacked.graph.nodes if node.op == "Conv"]
    for node, weight in zip(found, convolutions, strict=True):
        scale = values(node.inputs[1].inputs[0].inputs[1]).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(values(node.inputs[1].inputs[0].inputs[0]) * scale, weight)


def test_a_seed_decides_what_chance_does() -> None:
    made = []
    for seed in (0, 0, 1):
        model = load(NET)
        context = Context(opset(model.graph), choose("x86-vnni"), seed=seed)
        QuantizeLayers(rounding="stochastic", keep_ends=False).apply(model.graph, context)
        made.append(weights(model))
    assert all((a == b).all() for a, b in zip(made[0], made[1], strict=True))
    assert all((a != b).any() for a, b in zip(made[0], made[2], strict=True))


def test_fixed_point_that_has_its_bits_stays() -> None:
    layers = QuantizeLayers(bits=4, keep_ends=False, power_of_two=True)
    _, (_, again) = done([layers, layers])
    assert not again.changes
    assert {skip.reason for skip in again.skips} == {"not rounded: it has 4 bits already"}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_layer_loses_more_than_by_the_nearest(method: Any, bits: int) -> None:
    for seed in range(5):
        W, E = problem(6, 30, seed=seed)
        wish = Wish(Grid(bits))
        plain = rounded(W, E, wish, "nearest").weight
        found = rounded(W, E, wish, method).weight
        assert E.error(W - found) <= E.error(W - plain) * (1 + 1e-12)


def test_what_outputs_ask_for_beats_the_nearest() -> None:
    lost = {}
    for method in ("nearest", "gptq", "descent"):
        layers = QuantizeLayers(bits=3, rounding=method, keep_ends=False)  # type: ignore[arg-type]
        _, (step,) = done([layers])
        first = step.changes[0].what  # the others follow what this one has left
        lost[method] = float(first.split(", ")[1].split(" %")[0])
    assert lost["gptq"] < 0.95 * lost["nearest"]
    assert lost["descent"] < 0.9 * lost["nearest"]


def test_goals_lower_the_error() -> None:
    layers = QuantizeLayers(bits=2, keep_ends=False)
    alone, _ = done([QuantizeLayers(bits=2, keep_ends=False, reconstruct=False)])
    aimed, _ = done([layers])
    assert decibels(NET, aimed, X) > decibels(NET, alone, X) + 1


def test_ends_keep_eight_bits() -> None:
    model, (step,) = done([QuantizeLayers(bits=3)])
    assert ends(load(NET).graph) == {n.name for n in model.graph.nodes if _is_end(n)}
    told = {change.node: change.what.split(",")[0] for change in step.changes}
    assert sorted(told.values()) == ["3 bits", "3 bits", "8 bits", "8 bits"]
    assert len(np.unique(weights(model)[1][0])) <= 8


def _is_end(node: Any) -> bool:
    return node.op == "MatMul" or node.outputs[0].name == "i"


def test_the_residual_sum_is_aimed_at_behind_quantized_activations() -> None:
    layers, constants = QuantizeLayers(bits=3, keep_ends=False), QuantizeConstants()
    behind, steps = done([Quantize(weights=False), layers, constants])
    assert {c.what.split(",")[1] for c in steps[2].changes} >= {" 16 scales"}
    before, _ = done([layers, Quantize()])
    assert decibels(NET, behind, X) > decibels(NET, before, X) - 0.5
    assert len(codes(behind)) == len(codes(before))
    assert all(len(np.unique(q)) <= 8 for q in codes(behind).values())


def test_goals_are_those_of_equalized_tensors() -> None:
    layers = QuantizeLayers(bits=8, keep_ends=False, scales="apart")
    model, _ = done([Equalize(), layers])
    assert decibels(NET, model, X) > 30


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_scales_apart_are_stored_in_few_bits_and_computed_in_float(bits: Any) -> None:
    rounder = QuantizeLayers(bits=bits, scales="apart", smallest=1024, keep_ends=False)
    model, (_, step, stored) = done([UpgradeOpset(21), rounder, StoreCodebooks()])
    assert len(step.changes) == 3  # the MatMul is small
    told = [change.what for change in stored.changes]
    assert len(told) == 3 and all(f"codes of {bits} bits" in what for what in told)
    for before, after in ((c.before, c.after) for c in stored.changes):
        assert after <= before * bits / 32 + 4 * 2**bits + 64
    inside, _ = done([QuantizeLayers(bits=bits, smallest=1024, keep_ends=False)])
    assert decibels(NET, model, X) == pytest.approx(decibels(NET, inside, X), abs=6)


def test_weights_that_have_few_bits_stay() -> None:
    layers = QuantizeLayers(bits=4, keep_ends=False)
    _, (_, again) = done([layers, layers])
    assert not again.changes
    assert {skip.reason for skip in again.skips} == {"not rounded: it has 4 bits already"}


def test_what_kernels_do_not_take_is_left_and_told() -> None:
    _, (step,) = done([QuantizeLayers()], exclude=("op:MatMul",))
    assert [s.reason for s in step.skips] == ["not rounded: excluded"]
    turned = bind(
        """g (float[N,3,8,8] x, float[3,4,3,3] W) => (float[N,4,10,10] y) {
            y = ConvTranspose (x, W) }""",
        W=normal(3, 4, 3, 3),
    )
    _, (step,) = done([QuantizeLayers()], turned, "openvino")
    assert "several rows of its weight" in step.skips[0].reason
    _, (step,) = done([QuantizeLayers()], turned)
    assert "no integer kernel" in step.skips[0].reason


def test_without_moments_codes_are_the_nearest() -> None:
    model = load(NET)
    context = Context(opset(model.graph), choose("x86-vnni"))
    changes = QuantizeLayers(bits=4).apply(model.graph, context)
    assert all("if inputs are alike" in change.what for change in changes)  # type: ignore[union-attr]


def test_a_weight_on_a_grid_of_seven_bits_does_not_saturate() -> None:
    model, _ = done([QuantizeLayers(bits=8), Quantize()], target="x86")
    assert all(np.abs(q.astype(int)).max() <= 63 for q in codes(model).values())


def test_constants_are_written_only_behind_quantized_inputs() -> None:
    _, (step,) = done([QuantizeConstants()])
    assert not step.changes
    assert {skip.reason for skip in step.skips} == {"its input is not quantized"}


def test_both_halves_make_what_quantize_makes() -> None:
    whole, _ = done([Quantize()])
    halves, _ = done([Quantize(weights=False), QuantizeConstants()])
    left, right = codes(whole), codes(halves)
    assert left.keys() == right.keys() and len(left) >= 3
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name])
    assert decibels(NET, whole, X) == pytest.approx(decibels(NET, halves, X), abs=0.01)


def test_settings() -> None:
    assert QuantizeSettings(bits=3).is_rounded
    assert QuantizeSettings(rounding="descent").is_rounded
    assert not QuantizeSettings().is_rounded
    with pytest.raises(OptionError, match="not dynamic"):
        QuantizeSettings(bits=3, format="dynamic")


@pytest.mark.parametrize("keep_ends", [True, False])
def test_blocks_are_stored_as_they_were_rounded(keep_ends: bool) -> None:
    layers = QuantizeLayers(keep_ends=keep_ends, block=16)
    plain, _ = done([UpgradeOpset(21), layers])
    store = QuantizeWeights(bits=4, block=16, smallest=0)
    model, (_, step, stored) = done([UpgradeOpset(21), layers, store])
    assert decibels(NET, model, X) == pytest.approx(decibels(NET, plain, X), abs=0.01)
    assert len(step.changes) == len(stored.changes) == 4
    assert all("200.0 dB" in change.what for change in stored.changes)  # nothing more is lost
    widths = [change.what.split()[1] for change in stored.changes]
    assert widths.count("int8") == (2 if keep_ends else 0)
    nearest, _ = done([UpgradeOpset(21), store])
    assert decibels(NET, model, X) > decibels(NET, nearest, X) + 2


def test_blocks_that_have_few_bits_stay() -> None:
    layers = QuantizeLayers(bits=3, block=32)
    _, (_, again) = done([layers, layers])
    assert {s.reason.split(": ")[1] for s in again.skips} == {
        "it has 3 bits already",
        "it has 8 bits already",
    }


def test_blocks_are_for_layers_whose_inputs_are_summed_in_a_row() -> None:
    turned = bind(
        """g (float[N,3,8,8] x, float[3,4,3,3] W) => (float[N,4,10,10] y) {
            y = ConvTranspose (x, W) }""",
        W=normal(3, 4, 3, 3),
    )
    _, (step,) = done([QuantizeLayers(block=16)], turned)
    assert [s.reason for s in step.skips] == [
        "not rounded: it is rounded where it is stored: its outputs overlap"
    ]
    with pytest.raises(OptionError, match="leave out scales = apart"):
        QuantizeLayers(block=16, scales="apart")
