"""`onnxc cluster` from a model file to the written, proven one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, report_of

import onnxc
from onnxc.pipeline import prepare
from onnxc.recipe import loads
from onnxc.zeros import count_zeros

MODELS = Path(__file__).resolve().parents[1] / "models"
TOKENS, TOKEN_DATA = MODELS / "digits_transformer.onnx", MODELS / "digits_transformer_calib.npz"
IMAGES, IMAGE_DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"
ARGUMENTS = ("cluster", TOKENS, "--data", TOKEN_DATA, "--samples", 20)


@pytest.fixture(autouse=True)
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_clustered_file_is_small_and_proven(capsys: Any) -> None:
    found = report_of(capsys, *ARGUMENTS, "-o", "o.onnx")
    assert found["after"]["bytes"] < found["before"]["bytes"] / 2.5
    assert found["comparison"]["agreement"] > 0.9
    assert found["count"] and found["aim"]["seeks"] == "size"
    assert found["after"]["bytes"] == Path("o.onnx").stat().st_size
    assert all(found[when]["opening"]["ms"] > 0 for when in ("before", "after"))
    names = [p.name for p in loads(found["recipe"]).passes]
    assert names == ["upgrade-opset", "cluster", "store-codebooks"]


def test_the_recipe_replays_it_byte_for_byte(capsys: Any) -> None:
    extra = ("--bits", 3, "--method", "hessian", "--init", "kmeans++", "--no-reconstruct")
    found = report_of(capsys, *ARGUMENTS, *extra, "-o", "1.onnx")
    Path("r.toml").write_text(found["recipe"])
    report_of(capsys, "cluster", TOKENS, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()


@pytest.mark.slow
def test_a_refit_lowers_the_error_and_keeps_the_values(capsys: Any) -> None:
    arguments = (*ARGUMENTS, "--bits", 2, "--include", "op:Gemm", "--include", "op:MatMul")
    alone = report_of(capsys, *arguments, "--no-reconstruct", "-o", "1.onnx")
    refit = report_of(capsys, *arguments, "-o", "2.onnx")
    assert refit["comparison"]["sqnr"] > alone["comparison"]["sqnr"]
    sizes = [Path(f"{i}.onnx").stat().st_size for i in (1, 2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.slow
def test_int8_codebooks_run_in_integer_kernels(capsys: Any) -> None:
    arguments = ("cluster", IMAGES, "--data", IMAGE_DATA, "--samples", 30)
    report_of(capsys, *arguments, "--format", "int8-codebook", "--no-reconstruct", "-o", "o.onnx")
    found = onnxc.validate(IMAGES, "o.onnx", data=IMAGE_DATA, samples=20)
    assert found.coverage is not None and found.coverage.integer >= 2
    assert found.after.bytes < found.before.bytes / 4
    stored = [n.op for n in onnxc.load("o.onnx").graph.nodes]
    assert "Gather" in stored and "DequantizeLinear" in stored


@pytest.mark.slow
def test_sparsify_then_cluster_keeps_the_zeros(capsys: Any) -> None:
    data = ("--data", TOKEN_DATA, "--samples", 20)
    zeros = ("--sparsity", 0.6, "--criterion", "magnitude", "--no-reconstruct")
    assert call("sparsify", TOKENS, *data, *zeros, "-o", "s.onnx", "--quiet") in (0, 1)
    report_of(capsys, "cluster", "s.onnx", *data, "--no-reconstruct", "-o", "c.onnx")
    model = onnxc.load("c.onnx")
    prepare(model)  # which unpacks it
    assert count_zeros(model).share > 0.55


@pytest.mark.slow
def test_vectors_are_small_and_proven(capsys: Any) -> None:
    arguments = ("cluster", IMAGES, "--data", IMAGE_DATA, "--samples", 20, "--include", "op:Gemm")
    extra = ("--method", "pq", "--rate", 3)
    found = report_of(capsys, *arguments, *extra, "-o", "1.onnx")
    assert found["after"]["bytes"] < found["before"]["bytes"] and found["count"] == 1
    assert found["comparison"]["agreement"] > 0.9 and "codewords of length" in str(found["done"])
    assert [p.name for p in loads(found["recipe"]).passes] == ["upgrade-opset", "cluster-vectors"]
    Path("r.toml").write_text(found["recipe"])  # which names the form of the layer
    assert "Gemm=" in found["recipe"]
    report_of(capsys, "cluster", IMAGES, "--recipe", "r.toml", "-o", "2.onnx")
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    assert call("pack", "1.onnx", "--quiet") == 0
    assert Path("1.onnxz").stat().st_size < found["after"]["bytes"]


def test_vectors_that_make_no_sense_are_told(capsys: Any) -> None:
    pq = (*ARGUMENTS, "--method", "pq")
    assert call(*pq, "--format", "int8-codebook") == 2
    assert "leave --format int8-codebook out" in capsys.readouterr().err
    assert call(*pq, "--rate", -1) == 2
    assert "rate is bits a weight" in capsys.readouterr().err
    assert call(*pq, "--init", "density") == 2
    assert "init does not go with --method pq" in capsys.readouterr().err
    assert call(*ARGUMENTS, "--length", 4) == 2
    assert "length does not go with --method dp" in capsys.readouterr().err


def test_options_that_mean_nothing_are_told(capsys: Any) -> None:
    assert call(*ARGUMENTS, "--bits", 9) == 2
    assert "1 to 8" in capsys.readouterr().err


def test_without_data_it_says_so(capsys: Any) -> None:
    found = report_of(capsys, "cluster", TOKENS, "-o", "o.onnx", "--bits", 6, "--no-reconstruct")
    assert "without data" in found["headline"] or "synthesized" in found["headline"]
    assert np.isfinite(found["comparison"]["sqnr"])


@pytest.mark.slow
def test_a_recipe_of_a_name_comes_with_onnxc_and_its_result_is_packed(capsys: Any) -> None:
    arguments = ("--data", TOKEN_DATA, "--samples", 20, "--recipe", "deep-compression")
    found = report_of(capsys, "cluster", TOKENS, *arguments, "-o", "o.onnxz")
    names = [p.name for p in loads(found["recipe"]).passes]
    assert names == ["sparsify", "reconstruct", "upgrade-opset", "cluster", "store-codebooks"]
    assert found["after"]["bytes"] == Path("o.onnxz").stat().st_size < TOKENS.stat().st_size / 6
    onnxc.unpack("o.onnxz", "o.onnx")
    assert Path("o.onnx").stat().st_size > 1.2 * Path("o.onnxz").stat().st_size
    packed, plain = onnxc.load("o.onnxz"), onnxc.load("o.onnx")
    prepare(packed), prepare(plain)
    assert count_zeros(packed).share == count_zeros(plain).share > 0.4
    assert sorted(path.name for path in Path().iterdir()) == ["o.onnx", "o.onnxz"]


def test_a_recipe_of_an_unknown_name_is_told_with_those_there_are(capsys: Any) -> None:
    assert call("cluster", TOKENS, "--recipe", "deep-compresion", "-o", "o.onnx") == 2
    said = capsys.readouterr().err
    assert "there is no recipe deep-compresion" in said and "deep-compression" in said
    assert not Path("o.onnx").exists()
