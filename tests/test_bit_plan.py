"""Bits of single layers under one average: what the plan keeps to, and that it pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from quantizing import dataset, decibels
from test_quantize_layers import NET, X, done
from texts import bind, normal

from onnxc import bit_plan
from onnxc.bit_plan import WIDTHS, Plan, planned
from onnxc.compression import Plan as Task
from onnxc.compression import compress_model
from onnxc.core import Context
from onnxc.errors import OptionError
from onnxc.graph import load, opset
from onnxc.matrices import layers
from onnxc.options import reader
from onnxc.pipeline import Calibration, gather
from onnxc.quantization import QuantizeSettings
from onnxc.recipe import Recipe, dump, loads
from onnxc.shapes import infer
from onnxc.targets import choose
from onnxc.tasks import QUANTIZE
from onnxc.typed import keys
from onnxc.workpiece import Workpiece
from passes.quantize_layers import QuantizeLayers

Array = NDArray[Any]
ALL = QuantizeLayers(keep_ends=False)


def workpiece(source: Any = NET, has_judge: bool = True, feed: Any = None) -> Workpiece:
    model = load(source)
    data = dataset(model, feed or X)
    first = next(iter(data.batches(4)))
    infer(model, first)
    context = Context(opset(model.graph), choose("x86-vnni"))
    calibration = Calibration(data, original=model)
    judge = data if has_judge else None
    return Workpiece(model, context, calibration, first, judge=judge)


def sizes(piece: Workpiece) -> dict[str, int]:
    found = layers(piece.model.graph, piece.context.only.names(piece.model.graph))
    return {layer.name: layer.size for layer in found}


@pytest.mark.parametrize("average", [2.0, 2.6, 3.5, 4.0, 8.0])
def test_the_average_is_kept_and_used(average: float) -> None:
    piece = workpiece()
    found = planned(ALL, average, piece)
    bits, size = found.of_layers, sizes(piece)
    assert bits.keys() == size.keys() and set(bits.values()) <= set(WIDTHS)
    spent = sum(bits[name] * size[name] for name in size) / sum(size.values())
    assert average - 0.5 < spent <= average + 1e-9
    kept = planned(replace(ALL, keep_ends=True), average, piece)
    assert len(kept.of_layers) == 2


def test_a_layer_that_the_outputs_feel_gets_more_bits() -> None:
    text = """g (float[N,16] x, float[16,16] A, float[16,16] B, float[16,8] C) => (float[N,8] y) {
        a = MatMul (x, A)
        b = MatMul (x, B)
        s = Mul (a, k)
        t = Add (s, b)
        y = MatMul (t, C) }"""
    weights = {"A": normal(16, 16), "B": normal(16, 16, seed=1), "C": normal(16, 8)}
    feed = {"x": normal(64, 16)}
    for factor, more in ((8.0, 0), (1 / 8, 1)):
        proto = bind(text, k=np.float32(factor), **weights)
        piece = workpiece(proto, feed=feed)
        a, b, _ = planned(ALL, 4.0, piece).of_layers.values()
        assert (a > b, b > a)[more]
        blind = planned(ALL, 4.0, workpiece(proto, has_judge=False, feed=feed))
        first, second, _ = blind.of_layers.values()
        assert abs(first - second) <= 1


def test_noise_falls_fourfold_a_bit_and_never_grows() -> None:
    piece = workpiece()
    stats = gather(piece.model, ALL, piece.context, piece.calibration)
    plan = Plan(ALL, replace(piece, context=replace(piece.context, stats=stats)))
    free = plan.free()
    for curve in plan.noise(free):
        assert (np.diff(curve) <= 0).all() and (curve > 0).all()
        assert curve[WIDTHS.index(4)] == pytest.approx(16 * curve[WIDTHS.index(6)])
    assert bit_plan.TRIED[-1] == 4


def test_what_layers_get_makes_the_outputs_better_than_one_width_for_all() -> None:
    found = {}
    for average in (3.0, 4.0):
        bits = planned(ALL, average, workpiece())
        model, _ = done([bits])
        found[average] = decibels(NET, model, X)
    uniform, _ = done([replace(ALL, bits=3)])
    assert decibels(NET, uniform, X) - 0.5 < found[3.0] < found[4.0]


def test_bits_stand_in_the_recipe() -> None:
    piece = workpiece()
    found = planned(ALL, 3.5, piece)
    again = loads(dump(Recipe((found,)))).passes[0]
    assert again == found
    first, _ = done([found])
    second, _ = done([again])
    assert decibels(NET, first, X) == decibels(NET, second, X)


@pytest.mark.parametrize("settings", [{}, {"scheme": "fixed"}, {"activations": "float"}])
def test_an_average_reaches_the_file(settings: dict[str, Any]) -> None:
    model = load(NET)
    data = dataset(model, X)
    wanted = QuantizeSettings(bits=3.5, **settings)
    result = compress_model(Task(QUANTIZE, wanted, choose("x86")), model, Calibration(data), data)
    assert "layers of bits: " in result.way
    rounder = next(p for p in result.passes if isinstance(p, QuantizeLayers))
    rounds = [change for change in result.done if "of its output lost" in change.what]
    told = {change.node: change.what.split(" bits")[0] for change in rounds}
    assert all(told[name] == str(bits) for name, bits in rounder.of_layers.items())
    assert wanted.suffix == "int3.5" and wanted.is_rounded


def test_a_point_makes_an_average() -> None:
    read = reader(keys(QuantizeSettings)["bits"])
    for text, wanted in (("4", 4), ("4.0", 4.0), ("3.5", 3.5), ("16", 16)):
        assert read(text) == wanted and type(read(text)) is type(wanted)


def test_bits_that_make_no_sense_are_refused() -> None:
    for bits in (1.5, 8.5, 16.0):
        with pytest.raises(OptionError, match="average of 2 to 8"):
            QuantizeSettings(bits=bits)
    with pytest.raises(OptionError, match="LAYER=BITS"):
        QuantizeLayers(widths=("conv1",))
    with pytest.raises(OptionError, match="conv1 cannot have 9 bits"):
        QuantizeLayers(widths=("conv1=9",))
    with pytest.raises(OptionError, match="qdq or weight-only"):
        QuantizeSettings(bits=3.5, format="dynamic")
