"""A transformer-like model of any size, its weights written straight to external data.

    ids (batch, seq) → Gather → layers × (LayerNorm → attention → + → LayerNorm → MLP → +) → head

Nothing but one piece of a weight is in memory at a time. A weight is a window on a pool of normal
numbers whose length is prime, so that no two rows are equal, with a scale of 1/√inputs, and one of
its own for each eighth of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

PERIOD = 1_048_573  # a prime
ALIGN = 4096
BATCH, SEQ = "batch", "seq"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. bytes: of its weights, nearly."""

    width: int
    layers: int
    vocabulary: int
    heads: int = 8

    @property
    def bytes(self) -> int:
        return 4 * (12 * self.width**2 * self.layers + 2 * self.vocabulary * self.width)


SMALL = Shape(width=64, layers=3, vocabulary=300, heads=4)
FAIR = Shape(width=512, layers=6, vocabulary=4_000)  # 92 MB
MEDIUM = Shape(width=768, layers=9, vocabulary=7_000)  # 298 MB
LARGE = Shape(width=1536, layers=18, vocabulary=22_000)  # 2.17 GiB


def generate(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write `model.onnx` and `model.onnx.data` into a folder; returns the path of the former."""
    path = folder / "model.onnx"
    with (folder / "model.onnx.data").open("wb") as file:
        graph = _Writer(shape, file, np.random.default_rng(seed)).graph()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def tokens(folder: Path, shape: Shape, samples: int, length: int, seed: int = 1) -> Path:
    """Random token ids, one row a sample."""
    path = folder / "tokens.npy"
    ids = np.random.default_rng(seed).integers(0, shape.vocabulary, (samples, length))
    np.save(path, ids.astype(np.int64))
    return path


class _Writer:
    """Nodes and weights in order."""

    def __init__(self, shape: Shape, file: BinaryIO, rng: np.random.Generator) -> None:
        self.shape, self.file, self.rng = shape, file, rng
        self.pool = rng.standard_normal(PERIOD).astype(np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def graph(self) -> onnx.GraphProto:
        s = self.shape
        x = self.node("Gather", self.weight("embedding", s.vocabulary, s.width, gain=1.0), "ids")
        for layer in range(s.layers):
            x = self.node("Add", x, self.attention(f"l{layer}", x))
            x = self.node("Add", x, self.perceptron(f"l{layer}", x))
        x = self.product("head", self.norm("final", x), s.width, s.vocabulary, "logits")
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [BATCH, SEQ])
        logits = helper.make_tensor_value_info(x, TensorProto.FLOAT, [BATCH, SEQ, s.vocabulary])
        return helper.make_graph(self.nodes, "big", [ids], [logits], self.weights)

    def attention(self, name: str, x: str) -> str:
        width, heads = self.shape.width, self.shape.heads
        mixed = self.product(f"{name}.qkv", self.norm(f"{name}.a", x), width, 3 * width)
        parts = self.nodes_of("Split", 3, mixed, axis=2)
        split = self.small(f"{name}.heads", np.array([0, 0, heads, width // heads], np.int64))
        q, k, v = (self.node("Reshape", part, split) for part in parts)
        q, v = (self.node("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = self.node("Transpose", k, perm=[0, 2, 3, 1])
        scale = self.small(f"{name}.scale", np.float32((width // heads) ** -0.5))
        scores = self.node("Mul", self.node("MatMul", q, k), scale)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        joined = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        whole = self.small(f"{name}.whole", np.array([0, 0, width], np.int64))
        return self.product(f"{name}.out", self.node("Reshape", joined, whole), width, width)

    def perceptron(self, name: str, x: str) -> str:
        width = self.shape.width
        up = self.product(f"{name}.up", self.norm(f"{name}.b", x), width, 4 * width)
        root, one, half = (
            self.small(f"{name}.{k}", np.float32(v))
            for k, v in (("root", 2**-0.5), ("one", 1), ("half", 0.5))
        )
        gate = self.node("Add", self.node("Erf", self.node("Mul", up, root)), one)
        active = self.node("Mul", self.node("Mul", up, gate), half)
        return self.product(f"{name}.down", active, 4 * width, width)

    def norm(self, name: str, x: str) -> str:
        width = self.shape.width
        scale = self.small(f"{name}.gamma", np.ones(width, np.float32))
        shift = self.small(f"{name}.beta", np.zeros(width, np.float32))
        return self.node("LayerNormalization", x, scale, shift, axis=-1)

    def product(self, name: str, x: str, rows: int, columns: int, to: str = "") -> str:
        made = self.node("MatMul", x, self.weight(name, rows, columns, gain=rows**-0.5))
        bias = self.small(f"{name}.bias", 0.02 * self.pool[:columns])
        return self.node("Add", made, bias, to=to)

    def node(self, op: str, *inputs: str, to: str = "", **attributes: object) -> str:
        name = to or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{len(self.nodes)}", **attributes))
        return name

    def nodes_of(self, op: str, count: int, *inputs: str, **attributes: object) -> list[str]:
        number = len(self.nodes)
        names = [f"t{number}.{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{number}", **attributes))
        return names

    def small(self, name: str, array: np.ndarray | np.generic) -> str:
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, rows: int, columns: int, gain: float) -> str:
        self.file.write(bytes(-self.file.tell() % ALIGN))
        offset, shift = self.file.tell(), int(self.rng.integers(PERIOD))
        gains = gain * self.rng.uniform(0.7, 1.4, 8).astype(np.float32)
        step = max(1, rows // 8)
        for number, start in enumerate(range(0, rows, step)):
            count = min(step, rows - start) * columns
            take = np.take(self.pool, np.arange(count) + shift, mode="wrap")
            self.file.write((take * gains[min(number, 7)]).tobytes())
            shift = (shift + count) % PERIOD
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": "model.onnx.data", "offset": offset, "length": prod(tensor.dims) * 4}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name
