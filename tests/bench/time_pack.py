"""Size, and speed in megabytes of float weights a second, of packing made-up tensors.

    python tests/bench/time_pack.py [--rounds 5] [--layers 8]

The tensors are Gaussian weights: as float32, as int8, in 16 levels (float32 values of a codebook,
and 4-bit indices two to a byte). A size is told as a share of the file, of `zstd -19` of a part of
it, and of the entropy of the indices. Speeds are of the best round, by the processor's time and by
the clock; they differ where other programs run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zstandard
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import onnxc

COUNT = 1 << 21  # weights of a layer
PART = 1 << 22  # bytes that zstd -19 is measured on
Array = NDArray[Any]


def main() -> None:
    """Pack and unpack each kind of weights, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    levels = np.sort(rng.normal(0, 0.05, 16)).astype(np.float32)
    drawn = [rng.normal(0, 0.05, COUNT).astype(np.float32) for _ in range(given.layers)]
    indices = [np.searchsorted((levels[1:] + levels[:-1]) / 2, w).astype(np.uint8) for w in drawn]
    kinds: dict[str, list[Array]] = {
        "float32": drawn,
        "int8": [np.round(w * 600).clip(-127, 127).astype(np.int8) for w in drawn],
        "16 levels": [levels[i] for i in indices],
        "4-bit indices": [i[::2] | i[1::2] << 4 for i in indices],
    }
    counts = np.bincount(np.concatenate(indices), minlength=16)
    p = counts / counts.sum()
    entropy = float(-(counts * np.log2(p, where=p > 0, out=np.zeros(16))).sum() / 8)
    print(f"{'':14}{'file':>9}{'packed':>9}{'of file':>9}{'of zstd':>9}{'of entropy':>12}", end="")
    print(f"{'pack':>15}{'unpack':>15}   MB/s, processor (clock)")
    for name, tensors in kinds.items():
        of_entropy = entropy if kinds[name][0].dtype != np.int8 and name != "float32" else None
        print(name.ljust(14) + row(tensors, given.rounds, of_entropy))


def row(tensors: list[Array], rounds: int, entropy: float | None) -> str:
    """The figures of one kind of weights."""
    with tempfile.TemporaryDirectory() as folder:
        plain, packed, back = (Path(folder) / name for name in ("m.onnx", "m.onnxz", "b.onnx"))
        plain.write_bytes(model(tensors).SerializeToString())
        pack = best(lambda: onnxc.pack(plain, packed), rounds)
        unpack = best(lambda: onnxc.unpack(packed, back), rounds)
        assert back.read_bytes() == plain.read_bytes()
        before, after = plain.stat().st_size, packed.stat().st_size
        part = plain.read_bytes()[:PART]
    zstd = len(zstandard.compress(part, 19)) / len(part) * before
    shown = f"{before / 1e6:9.2f}{after / 1e6:9.2f}{after / before:9.4f}{after / zstd:9.4f}"
    shown += f"{after / entropy:12.4f}" if entropy else " " * 12
    size = 4 * COUNT * len(tensors) / 1e6
    return shown + "".join(f"{size / t[0]:8.0f} ({size / t[1]:4.0f})" for t in (pack, unpack))


def best(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The least seconds of the processor, and of the clock."""
    times = []
    for _ in range(rounds):
        used, start = time.process_time(), time.perf_counter()
        work()
        times.append((time.process_time() - used, time.perf_counter() - start))
    return min(t[0] for t in times), min(t[1] for t in times)


def model(tensors: list[Array]) -> onnx.ModelProto:
    """A model that holds the tensors, and does nothing with them."""
    held = [numpy_helper.from_array(t.reshape(1024, -1), f"w{i}") for i, t in enumerate(tensors)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:], held))


if __name__ == "__main__":
    main()
