"""How fine the codewords of each layer are: within the budget, and where the outputs feel it."""

from __future__ import annotations

import numpy as np
from quantizing import dataset
from texts import bind, context, normal

from onnxc.graph import load
from onnxc.numerics.vector_fit import Form
from onnxc.pipeline import Calibration
from onnxc.shapes import infer
from onnxc.storage.codebooks import OVERHEAD
from onnxc.storage.codewords import overhead
from onnxc.vector_plan import planned
from onnxc.workpiece import Workpiece
from passes.cluster_vectors import ClusterVectors

TWO = bind(
    """g (float[1,24] x, float[24,64] V, float[24,64] W, float s) => (float[1,64] y) {
    v = MatMul (x, V)
    w = MatMul (x, W)
    u = Mul (v, s)
    y = Add (u, w) }""",
    18,
    V=normal(24, 64),
    W=normal(24, 64, seed=1),
    s=np.array(0.01, np.float32),
)
for node, name in zip(TWO.graph.node, ("faint", "loud", "scale", "sum"), strict=True):
    node.name = name
FEED = {"x": normal(60, 1, 24)}
ASKED = ClusterVectors(rate=2, smallest=0, reconstruct=False)


def piece(has_data: bool) -> Workpiece:
    model = load(TWO)
    data = dataset(model, FEED)
    infer(model, next(iter(data.batches(1))))
    calibration = Calibration(data if has_data else None)
    return Workpiece(model, context(model), calibration, judge=data if has_data else None)


def bytes_of(form: Form) -> int:
    return form.size(64, 24) + overhead(form, True, 18)


def test_all_layers_get_forms_within_the_budget() -> None:
    found = planned(ASKED, piece(False), 18).given
    budget = 2 * (2 * 24 * 64) / 8 + 2 * OVERHEAD[False]
    assert found.keys() == {"faint", "loud"}
    assert sum(map(bytes_of, found.values())) <= budget


def test_a_layer_that_the_outputs_hardly_feel_gets_less() -> None:
    found = planned(ASKED, piece(True), 18).given
    assert bytes_of(found["loud"]) > bytes_of(found["faint"])


def test_what_the_user_says_is_kept() -> None:
    for asked in (ClusterVectors(rate=0), ClusterVectors(forms=("loud=4x8",))):
        assert planned(asked, piece(False), 18) is asked
