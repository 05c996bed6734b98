"""The same input, seed and machine give the same bytes: in another process, and with workers.

Sets and dictionaries of strings are where an order of chance gets in, so the two processes have
different seeds of the hash. What is chosen by time is exempt, and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
CNN, TRANSFORMER = "digits_cnn", "digits_transformer"
FEW = ("--samples", "16", "--seed", "3")

Case = tuple[str, ...]

QUICK: dict[str, Case] = {
    "qdq": ("quantize", CNN, "--format", "qdq", "--ranges", "minmax"),
    "cluster": ("cluster", CNN, "--method", "ecsq"),
    "calibrate": ("calibrate", CNN),
    "pack": ("pack", CNN),
}

WHOLE: dict[str, Case] = {
    f"{model} {' '.join(arguments)}": (arguments[0], model, *arguments[1:])
    for model in (CNN, TRANSFORMER)
    for arguments in (
        ("quantize", "--format", "qoperator", "--ranges", "minmax"),
        ("quantize", "--format", "dynamic"),
        ("quantize", "--format", "weight-only"),
        *(("quantize", "--scheme", s) for s in ("fixed", "pow2", "ternary", "binary", "admm")),
        ("quantize", "--scheme", "levels"),
        ("quantize", "--bits", "3"),
        ("quantize", "--bits", "16", "--scheme", "fixed"),
        ("quantize", "--bits", "4", "--format", "weight-only"),
        *(
            ("quantize", "--format", "qdq", "--ranges", "minmax", "--rounding", r)
            for r in ("gptq", "descent", "stochastic")
        ),
        *(("prune", "--ratio", "0.3", "--criterion", c) for c in ("obs", "lasso", "random")),
        *(
            ("factorize", "--params", "0.6", "--no-faster", "--method", m)
            for m in ("auto", "svd", "tucker", "cp", "tt")
        ),
        *(
            ("cluster", "--method", m)
            for m in ("kmeans", "hessian", "ecsq", "gmm", "dp", "pq", "rq", "kernels")
        ),
        ("sparsify", "--sparsity", "0.6"),
        ("sparsify", "--nm", "2:4"),
        ("calibrate",),
        ("pack", "--thorough"),
    )
}


EACH = """
import json, sys
from onnxc.cli import run

for arguments in json.loads(sys.argv[1]):
    code = run([*arguments, "--quiet"])
    if code not in (0, 1):
        sys.exit(f"{arguments}: {code}")
"""


def written(cases: dict[str, Case], folder: Path, seed: str, *more: str) -> dict[str, bytes]:
    """What each command writes in one process with this seed of the hash."""
    folder.mkdir()
    commands = [arguments(case, folder / str(n), more) for n, case in enumerate(cases.values())]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (folder / str(n)).read_bytes() for n, name in enumerate(cases)}


def arguments(case: Case, output: Path, more: tuple[str, ...]) -> list[str]:
    command, model, *options = case
    data = () if command == "pack" else ("--data", str(MODELS / f"{model}_calib.npz"), *FEW, *more)
    return [command, str(MODELS / f"{model}.onnx"), *options, *data, "-o", str(output)]


def check_equal(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (written(QUICK, tmp_path / seed, seed) for seed in ("1", "2"))
    check_equal(first, second)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_whatever_is_asked(tmp_path: Path) -> None:
    first, second = (written(WHOLE, tmp_path / seed, seed) for seed in ("1", "2"))
    check_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_write_the_same_bytes(workers: str, tmp_path: Path) -> None:
    """A sample, one command of each kind; `test_cluster` has the statistics in full."""
    pytest.importorskip("distributed")
    names = ("quantize --format qoperator --ranges minmax", "prune --ratio 0.3 --criterion obs")
    names += ("factorize --params 0.6 --no-faster --method auto", "cluster --method ecsq")
    names += ("sparsify --sparsity 0.6", "calibrate", "quantize --scheme admm")
    some = {name: WHOLE[f"{CNN} {name}"] for name in names}
    alone = written(some, tmp_path / "alone", "1")
    check_equal(alone, written(some, tmp_path / "workers", "1", "--workers", workers))


@pytest.mark.slow
def test_a_search_for_size_finds_the_same(tmp_path: Path) -> None:
    """Time decides nothing where size is sought and all is tried."""
    found = []
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.onnxz"
        command = ["compress", str(MODELS / f"{CNN}.onnx"), "--minimize", "size"]
        command += ["--data", str(MODELS / f"{CNN}_calib.npz"), "--max-time", "1h", *FEW]
        command += ["--max-drop", "5", "-o", str(output)]
        subprocess.run(
            [sys.executable, "-c", EACH, json.dumps([command])],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            check=True,
        )
        found.append(output.read_bytes())
    assert found[0] == found[1]
