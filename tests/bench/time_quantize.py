"""Time and peak memory from a model to the written file: onnxc beside onnxruntime.quantization.

    python tests/bench/time_quantize.py [--rounds 3] [--ranges minmax ...] [--images 100 1000]

The same float model, the same prepared images, uint8 activations and one weight scale a channel
for both. Each run is a fresh process; the tools take turns, so that both see the same state of the
machine, and a ratio is one of medians. Imports are not timed. onnxc's time holds what it does
beyond writing the file: it prepares the graph, equalizes, corrects biases, compares and times the
result. onnxruntime has no least-squared-error ranges, so ours stand beside its entropy.

With more than 100 images (they are repeated) only onnxc runs, and once: its memory should not grow,
while that of onnxruntime grows with every image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy", "mse": "Entropy"}
TOOLS = ("onnxc", "onnxruntime")
FEW = 100  # images with which both tools run
WIDTHS = (10, 8, 17, 18, 8, 8)  # of the table's columns
Run = dict[str, float]  # seconds, and bytes of memory at the peak


def main() -> None:
    """Run all, taking turns, and print one table. Nothing heavy is imported in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranges", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", nargs="+", type=int, default=[FEW, 1000])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        tool, ranges, count = given.worker
        print(json.dumps(work(tool, ranges, int(count))))
        return
    if is_small():
        print("../shared is not here, so the small digits network takes the place of MobileNetV2")
    runs: defaultdict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for turn in range(given.rounds):
        counts = [count for count in given.images if count <= FEW or not turn]
        for job in jobs(given.ranges, counts):
            runs[job].append(start(*job))
    print("\n".join(table(runs)))


def is_small() -> bool:
    """Whether the digits network has to do."""
    return not (SHARED / "models" / "mobilenetv2.onnx").is_file()


def jobs(ranges: Sequence[str], counts: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Tool, ranges and number of images of each run of one round; a method of a tool only once."""
    for count in counts:
        seen = set()
        for way in ranges:
            for tool in TOOLS if count <= FEW else TOOLS[:1]:
                name = way if tool == "onnxc" else METHODS[way]
                if (tool, name) not in seen:
                    yield tool, name, count
                seen.add((tool, name))


def start(tool: str, ranges: str, count: int) -> Run:
    """Run one job in a fresh process, whose peak counts from the size of this one: stay small."""
    command = [sys.executable, __file__, "--worker", tool, ranges, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tool} {ranges} failed:\n{done.stderr}")
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def table(runs: dict[tuple[str, str, int], list[Run]]) -> Iterator[str]:
    """Medians of each job beside those of onnxruntime, and the ratios onnxc / onnxruntime."""
    headings = ("ranges", "images", "onnxc", "onnxruntime", "time", "memory")
    yield "".join(f"{h:>{w}s}" for h, w in zip(headings, WIDTHS, strict=True))
    for (tool, ranges, count), found in runs.items():
        if tool != "onnxc":
            continue
        ours, theirs = medians(found), medians(runs.get((TOOLS[1], METHODS[ranges], count), []))
        ratios = [f"{ours[key] / theirs[key]:.2f}x" for key in theirs]
        cells = (ranges, str(count), shown(ours), shown(theirs), *ratios)
        yield "".join(f"{c:>{w}s}" for c, w in zip(cells, WIDTHS, strict=False))


def medians(found: list[Run]) -> Run:
    """The median of each measure; nothing for no runs."""
    return {key: statistics.median(run[key] for run in found) for key in (found or [{}])[0]}


def shown(run: Run) -> str:
    """Seconds and MB in words."""
    return f"{run['seconds']:.1f} s, {run['memory'] / 1e6:.0f} MB" if run else "-"


def work(tool: str, ranges: str, count: int) -> Run:
    """Quantize once in this process: seconds and peak bytes."""
    import time

    from onnxc.api import peak_memory

    with tempfile.TemporaryDirectory() as folder:
        model, data, preprocess = inputs(Path(folder), count)
        run = with_onnxc if tool == "onnxc" else with_onnxruntime
        quantize = run(model, data, preprocess, ranges, Path(folder) / "result.onnx")
        begin = time.perf_counter()
        quantize()
        return {"seconds": time.perf_counter() - begin, "memory": float(peak_memory() or 0)}


def inputs(folder: Path, count: int) -> tuple[Path, Any, Any]:
    """Model, data with `count` samples, and how to prepare them."""
    from calib.data import Preprocess

    if is_small():
        import numpy as np

        with np.load(ROOT / "models" / "digits_cnn_calib.npz") as arrays:
            images = arrays["image"]
        many = np.resize(images, (count, *images.shape[1:]))
        return ROOT / "models" / "digits_cnn.onnx", many, Preprocess()
    links = folder / "images"
    links.mkdir()
    files = sorted((SHARED / "data" / "imagenet1k" / "calib").rglob("*.jp*g"))
    for number in range(count):
        (links / f"{number:05d}.jpg").symlink_to(files[number % len(files)])
    return SHARED / "models" / "mobilenetv2.onnx", links, Preprocess("imagenet")


def with_onnxc(model: Path, data: Any, preprocess: Any, ranges: Any, output: Path) -> Any:
    """A call without arguments that quantizes with onnxc."""
    import onnxc
    from onnxc.api import QuantizeSettings

    settings = QuantizeSettings(ranges=ranges)
    return lambda: onnxc.quantize(
        model, data=data, preprocess=preprocess, settings=settings, output=output
    )


def with_onnxruntime(model: Path, data: Any, preprocess: Any, method: str, output: Path) -> Any:
    """A call without arguments that quantizes with onnxruntime; it reads the images as we do."""
    from onnxruntime import quantization

    from calib.data import open_data
    from onnxc.api import input_specs

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = open_data(data, input_specs(model), preprocess).batches(1)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    return lambda: quantization.quantize_static(
        str(model),
        str(output),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        calibrate_method=quantization.CalibrationMethod[method],
    )


if __name__ == "__main__":
    main()
