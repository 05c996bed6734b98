"""Throughput of statistics with one and two Dask workers on this machine.

    python tests/bench/scale.py [--rounds 3] [--images 320] [--batch 1]

Ranges, histograms and second moments of all layers of MobileNetV2, gathered by processes of one
thread each, which stay up while one and two of them take turns. Each round gives a ratio of two
neighbouring runs, so that both see the same state of the machine; the last line is their median.
What the machine itself allows is measured in the same rounds: the same work in one and in two
processes that know nothing of Dask and of each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@dataclass(frozen=True)
class Task:
    """What to gather, and on what."""

    model: Any
    keys: list[Any]
    data: Any
    batch: int | None

    def run(self, client: Any = None, half: int | None = None) -> float:
        """Seconds. half: of the samples, the first or the second."""
        from calib.collect import collect

        data = self.data if half is None else self.data.subset(slice(half, None, 2))
        begin = time.perf_counter()
        collect(self.model, self.keys, data, batch=self.batch, client=client)
        return time.perf_counter() - begin


def task(folder: Path, images: int, batch: int | None) -> Task:
    """MobileNetV2, ready to be calibrated on so many images; the hundred there are repeat."""
    from calib.data import Preprocess, open_data
    from onnxc.core import Key
    from onnxc.graph import load
    from onnxc.moments import moments_keys
    from onnxc.pipeline import prepare
    from onnxc.request import input_specs
    from onnxc.shapes import infer

    path = SHARED / "models" / "mobilenetv2.onnx"
    files = sorted((SHARED / "data" / "imagenet1k" / "calib").rglob("*.jp*g"))
    folder.mkdir(exist_ok=True)
    for number in range(images):
        link = folder / f"{number:05d}.jpg"
        if not link.exists():
            link.symlink_to(files[number % len(files)])
    data, model = open_data(folder, input_specs(path), Preprocess("imagenet")), load(path)
    feed = next(iter(data.batches(1)))
    prepare(model, feed)
    infer(model, feed)
    names = [tensor.name for node in model.graph.nodes for tensor in node.outputs]
    keys = [Key(name, what) for name in names for what in ("range", "histogram")]
    return Task(model, [*moments_keys(model.graph).values(), *keys], data, batch)


def apart(folder: Path, images: int, batch: int | None, half: int | None) -> float:
    """Seconds of a process that works alone."""
    return task(folder, images, batch).run(half=half)


def main() -> None:
    """Take turns and print a line a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    if not (SHARED / "models" / "mobilenetv2.onnx").is_file():
        sys.exit("../shared is not here, so there is nothing large enough to measure")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "images", given.images, given.batch, given.rounds)


def measure(folder: Path, images: int, batch: int, rounds: int) -> None:
    """One worker, two workers, one process, two processes, and again."""
    from calib.cluster import connected

    work, size = task(folder, images, batch), (folder, images, batch)
    print(f"{'images/s':>10}{'1 worker':>12}{'2 workers':>12}{'ratio':>8}{'machine':>10}")
    ratios, bounds, speeds = [], [], []
    with (
        connected(workers=1) as one,
        connected(workers=2) as two,
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        work.run(one), work.run(two)  # imports, and files into memory
        for number in range(rounds):
            single, double = work.run(one), work.run(two)
            alone = pool.submit(apart, *size, None).result()
            halves = [pool.submit(apart, *size, half) for half in (0, 1)]
            both = max(half.result() for half in halves)
            ratios.append(single / double)
            bounds.append(alone / both)
            speeds.append((images / single, images / double))
            row = (*speeds[-1], ratios[-1], bounds[-1])
            print(f"{number + 1:>10}{row[0]:>12.1f}{row[1]:>12.1f}{row[2]:>8.2f}{row[3]:>10.2f}")
    middle = [statistics.median(column) for column in (*zip(*speeds, strict=True), ratios, bounds)]
    print(f"{'median':>10}{middle[0]:>12.1f}{middle[1]:>12.1f}{middle[2]:>8.2f}{middle[3]:>10.2f}")


if __name__ == "__main__":
    main()
