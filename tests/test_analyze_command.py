"""`onnxc analyze`: which layers suffer, which to leave float, where a quantized file goes wrong."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calls import call, report_of
from quantizing import apply
from test_blame import CHAIN, FEED, HEAVY, chain, scaled
from texts import bind, normal

import onnxc
from onnxc.graph import save
from onnxc.harm import harm
from onnxc.keeping import candidates, worth
from onnxc.report import Kept, Sensitivity
from passes.quantize import Quantize

assert CHAIN
QUICK = ("--seconds", 60)  # more than it takes


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, m.onnx, whose layer Conv_b suffers from 8 bits, and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    W1 = normal(8, 8, 3, 3) / 3
    W1[:, :, 0, 0] *= 30  # large weights that only ever see what is padded: all others lose steps
    onnx.save(chain(size=1, W1=W1), "m.onnx")
    np.savez("data.npz", x=np.abs(normal(60, 1, 4, 1, 1)))
    return tmp_path


def test_the_layer_made_bad_on_purpose_is_first(capsys: Any) -> None:
    found = report_of(
        capsys, "analyze", "m.onnx", "--data", "data.npz", *QUICK, "--passes", "quantize"
    )
    weights = [x for x in found["layers"] if x["what"] == "weights"]
    assert {x["node"] for x in weights} == set(HEAVY)
    assert min(weights, key=lambda x: x["sqnr"])["node"] == "Conv_b"
    both = {x["node"]: x for x in found["layers"] if x["what"] == "both"}
    assert min(both, key=lambda n: both[n]["sqnr"]) == "Conv_b"
    assert both["Conv_b"]["bytes"] == 8 * 8 * 9 * 3 and both["Conv_b"]["macs"] == 8 * 8 * 9
    assert all(0 <= x["loss"] <= 1 for x in found["layers"])
    costs = [x["cost"] for x in found["layers"]]
    assert costs == sorted(costs, reverse=True)
    assert found["kept"][0]["nodes"] == []
    noises = [10 ** (-kept["sqnr"] / 10) for kept in found["kept"]]
    gains = [before - after for before, after in pairwise(noises)]
    assert found["kept"][gains.index(max(gains)) + 1]["nodes"][-1] == "Conv_b"
    assert max(gains) > noises[0] / 2
    assert "Conv_b" in found["best"]["nodes"]
    assert found["best"]["sqnr"] > found["plain"]["sqnr"] + 3
    assert "--exclude Conv_b" in found["exclude"]


def test_the_options_to_paste_do_what_is_promised(capsys: Any) -> None:
    arguments = ("m.onnx", "--data", "data.npz")
    found = report_of(capsys, "analyze", *arguments, *QUICK, "--passes", "quantize")
    report_of(capsys, "quantize", *arguments, *found["exclude"].split(), "-o", "o.onnx", code=0)
    ops = {n.name: n for n in onnx.load("o.onnx").graph.node}
    weights = {t.name for t in onnx.load("o.onnx").graph.initializer if t.data_type == 1}
    assert any(name in weights for name in ops["Conv_b"].input)


def test_other_passes_and_what_they_are_for(capsys: Any) -> None:
    arguments = ("analyze", "m.onnx", "--data", "data.npz", *QUICK)
    found = report_of(capsys, *arguments, "--passes", "prune,factorize,cluster")
    told = {
        what: [x for x in found["layers"] if x["what"] == what] for what in ("prune", "cluster")
    }
    assert told["prune"] and all(x["macs"] > 0 and x["bytes"] > 0 for x in told["prune"])
    assert {x["node"] for x in told["cluster"]} <= set(HEAVY)
    assert found["plain"] is None and found["kept"] == []
    assert "most sensitive" in found["verdict"]
    assert all(skip["reason"] for skip in found["skips"])


def test_a_file_with_a_clipped_range_is_explained(capsys: Any) -> None:
    proto = chain()
    np.savez("data.npz", **FEED)
    onnx.save(proto, "o.onnx")
    made, _ = apply(proto, Quantize(ranges="minmax"), FEED)
    save(scaled(made, "br_scale", 0.3), "q.onnx")
    arguments = ("o.onnx", "--data", "data.npz", "--level", "none")
    found = report_of(capsys, "analyze", *arguments, "--quantized", "q.onnx")
    assert found["verdict"].startswith("the error starts at Conv_b")
    assert "cutting at 0 to" in found["verdict"]
    advice = next(a for a in found["advice"] if "cut large values off" in a["what"])
    assert advice["nodes"][0] == "Conv_b" and advice["gain"] > 3
    assert call("analyze", *arguments, "--quantized", "q.onnx", "--top", 2) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "error starts here" in words and "what would help" in words
    own = report_of(capsys, "validate", "o.onnx", "q.onnx", *arguments[1:])
    worst = min((x for x in own["blame"] if x["own"] is not None), key=lambda x: x["own"])
    assert worst["node"] == "Conv_b" and worst["cause"].startswith("cutting")


def test_the_console_says_the_verdict_first(capsys: Any) -> None:
    arguments = ("m.onnx", "--data", "data.npz", *QUICK, "--passes", "quantize", "--top", 2)
    assert call("analyze", *arguments, "--what", "both") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m.onnx")
    assert "float" in lines[1] or "quantize" in lines[1]
    assert any(line.startswith("quantized alone") for line in lines)
    assert any("less sensitive" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --data"),
        (["--data", "data.npz", "--passes", "quantise"], "quantise is not known: choose of"),
        (["--data", "data.npz", "--what", "bias"], "bias is not known: choose of weights"),
        (["--data", "data.npz", "--quantized", "m.onnx"], "is not quantized"),
        (["--data", "data.npz", "--quantized", "other.onnx"], "no quantized form of m.onnx"),
        (["--data", "data.npz", "--quantized", "none.onnx"], "none.onnx"),
        (["--data", "data.npz", "--quantized", "other.onnx", "--bits", 4], "does not go with"),
    ],
)
def test_bad_input_is_told_in_one_sentence(options: list[Any], words: str, capsys: Any) -> None:
    text = CHAIN.replace("8,8,3,3", "9,8,3,3").replace("8,8,1,1", "8,9,1,1").replace("a =", "k =")
    for old, new in (("(a)", "(k)"), ("ar", "kr"), ("br", "lr"), ("b =", "l ="), ("(b)", "(l)")):
        text = text.replace(old, new)
    text = text.replace("c = ", "m = ").replace("Add (c", "Add (m").replace("W1, B)", "W1)")
    text = text.replace("float[1,4,8,8] x", "float[1,4,1,1] x")
    shapes = {"W0": (8, 4, 3, 3), "W1": (9, 8, 3, 3), "W2": (8, 9, 1, 1), "W3": (5, 8), "B": (8,)}
    other = bind(text, **{name: normal(*shape) for name, shape in shapes.items()})
    made, _ = apply(other, Quantize(), {"x": np.load("data.npz")["x"]})
    save(made, "other.onnx")
    assert call("analyze", "m.onnx", *options) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told


def test_the_facade(box: Path) -> None:
    found = onnxc.analyze("m.onnx", data="data.npz", seconds=60, passes=["quantize"], what=["both"])
    assert found.layers and found.verdict and found.samples == 20
    assert {x.what for x in found.layers} == {"both"}
    with pytest.raises(onnxc.OptionError, match="bits"):
        onnxc.analyze("m.onnx", data="data.npz", bits=1)


def test_harm_is_the_mean_over_outputs() -> None:
    y = normal(8, 5)
    lost = harm([{"a": y, "b": y}], [{"a": y, "b": y * np.float32(1.1)}])
    assert lost.noise == pytest.approx(0.005, rel=1e-4)


def test_layers_are_kept_while_they_bring_something_back() -> None:
    levels = [20.0, 24.0, 27.5, 28.0, 28.2]
    found = [Kept(tuple("abcd"[:i]), sqnr, None) for i, sqnr in enumerate(levels)]
    assert worth(found) == ("a", "b")
    assert worth(found[:1]) == () and worth([]) == ()
    assert worth([found[0], Kept(("a",), 20.2, None)]) == ()
    rows = [
        Sensitivity(n, "Conv", "both", q, None, 0, 0, 1.0)
        for n, q in zip("abc", (30, 9, 20), strict=True)
    ]
    assert list(candidates(rows)) == ["b", "c", "a"]


def test_files_of_other_tools_are_explained(shared: Path, capsys: Any) -> None:
    found = report_of(
        capsys,
        *("analyze", shared / "models" / "resnet20.onnx"),
        *("--quantized", shared / "peers" / "resnet20" / "nncf.onnx"),
        *("--data", shared / "data" / "cifar10" / "calib", "--preset", "imagenet"),
        *("--resize", "none", "--samples", 8),
    )
    assert len(found["blame"]) >= 20 and not found["unmatched"]
    assert "cutting" in found["verdict"]
