"""A graph becomes the message that the graph library's exporter gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Parse

from onnxc import export
from onnxc.export import exported
from onnxc.graph import Model, as_declared, load
from onnxc.normal import graphs
from onnxc.shapes import infer

MODELS = Path(__file__).resolve().parents[1] / "models"
NESTED = """g (bool c, float[N,3] x) => (float[N,3] y) {
    t = Softmax <axis: int = 1> (x)
    y = If (c) <
        then_branch = a_body () => (float[N,3] a) { s = Mul(t, w) a = Add(s, v) },
        else_branch = b_body () => (float[N,3] b) { r = Neg(t) b = Sub(r, v) }> }"""
DEEP = """g (float[1,3,H,W] x) => (float[1,2,h,w] y) {
    t = Conv <pads: ints = [1,1,1,1], auto_pad: string = "NOTSET"> (x, k)
    y = LeakyRelu <alpha: float = 0.3> (t) }"""


def by_library(graph: gs.Graph) -> onnx.ModelProto:
    with export._stubs(graph, []):
        proto = gs.export_onnx(
            graph, do_type_check=False, opset_imports=export._opset_imports(graph)
        )
    export._share_constants(graph, proto.graph)
    for name in ("ir_version", "producer_name", "producer_version"):  # told by the envelope
        proto.ClearField(name)
    for _, inner in graphs(proto.graph):
        inner.ClearField("doc_string")
    return proto


@pytest.fixture(params=["nested", "deep", *(p.name for p in sorted(MODELS.glob("*.onnx")))])
def model(request: pytest.FixtureRequest, parse: Parse) -> Model:
    arrays = {n: np.arange(1, 4, dtype=np.float32) for n in "wv"}
    if request.param == "nested":
        return load(parse(NESTED, **arrays))
    if request.param == "deep":
        return load(parse(DEEP, k=np.ones((2, 3, 3, 3), np.float32)))
    return load(MODELS / request.param)


@pytest.mark.parametrize("is_inferred", [False, True])
def test_the_message_is_that_of_the_library(model: Model, is_inferred: bool) -> None:
    if is_inferred:
        infer(model)
    assert exported(model.graph)[0] == by_library(model.graph)


def test_types_that_were_inferred_are_not_told(parse: Parse) -> None:
    arrays = {n: np.arange(1, 4, dtype=np.float32) for n in "wv"}
    loaded = load(parse(NESTED, **arrays))
    infer(loaded)
    everything = {v.name for _, g in graphs(exported(loaded.graph)[0].graph) for v in g.value_info}
    assert everything == {"t", "s", "r"}
    told = exported(loaded.graph, {"s"})[0]
    assert [v.name for _, g in graphs(told.graph) for v in g.value_info] == ["s"]
    assert not any(g.value_info for _, g in graphs(as_declared(loaded)[0].graph))


def test_weights_that_bodies_share_are_stored_once(parse: Parse) -> None:
    arrays = {n: np.arange(1, 4, dtype=np.float32) for n in "wv"}
    proto = exported(load(parse(NESTED, **arrays)).graph)[0]
    stored = {g.name: [t.name for t in g.initializer] for _, g in graphs(proto.graph)}
    assert sorted(stored["g"]) == ["v"] and stored["a_body"] == ["w"] and not stored["b_body"]
