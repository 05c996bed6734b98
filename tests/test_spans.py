"""Ranges of quantized tensors beside what calibration saw of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from calib.observers import HistogramObserver
from onnxc.core import Key
from onnxc.graph import load
from onnxc.spans import SHOWN, histograms, spans
from passes.equalize import Equalize
from passes.quantize import Quantize

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
<float s = {0.5}, int8 z = {-28}>
{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Relu(d) }
"""


def seen(values: np.ndarray) -> HistogramObserver:
    observer = HistogramObserver()
    observer.update(np.asarray(values, np.float32)[None])
    return observer


def test_ends_and_what_lies_outside() -> None:
    values = np.concatenate([np.linspace(-50, 77, 990), np.full(10, 100.0)])
    (found,) = spans(load(onnx.parser.parse_model(TEXT)), {"x": seen(values)})
    assert (found.tensor, found.type, found.scale, found.zero_point) == ("x", "int8", 0.5, -28)
    assert (found.low, found.high) == (-50.0, 77.5)
    assert (found.least, found.most) == (-50.0, 100.0)
    assert found.clipped == pytest.approx(0.01, abs=1e-9)
    assert found.used == 1.0
    assert len(found.counts) == SHOWN and sum(found.counts) == 1000
    assert found.counts[-1] == 10


def test_integer_operators_name_their_scales_after_what_they_make() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (uint8[N, 4] x_quantized) => (float[N, 4] y)
        <float x_scale = {0.5}, uint8 x_zero_point = {100}>
        { y = DequantizeLinear(x_quantized, x_scale, x_zero_point) }
    """
    (found,) = spans(load(onnx.parser.parse_model(text)), {"x": seen(np.arange(4.0))})
    assert (found.tensor, found.low, found.high) == ("x", -50.0, 77.5)


def test_a_tensor_of_one_value_has_one_bin() -> None:
    (found,) = spans(load(onnx.parser.parse_model(TEXT)), {"x": seen(np.full(7, 3.0))})
    assert found.counts == (7,) and found.used == 0.0 and found.clipped == 0.0


def test_no_histogram_and_no_finite_values_are_passed_over() -> None:
    model = load(onnx.parser.parse_model(TEXT))
    assert spans(model, {}) == ()
    assert spans(model, {"x": seen(np.array([np.inf, 1.0]))}) == ()


def test_a_scale_for_each_channel_is_passed_over() -> None:
    text = TEXT.replace("float s = {0.5}, int8 z = {-28}", "float[4] s = {1, 2, 3, 4}, int8[4] z")
    text = text.replace("int8[4] z", "int8[4] z = {0, 0, 0, 0}")
    assert spans(load(onnx.parser.parse_model(text)), {"x": seen(np.arange(4.0))}) == ()


def test_histograms_are_those_of_the_chosen_way_the_latest_first() -> None:
    passes = (Equalize(), Quantize())
    early, late, other = (seen(np.arange(n + 1.0)) for n in (1, 2, 3))
    key = Key("x", "histogram")
    memo = {
        (passes[:1], frozenset(), None): {key: late},
        ((), frozenset(), None): {key: early, Key("y", "histogram"): early},
        ((Quantize(),), frozenset(), None): {key: other},
        (None, frozenset(), None): {key: other},
        (passes, frozenset(), None): {Key("x", "histogram", minus="y"): other},
    }
    found = histograms(memo, passes)
    assert found["x"] is late and found["y"] is early
