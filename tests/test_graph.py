"""The border: what goes in comes out, equal to the bit, and what cannot go in gets one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import SHARED, Outputs, Parse
from google.protobuf import text_format

from onnxc.errors import ModelError, OptionError
from onnxc.graph import copy, load, save, to_bytes, to_proto, unfinite
from onnxc.runtime import Runtime, dtype_of, run, session

X = np.array([1.0, -2.0, 3.0], np.float32)
TEXT = "g (float[3] x) => (float[3] y) { y = Mul(x, w) }"


def test_a_path_bytes_and_a_protobuf_load_alike(parse: Parse, tmp_path: Path) -> None:
    model = parse(TEXT, w=X)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    sources = (path, str(path), path.read_bytes(), model)
    assert len({to_bytes(load(source)) for source in sources}) == 1


def test_a_second_round_trip_changes_no_byte(parse: Parse) -> None:
    once = to_bytes(load(parse(TEXT, w=X)))
    assert to_bytes(load(once)) == once
    assert to_bytes(copy(load(once))) == once


def test_save_writes_what_to_bytes_gives(parse: Parse, tmp_path: Path) -> None:
    model = load(parse(TEXT, w=X))
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == to_bytes(model)


def test_a_path_that_cannot_be_written_is_a_sentence(parse: Parse, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot write .*out\.onnx: there is no folder"):
        save(load(parse(TEXT, w=X)), tmp_path / "gone" / "out.onnx")


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


BAD_FILES = {
    "empty": (lambda data: b"", "the file is empty"),
    "text": (lambda data: b"this is not a model", "not an ONNX model"),
    "image": (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(99), "not an ONNX model"),
    "zeros": (lambda data: bytes(100), "not an ONNX model"),
    "truncated": (truncated, "not an ONNX model, or a truncated one"),
    "no graph": (lambda data: onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_in_one_sentence(parse: Parse, tmp_path: Path, kind: str) -> None:
    spoil, sentence = BAD_FILES[kind]
    path = tmp_path / "bad.onnx"
    path.write_bytes(spoil(parse(TEXT, w=X).SerializeToString()))
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert sentence in message
    assert "\n" not in message


def test_every_truncation_is_refused(parse: Parse) -> None:
    data = parse(TEXT, w=X).SerializeToString()
    for length in range(len(data)):
        with pytest.raises(ModelError):
            load(data[:length])


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx: cannot read the model: No such file"):
        load(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="cannot read the model: Is a directory"):
        load(tmp_path)


NAN, INF = np.float32(np.nan), np.float32(np.inf)


@pytest.mark.parametrize(("value", "found"), [(1, []), (NAN, ["w", "v"]), (-INF, ["w"])])
def test_unfinite_names_weights(parse: Parse, value: float, found: list[str]) -> None:
    text = "g (float[1, 2] x) => (float[1, 2] y) { a = MatMul(x, w) y = Add(a, v) }"
    weight = np.array([[1, 2], [3, value]], np.float32)
    model = load(parse(text, w=weight, v=weight[1]))
    assert unfinite(model) == found


def test_unfinite_reads_small_float_types_and_no_integers(parse: Parse) -> None:
    text = """g (float[2] x) => (float[2] y, int64[1] z) { b = Cast <to = 1> (w)
        y = Add(x, b) z = Shape(i) }"""
    weight = np.array([1, np.nan], ml_dtypes.bfloat16)
    model = load(parse(text, w=weight, i=np.array([1, -8], ml_dtypes.int4)))
    assert unfinite(model) == ["w"]


def test_loading_prints_nothing(parse: Parse) -> None:
    code = "import sys, onnxc.graph as g; g.to_bytes(g.load(sys.stdin.buffer.read()))"
    text = "g (bfloat16[3] x) => (bfloat16[3] y) { y = Mul(x, w) }"
    data = parse(text, w=X.astype(ml_dtypes.bfloat16)).SerializeToString()
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_an_initializer_that_is_an_output_stays_one(parse: Parse, outputs: Outputs) -> None:
    model = parse("g (float[3] x) => (float[3] y, float[3] w) { y = Mul(x, w) }", w=X)
    for loaded in (load(model), copy(load(model))):
        np.testing.assert_array_equal(outputs(loaded, x=X)["w"], X)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and a.dtype.kind in "fc":
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    return str(a) == str(b)


def manifest() -> dict[str, dict[str, list[int]]]:
    file = SHARED / "models" / "zoo" / "manifest.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return {row["name"]: row.get("test_input_shapes") or {} for row in rows}


ZOO = manifest()
CARRIED_NOT = {"pipeline_vectorize": "input 'float_input' is a map"}
NEVER_RAN = {"deformconv_19", "gnn_policy", "nested_if_loop_scan"}  # ONNX Runtime refuses them
SLOW = {"ad01_loops_op19", "protocol_transformer"}
MEANINGS = {"sr": 16000}  # inputs that are no noise


def a_feed(opened: Any, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Random inputs: shapes from the manifest, else free dimensions 1."""
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for port in opened.get_inputs():
        shape = shapes.get(port.name, [d if isinstance(d, int) else 1 for d in port.shape])
        kind = dtype_of(port.type)
        if kind == np.dtype(object):
            feed[port.name] = np.full(shape, "some words", object)
        else:
            noise = np.asarray(rng.random(shape) * 3)
            feed[port.name] = np.full(shape, MEANINGS.get(port.name, noise)).astype(kind)
    return feed


def ports(opened: Any) -> list[tuple[str, str, Any]]:
    return [(p.name, p.type, p.shape) for p in (*opened.get_inputs(), *opened.get_outputs())]


def real_models() -> Iterator[Any]:
    for name in ZOO or ["none"]:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", list(real_models()))
def test_real_models_come_out_as_they_went_in(name: str, shared: Path) -> None:
    path = shared / "models" / "zoo" / f"{name}.onnx"
    if name in CARRIED_NOT:
        with pytest.raises(ModelError, match=CARRIED_NOT[name]):
            load(path)
        return
    model = load(path)
    assert to_bytes(load(to_bytes(model))) == to_bytes(model)
    if name in NEVER_RAN:
        return
    runtime = Runtime(level="none")  # fusions differ where weights were inputs
    reference = session(path, runtime)
    feed = a_feed(reference, ZOO[name])
    expected = run(reference, feed)
    opened = session(to_bytes(copy(model)), runtime)
    assert ports(opened) == ports(reference)
    found = run(opened, feed)
    assert [n for n in expected if not same(expected[n], found[n])] == []


def backend_models() -> list[Path]:
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return sorted(root.glob("*/*/model.onnx"))


BACKEND = backend_models()


def is_optional(model: onnx.ModelProto) -> bool:
    return any(p.type.WhichOneof("value") == "optional_type" for p in model.graph.input)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_the_models_of_the_onnx_test_suite_come_out_as_they_went_in(part: int) -> None:
    assert BACKEND
    for path in BACKEND[part::16]:
        check_backend_model(path)


def test_a_sample_of_the_onnx_test_suite_comes_out_as_it_went_in() -> None:
    if not BACKEND:
        pytest.skip("this onnx package comes without its test models")
    for path in BACKEND[:: max(1, len(BACKEND) // 200)]:
        check_backend_model(path)


def check_backend_model(path: Path) -> None:
    model = onnx.load(path)
    if is_optional(model):
        with pytest.raises(ModelError, match="is optional"):
            load(path)
        return
    proto = to_proto(load(path))
    constant = {t.name for t in model.graph.initializer}
    assert list(proto.graph.input) == [p for p in model.graph.input if p.name not in constant], path
    assert list(proto.graph.output) == list(model.graph.output), path
    if not model.functions:
        assert [operator(n) for n in proto.graph.node] == [
            operator(n) for n in model.graph.node if not is_lowered(n, model.graph)
        ], path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onnx.checker.check_model(proto)


def is_lowered(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    return node.op_type == "Constant" and node.output[0] not in {p.name for p in graph.output}


def _unnamed(attribute: onnx.AttributeProto) -> onnx.AttributeProto:
    """Its tensor without an empty name: onnx 1.19 writes one, later versions write none."""
    if attribute.HasField("t") and not attribute.t.name:
        attribute.t.ClearField("name")
    return attribute


def operator(node: onnx.NodeProto) -> tuple[Any, ...]:
    """What a node computes: everything but its name and its bodies, whose constants are lowered."""
    plain = [a for a in node.attribute if a.type != onnx.AttributeProto.GRAPH]
    attributes = sorted(text_format.MessageToString(_unnamed(a)) for a in plain)
    return node.op_type, node.domain, tuple(node.input), tuple(node.output), attributes
