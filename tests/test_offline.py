"""Commands without workers open no connection: each runs where any use of a socket is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn_calib.npz"

OFFLINE = """
import json, sys

used = []

def refuse(event, arguments):
    if event.startswith("socket.") or event in ("urllib.Request", "http.client.connect"):
        used.append(event)
        raise RuntimeError(f"{event} is a use of the network")

sys.addaudithook(refuse)
from onnxc.cli import run

codes = [run(arguments) for arguments in json.loads(sys.argv[1])]
import socket
try:
    socket.create_connection(("localhost", 9), 1)
except RuntimeError:
    codes.append("refused")
print(json.dumps([codes, used[:-1]]))
"""


def test_no_command_opens_a_connection(tmp_path: Path) -> None:
    model, few = str(MODEL), ("--data", str(DATA), "--samples", "8", "--quiet")
    calibrate = ("calibrate", model, *few, "--what", "range")
    commands = [
        ("inspect", model, "--quiet"),
        ("quantize", model, "--format", "weight-only", *few, "-o", "q.onnx", "--html", "q.html"),
        ("validate", model, "q.onnx", *few, "--save-vectors", "vectors"),
        ("bench", model, "q.onnx", "--repeats", "2", "--min-time", "0", "--quiet"),
        ("analyze", model, *few, "--quantized", "q.onnx"),
        (*calibrate, "--seed", "1", "-o", "1.stats"),
        (*calibrate, "--seed", "2", "-o", "2.stats"),
        ("calibrate", "--merge", "1.stats", "2.stats", "-o", "m.stats", "--quiet"),
        ("pack", "q.onnx", "-o", "q.onnxz", "--quiet"),
        ("unpack", "q.onnxz", "-o", "u.onnx", "--quiet"),
        ("prune", model, "--ratio", "0.1", *few, "-o", "p.onnx"),
        ("compress", model, "--data", str(DATA), "--max-time", "1s", "--quiet", "-o", "c.onnx"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(MODELS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, used = json.loads(done.stdout)
    assert used == []
    assert codes[-1] == "refused"
    assert codes[:-1] == [0] * 11 + [codes[-2]], done.stderr
    assert codes[-2] in (0, 1), done.stderr  # whether a search finds anything in a second
