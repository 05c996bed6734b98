"""What gathering statistics costs, beside the plain inference of the same images.

    python tests/bench/time_calibrate.py [--rounds 5] [--images 100 400]

Ranges, histograms and moments of the inputs and outputs of all heavy layers of MobileNetV2. Both
run in one process with equally many threads, in turn; a ratio is one of medians. Once the images
are in memory already, once both read them from their files. Peak memory is that of a fresh process
each, and should not grow with the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "mobilenetv2.onnx"
IMAGES = SHARED / "data" / "imagenet1k" / "calib"
BOUND = 500_000_000  # bytes


def main() -> None:
    """Print a line for each way of reading and number of threads, then the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not MODEL.is_file():
        print("skipped: the folder ../shared with real models and data is not here")
        return
    if given.worker:
        print(json.dumps(peak(given.worker)))
        return
    for count in given.images:  # first, for a child's peak counts from the size of this process
        done = subprocess.run(
            [sys.executable, __file__, "--worker", str(count)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        print(f"{count} images: peak memory {json.loads(done.stdout) / 1e6:.0f} MB")
    print(f"{'images':>10s}{'threads':>9s}{'inference':>11s}{'statistics':>12s}{'ratio':>7s}")
    for reads in ("in memory", "from files"):
        for threads in (1, 2):
            print(line(reads, threads, given.rounds))


def line(reads: str, threads: int, rounds: int) -> str:
    """Median seconds of both, and their ratio."""
    images = _folder(100) if reads == "from files" else _in_memory()
    infer, gather = jobs(images, threads)
    plain, ours = zip(*((_seconds(infer), _seconds(gather)) for _ in range(rounds)), strict=True)
    a, b = statistics.median(plain), statistics.median(ours)
    return f"{reads:>10s}{threads:9d}{a:9.2f} s{b:10.2f} s{b / a:6.2f}x"


def jobs(images: Any, threads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Plain inference of a dataset, and gathering its statistics."""
    from calib.collect import collect
    from onnxc.core import Context, Key
    from onnxc.graph import load, opset, to_bytes
    from onnxc.moments import moments_keys
    from onnxc.pipeline import prepare
    from onnxc.runtime import Runtime, run, session
    from onnxc.shapes import infer
    from onnxc.targets import choose
    from passes.quantize import Quantize

    model, feed = load(MODEL), next(iter(images.batches(1)))
    prepare(model, feed)
    infer(model, feed)
    context = Context(opset(model.graph), choose("auto"))
    moments = set(moments_keys(model.graph).values())
    ranged = {key.name for key in (*Quantize().wants(model.graph, context), *moments)}
    keys = [*(Key(name, "histogram") for name in ranged), *moments]
    opened = session(to_bytes(model), Runtime(threads))

    def plain() -> None:
        for batch in images.batches(1):
            run(opened, batch)

    return plain, lambda: collect(model, keys, images, max_memory=BOUND, threads=threads)


def peak(count: int) -> int:
    """Peak bytes of this process after gathering statistics of that many images."""
    _, gather = jobs(_folder(count), 2)
    found = gather()
    return int(found.peak_rss)


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _folder(count: int) -> Any:
    """A dataset of image files, repeated where there are too few."""
    import numpy as np

    from calib.data import Preprocess, open_data
    from onnxc.request import input_specs

    found = open_data(IMAGES, input_specs(MODEL), Preprocess("imagenet"))
    return found.subset(np.arange(count) % len(found))


def _in_memory() -> Any:
    import numpy as np

    from calib.data import open_data
    from onnxc.request import input_specs

    arrays = [feed["input"] for feed in _folder(100).batches(1)]
    return open_data(np.concatenate(arrays), input_specs(MODEL))


if __name__ == "__main__":
    main()
