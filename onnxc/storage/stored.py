"""How a graph holds a weight in few bits: the nodes that make it float again, or read it as it is.

A weight is viewed as (outer, K, inner), K the axes that are summed over, and comes as `Blocks` of
codes q and scales s (`onnxc.numerics.blocks`). Codes are stored once, as int8 or packed int4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.graph import constant, first_of, fresh, insert, replace_uses, store
from onnxc.numerics.blocks import Blocks, pack_columns

FLOAT = 1  # ONNX number of float32
CONTRIB = "com.microsoft"
ACCURACY = 4  # of MatMulNBits: in int8; in float32, 8-bit weights take up to 20 times as long


def source(tensor: gs.Tensor) -> tuple[gs.Constant | None, gs.Node | None]:
    """The float constant behind an input of a node, and the Transpose of a matrix in between."""
    turn = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    if turn is not None and (turn.op != "Transpose" or turn.attrs.get("perm", [1, 0]) != [1, 0]):
        return None, None
    found = turn.inputs[0] if turn is not None else tensor
    if not isinstance(found, gs.Constant) or found.dtype not in (np.float32, np.float16):
        return None, None
    rank = len(found.shape)
    return (found, turn) if rank == 2 or (rank > 2 and turn is None) else (None, None)


def why_no_source(node: gs.Node, tensor: gs.Tensor) -> str:
    """Why `source` finds no weight in an input of a node, in a user's words."""
    if isinstance(tensor, gs.Constant):
        return f"its weight {tensor.name} is not a float matrix"
    if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear":
        return "is quantized already"
    if node.op != "MatMul":
        return "its weight is computed"
    is_first = source(node.inputs[0])[0] is not None
    return "its weight is the first operand" if is_first else "multiplies two activations"


@dataclass
class Writing:
    """One weight on its way into a graph; what it adds to the file collects in `stored`.

    names: the main graph, which knows all names. graph: the one whose nodes read the weight.
    summed: the axes [start, stop) of the weight that are summed over.
    """

    names: gs.Graph
    graph: gs.Graph
    tensor: gs.Constant
    summed: tuple[int, int]
    blocks: Blocks
    stored: list[gs.Constant] = field(default_factory=list)

    def fold(self, readers: Sequence[gs.Node]) -> None:
        """Readers read Mul(Cast(q), s), which ONNX Runtime computes when it loads the file."""
        codes, scales = self.blocks.stored(), self.blocks.scales
        is_cut = self.blocks.codes.shape[1] > 1
        if not is_cut:
            codes, scales = codes.reshape(self.tensor.shape), scales.reshape(self._grid())
        x = self._node("Cast", [self._keep("q", codes)], to=FLOAT)
        nodes = [x, self._node("Mul", [x.outputs[0], self._keep("scale", scales)])]
        nodes += self._shaped(nodes[-1].outputs[0]) if is_cut else []
        nodes += self._halved(nodes[-1].outputs[0])
        self._replace(readers, nodes)

    def dequantize(self, readers: Sequence[gs.Node]) -> None:
        """Readers read DequantizeLinear(q, s): one scale a channel, or blocked where it is cut."""
        outer, count, block, inner = self.blocks.codes.shape
        codes, scales = self.blocks.unfilled(), self.blocks.scales[:, :, 0]
        if outer == 1:
            codes, scales, axis = codes[0], scales[0], 0
        elif inner == 1:
            codes, scales, axis = codes[..., 0], scales[..., 0], 1
        else:
            axis = 1
        attrs = {"axis": axis, "block_size": block}
        if count == 1 and codes.ndim == 2:
            attrs, scales = {"axis": 1 - axis}, scales.reshape(-1)
            if axis == 1 and self.tensor.shape[0] == outer:
                codes = codes.reshape(self.tensor.shape)
        inputs = [self._keep("q", codes), self._keep("scale", scales.astype(self.tensor.dtype))]
        nodes = [self._node("DequantizeLinear", inputs, **attrs)]
        if codes.shape != tuple(self.tensor.shape):
            nodes.append(self._reshape(nodes[-1].outputs[0], self.tensor.shape))
        self._replace(readers, nodes)

    def pick_rows(self, lookups: Sequence[gs.Node]) -> None:
        """Each Gather picks rows of q, which its row of s then multiplies."""
        codes = self._keep("q", self.blocks.stored().reshape(self.tensor.shape))
        scales = self._keep("scale", self.blocks.scales.reshape(self._grid()))
        after = {}
        for node in lookups:
            result, rows = node.outputs[0], self._fresh("rows")
            chosen = self._node("Gather", [scales, node.inputs[1]], axis=0)
            cast = self._node("Cast", [rows], to=FLOAT)
            product = self._node("Mul", [cast.outputs[0], chosen.outputs[0]])
            after[node.name] = [chosen, cast, product, *self._halved(product.outputs[0])]
            node.inputs[0], node.outputs = codes, [rows]
            after[node.name][-1].outputs = [result]
        insert(self.graph, after=after)

    def multiply(self, products: Sequence[gs.Node]) -> None:
        """Each MatMul or Gemm becomes MatMulNBits, a Gemm's bias an Add behind it."""
        outer, _, block, inner = self.blocks.codes.shape
        scales = self.blocks.scales[:, :, 0].transpose(0, 2, 1).reshape(-1)
        inputs = [self._keep("q", pack_columns(self.blocks)), self._keep("scale", scales)]
        bits = self.blocks.bits
        attrs = {"K": self.blocks.length, "N": outer * inner, "bits": bits, "block_size": block}
        after = {}
        for node in products:
            result, bias = node.outputs[0], node.inputs[2:3]
            node.op, node.domain = "MatMulNBits", CONTRIB
            node.attrs = {**attrs, "accuracy_level": ACCURACY}
            node.inputs = [node.inputs[0], *inputs]
            if bias and bias[0].name:
                node.outputs = [self._fresh("product")]
                after[node.name] = [self._node("Add", [node.outputs[0], *bias])]
                after[node.name][0].outputs = [result]
        insert(self.graph, after=after)

    def _grid(self) -> list[int]:
        """The shape of the weight with 1 along the axes that share a scale."""
        start, stop = self.summed
        return [1 if start <= axis < stop else n for axis, n in enumerate(self.tensor.shape)]

    def _fresh(self, what: str) -> gs.Variable:
        return gs.Variable(fresh(self.names, f"{self.tensor.name}_{what}"))

    def _keep(self, what: str, array: NDArray[Any]) -> gs.Constant:
        """A new constant, counted."""
        name = fresh(self.names, f"{self.tensor.name}_{what}")
        kept = store(self.names, name, np.ascontiguousarray(array))
        self.stored.append(kept)
        return kept

    def _node(self, op: str, inputs: list[gs.Tensor], **attrs: Any) -> gs.Node:
        name = fresh(self.names, f"{self.tensor.name}/{op}")
        return gs.Node(op, name, attrs, inputs, [self._fresh(op.lower())])

    def _numbers(self, numbers: Sequence[int]) -> gs.Constant:
        return constant(fresh(self.names, f"{self.tensor.name}_shape"), np.array(numbers, np.int64))

    def _reshape(self, x: gs.Tensor, shape: Sequence[int]) -> gs.Node:
        return self._node("Reshape", [x, self._numbers(shape)])

    def _shaped(self, x: gs.Tensor) -> list[gs.Node]:
        """From (outer, blocks, block, inner) to the shape of the weight."""
        outer, count, block, inner = self.blocks.codes.shape
        if not self.blocks.is_filled:
            return [self._reshape(x, self.tensor.shape)]
        joined = self._reshape(x, (outer, count * block, inner))
        ends = [self._numbers([0]), self._numbers([self.blocks.length]), self._numbers([1])]
        cut = self._node("Slice", [joined.outputs[0], *ends])
        return [joined, cut, self._reshape(cut.outputs[0], self.tensor.shape)]

    def _halved(self, x: gs.Tensor) -> list[gs.Node]:
        """A Cast back to the type of a weight that is not float32."""
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.tensor.dtype))
        return [] if kind == FLOAT else [self._node("Cast", [x], to=kind)]

    def _replace(self, readers: Sequence[gs.Node], nodes: list[gs.Node]) -> None:
        """Let all readers of the weight read the last of `nodes`, put in front of the first one."""
        nodes[-1].outputs[0].dtype = self.tensor.dtype
        nodes[-1].outputs[0].shape = self.tensor.shape
        replace_uses(self.tensor, nodes[-1].outputs[0])
        insert(self.graph, before={first_of(self.graph, readers).name: nodes})
