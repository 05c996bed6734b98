"""Quantize the activations of matrix products and LSTMs while the model runs; no data needed.

    x ≈ s_x (q_x − z_x),   W ≈ s_W q_W,   y = x W ≈ s_x s_W (q_x − z_x) q_W

DynamicQuantizeLinear finds s_x and z_x of each tensor as it comes, once for all products that read
it; MatMulInteger sums in int32. Weights are symmetric, with one scale an output channel. Written in
the shape that ONNX Runtime fuses to MatMulIntegerToFloat or DynamicQuantizeMatMul:

    Mul(Cast(MatMulInteger(q_x, q_W, z_x)), Mul(s_x, s_W))

Gemm gives its alpha to s_W and its C to an Add behind. LSTM becomes DynamicQuantizeLSTM, ONNX
Runtime's own. Left alone: products of two activations, half precision (DynamicQuantizeLinear reads
float32), GRU, which no kernel quantizes on the fly, and convolutions: ONNX Runtime's ConvInteger
takes 4 to 16 times as long as its float Conv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.graph import constants, fresh, insert, nbytes, store, tidy, values, walk
from onnxc.numerics.blocks import decibels, quantize_blocks
from onnxc.ops import knowledge
from onnxc.storage.stored import source, why_no_source

Array = NDArray[Any]
Names = frozenset[str]

FLOAT = 1  # ONNX number of float32
OPSET = 11  # of DynamicQuantizeLinear


class RefusalError(Exception):
    """A node that stays as it is, with the reason that the Skip gives."""


@dataclass(frozen=True)
class Stored:
    """A weight as the file keeps it: its codes, its scales, and their signal-to-noise ratio."""

    codes: gs.Constant
    scales: gs.Constant
    decibels: float


@register
@dataclass(frozen=True)
class QuantizeDynamic:
    """Quantize the activations of matrix products and LSTMs while the model runs; no data needed.

    smallest: bytes below which a weight is left alone.
    """

    smallest: int = 1024

    name: ClassVar[str] = "quantize-dynamic"
    lossless: ClassVar[bool] = False

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        pinned = {tensor.name for inner in walk(graph) for tensor in inner.outputs}
        writing = Writing(graph, context.target.reduce_range)
        skips = []
        for inner in list(walk(graph)):
            for node in [n for n in inner.nodes if knowledge(n).role in ROLES]:
                try:
                    self._guard(node, allowed, context)
                    self._guard_weights(node, pinned)
                    WRITERS[node.op](writing, node)
                except RefusalError as refusal:
                    skips.append(Skip(node.name, str(refusal)))
            writing.place(inner)
        if not writing.done:
            return [*skips]
        tidy(graph)
        return [*writing.changes(), *skips]

    def _guard(self, node: gs.Node, allowed: Names, context: Context) -> None:
        """Raise RefusalError where a node must or should stay float."""
        if node.name not in allowed:
            raise RefusalError("excluded")
        if node.op not in WRITERS:
            raise RefusalError(UNFIT.get(node.op, f"no kernel quantizes {node.op} on the fly"))
        if node.op not in context.target.dynamic:
            raise RefusalError(f"target {context.target.name} does not quantize it on the fly")
        if context.opset < OPSET:
            raise RefusalError(f"needs opset {OPSET}, and the model has {context.opset}")
        if node.op == "LSTM" and node.attrs.get("layout", 0):
            raise RefusalError("has the batch first (layout = 1), which no kernel takes")
        if len(node.inputs[0].shape or (0, 0)) < 2:
            raise RefusalError("multiplies a vector")

    def _guard_weights(self, node: gs.Node, pinned: set[str]) -> None:
        """The same for its weights; pinned: outputs of graphs."""
        for tensor in (node.inputs[p] for p in WEIGHTS[node.op]):
            weight, _ = source(tensor)
            if weight is None:
                raise RefusalError(why_no_source(node, tensor))
            if weight.dtype != np.float32:
                raise RefusalError("computes in half precision")
            size = nbytes(weight)
            if size < self.smallest:
                raise RefusalError(f"its weight has {size} bytes, fewer than {self.smallest}")
            if len(weight.shape) != (3 if node.op == "LSTM" else 2):
                raise RefusalError(f"its weight has {len(weight.shape)} axes")
            if not np.isfinite(values(weight)).all():
                raise RefusalError("its weight is not finite")
            if weight.name in pinned:
                raise RefusalError("its weight is an output of the graph")


@dataclass
class Writing:
    """Nodes on their way into a graph, what they share, and what is done for the report.

    graph: the main graph. reduced: weights of 7 bits. before, after: new nodes by the name of the
    node that they go with. ready: quantized activations of the graph being written. kept: stored
    weights. done: name of a node, its weights, and their stored forms.
    """

    graph: gs.Graph
    reduced: bool
    before: dict[str, list[gs.Node]] = field(default_factory=dict)
    after: dict[str, list[gs.Node]] = field(default_factory=dict)
    ready: dict[tuple[int, bool], list[gs.Variable]] = field(default_factory=dict)
    kept: dict[tuple[int, str], Stored] = field(default_factory=dict)
    done: list[tuple[str, list[gs.Constant], list[Stored]]] = field(default_factory=list)

    def product(self, node: gs.Node) -> None:
        """MatMul or Gemm to MatMulInteger, Cast, Mul, and Add where there is a C."""
        name, x, result = node.name, node.inputs[0], node.outputs[0]
        weight, turn = source(node.inputs[1])
        is_turned = bool(node.attrs.get("transB", 0)) != (turn is not None)
        stored = self._matrix(weight, is_turned, float(node.attrs.get("alpha", 1.0)))
        added = self._addend(node)
        codes, scale, zero = self._quantized(node, x, bool(node.attrs.get("transA", 0)))
        scales = self._node("Mul", name, [scale, stored.scales])
        self.before.setdefault(name, []).append(scales)
        node.op, node.attrs = "MatMulInteger", {}
        node.inputs, node.outputs = [codes, stored.codes, zero], [self._tensor(name, "sum")]
        cast = self._node("Cast", name, [node.outputs[0]], to=FLOAT)
        product = self._node("Mul", name, [cast.outputs[0], scales.outputs[0]])
        tail = [self._node("Add", name, [product.outputs[0], added])] if added is not None else []
        self.after[name] = [cast, product, *tail]
        self.after[name][-1].outputs = [result]
        self.done.append((name, [weight], [stored]))

    def lstm(self, node: gs.Node) -> None:
        """LSTM to DynamicQuantizeLSTM, whose weights are transposed."""
        weights = [node.inputs[1], node.inputs[2]]
        stored = [self._gates(weight) for weight in weights]
        given = [*node.inputs[:8], *(gs.Variable.empty() for _ in range(8 - len(node.inputs)))]
        given[1:3] = [s.codes for s in stored]
        for weight, form in zip(weights, stored, strict=True):
            zeros = np.zeros(form.scales.shape, np.int8)
            given += [form.scales, self._constant(weight.name, "zero", zeros)]
        node.op, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
        node.attrs = {key: value for key, value in node.attrs.items() if key != "layout"}
        node.inputs = given
        self.done.append((node.name, weights, stored))

    def place(self, inner: gs.Graph) -> None:
        """Put the new nodes into the graph that they were made for."""
        insert(inner, self.before, self.after)
        self.before, self.after, self.ready = {}, {}, {}

    def changes(self) -> Iterator[Change]:
        """What was done, once the graph is tidy: a weight that something still reads stays."""
        remaining = {id(tensor) for tensor in constants(self.graph)}
        for name, weights, stored in self.done:
            freed = [w for w in weights if id(w) not in remaining]
            added = [t for s in stored for t in (s.codes, s.scales) if id(t) in remaining]
            remaining.update(id(w) for w in weights)
            remaining.difference_update(id(t) for t in added)
            ratio = min(s.decibels for s in stored)
            what = f"int8 per channel, {ratio:.1f} dB, activations as they come"
            yield Change(name, what, sum(map(nbytes, freed)), sum(map(nbytes, added)))

    def _quantized(self, node: gs.Node, x: gs.Tensor, is_turned: bool) -> list[gs.Variable]:
        """q_x, s_x and z_x of an activation, found once."""
        if (id(x), is_turned) in self.ready:
            return self.ready[id(x), is_turned]
        nodes = self.before.setdefault(node.name, [])
        if is_turned:
            nodes.append(self._node("Transpose", x.name, [x], perm=[1, 0]))
        given = nodes[-1].outputs[0] if is_turned else x
        nodes.append(self._node("DynamicQuantizeLinear", x.name, [given]))
        nodes[-1].outputs = [self._tensor(x.name, what) for what in ("q", "scale", "zero")]
        self.ready[id(x), is_turned] = list(nodes[-1].outputs)
        return list(nodes[-1].outputs)

    def _addend(self, node: gs.Node) -> gs.Tensor | None:
        """β C of a Gemm."""
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return None
        c, beta = node.inputs[2], np.float32(node.attrs.get("beta", 1.0))
        if beta == 1.0:
            return c
        if isinstance(c, gs.Constant):
            return self._constant(c.name, "scaled", values(c) * beta)
        factor = self._constant(node.name, "beta", np.array(beta))
        self.before.setdefault(node.name, []).append(self._node("Mul", node.name, [c, factor]))
        return self.before[node.name][-1].outputs[0]

    def _matrix(self, weight: gs.Constant, is_turned: bool, alpha: float) -> Stored:
        """q_W of shape (K, N) and α s_W of shape (N,), of a weight (K, N), or (N, K) if turned."""
        key = (id(weight), f"{is_turned} {alpha}")
        if key not in self.kept:
            array = values(weight)[:, :, None] if is_turned else values(weight)[None]
            blocks = quantize_blocks(array, 8, reduced=self.reduced)
            codes = blocks.unfilled()[:, :, 0].T if is_turned else blocks.unfilled()[0]
            scales = np.float32(alpha) * blocks.scales.reshape(-1)
            self.kept[key] = self._stored(weight, codes, scales, decibels(array, blocks))
        return self.kept[key]

    def _gates(self, weight: gs.Constant) -> Stored:
        """q_W of shape (directions, inputs, 4 hidden) and s_W of shape (directions, 4 hidden)."""
        key = (id(weight), "gates")
        if key not in self.kept:
            array = values(weight)
            rows = array.reshape(-1, array.shape[2], 1)
            blocks = quantize_blocks(rows, 8, reduced=self.reduced)
            codes = blocks.unfilled().reshape(array.shape).transpose(0, 2, 1)
            scales = blocks.scales.reshape(array.shape[:2])
            self.kept[key] = self._stored(weight, codes, scales, decibels(rows, blocks))
        return self.kept[key]

    def _stored(self, weight: gs.Constant, codes: Array, scales: Array, ratio: float) -> Stored:
        q = self._constant(weight.name, "q", np.ascontiguousarray(codes))
        return Stored(q, self._constant(weight.name, "scale", scales), ratio)

    def _constant(self, name: str, what: str, array: Array) -> gs.Constant:
        return store(self.graph, fresh(self.graph, f"{name}_{what}"), array)

    def _tensor(self, name: str, what: str) -> gs.Variable:
        return gs.Variable(fresh(self.graph, f"{name}_{what}"))

    def _node(self, op: str, name: str, inputs: list[gs.Tensor], **attrs: Any) -> gs.Node:
        """A node with one output, named after `name`."""
        label = fresh(self.graph, f"{name}/{op}")
        return gs.Node(op, label, attrs, inputs, [self._tensor(name, op.lower())])


ROLES = ("weighted", "recurrent")
WEIGHTS = {"MatMul": (1,), "Gemm": (1,), "LSTM": (1, 2)}
WRITERS: dict[str, Callable[[Writing, gs.Node], None]] = {
    "MatMul": Writing.product,
    "Gemm": Writing.product,
    "LSTM": Writing.lstm,
}
UNFIT = {"Conv": "ConvInteger, which quantizes on the fly, is 4 to 16 times slower than Conv"}
