"""Bad input, through the real command line: exit code 2, one clear sentence, nothing written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxc import files
from onnxc.cli import main

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CNN_DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
SCORES = "m (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> { y = MatMul(x, w) }"

Arguments = list[Any]


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and the one for temporary files: whatever is written, is written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shutil.copy(CNN, "cnn.onnx")
    return tmp_path


def content(box: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the session mark of ONNX Runtime."""
    found = (p for p in box.rglob("*") if p.is_file() and p.name != ".ses")
    return {str(p.relative_to(box)): p.read_bytes() for p in found}


def code_of(arguments: Arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return int(left.value.code or 0)


def refusal(arguments: Arguments, box: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a command is refused, once it is sure that nothing was written."""
    before = content(box)
    code = code_of(arguments)
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.out == ""
    assert shown.err.startswith("Error: ")
    assert shown.err.count("\n") == 1, shown.err
    assert content(box) == before
    return shown.err


def saved(name: str, text: str, **weights: NDArray[Any]) -> str:
    """A model from text; arrays become initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    for info in list(proto.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        array = weights.get(info.name, np.ones(shape, np.float32))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    Path(name).write_bytes(proto.SerializeToString())
    return name


def arrays(**named: NDArray[Any]) -> str:
    np.savez("data.npz", **named)  # type: ignore[arg-type]
    return "data.npz"


def images(count: int = 3, broken: int = 0) -> str:
    """A folder of grey images, the first ones of them cut short."""
    Path("images").mkdir()
    for number in range(count):
        path = Path("images") / f"{number}.png"
        Image.fromarray(np.full((32, 32), 20 * number, np.uint8)).save(path)
        if number < broken:
            path.write_bytes(path.read_bytes()[:40])
    return "images"


def split_model(keep: slice) -> str:
    """A model whose external data are cut."""
    onnx.save(onnx.load(CNN), "s.onnx", save_as_external_data=True, location="s.bin")
    Path("s.bin").write_bytes(Path("s.bin").read_bytes()[keep])
    return "s.onnx"


def file(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


BAD_MODELS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "missing": (lambda: "no.onnx", ("no.onnx", "does not exist")),
    "a folder": (lambda: images(1), ("images", "folder")),
    "empty": (lambda: file("e.onnx", b""), ("e.onnx", "empty")),
    "truncated": (lambda: file("t.onnx", CNN.read_bytes()[:300_000]), ("t.onnx",)),
    "cut in the graph": (lambda: file("t.onnx", CNN.read_bytes()[:500]), ("t.onnx",)),
    "text": (lambda: file("t.onnx", b"It was a dark and stormy night.\n"), ("t.onnx",)),
    "an image": (lambda: f"{images(1)}/0.png", ("0.png",)),
    "zeros": (lambda: file("z.onnx", bytes(4096)), ("z.onnx",)),
    "a missing tensor": (
        lambda: saved("i.onnx", "m (float[2] x) => (float[2] y) { y = Add(x, nowhere) }"),
        ("i.onnx", "nowhere"),
    ),
    "a cycle": (
        lambda: saved("i.onnx", "m (float[2] x) => (float[2] y) { y = Add(x, z)  z = Neg(y) }"),
        ("i.onnx", "cycle"),
    ),
    "an unknown operator": (
        lambda: saved("i.onnx", "m (float[2] x) => (float[2] y) { y = Fou(x) }"),
        ("i.onnx", "Fou"),
    ),
    "shapes that clash": (
        lambda: saved("i.onnx", SCORES.replace("[4, 3] w", "[5, 3] w")),
        ("i.onnx",),
    ),
    "external data missing": (
        lambda: (split_model(slice(None)), Path("s.bin").unlink())[0],
        ("s.onnx", "s.bin"),
    ),
    "external data cut": (lambda: split_model(slice(1000)), ("s.onnx", "s.bin")),
    "NaN in a weight": (
        lambda: saved("n.onnx", SCORES, w=np.full((4, 3), np.nan, np.float32)),
        ("n.onnx", "'w'", "NaN"),
    ),
    "infinity in a weight": (
        lambda: saved("n.onnx", SCORES, w=np.full((4, 3), np.inf, np.float32)),
        ("n.onnx", "'w'", "infinity"),
    ),
    "quantized already": (
        lambda: saved(
            "q.onnx",
            """m (float[N, 2] x) => (float[N, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.1}>
            { w = DequantizeLinear(q, s)  y = MatMul(x, w) }""",
        ),
        ("q.onnx", "already quantized", "left alone"),
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD_MODELS[name]
    sentence = refusal(["quantize", make()], box, capsys)
    assert all(word in sentence for word in words), sentence


def image_array(**changed: Any) -> NDArray[Any]:
    x: NDArray[Any] = np.load(CNN_DATA)["image"][:12].astype(np.float32)
    if "value" in changed:
        x[7, 0, 3, 3] = changed["value"]
    return x


EXPECTS = "input 'image' expects float32 [N, 1, 32, 32]"
BAD_DATA: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "missing": (lambda: "no.npz", ("no.npz", "does not exist")),
    "another shape": (
        lambda: arrays(image=np.zeros((5, 1, 28, 28), np.float32)),
        (EXPECTS, "data.npz", "(5, 1, 28, 28)"),
    ),
    "another layout": (
        lambda: arrays(image=np.zeros((5, 32, 32, 1), np.float32)),
        (EXPECTS, "data.npz", "transpose it from NHWC to NCHW"),
    ),
    "no samples": (
        lambda: arrays(image=np.zeros((0, 1, 32, 32), np.float32)),
        (EXPECTS, "is empty"),
    ),
    "another type": (lambda: arrays(image=np.full((5, 1, 32, 32), "a")), (EXPECTS, "data.npz")),
    "two arrays for one input": (
        lambda: arrays(image=image_array(), mask=image_array()),
        ("data.npz", "'image'", "'mask'"),
    ),
    "NaN": (lambda: arrays(image=image_array(value=np.nan)), ("data.npz", "'image'", "NaN")),
    "infinity": (lambda: arrays(image=image_array(value=np.inf)), ("data.npz", "sample 7", "inf")),
    "too large for the type": (
        lambda: arrays(image=np.full((5, 1, 32, 32), 1e300)),
        ("data.npz", "'image'", "infinity"),
    ),
    "no numpy file": (lambda: file("broken.npz", b"PK and no more"), ("broken.npz",)),
    "Python objects": (
        lambda: arrays(image=np.array([{}, []], object)),
        ("data.npz", "Python objects"),
    ),
    "no data file": (lambda: file("notes.txt", b"hello"), ("notes.txt", "no data")),
    "no images": (
        lambda: (images(0), file("images/readme.txt", b"none"))[0],
        ("images", "holds no images"),
    ),
    "unreadable images alone": (
        lambda: images(3, broken=3),
        ("none of the 3 images could be read", "0.png"),
    ),
    "labels for other samples": (
        lambda: arrays(image=image_array(), labels=np.zeros(5, np.int64)),
        ("data.npz", "5 labels for 12 samples"),
    ),
    "labels of other classes": (
        lambda: arrays(image=image_array(), labels=np.arange(12)),
        ("label", "10 classes", "'logits'"),
    ),
    "negative labels": (
        lambda: arrays(image=image_array(), labels=np.full(12, -1)),
        ("label -1", "10 classes"),
    ),
    "labels that are no integers": (
        lambda: arrays(image=image_array(), labels=np.zeros(12)),
        ("data.npz", "labels", "integers"),
    ),
    "a label for each pixel": (
        lambda: arrays(image=image_array(), labels=np.zeros((12, 32), np.int64)),
        ("labels of shape", "'logits'"),
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD_DATA[name]
    source = make()
    arguments = ["quantize", "cnn.onnx", "--data", source, "-o", "out.onnx"]
    sentence = refusal(arguments, box, capsys)
    assert all(word in sentence for word in words), sentence
    judged = ["quantize", "cnn.onnx", "--data", CNN_DATA, "--val", source, "-o", "out.onnx"]
    judged += ["--format", "weight-only"]  # the least work before what is judged is read
    sentence = refusal(judged, box, capsys)
    assert all(word in sentence for word in words), sentence


TOKENS_EXPECTED = "input 'tokens' expects int64 [N, 64]"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros((4, 64), np.float32), (TOKENS_EXPECTED, "float32")),
        (np.full((4, 64), 2**63, np.uint64), (TOKENS_EXPECTED, "outside")),
        (np.full((4, 64), 9999), ("cnn.onnx", "9999", TOKENS_EXPECTED)),
    ],
    ids=["floats", "too large for the type", "outside the table"],
)
def test_bad_tokens(tokens: NDArray[Any], words: tuple[str, ...], box: Path, capsys: Any) -> None:
    shutil.copy(TOKENS, "cnn.onnx")
    arguments = ["quantize", "cnn.onnx", "--data", arrays(tokens=tokens), "-o", "out.onnx"]
    sentence = refusal(arguments, box, capsys)
    assert all(word in sentence for word in words), sentence


def test_a_bad_token_late_in_the_data(box: Path, capsys: Any) -> None:
    shutil.copy(TOKENS, "cnn.onnx")
    tokens = np.array(np.load(TOKEN_DATA)["tokens"][:40], np.int64)
    tokens[3, 5] = 9999  # in a sample for calibration, not in one that judges
    source = arrays(tokens=tokens)
    sentence = refusal(["quantize", "cnn.onnx", "--data", source, "-o", "o.onnx"], box, capsys)
    assert "cnn.onnx" in sentence and "9999" in sentence


def test_an_unreadable_image_among_many_is_skipped_and_counted(box: Path, capsys: Any) -> None:
    arguments = ["quantize", "cnn.onnx", "--data", images(9, broken=2), "-o", "out.onnx"]
    assert code_of(arguments) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "unreadable images were skipped, 2 in all" in words
    assert "images/0.png" in words and "images/1.png" in words
    assert "calibrated on 6 samples, judged on 1" in words
    assert Path("out.onnx").is_file()


def linked(make: Callable[[str, str], None]) -> str:
    make("cnn.onnx", "link.onnx")
    return "link.onnx"


BAD_OUTPUTS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "in no folder": (lambda: "no/out.onnx", ("no/out.onnx", "no folder")),
    "a folder": (lambda: images(1), ("images", "is a folder")),
    "the input": (lambda: "cnn.onnx", ("cnn.onnx", "the input itself")),
    "the input, spelled otherwise": (lambda: "./x/../cnn.onnx", ("the input itself",)),
    "a symbolic link to the input": (lambda: linked(os.symlink), ("link.onnx", "the input itself")),
    "a hard link to the input": (lambda: linked(os.link), ("link.onnx", "the input itself")),
    "the data": (lambda: str(shutil.copy(CNN_DATA, "d.npz")), ("d.npz", "the input itself")),
    "a device": (lambda: os.devnull, (os.devnull, "device")),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_outputs(name: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x").mkdir()
    make, words = BAD_OUTPUTS[name]
    place = make()
    data = place if name == "the data" else CNN_DATA
    arguments = ["quantize", "cnn.onnx", "--data", data, "-o", place]
    sentence = refusal(arguments, box, capsys)
    assert all(word in sentence for word in words), sentence


def test_the_weights_of_the_input_are_not_overwritten(box: Path, capsys: Any) -> None:
    source = split_model(slice(None))
    assert "input itself" in refusal(["quantize", source, "-o", "s.bin"], box, capsys)
    Path("s.bin").rename("out.onnx.data")
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in (e for e in tensor.external_data if e.key == "location"):
            entry.value = "out.onnx.data"
    Path(source).write_bytes(proto.SerializeToString())
    assert "out.onnx.data" in refusal(["quantize", source, "-o", "out.onnx"], box, capsys)


def test_an_output_that_is_not_writable(box: Path, monkeypatch: Any, capsys: Any) -> None:
    """As the system would answer for a folder of somebody else: tests may run as root."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    sentence = refusal(["quantize", "cnn.onnx", "-o", "out.onnx"], box, capsys)
    assert "out.onnx is not writable" in sentence


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(box: Path, capsys: Any) -> None:
    Path("locked").mkdir(mode=0o500)
    sentence = refusal(["quantize", "cnn.onnx", "-o", "locked/out.onnx"], box, capsys)
    assert "locked/out.onnx is not writable" in sentence


class FullDisk:
    """A file on a disk with no room left."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *reason: object) -> None:
        self.opened.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def write(self, data: bytes) -> int:
        self.opened.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_a_full_disk(command: str, box: Path, monkeypatch: Any, capsys: Any) -> None:
    create = files._create
    monkeypatch.setattr(files, "_create", lambda *paths: FullDisk(create(*paths)))
    arguments = [command, "cnn.onnx", "--data", CNN_DATA, "--samples", 8, "-o", "out.onnx"]
    sentence = refusal(arguments, box, capsys)
    assert "cannot write out.onnx: No space left on device" in sentence


BAD_OPTIONS: dict[str, tuple[Arguments, tuple[str, ...]]] = {
    "an unknown node": (
        ["--exclude", "/0/0.0/Conv"],
        ("'/0/0.0/Conv' matches no node; the nearest: /",),
    ),
    "an unknown included node": (["--include", "nothing*"], ("'nothing*' matches no node",)),
    "an unknown op": (["--exclude", "op:Covn"], ("'op:Covn' matches no node", "Conv")),
    "an unknown end": (["--include", "a..b"], ("no node 'a'",)),
    "no expression": (["--exclude", "re:("], ("re:(", "regular expression")),
    "an empty pattern": (["--exclude", ""], ("is empty",)),
    "target": (["--target", "vax"], ("'vax'", "'auto'", "'x86-vnni'")),
    "provider": (["--provider", "Abacus"], ("'Abacus'", "CPU")),
    "level": (["--level", "most"], ("'most'", "'extended'")),
    "threads": (["--threads", "-1"], ("--threads", "-1")),
    "samples": (["--samples", "0"], ("--samples",)),
    "format": (["--format", "gguf"], ("'gguf'", "'qdq'")),
    "bits": (["--bits", "12"], ("not 12", "8 or 16")),
    "settings that clash": (["--format", "dynamic", "--bits", "4"], ("dynamic", "weight-only")),
    "seed": (["--seed", "luck"], ("--seed", "luck")),
    "memory": (["--max-memory", "lots"], ("'lots'", "400MB")),
    "preset": (["--preset", "imagenot"], ("imagenot", "imagenet")),
    "size": (["--data", "images", "--size", "big"], ("--size", "big", "224")),
    "resize": (["--data", "images", "--resize", "melt"], ("--resize", "melt")),
    "a size that does not fit": (
        ["--data", "images", "--size", "64"],
        (EXPECTS, "--size 64x64"),
    ),
    "no recipe": (["--recipe", "no.toml"], ("no.toml",)),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images()
    arguments, words = BAD_OPTIONS[name]
    sentence = refusal(["quantize", "cnn.onnx", "-o", "out.onnx", *arguments], box, capsys)
    assert all(word in sentence for word in words), sentence


BAD_RECIPES = {
    "an unknown key": ("sede = 1", ("r.toml", "'sede'", "did you mean 'seed'")),
    "an unknown pass": ('[[pass]]\nname = "quantise"', ("'quantise'", "did you mean 'quantize'")),
    "an unknown key of a pass": (
        '[[pass]]\nname = "quantize"\nrange = "mse"',
        ("'range'", "[[pass]] quantize", "did you mean 'ranges'"),
    ),
    "a value of another type": (
        '[[pass]]\nname = "quantize"\nranges = 3',
        ("ranges", "one of minmax", "3"),
    ),
    "an unknown target": ('[target]\nname = "vax"', ("'vax'", "x86-vnni")),
    "an unknown node": ('exclude = ["/nothing"]', ("'/nothing' matches no node",)),
    "no TOML": ("seed = ", ("r.toml", "TOML")),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes(name: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = BAD_RECIPES[name]
    file("r.toml", text.encode())
    arguments = ["quantize", "cnn.onnx", "--recipe", "r.toml", "-o", "out.onnx"]
    sentence = refusal(arguments, box, capsys)
    assert all(word in sentence for word in words), sentence


def test_an_option_that_no_pass_of_the_recipe_has(box: Path, capsys: Any) -> None:
    file("r.toml", b'[[pass]]\nname = "quantize"\n')
    arguments = ["quantize", "cnn.onnx", "--recipe", "r.toml", "--format", "dynamic"]
    assert "no pass of the recipe has the key 'format'" in refusal(arguments, box, capsys)


def test_models_for_a_comparison_that_take_other_inputs(box: Path, capsys: Any) -> None:
    sentence = refusal(["validate", "cnn.onnx", TOKENS], box, capsys)
    assert EXPECTS in sentence and "has no such input" in sentence
    assert "'image'" in refusal(["bench", "cnn.onnx", TOKENS], box, capsys)


def test_a_bound_for_a_model_without_classes(box: Path, capsys: Any) -> None:
    text = SCORES.replace("float[N, 3] y", "float[N, 1] y").replace("[4, 3] w", "[4, 1] w")
    arguments = ["quantize", saved("one.onnx", text), "--max-drop", 1, "-o", "out.onnx"]
    assert "--max-drop needs a model with classes" in refusal(arguments, box, capsys)
