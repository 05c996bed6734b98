"""The package: the same bytes come back, and nothing but a sentence comes of a damaged file."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zstandard
from calls import call, report_of
from onnx import TensorProto, helper, numpy_helper
from texts import bind, normal

import onnxc
from onnxc.errors import ModelError, OptionError
from onnxc.graph import load, to_bytes
from onnxc.runtime import run, session
from onnxc.storage import package, pieces
from onnxc.storage.coders import numbers

MODELS = Path(__file__).resolve().parents[1] / "models"
NAMES = ["resnet20", "stories260k"]

TEXT = """
g (float[N, 24] x) => (float[N, 10] y)
<float[24, 64] w, float[64] b, float[64, 10] v>
{ h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v) }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Tensors of several forms: float, clustered, pruned."""
    levels = np.sort(normal(16))
    w = levels[np.abs(normal(24, 64) * 4).astype(int).clip(0, 15)]
    v = np.where(np.abs(normal(64, 10)) < 0.7, 0, normal(64, 10)).astype(np.float32)
    proto = bind(TEXT, w=w, b=normal(64), v=v)
    proto.doc_string = "what it is for"
    proto.metadata_props.add(key="author", value="somebody")
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def packed(model: Path) -> Path:
    onnxc.pack(model)
    return model.with_suffix(".onnxz")


def round_trip(path: Path, folder: Path, **how: Any) -> Path:
    """Pack, unpack into a new folder; the file that came back."""
    place = folder / "back" / path.name
    place.parent.mkdir()
    onnxc.pack(path, folder / "p.onnxz", **how)
    onnxc.unpack(folder / "p.onnxz", place)
    return place


@pytest.mark.parametrize("thorough", [False, True])
def test_the_same_bytes_come_back(model: Path, tmp_path: Path, thorough: bool) -> None:
    back = round_trip(model, tmp_path, thorough=thorough)
    assert back.read_bytes() == model.read_bytes()
    assert (tmp_path / "p.onnxz").stat().st_size < 0.6 * model.stat().st_size


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_models_of_the_repository(name: str, tmp_path: Path) -> None:
    path = MODELS / f"{name}.onnx"
    assert round_trip(path, tmp_path).read_bytes() == path.read_bytes()
    best = len(zstandard.compress(path.read_bytes(), 19))
    assert (tmp_path / "p.onnxz").stat().st_size < 0.92 * best


@pytest.mark.parametrize("name", NAMES)
def test_real_models(shared: Path, name: str, tmp_path: Path) -> None:
    path = shared / "models" / f"{name}.onnx"
    assert round_trip(path, tmp_path).read_bytes() == path.read_bytes()
    assert (tmp_path / "p.onnxz").stat().st_size < 0.85 * path.stat().st_size


def test_the_zoo(shared: Path, tmp_path: Path) -> None:
    """Models of other tools, with bodies, functions, old versions and odd types."""
    for path in sorted((shared / "models" / "zoo").glob("*.onnx")):
        if path.stat().st_size < 120_000:
            onnxc.pack(path, tmp_path / "p.onnxz")
            onnxc.unpack(tmp_path / "p.onnxz", tmp_path / "m.onnx")
            assert (tmp_path / "m.onnx").read_bytes() == path.read_bytes(), path.name
            best = len(zstandard.compress(path.read_bytes(), 19))
            assert (tmp_path / "p.onnxz").stat().st_size <= 1.001 * best + 200, path.name


def everywhere() -> onnx.ModelProto:
    """Tensors wherever a model may have them, in every way to store numbers."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(normal(20, 30)))],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [20, 30])],
        [numpy_helper.from_array(normal(30, 20, seed=1), "inner")],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["plain"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, [20, 30])],
    )
    values = {
        "plain": (TensorProto.FLOAT, normal(20, 30).ravel()),
        "doubles": (TensorProto.DOUBLE, normal(600).astype(np.float64)),
        "bytes": (TensorProto.INT8, np.arange(-100, 500) % 100),
        "longs": (TensorProto.INT64, np.arange(600)),
        "halves": (TensorProto.FLOAT16, normal(600)),
        "nibbles": (TensorProto.INT4, np.arange(2000) % 7),
    }
    graph = helper.make_graph(
        [
            helper.make_node(
                "If", ["c"], ["y"], then_branch=inner, else_branch=other, doc_string="d"
            )
        ],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [20, 30])],
        [helper.make_tensor(n, t, [v.size], v.tolist()) for n, (t, v) in values.items()]
        + [
            helper.make_tensor(
                "texts", TensorProto.STRING, [300], [f"word {i}" for i in range(300)]
            )
        ],
    )
    graph.initializer[0].dims[:] = [20, 30]
    body = [helper.make_node("Constant", [], ["o"], value=numpy_helper.from_array(normal(700)))]
    function = helper.make_function("f", "F", [], ["o"], body, [helper.make_opsetid("", 21)])
    sparse = onnx.SparseTensorProto(dims=[9000])
    sparse.values.CopyFrom(numpy_helper.from_array(normal(500), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(500) * 3))
    graph.sparse_initializer.append(sparse)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets)


def test_tensors_are_found_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "e.onnx"
    path.write_bytes(everywhere().SerializeToString())
    assert round_trip(path, tmp_path).read_bytes() == path.read_bytes()
    (member,) = pieces.members(path)
    names = {piece.name for piece in member.pieces}
    assert names >= {"plain", "inner", "doubles", "bytes", "longs", "halves", "nibbles", "sparse"}
    assert len(member.pieces) == 11  # with the indices, and the constants of a body and a function


def test_fields_that_are_not_known_are_kept(model: Path, tmp_path: Path) -> None:
    extra = numbers(999 << 3 | 2, 700) + bytes(700)
    model.write_bytes(model.read_bytes() + extra)
    assert round_trip(model, tmp_path).read_bytes() == model.read_bytes()


def external(model: Path, folder: Path, location: str = "weights/m.bin") -> Path:
    proto = onnx.load(model)
    path = folder / "far" / "m.onnx"
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"location": location, "size_threshold": 100}
    onnx.save(proto, path, save_as_external_data=True, **options)
    return path


def test_external_data_comes_back_beside_the_model(model: Path, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    back = round_trip(path, tmp_path)
    for file in ("m.onnx", "weights/m.bin"):
        assert (back.parent / file).read_bytes() == (path.parent / file).read_bytes()
    x = normal(3, 24)
    (y,) = run(session(tmp_path / "p.onnxz"), {"x": x}).values()
    np.testing.assert_array_equal(y, run(session(model), {"x": x})["y"])
    assert (tmp_path / "p.onnxz").stat().st_size < 0.6 * model.stat().st_size


def test_external_data_never_overwrites_a_file(model: Path, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    onnxc.pack(path, tmp_path / "p.onnxz")
    with pytest.raises(OptionError, match=r"m\.bin exists already; unpack the model into another"):
        onnxc.unpack(tmp_path / "p.onnxz", path.parent / "new.onnx")
    assert not (path.parent / "new.onnx").exists()


def test_external_data_that_is_missing_is_named(model: Path, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    (path.parent / "weights/m.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="too short for weight"):
        onnxc.pack(path, tmp_path / "p.onnxz")
    (path.parent / "weights/m.bin").unlink()
    with pytest.raises(ModelError, match="not beside the model"):
        onnxc.pack(path, tmp_path / "p.onnxz")
    assert not (tmp_path / "p.onnxz").exists()


def test_tensors_that_are_alike_are_stored_once(tmp_path: Path) -> None:
    w = normal(64, 64)
    text = "g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w, float[64, 64] v>"
    proto = bind(text + "{ h = MatMul(x, w)  y = MatMul(h, v) }", w=w, v=w)
    path = tmp_path / "twice.onnx"
    path.write_bytes(proto.SerializeToString())
    assert round_trip(path, tmp_path).read_bytes() == path.read_bytes()
    assert (tmp_path / "p.onnxz").stat().st_size < w.nbytes


def test_every_reader_of_models_reads_a_package(model: Path, packed: Path, tmp_path: Path) -> None:
    assert to_bytes(load(packed)) == to_bytes(load(model))
    x = normal(5, 24)
    np.testing.assert_array_equal(
        run(session(packed), {"x": x})["y"], run(session(model), {"x": x})["y"]
    )
    assert onnxc.inspect(packed).bytes == packed.stat().st_size
    found = onnxc.validate(model, packed, data={"x": x}, save_vectors=tmp_path / "vectors")
    assert found.comparison.sqnr > 150
    assert (tmp_path / "vectors" / "model.onnx").read_bytes() == model.read_bytes()
    report = onnxc.quantize(packed, data={"x": x}, output=tmp_path / "q.onnx")
    assert report.model == str(packed)


def test_commands_read_a_package(packed: Path, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=normal(20, 24))
    data = ("--data", tmp_path / "x.npz", "--quiet")
    assert call("inspect", packed, "--quiet") == 0
    assert call("validate", model, packed, *data) == 0
    assert call("bench", model, packed, "--repeats", 2, "--min-time", 0.01, "--quiet") == 0
    assert call("calibrate", packed, *data, "-o", tmp_path / "m.stats") == 0
    assert call("quantize", packed, *data, "-o", tmp_path / "q.onnx") == 0
    assert call("pack", tmp_path / "q.onnx", "--quiet") == 0
    assert (tmp_path / "q.onnxz").is_file()


def test_the_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "p.onnxz"
    found = report_of(capsys, "pack", model, "-o", packed)
    assert (found["before"], found["after"]) == (model.stat().st_size, packed.stat().st_size)
    assert found["ratio"] == pytest.approx(found["before"] / found["after"])
    assert sum(way["tensors"] for way in found["ways"].values()) == 2
    assert sum(way["before"] for way in found["ways"].values()) == 4 * (24 * 64 + 64 * 10)
    found = report_of(capsys, "unpack", packed, "-o", tmp_path / "back.onnx")
    assert (found["before"], found["after"]) == (packed.stat().st_size, model.stat().st_size)
    assert found["files"] == [str(tmp_path / "back.onnx")]
    assert call("pack", model, "-o", packed) == 0
    assert {"codebook, rANS", "in all", "ratio"} <= {
        part.strip() for line in capsys.readouterr().out.splitlines() for part in line.split("  ")
    }


REFUSED: dict[str, Callable[[Path, Path], Any]] = {
    "is packed already": lambda model, packed: onnxc.pack(packed),
    "no package of onnxc pack": lambda model, packed: onnxc.unpack(model, model.parent / "o.onnx"),
    "does not exist": lambda model, packed: onnxc.pack(model.parent / "no.onnx"),
    "is the input itself": lambda model, packed: onnxc.unpack(packed, packed),
    "there is no folder": lambda model, packed: onnxc.pack(model, model.parent / "no" / "p.onnxz"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_requests(sentence: str, model: Path, packed: Path) -> None:
    with pytest.raises((ModelError, OptionError), match=sentence):
        REFUSED[sentence](model, packed)


@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(2000), b"\x3a\xff\xff\x03zz"])
def test_what_is_no_model_is_not_packed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.onnx"):
        onnxc.pack(path)
    assert list(tmp_path.iterdir()) == [path]


def read_or_refused(path: Path, expected: bytes) -> bool:
    """Whether a package is read; then the bytes must be the right ones."""
    try:
        (stored,) = package.read(path)
        found = b"".join(bytes(part) for part in package.restore(path, stored))
    except ModelError:
        return False
    assert found == expected
    return True


def test_a_truncated_package_is_an_error(model: Path, packed: Path, tmp_path: Path) -> None:
    data, expected = packed.read_bytes(), model.read_bytes()
    cut = tmp_path / "cut.onnxz"
    for length in {*range(0, len(data), 53), *range(len(data) - 50, len(data))}:
        cut.write_bytes(data[:length])
        assert not read_or_refused(cut, expected), length
    cut.write_bytes(data + b"\0")
    assert not read_or_refused(cut, expected)


def test_a_flipped_bit_is_an_error(model: Path, packed: Path, tmp_path: Path) -> None:
    data, expected = packed.read_bytes(), model.read_bytes()
    bad = tmp_path / "bad.onnxz"
    for at in {*range(8, len(data), 29), *range(len(data) - 44, len(data))}:
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        bad.write_bytes(bytes(flipped))
        assert not read_or_refused(bad, expected), at


def rewritten(packed: Path, place: Path, edit: Callable[[bytes], bytes]) -> Path:
    """A package with other contents whose checksums are right, as an attacker would write it."""
    data = packed.read_bytes()
    with packed.open("rb") as file:
        start, contents = package._contents(file, len(data))
    with place.open("wb") as file:
        file.write(data[:start])
        package._finish(file, edit(contents))
    return place


def test_contents_of_an_attacker_are_read_or_refused(packed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def edit(contents: bytes) -> bytes:
        changed = bytearray(contents)
        for _ in range(int(rng.integers(1, 4))):
            changed[rng.integers(min(len(changed), 200))] = rng.integers(256)
        return bytes(changed[: int(rng.integers(1, 2 * len(changed)))])

    for _ in range(300):
        bad = rewritten(packed, tmp_path / "bad.onnxz", edit)
        try:
            for stored in package.read(bad):
                sum(len(part) for part in package.restore(bad, stored))
        except ModelError as error:
            assert len(str(error)) > 20


@pytest.mark.parametrize("size", [1 << 30, 1 << 45, 1 << 62])
def test_no_declared_size_is_allocated(packed: Path, tmp_path: Path, size: int) -> None:
    def lying(contents: bytes) -> bytes:
        place = numbers(0, size, 8, 4, zlib.crc32(b""), zlib.crc32(b""))
        told = numbers(0, 0, 4, 0)  # bytes as they are
        return numbers(1, 0, 1, 0) + place + numbers(1) + b"w" + numbers(len(told)) + told

    bad = rewritten(packed, tmp_path / "bad.onnxz", lying)
    with pytest.raises(ModelError, match="weight 'w' declares too many bytes"):
        package.read(bad)
    with pytest.raises(ModelError, match=r"bad\.onnxz: the package is damaged"):
        load(bad)


@pytest.mark.parametrize("name", ["../out.bin", "/tmp/out.bin", "", "a/../../b"])
def test_no_file_outside_the_folder_is_written(packed: Path, tmp_path: Path, name: str) -> None:
    def escaping(contents: bytes) -> bytes:
        told = name.encode()
        return numbers(2, 0, 0, 0) + numbers(len(told)) + told + numbers(0, 4) + b"data"

    bad = rewritten(packed, tmp_path / "bad.onnxz", escaping)
    with pytest.raises(ModelError, match="its contents make no model"):
        onnxc.unpack(bad, tmp_path / "m2.onnx")
    assert not (tmp_path / "m2.onnx").exists()


def test_a_newer_version_is_told(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "VERSION", 2)
    with pytest.raises(ModelError, match="of version 1; this onnxc reads 2"):
        package.read(packed)


def test_a_full_disk_is_told_before_anything_is_written(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(package.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OptionError, match="has room for 10 bytes"):
        onnxc.unpack(packed, tmp_path / "back.onnx")


def test_an_interrupted_pack_leaves_what_was_there(
    model: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed.read_bytes()

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(package.streams, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        onnxc.pack(model, packed)
    assert packed.read_bytes() == before
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.onnx", "m.onnxz"]


def test_the_same_model_gives_the_same_package(model: Path, packed: Path, tmp_path: Path) -> None:
    onnxc.pack(model, tmp_path / "again.onnxz")
    assert (tmp_path / "again.onnxz").read_bytes() == packed.read_bytes()


def test_a_missing_library_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OptionError('pip install "onnxc[pack]"')

    monkeypatch.setattr(package, "libraries", missing)
    with pytest.raises(OptionError, match="pip install"):
        onnxc.pack(model)
    assert not model.with_suffix(".onnxz").exists()
