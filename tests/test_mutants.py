"""Models that something is wrong with: refused with a sentence, or carried as they are."""

from __future__ import annotations

import io
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image
from texts import context

from calib.data import InputSpec, Preprocess, open_data
from onnxc import api, recipe
from onnxc.anytime import journal
from onnxc.check import problems, snapshot
from onnxc.core import PASSES
from onnxc.errors import DataError, ModelError, OnnxcError, OptionError
from onnxc.graph import load, to_bytes
from onnxc.pipeline import apply_pass
from onnxc.shapes import infer

QUICK, WHOLE = 150, 5_000
MOST = 2 << 30  # bytes more than now that a process may ask for


@contextmanager
def bounded(size: int = MOST) -> Iterator[None]:
    """Whoever asks for more memory than that is refused it."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder: Path, model: onnx.ModelProto) -> Path:
    (folder / "w.bin").write_bytes(np.linspace(0.1, 1, 64, dtype=np.float32).tobytes())
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    """The sentence that a model is refused with; empty where it is taken and comes back."""
    try:
        with bounded():
            loaded = load(path)
            again = load(to_bytes(loaded))
    except OnnxcError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)
    assert len(again.graph.nodes) == len(loaded.graph.nodes)
    return ""


def loads(folder: Path, seeds: range) -> Counter[bool]:
    return Counter(bool(refusal(write(folder, mutants.mutant(seed)))) for seed in seeds)


def test_sound_models_are_taken(tmp_path: Path) -> None:
    assert {name: refusal(write(tmp_path, mutants.sound(name))) for name in mutants.NAMES} == (
        dict.fromkeys(mutants.NAMES, "")
    )


def test_mutants_are_refused_or_taken(tmp_path: Path) -> None:
    found = loads(tmp_path, range(QUICK))
    assert min(found[True], found[False]) > QUICK // 5  # both happen, so both are tested


@pytest.mark.slow
def test_many_mutants_are_refused_or_taken(tmp_path: Path) -> None:
    loads(tmp_path, range(QUICK, WHOLE))


def check_passes(path: Path) -> int:
    """Each pass leaves a mutant that runs whole, or leaves it alone; how many were changed."""
    if refusal(path) or snapshot(load(path), None).failure:
        return 0
    changed = 0
    for name, make in sorted(PASSES.items()):
        model, before = load(path), load(path)
        infer(model)  # a wrong shape that the file tells of a tensor inside is mended by it
        infer(before)
        done = apply_pass(model, make(), context(model))
        if done.changes:
            changed += 1
            assert problems(before, model, None, make.lossless) == [], name
        else:
            assert to_bytes(model) == to_bytes(before), name
    return changed


def test_passes_on_mutants(tmp_path: Path) -> None:
    assert sum(check_passes(write(tmp_path, mutants.mutant(seed))) for seed in range(6)) > 0


@pytest.mark.slow
def test_passes_on_many_mutants(tmp_path: Path) -> None:
    for seed in range(6, 400):
        check_passes(write(tmp_path, mutants.mutant(seed)))


COMMANDS: dict[str, Callable[..., Any]] = {
    "quantize": api.quantize,
    "weight-only": lambda m, **o: api.quantize(m, format="weight-only", **o),
    "prune": api.prune,
    "factorize": api.factorize,
    "cluster": api.cluster,
    "sparsify": api.sparsify,
}


def declared(path: Path) -> list[bytes]:
    graph = onnx.load(path, load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    ports = (*(v for v in graph.input if v.name not in constant), *graph.output)
    return [port.SerializeToString(deterministic=True) for port in ports]


def check_command(command: str, path: Path, seed: int) -> bool:
    """A file that is written has the interface of the original, and runs; whether one was."""
    output = path.with_name("out.onnx")
    output.unlink(missing_ok=True)
    try:
        COMMANDS[command](path, output=output)
    except OnnxcError as error:
        assert "\n" not in str(error)
        assert not output.exists()
        return False
    assert snapshot(load(output), None).failure is None, seed
    assert declared(output) == declared(path), seed
    return True


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_mutants(command: str, tmp_path: Path) -> None:
    written = [
        check_command(command, write(tmp_path, mutants.mutant(seed)), seed) for seed in range(60)
    ]
    assert sum(written) > 10


FILLINGS: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda x: np.full_like(x, np.nan),
    "one infinity": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, np.inf, x),
    "denormal": lambda x: np.full_like(x, 1e-42),
    "zeros": np.zeros_like,
    "the largest": lambda x: np.full_like(x, np.finfo(np.float32).max),
    "a dead channel": lambda x: np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)), x, 0),
}
SIXTEEN = ", ".join(str(0.1 * i) for i in range(16))
EDGES = {
    "no samples": f"""g (float[0,4] x) => (float[0,4] y) <float[4,4] W = {{{SIXTEEN}}}> {{
        y = MatMul (x, W) }}""",
    "no channels": """g (float[N,0] x) => (float[N,4] y) <float[0,4] W = {}> {
        y = MatMul (x, W) }""",
    "scalars": """g (float x) => (float y) <float w = {2}> { z = Mul (x, w) y = Relu (z) }""",
    "constant activations": f"""g (float[N,4] x) => (float[N,4] y)
        <float[4,4] W = {{{SIXTEEN}}}, float[1] o = {{0}}> {{
            z = Mul (x, o)
            y = MatMul (z, W) }}""",
}


def filled(name: str, filling: str) -> onnx.ModelProto:
    """A sound model with other weights."""
    model = mutants.sound(name)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = FILLINGS[filling](onnx.numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def edge(name: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + EDGES[name])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a command refuses what is not finite
@pytest.mark.parametrize("filling", FILLINGS)
def test_passes_on_odd_weights(filling: str, tmp_path: Path) -> None:
    check_passes(write(tmp_path, filled("convolution", filling)))


@pytest.mark.parametrize("name", EDGES)
def test_passes_on_odd_shapes(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, edge(name))
    assert refusal(path) == ""
    check_passes(path)


@pytest.mark.slow
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_odd_weights(command: str, filling: str, tmp_path: Path) -> None:
    """Weights that are not finite are refused; what becomes so inside is left alone."""
    is_written = check_command(command, write(tmp_path, filled("convolution", filling)), 0)
    if filling == "the largest":
        assert is_written == (command in ("factorize", "cluster"))
    else:
        assert is_written == (filling not in ("NaN", "one infinity"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_odd_shapes(command: str, name: str, tmp_path: Path) -> None:
    check_command(command, write(tmp_path, edge(name)), 0)


def edited(name: str, edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = mutants.sound(name)
    edit(model)
    return model


def first(model: onnx.ModelProto) -> onnx.TensorProto:
    return model.graph.initializer[0]


def place(model: onnx.ModelProto, key: str, value: str) -> None:
    for entry in first(model).external_data:
        if entry.key == key:
            entry.value = value


def not_text(model: onnx.ModelProto) -> onnx.ModelProto:
    """A node whose operator is not UTF-8: protobuf writes what it is told and checks nothing."""
    data = model.SerializeToString().replace(b"Identity", b"Ident\xfety")
    return onnx.ModelProto.FromString(data)


BROKEN: dict[str, tuple[onnx.ModelProto, str]] = {
    "an element type that there is not": (
        edited(
            "shapes", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1 << 16)
        ),
        "element type 65536",
    ),
    "a weight of an unknown type": (
        edited("shapes", lambda m: setattr(first(m), "data_type", 255)),
        "type 255 has no fixed size",
    ),
    "a weight without a type": (
        edited("shapes", lambda m: first(m).ClearField("data_type")),
        "type 0 has no fixed size",
    ),
    "an external weight of an unknown type": (
        edited("external", lambda m: setattr(first(m), "data_type", 63)),
        "type 63 has no fixed size",
    ),
    "a shape below zero": (
        edited("shapes", lambda m: first(m).dims.__setitem__(0, -3)),
        "shape [-3",
    ),
    "a shape that overflows": (
        edited("shapes", lambda m: first(m).dims.__setitem__(0, 1 << 62)),
        "does not fit",
    ),
    "data of another length": (
        edited("shapes", lambda m: setattr(first(m), "raw_data", b"\0" * 44)),
        "invalid",
    ),
    "external data outside": (
        edited("external", lambda m: place(m, "location", "../w")),
        "outside",
    ),
    "external data at the root": (
        edited("external", lambda m: place(m, "location", "/etc/hostname")),
        "outside",
    ),
    "external data in a file that has no name": (
        edited("external", lambda m: place(m, "location", "9" * 5000)),
        "cannot be read",
    ),
    "external data too short": (
        edited("external", lambda m: place(m, "offset", "240")),
        "too short",
    ),
    "a place of many digits": (
        edited("external", lambda m: place(m, "offset", "9" * 5000)),
        "of 5000 characters",
    ),
    "a text that is none": (not_text(mutants.sound("body")), "not UTF-8"),
    "a function that takes more than it has": (
        edited("function", lambda m: m.graph.node[0].input.append("x")),
        "cannot be inlined",
    ),
    "two functions of one name": (
        edited("function", lambda m: m.functions.append(m.functions[0])),
        "there are 2 local functions",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(name: str, tmp_path: Path) -> None:
    model, word = BROKEN[name]
    assert word in refusal(write(tmp_path, model))


def test_a_place_of_many_digits_is_not_packed(tmp_path: Path) -> None:
    path = write(tmp_path, BROKEN["a place of many digits"][0])
    with pytest.raises(ModelError, match="bad place"):
        api.pack(path, tmp_path / "m.onnxz")


def test_weights_may_overlap_in_their_file(tmp_path: Path) -> None:
    model = mutants.external()
    model.graph.initializer.append(first(model))
    model.graph.initializer[1].name = "unread"
    assert refusal(write(tmp_path, model)) == ""


@pytest.mark.parametrize(
    ("text", "word"),
    [("seed = " + "9" * 5000, "not valid TOML"), ("a = " + "[" * 5000, "nested too deep")],
)
def test_broken_recipes(text: str, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        recipe.loads(text)


PORTS = (InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8)),)


def test_a_header_of_an_array_that_ends_early(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3, 8, 8), np.float32))
    data = file.getvalue().replace(b"'shape': (2, 3, 8, 8)", b"'shape': ((, 3, 8, 8)")
    (tmp_path / "data.npy").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*data\.npy"):
        open_data(tmp_path / "data.npy", PORTS)


def test_an_image_that_is_far_larger_than_its_file(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8300, 8300), np.uint8)).save(tmp_path / "0.png")
    assert (tmp_path / "0.png").stat().st_size < 1 << 20
    with pytest.raises(DataError, match="8300 x 8300 pixels"):
        list(open_data(tmp_path, PORTS, Preprocess(resize="stretch")).batches(1))


@pytest.mark.parametrize(
    "line", [b'[{"plan": "p"}]', b"[[]]", b"[]", b"3", b"[" * 100_000], ids=range(5)
)
def test_a_damaged_journal(line: bytes, tmp_path: Path) -> None:
    (tmp_path / f"out{journal.SUFFIX}").write_bytes(b'{"model": "m"}\n' + line + b"\n")
    with pytest.raises(OptionError, match="cannot go on with"):
        journal.begin(tmp_path / "out", {"model": "m"}, resume=True)


def test_a_mutant_is_the_same_for_a_seed() -> None:
    drawn = [mutants.mutant(seed).SerializeToString() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
