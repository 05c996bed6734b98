"""How a graph holds a constant of few distinct values: a codebook, and codes of 1 to 8 bits.

    value = levels[unpack(codes)]

ONNX Runtime computes this when it loads the file, and runs the model as if the constant had been
there. The chain is of standard operators and begins with packed codes (`onnxc.numerics.packing`):

    8 bits          Cast, Gather: the codes have the shape of the constant
    4 bits          the same with the type uint4, from opset 21 on
    1, 2, 4 bits    BitShift left, BitShift right, Cast, Gather, Reshape
    3, 5, 6, 7      Gather twice, BitShift twice, BitwiseOr, and then the same; from opset 18 on

What does not depend on the codes, such as shifts, is stored once in a graph for each width. The
result takes the name of the constant; what is on the way to it has short names, for in a small
model names weigh more than codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.graph import constant, first_of, fresh, insert, nbytes, replace_uses, store
from onnxc.numerics.packing import Layout, layout, pack

INT32 = 6  # ONNX number
SHIFT_OPSET, OR_OPSET, NIBBLE_OPSET = 11, 18, 21  # of BitShift, BitwiseOr and uint4
NIBBLE = 4  # bits
WIDEST = 8
OVERHEAD = {False: 320, True: 640}  # bytes of a chain of nodes, without and with BitwiseOr


def least_opset(bits: int) -> int:
    """The first opset whose operators unpack codes of so many bits."""
    if bits == WIDEST:
        return 1
    return SHIFT_OPSET if layout(bits).is_simple else OR_OPSET


def stored_bytes(count: int, levels: int, bits: int, itemsize: int) -> int:
    """Bytes that a constant of `count` values takes in this form, its nodes included."""
    chain = OVERHEAD[bits < WIDEST and not layout(bits).is_simple]
    return -(-count * bits // 8) + levels * itemsize + chain


@dataclass
class Books:
    """Writes the codebooks of one graph.

    shared: constants that all chains of a width read. number: codebooks written so far.
    """

    graph: gs.Graph
    opset: int
    number: int = 0
    shared: dict[tuple[str, int], gs.Constant] = field(default_factory=dict)

    def write(
        self, tensor: gs.Constant, levels: NDArray[Any], codes: NDArray[Any], bits: int
    ) -> int:
        """Let the nodes of the graph that read a constant read levels[codes]; bytes stored.

        levels: (K,), of the type of the constant. codes: of its shape.
        """
        self.number += 1
        book = self._keep("levels", levels)
        nodes, kept = self._picked(book, codes, bits)
        if not self.is_whole(bits):
            nodes += self._reshape(tensor.shape, nodes[-1].outputs[0], codes.size, bits)
        self._replace(tensor, nodes)
        return nbytes(book) + nbytes(kept)

    def is_whole(self, bits: int) -> bool:
        """Whether codes of this width are stored in a type of ONNX, in the shape that they have."""
        return bits == WIDEST or (bits == NIBBLE and self.opset >= NIBBLE_OPSET)

    def _picked(
        self, book: gs.Constant, codes: NDArray[Any], bits: int
    ) -> tuple[list[gs.Node], gs.Constant]:
        """The nodes that give rows of a book by codes, and the codes as they are stored."""
        nodes, kept = self._stored(codes, bits)
        return nodes + self._look_up(book, nodes[-1].outputs[0] if nodes else kept), kept

    def _stored(self, codes: NDArray[Any], bits: int) -> tuple[list[gs.Node], gs.Constant]:
        """The nodes that unpack codes, none of a width that is stored whole, and what they read."""
        if self.is_whole(bits):
            kind = np.dtype(np.uint8) if bits == WIDEST else np.dtype(ml_dtypes.uint4)
            return [], self._keep("codes", codes.astype(np.uint8).astype(kind))
        kept = self._keep("codes", pack(codes, bits))
        return self._unpack(kept, bits), kept

    def _unpack(self, packed: gs.Constant, bits: int) -> list[gs.Node]:
        """Codes as bytes, (groups, count)."""
        place = layout(bits)
        left = self._shared("left", bits, place.left)
        if place.is_simple:
            nodes = [self._node("BitShift", [packed, left], direction="LEFT")]
        else:
            nodes = self._straddle(packed, left, place, bits)
        down = self._shared("down", bits, np.array(place.down, np.uint8))
        inputs = [nodes[-1].outputs[0], down]
        return [*nodes, self._node("BitShift", inputs, direction="RIGHT")]

    def _straddle(
        self, packed: gs.Constant, left: gs.Constant, place: Layout, bits: int
    ) -> list[gs.Node]:
        """Both bytes of each code, shifted to where they belong."""
        picked = [
            self._node("Gather", [packed, self._shared(name, bits, index)], axis=1)
            for name, index in (("first", place.first), ("second", place.second))
        ]
        right = self._shared("right", bits, place.right)
        high, low = (node.outputs[0] for node in picked)
        shifted = [
            self._node("BitShift", [high, left], direction="LEFT"),
            self._node("BitShift", [low, right], direction="RIGHT"),
        ]
        both = self._node("BitwiseOr", [node.outputs[0] for node in shifted])
        return [*picked, *shifted, both]

    def _look_up(self, book: gs.Constant, codes: gs.Tensor) -> list[gs.Node]:
        cast = self._cast(codes, INT32)
        return [cast, self._node("Gather", [book, cast.outputs[0]])]

    def _reshape(self, shape: Any, found: gs.Tensor, count: int, bits: int) -> list[gs.Node]:
        """To a shape, without what the last group of so many codes is filled up with."""
        nodes: list[gs.Node] = []
        if count % layout(bits).count:
            flat = self._node("Reshape", [found, self._numbers([-1])])
            ends = [self._numbers([0]), self._numbers([int(np.prod(shape))])]
            nodes = [flat, self._node("Slice", [flat.outputs[0], *ends])]
            found = nodes[-1].outputs[0]
        return [*nodes, self._node("Reshape", [found, self._numbers(shape)])]

    def _cast(self, x: gs.Tensor, kind: int) -> gs.Node:
        return self._node("Cast", [x], to=kind)

    def _numbers(self, numbers: Any) -> gs.Constant:
        """A vector of int64, once for each content."""
        text = "x".join(map(str, numbers))
        return self._shared(f"shape_{text}", 0, np.array(list(numbers), np.int64))

    def _shared(self, name: str, bits: int, array: NDArray[Any]) -> gs.Constant:
        key = (name, bits)
        if key not in self.shared:
            stem = f"{name}_of_{bits}_bits" if bits else name
            self.shared[key] = constant(fresh(self.graph, stem), array)
        return self.shared[key]

    def _keep(self, what: str, array: NDArray[Any]) -> gs.Constant:
        name = fresh(self.graph, f"{what}_{self.number}")
        return store(self.graph, name, np.ascontiguousarray(array))

    def _node(self, op: str, inputs: list[gs.Tensor], **attrs: Any) -> gs.Node:
        """A node that is named as its output."""
        name = fresh(self.graph, f"{op.lower()}_{self.number}")
        return gs.Node(op, name, attrs, inputs, [gs.Variable(name)])

    def _replace(self, tensor: gs.Constant, nodes: list[gs.Node]) -> None:
        """Let all readers read what the last node makes, with the chain ahead of the first one."""
        made = gs.Variable(tensor.name, tensor.dtype, tensor.shape)
        nodes[-1].outputs = [made]
        first = first_of(self.graph, tensor.outputs)
        replace_uses(tensor, made)
        insert(self.graph, before={first.name: nodes})
