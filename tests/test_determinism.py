"""The same input, seed and machine give the same bytes: in another process, and with workers.

Sets and dictionaries of strings are where an order of chance gets in, so the two processes have
different seeds of the hash. What is chosen by time is exempt, and says so.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
CNN, TRANSFORMER = "digits_cnn", "digits_transformer"
FEW = ("--samples", "16", "--seed", "3")

EACH = """
import json, sys
from onnxc.cli import run

for arguments in json.loads(sys.argv[1]):
    code = run([*arguments, "--quiet"])
    if code:
        sys.exit(f"{arguments}: {code}")
"""

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
        *(("quantize", "--bits", b) for b in ("3", "16")),
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
