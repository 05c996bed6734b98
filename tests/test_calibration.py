"""`onnxc calibrate`: what is gathered of which tensors, what is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizing import dataset
from texts import bind, normal, positive

import onnxc
from calib.statistics import load as load_statistics
from onnxc import calibration
from onnxc.cli import run
from onnxc.core import Context, Key
from onnxc.errors import OptionError
from onnxc.graph import load, opset
from onnxc.moments import moments_keys
from onnxc.pipeline import prepare
from onnxc.shapes import infer
from onnxc.targets import TARGETS
from passes.equalize import Equalize
from passes.quantize import Quantize

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CNN_DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"


def residual() -> onnx.ModelProto:
    """Convolutions, a sum under a Relu whose summands are read once and twice, and an LSTM."""
    return bind(
        """g (float[N,3,8,8] x, float[6,3,3,3] A, float[6,6,3,3] B, float[6,6,3,3] C,
               float[1,16,64] W, float[1,16,4] R)
             => (float[N,6,8,8] y, float[N,1,6,4] z) {
            a = Conv <pads: ints = [1,1,1,1]> (x, A)
            r = Relu (a)
            b = Conv <pads: ints = [1,1,1,1]> (r, B)
            s = Add (b, r)
            q = Relu (s)
            y = Conv <pads: ints = [1,1,1,1]> (q, C)
            shape = Constant <value: tensor = int64[3] {-1, 6, 64}> ()
            f = Reshape (q, shape)
            z = LSTM <hidden_size: int = 4> (f, W, R) }""",
        A=normal(6, 3, 3, 3, seed=1),
        B=normal(6, 6, 3, 3, seed=2),
        C=normal(6, 6, 3, 3, seed=3),
        W=normal(1, 16, 64, seed=4),
        R=normal(1, 16, 4, seed=5),
    )


def gathered(tmp_path: Path, proto: onnx.ModelProto, data: Any, **options: Any) -> Any:
    model, path = tmp_path / "m.onnx", tmp_path / "m.stats"
    model.write_bytes(proto.SerializeToString())
    report = onnxc.calibrate(model, data=data, output=path, **options)
    return report, load_statistics(path)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize(
    ("model", "data"), [(CNN, CNN_DATA), (TOKENS, TOKEN_DATA), (residual(), None)]
)
def test_what_quantizing_wants_of_the_prepared_graph_is_there(
    model: Any, data: Path | None, target: str
) -> None:
    opened = load(model)
    arrays = {"x": normal(2, 3, 8, 8)} if data is None else dict(np.load(data))
    arrays = {port.name: arrays[port.name][:2] for port in opened.graph.inputs}
    feed = next(iter(dataset(opened, arrays).batches(1)))
    prepare(opened, feed)
    infer(opened, feed)
    context = Context(opset(opened.graph), TARGETS[target])
    keys = set(calibration.wanted_keys(opened.graph, calibration.WHAT))
    for pass_ in (Quantize(), Quantize(spread=False), Equalize()):
        assert set(pass_.wants(opened.graph, context)) <= keys
    assert set(moments_keys(opened.graph).values()) <= keys


def test_tensors_are_those_of_the_prepared_graph(tmp_path: Path) -> None:
    x = positive(6, 3, 8, 8)
    report, found = gathered(tmp_path, residual(), x)
    observed = {key.tensor for key in found.stats if key.what == "histogram"}
    assert observed == {"x", "r", "b", "q", "y", "f", "z"}  # neither a nor s: a Relu takes them in
    assert Key("q", "histogram", minus="r") in found.stats
    assert Key("q", "histogram", minus="b") not in found.stats  # r is read twice
    assert report.samples == len(found.samples) == 6
    assert report.statistics == {"histogram": 8, "moments": 4}  # no channels to equalize
    assert report.bytes == (tmp_path / "m.stats").stat().st_size
    assert 0 < report.rows < 1 and report.binned == 1


def test_the_kinds_can_be_chosen(tmp_path: Path) -> None:
    _, found = gathered(tmp_path, residual(), positive(3, 3, 8, 8), what=("range", "mean"))
    assert {key.what for key in found.stats} == {"range", "mean"}
    x: Any = found.stats[Key("x", "range")]
    assert float(x.low) == positive(3, 3, 8, 8).min()
    mean: Any = found.stats[Key("x", "mean", 1)]
    np.testing.assert_allclose(mean.mean, positive(3, 3, 8, 8).mean((0, 2, 3)), rtol=1e-6)
    with pytest.raises(OptionError, match="--what mood is unknown: choose from range, histogram"):
        onnxc.calibrate(CNN, data=CNN_DATA, output=tmp_path / "s", what=("mood",))
    with pytest.raises(OptionError, match="--what nothing"):
        onnxc.calibrate(CNN, data=CNN_DATA, output=tmp_path / "s", what=())
    assert not (tmp_path / "s").exists()


def test_layers_without_moments_are_named_with_the_reason(tmp_path: Path) -> None:
    proto = bind(
        """g (float[N,4] x, float[3,4,4] W) => (float[3,N,4] y) { y = MatMul (x, W) }""",
        W=normal(3, 4, 4),
    )
    report, found = gathered(tmp_path, proto, normal(5, 4))
    assert [skip.reason for skip in report.skips] == [
        "its weight has 3 axes, so there is one matrix a sample"
    ]
    assert not any(key.what == "moments" for key in found.stats)
    report, _ = gathered(tmp_path, proto, normal(5, 4), what=("range",))
    assert report.skips == ()


def test_a_layer_in_a_body_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    m (float[N, 4] x, bool c) => (float[N, 4] y)
      <float[4, 4] W = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
      y = If (c) <
        then_branch = a () => (float[N, 4] p) { p = MatMul (x, W) },
        else_branch = b () => (float[N, 4] q) { q = Identity (x) } > }"""
    proto = onnx.parser.parse_model(text)
    data = {"x": normal(3, 4), "c": np.array([True, True, True])}
    report, _ = gathered(tmp_path, proto, data)
    assert [skip.reason for skip in report.skips] == ["it is inside a nested body"]


def test_a_tensor_that_holds_infinity_is_lost_and_told(tmp_path: Path) -> None:
    proto = bind(
        """g (float[N,4] x, float[4,4] W, float[4] mask) => (float[N,4] y) {
            a = MatMul (x, W)
            b = Add (a, mask)
            y = Softmax (b) }""",
        W=normal(4, 4),
        mask=np.float32([0, 0, -np.inf, 0]),
    )
    report, found = gathered(tmp_path, proto, normal(5, 4))
    assert found.lost == {Key("b", "histogram")}
    assert any("'b' holds infinite values" in note for note in report.notes)


def test_every_sample_has_a_digest_of_what_it_holds(tmp_path: Path) -> None:
    x = normal(6, 3, 8, 8)
    _, first = gathered(tmp_path, residual(), x[:4])
    _, second = gathered(tmp_path, residual(), {"x": x[::-1][2:]})
    assert first.samples == second.samples
    assert first.data == second.data
    _, other = gathered(tmp_path, residual(), x[2:])
    assert len(first.seen & other.seen) == 2


# --- the command


def call(*arguments: Any) -> int:
    return run([str(a) for a in arguments])


@pytest.fixture
def stats(tmp_path: Path) -> list[Path]:
    """Statistics files of two parts of the digits."""
    images = np.load(CNN_DATA)["image"][:12]
    paths = [tmp_path / "a.stats", tmp_path / "b.stats"]
    for path, part in zip(paths, (images[:5], images[5:]), strict=True):
        np.savez(path.with_suffix(".npz"), image=part)
        assert (
            call("calibrate", CNN, "--data", path.with_suffix(".npz"), "-o", path, "--quiet") == 0
        )
    return paths


def test_the_report_fits_two_minutes(tmp_path: Path, capsys: Any) -> None:
    arguments = ("calibrate", CNN, "--data", CNN_DATA, "--samples", 8, "-o", tmp_path / "s")
    assert call(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(" ".join(lines).split())
    assert len(lines) < 12
    assert "statistics of 20 tensors over 8 samples" in words
    assert "moments 10 of" in words and "rows of layer inputs" in words
    assert "peak memory" in words and "file" in words
    assert call(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["statistics"]["moments"] == 10
    assert found["bytes"] == (tmp_path / "s").stat().st_size
    assert found["sources"] == [str(CNN)]


def test_merging_on_the_command_line(stats: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert call("calibrate", "--merge", *stats, "-o", tmp_path / "m.stats") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "over 12 samples" in words and "merged from" in words
    assert len(load_statistics(tmp_path / "m.stats").samples) == 12
    assert call("calibrate", "--merge", stats[0], tmp_path / "m.stats", "-o", tmp_path / "n") == 2
    assert "5 samples would count twice" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_merging_may_replace_one_of_the_parts(stats: list[Path]) -> None:
    assert call("calibrate", "--merge", *stats, "-o", stats[0], "--quiet") == 0
    assert len(load_statistics(stats[0]).samples) == 12


USAGE = {
    "two models": (["{cnn}", "{cnn}", "--data", "d"], "give one MODEL, or --merge"),
    "no data": (["{cnn}"], "--data"),
    "nothing": ([], "MODEL"),
    "data to merge": (["--merge", "{a}", "{b}", "--data", "d"], "--data does not go with --merge"),
    "kinds to merge": (["--merge", "{a}", "{b}", "--what", "range"], "--what does not go with"),
    "images to merge": (["--merge", "{a}", "{b}", "--preset", "imagenet"], "--preset does not go"),
    "one file": (["--merge", "{a}"], "two statistics files or more"),
    "a model to merge": (["--merge", "{a}", "{cnn}"], "digits_cnn.onnx is no statistics file"),
    "a missing file": (["--merge", "{a}", "gone"], "statistics gone do not exist"),
    "an unknown kind": (["{cnn}", "--data", "d", "--what", "range,mood"], "--what mood"),
}


@pytest.mark.parametrize("name", list(USAGE))
def test_usage_errors_are_one_sentence(
    name: str, stats: list[Path], tmp_path: Path, capsys: Any
) -> None:
    arguments, told = USAGE[name]
    places = {"cnn": CNN, "a": stats[0], "b": stats[1]}
    capsys.readouterr()
    assert call("calibrate", *(a.format(**places) for a in arguments), "-o", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()
