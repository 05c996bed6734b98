"""Weights beside the graph: external files are mapped when read, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Outputs, Parse, Weights

from onnxc import graph as border
from onnxc.errors import ModelError
from onnxc.graph import (
    Model,
    constant,
    constants,
    copy,
    load,
    nbytes,
    runnable,
    save,
    skeleton,
    to_bytes,
    to_proto,
    values,
)
from onnxc.runtime import Runtime, run, session
from onnxc.weights import ExternalValues

X = np.arange(40, dtype=np.float32).reshape(1, 40)
W = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
TEXT = "g (float[1, 40] x) => (float[1, 40] y) { a = MatMul(x, w) b = Add(a, v) y = MatMul(b, u) }"
ARRAYS: Weights = {"w": W, "v": W[0], "u": W.T.copy()}


@pytest.fixture
def external(parse: Parse, tmp_path: Path) -> Path:
    """A model whose weights are all in m.data beside it."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    options = {"location": "m.data", "size_threshold": 0}
    onnx.save(parse(TEXT, **ARRAYS), path, save_as_external_data=True, **options)
    return path


def held(model: Model) -> dict[str, object]:
    return {tensor.name: tensor._values for tensor in constants(model.graph)}


def test_external_weights_are_not_read_before_they_are_asked_for(external: Path) -> None:
    model = load(external)
    assert all(isinstance(value, ExternalValues) for value in held(model).values())
    data = external.with_name("m.data")
    size = data.stat().st_size
    data.write_bytes(np.full(size // 4, 7, np.float32).tobytes())
    found = {tensor.name: values(tensor) for tensor in constants(model.graph)}
    np.testing.assert_array_equal(found["w"], np.full((40, 40), 7))
    assert all(isinstance(value, ExternalValues) for value in held(model).values())
    assert [nbytes(t) for t in constants(model.graph)] == [6400, 160, 6400]


def test_a_model_with_external_weights_runs_and_moves(
    external: Path, tmp_path: Path, outputs: Outputs
) -> None:
    expected = outputs(onnx.load(external), x=X)["y"]
    model = load(external)
    for one in (model, copy(model)):
        np.testing.assert_array_equal(outputs(one, x=X)["y"], expected)
    save(model, tmp_path / "moved.onnx")
    external.with_name("m.data").unlink()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["moved.onnx"]
    np.testing.assert_array_equal(outputs(load(tmp_path / "moved.onnx"), x=X)["y"], expected)


def test_weights_above_the_limit_go_beside_the_file(
    external: Path, tmp_path: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(onnx.load(external), x=X)["y"]
    monkeypatch.setattr(border, "SPLIT", 10_000)
    model = load(external)
    target = tmp_path / "out.onnx"
    save(model, target)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        *("out.onnx", "out.onnx.data")
    ]
    assert target.stat().st_size < 2000
    onnx.checker.check_model(target)
    found = run(session(target, Runtime()), {"x": X})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    again = load(target)
    save(again, target)  # onto the very file that is mapped
    np.testing.assert_array_equal(outputs(load(target), x=X)["y"], expected)


def test_runnable_gives_bytes_or_a_file_that_goes_away(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(external)
    with runnable(model) as small:
        assert isinstance(small, bytes)
    monkeypatch.setattr(border, "SPLIT", 10_000)
    with runnable(model) as large:
        assert isinstance(large, Path)
        assert run(session(large), {"x": X})["y"].shape == (1, 40)
    assert not large.parent.exists()


def test_too_large_for_one_file_is_a_sentence(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(border, "_FILE_LIMIT", 10_000)
    with pytest.raises(ModelError, match="above 2 GB, too large for one file; save it to a path"):
        to_bytes(load(external))


def test_a_replaced_external_weight_is_stored_inside(external: Path, outputs: Outputs) -> None:
    model = load(external)
    node = model.graph.nodes[0]
    node.inputs[1] = constant("w", np.zeros((40, 40), np.float32))
    node = model.graph.nodes[2]
    node.inputs[1].values = np.eye(40, dtype=np.float32)  # the way that used to break the file
    proto = to_proto(model)
    assert not [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    onnx.checker.check_model(proto)
    np.testing.assert_array_equal(outputs(proto, x=X)["y"], W[:1])


def test_a_skeleton_is_small_and_keeps_types_and_small_values(parse: Parse) -> None:
    proto, weights = skeleton(load(parse(TEXT, **ARRAYS)))
    assert proto.ByteSize() < 1000
    assert [w.shape for w in weights] == [(40, 40), (40, 40)]
    shapes = {t.name: (list(t.dims), t.data_type) for t in proto.graph.initializer}
    assert shapes == {"w": ([40, 40], 1), "v": ([40], 1), "u": ([40, 40], 1)}
    assert len(proto.graph.initializer[1].raw_data) == 160


def test_copies_share_arrays_that_nobody_can_change(parse: Parse) -> None:
    model = load(parse(TEXT, **ARRAYS))
    model.graph.nodes[0].inputs[1] = constant("w", W.copy())
    twin = copy(model)
    assert held(twin)["w"] is held(model)["w"]
    with pytest.raises(ValueError, match="read-only"):
        twin.graph.nodes[0].inputs[1].values[0] = 0
    twin.graph.nodes[0].inputs[1] = constant("w", np.zeros_like(W))
    np.testing.assert_array_equal(values(model.graph.nodes[0].inputs[1]), W)


def test_packed_external_weights_are_unpacked_when_read(tmp_path: Path) -> None:
    array = (np.arange(3000) % 16 - 8).astype(ml_dtypes.int4).reshape(3, 1000)
    port = gs.Variable("y", np.dtype(np.float32), [3, 1000])
    one = constant("s", np.float32(0.5))
    node = gs.Node("DequantizeLinear", "n", inputs=[constant("w", array), one], outputs=[port])
    path = tmp_path / "m.onnx"
    proto = to_proto(Model(gs.Graph([node], outputs=[port], opset=21)))
    onnx.save(proto, path, save_as_external_data=True, location="d", size_threshold=0)
    model = load(path)
    weight = model.graph.nodes[0].inputs[0]
    assert isinstance(weight._values, ExternalValues)
    assert nbytes(weight) == 1500
    np.testing.assert_array_equal(values(weight).astype(int), array.astype(int))
    found = run(session(to_bytes(model)), {})["y"]
    np.testing.assert_array_equal(found, array.astype(np.float32) / 2)


def set_entry(model: onnx.ModelProto, key: str, value: str) -> None:
    entries = {e.key: e for e in model.graph.initializer[0].external_data}
    entries[key].value = value


OUTSIDE = ("../secret", "/etc/passwd", "a/../../b", "", "..")


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_data_outside_the_folder_is_refused(external: Path, location: str) -> None:
    (external.parent.parent / "secret").write_bytes(bytes(10_000))
    model = onnx.load(external, load_external_data=False)
    set_entry(model, "location", location)
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx: weight 'w' refers to .* outside the folder"):
        load(external)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("location", "gone.data", r"gone\.data of weight 'w' is missing"),
        ("offset", "100000", r"m\.data is too short for weight 'w'"),
        ("offset", "-1", r"'w': external data has a bad offset '-1'"),
        ("length", "12", r"weight 'w' needs 6400 bytes, but its external data has 12"),
    ],
)
def test_damaged_external_data_is_a_sentence(
    external: Path, key: str, value: str, sentence: str
) -> None:
    model = onnx.load(external, load_external_data=False)
    set_entry(model, key, value)
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=sentence):
        load(external)


def test_a_truncated_external_file_is_a_sentence(external: Path) -> None:
    data = external.with_name("m.data")
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"m\.data is too short for weight 'u'"):
        load(external)


def test_external_data_needs_a_folder(external: Path, outputs: Outputs) -> None:
    data = external.read_bytes()
    with pytest.raises(ModelError, match=r"external file 'm\.data'; open the model by its path"):
        load(data)
    assert outputs(load(data, base=external.parent), x=X)["y"].shape == (1, 40)


def test_data_that_does_not_fill_the_shape_is_a_sentence(parse: Parse) -> None:
    model = parse(TEXT, **ARRAYS)
    model.graph.initializer[0].raw_data = b"\0" * 6396
    with pytest.raises(ModelError, match="initializer 'w' is damaged"):
        load(model)


BODIES = """g (bool c, float[1, 40] x) => (float[1, 40] y) {
    m = MatMul(x, w)
    y = If (c) <then_branch = t () => (float[1, 40] a) { a = MatMul(m, w) },
                else_branch = e () => (float[1, 40] b) { b = MatMul(m, v) }> }"""
ONLY_BODIES = BODIES.replace("m = MatMul(x, w)", "m = Neg(x)").replace("(m, v)", "(m, w)")


@pytest.mark.parametrize("text", [BODIES, ONLY_BODIES])
def test_a_weight_that_bodies_share_is_stored_once(
    parse: Parse, outputs: Outputs, text: str
) -> None:
    model = parse(text, w=W, **({"v": W.T.copy()} if "v" in text.split("else")[1] else {}))
    loaded = load(model)
    assert len(to_bytes(loaded)) < len(model.SerializeToString()) + 200
    for condition in (True, False):
        feed = {"c": np.array(condition), "x": X}
        np.testing.assert_array_equal(outputs(loaded, **feed)["y"], outputs(model, **feed)["y"])
