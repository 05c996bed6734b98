"""Apply passes with calibration to fixture graphs, and look at what the runtime makes of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.data import Dataset, InputSpec, open_data
from onnxc.check import compare
from onnxc.core import Context, Pass
from onnxc.graph import Model, load, opset, to_bytes
from onnxc.pipeline import Calibration, Step, compress
from onnxc.runtime import Runtime, session
from onnxc.selectors import Selector
from onnxc.shapes import infer
from onnxc.targets import choose

Feed = dict[str, Any]
BORDERS = ("QuantizeLinear", "DequantizeLinear")


def dataset(model: Model, feed: Feed) -> Dataset:
    """Arrays by input name, first axis the samples."""
    ports = [InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape)) for t in model.graph.inputs]
    return open_data(feed, ports)


def apply(
    source: onnx.ModelProto | Model,
    pass_: Pass,
    feed: Feed,
    target: str = "x86-vnni",
    **only: tuple[str, ...],
) -> tuple[Model, Step]:
    """Calibrate on the feed, apply with checks, and return the model with what was done."""
    model = source if isinstance(source, Model) else load(source)
    data = dataset(model, feed)
    first = next(iter(data.batches(1)))
    infer(model, first)
    context = Context(opset(model.graph), choose(target), only=Selector(**only))
    (step,) = compress(model, [pass_], context, Calibration(data), first)
    assert not step.problems, step.problems
    return model, step


def decibels(reference: onnx.ModelProto, model: Model, feed: Feed) -> float:
    """SQNR of the least exact output over the feed."""
    found = compare(load(reference), model, dataset(model, feed))
    return min(fidelity.sqnr for fidelity in found.outputs.values())


def optimized(model: Model) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs, before it moves layouts."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimized.onnx"
        session(to_bytes(model), Runtime(level="extended"), dump)
        return onnx.load(dump).graph


def kernels(model: Model) -> list[str]:
    """Operators of that graph in order."""
    return [node.op_type for node in optimized(model).node]


def inside(model: Model) -> list[str]:
    """The same without the Q/DQ at the border of the graph."""
    return [op for op in kernels(model) if op not in BORDERS]
