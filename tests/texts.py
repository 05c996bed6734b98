"""Fixture graphs as ONNX text: weights are written as inputs and bound to arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from onnxc.core import Change, Context, Pass, Skip
from onnxc.graph import Model, load, opset, to_bytes
from onnxc.pipeline import Step, apply_pass
from onnxc.runtime import run, session
from onnxc.selectors import Selector
from onnxc.targets import Target, detect

RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))

exact_sums = pytest.mark.skipif(
    detect() == "x86", reason="without VNNI this processor saturates sums of 8-bit products"
)


def skip_refused(done: Step) -> None:
    """Skip where an old ONNX Runtime refuses what later ones run: the step was undone then."""
    refused = [problem for problem in done.problems if "ONNX Runtime refuses" in problem]
    if refused and RUNTIME < (1, 28):
        pytest.skip(refused[0])


def bind(text: str, opset: int = 13, **weights: NDArray[Any]) -> onnx.ModelProto:
    """A graph `name (inputs) => (outputs) { nodes }` as a model; `weights` become initializers."""
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    kept = [port for port in proto.graph.input if port.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    return proto


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def positive(*shape: int, seed: int = 0) -> NDArray[Any]:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.5)


def context(model: Model, **only: tuple[str, ...]) -> Context:
    return Context(opset=opset(model.graph), target=Target("any"), only=Selector(**only))


def outputs(model: Model | onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Any]:
    data = to_bytes(model) if isinstance(model, Model) else model.SerializeToString()
    return run(session(data), feed)


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def changed(results: list[Change | Skip]) -> list[str]:
    return [result.node for result in results if isinstance(result, Change)]


def reasons(results: list[Change | Skip]) -> str:
    return "\n".join(result.reason for result in results if isinstance(result, Skip))


def step(proto: onnx.ModelProto, pass_: Pass, feed: dict[str, Any]) -> tuple[Model, Step]:
    """Load, apply with checks, and compare with the original: equal to 1e-4 of the largest."""
    model = load(proto)
    done = apply_pass(model, pass_, context(model), feed)
    before, after = outputs(proto, feed), outputs(model, feed)
    for name, expected in before.items():
        limit = 1e-4 * max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=limit)
    return model, done
