"""Store weights in 8 or 4 bits and compute in float: a smaller file, nearly the same numbers.

    w ≈ s q        one scale s for each output channel, or for each block of values summed together

A weight is converted as a constant, once, whoever reads it, also through a Transpose. Three forms:

    fold          Mul(Cast(q), s), which ONNX Runtime computes when it loads the file: the speed
                  and the memory of float
    dq            DequantizeLinear(q, s), by blocks from opset 21 on, for runtimes that fuse it
    matmulnbits   MatMulNBits, ONNX Runtime's product with weights that stay small in memory; other
                  operators than MatMul and Gemm take the form `fold`

A table that is only looked up keeps its int8 codes in memory in the last two forms: the rows that
Gather picks are multiplied by their scales. Weights that lie on integers already, of so many bits
or of 8, keep them: `quantize_layers` put them there. Left alone: small weights, weights that
something reads as data or that leave the model, and weights that a nested body shares with the
graph around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.core import Change, Context, Key, Skip, register
from onnxc.errors import OptionError
from onnxc.graph import gathering, nbytes, tidy, values, walk
from onnxc.numerics.blocks import Blocks, decibels, known_blocks, quantize_blocks
from onnxc.ops import knowledge
from onnxc.storage.stored import Writing, source, why_no_source

Names = frozenset[str]
Array = NDArray[Any]

WIDEST = 8  # bits, that few weights keep

POSITIONS = dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2))  # of weights, where there are several
PRODUCTS = ("MatMul", "Gemm")
STANDARD = (None, "", "ai.onnx")
AXIS_OPSET, HALF_OPSET, BLOCK_OPSET = 13, 19, 21  # of DequantizeLinear; the last also of int4
SHORTEST = 4  # values that share a scale


class RefusalError(Exception):
    """A weight that stays as it is, with the reason that the Skip gives."""


@dataclass(frozen=True)
class Use:
    """A node that multiplies by a weight or looks it up; turn: the Transpose in between.

    graph: the one that reads the weight.
    """

    graph: gs.Graph
    node: gs.Node
    position: int
    turn: gs.Node | None = None

    def summed(self, rank: int) -> tuple[int, int]:
        """Axes [start, stop) of the weight that share a scale: those summed over, mostly."""
        start, stop = SUMMED[self.node.op](self, rank)
        return (1 - start, 2 - start) if self.turn else (start, stop)


@dataclass
class Weight:
    """A constant and its readers; `others` are those that do not use it as a weight."""

    tensor: gs.Constant
    uses: list[Use] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(use.node.name for use in self.uses))

    @property
    def summed(self) -> tuple[int, int]:
        """What the first reader sums over."""
        return self.uses[0].summed(len(self.tensor.shape))

    @property
    def view(self) -> tuple[int, int, int]:
        """The shape (outer, K, inner) around the axes that are summed over."""
        shape, (start, stop) = self.tensor.shape, self.summed
        return prod(shape[:start]), prod(shape[start:stop]), prod(shape[stop:])


@register
@dataclass(frozen=True)
class QuantizeWeights:
    """Store weights in 8 or 4 bits and compute in float.

    bits: width of a stored weight.
    block: values that share a scale: 16, 32, 64 or 128; 0 for one scale an output channel.
    form: how weights become float again: folded at load, MatMulNBits, or DequantizeLinear.
    smallest: bytes below which a weight is left alone.
    """

    bits: Literal[8, 4] = 8
    block: Literal[0, 16, 32, 64, 128] = 0
    form: Literal["fold", "matmulnbits", "dq"] = "fold"
    smallest: int = 1024

    name: ClassVar[str] = "quantize-weights"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.form == "matmulnbits" and not self.block:
            raise OptionError("form = matmulnbits has one scale a block; set block to 32, say")

    def wants(self, graph: gs.Graph, context: Context) -> Iterable[Key]:
        return ()

    def apply(self, graph: gs.Graph, context: Context) -> list[Change | Skip]:
        allowed = context.only.names(graph)
        results: list[Change | Skip] = list(_without_weight(graph))
        outputs = {id(tensor) for inner in walk(graph) for tensor in inner.outputs}
        with gathering(graph):
            for weight in _weights(graph):
                try:
                    self._guard(weight, allowed, context.opset, outputs)
                except RefusalError as refusal:
                    results += [Skip(name, str(refusal)) for name in weight.names]
                else:
                    results += self._convert(graph, weight)
        if any(isinstance(result, Change) for result in results):
            tidy(graph)
        return results

    def _guard(self, weight: Weight, allowed: Names, opset: int, outputs: set[int]) -> None:
        """Raise RefusalError where a weight must or should stay."""
        outside = [name for name in weight.names if name not in allowed]
        if outside:
            shares = f"shares its weight with {outside[0]}, which is excluded"
            raise RefusalError(shares if len(weight.names) > 1 else "excluded")
        if id(weight.tensor) in outputs:
            raise RefusalError("its weight is an output of the graph")
        if weight.others:
            raise RefusalError(f"{weight.others[0]} reads its weight as data")
        if len({id(use.graph) for use in weight.uses}) > 1:
            raise RefusalError("a nested body shares its weight with the graph around it")
        size = nbytes(weight.tensor)
        if size < self.smallest:
            raise RefusalError(f"its weight has {size} bytes, fewer than {self.smallest}")
        if weight.view[1] < SHORTEST:
            raise RefusalError("scales would cost what its weight saves")
        needed = self._opset(weight)
        if opset < needed:
            raise RefusalError(f"needs opset {needed}, and the model has {opset}")
        if not np.isfinite(values(weight.tensor)).all():
            raise RefusalError("its weight is not finite")

    def _opset(self, weight: Weight) -> int:
        """The least opset that the form of a weight can be written in."""
        if self._is_product(weight) or self._is_lookup(weight):
            return 1
        if self.bits == 4:
            return BLOCK_OPSET
        if self.form != "dq":
            return 1
        if self.block or (weight.view[0] > 1 and weight.view[2] > 1):
            return BLOCK_OPSET
        return AXIS_OPSET if weight.tensor.dtype == np.float32 else HALF_OPSET

    def _is_product(self, weight: Weight) -> bool:
        """Whether the readers of a weight become MatMulNBits."""
        tensor = weight.tensor
        is_matrix = tensor.dtype == np.float32 and len(tensor.shape) == 2
        fits = self.form == "matmulnbits" and is_matrix and weight.view[1] >= self.block
        return fits and all(_is_plain(u) and u.summed(2) == weight.summed for u in weight.uses)

    def _is_lookup(self, weight: Weight) -> bool:
        """Whether the rows of a table are dequantized after they are picked."""
        is_table = all(
            use.node.op == "Gather" and not use.turn and not use.node.attrs.get("axis", 0)
            for use in weight.uses
        )
        return is_table and self.form != "fold" and self.bits == 8

    def _convert(self, graph: gs.Graph, weight: Weight) -> Iterator[Change]:
        """Write a weight in its form: a Change with the bytes, and one for each other reader."""
        is_lookup, is_product = self._is_lookup(weight), self._is_product(weight)
        block = 0 if is_lookup else self.block
        array = values(weight.tensor).reshape(weight.view)
        blocks = _known(array, self.bits, block) or quantize_blocks(array, self.bits, block)
        readers = [use.turn or use.node for use in weight.uses]
        writing = Writing(graph, weight.uses[0].graph, weight.tensor, weight.summed, blocks)
        if is_product:
            writing.multiply([use.node for use in weight.uses])
        elif is_lookup:
            writing.pick_rows(readers)
        elif self.form == "dq":
            writing.dequantize(readers)
        else:
            writing.fold(readers)
        grain = f"in blocks of {block}" if block else "per channel"
        what = f"{weight.tensor.name} int{blocks.bits} {grain}, {decibels(array, blocks):.1f} dB"
        first, *rest = weight.names
        yield Change(first, what, nbytes(weight.tensor), sum(map(nbytes, writing.stored)))
        yield from (Change(name, f"shares {weight.tensor.name} with {first}") for name in rest)


def _known(weight: Array, bits: int, block: int) -> Blocks | None:
    """What a weight was rounded to before, in as few of these bits as that takes."""
    found = (known_blocks(weight, width, block) for width in sorted({bits, WIDEST}))
    return next((blocks for blocks in found if blocks is not None), None)


def _weights(graph: gs.Graph) -> list[Weight]:
    """Constants that nodes multiply by or look up, nested bodies included, in order."""
    found: dict[int, Weight] = {}
    owners = {id(node): inner for inner in walk(graph) for node in inner.nodes}
    for node in (node for inner in walk(graph) for node in inner.nodes):
        for position in _positions(node):
            tensor, turn = source(node.inputs[position])
            if tensor is not None:
                weight = found.setdefault(id(tensor), Weight(tensor))
                weight.uses.append(Use(owners[id(turn or node)], node, position, turn))
    for weight in found.values():
        known = {id(n) for use in weight.uses for n in (use.turn or use.node, use.turn)}
        weight.others = [n.name for n in weight.tensor.outputs if id(n) not in known]
    return list(found.values())


def _positions(node: gs.Node) -> tuple[int, ...]:
    """Where a node has weights; a MatMul may have its weight first."""
    if node.domain not in STANDARD or node.op not in SUMMED:
        return ()
    row = knowledge(node)
    is_first = node.op == "MatMul" and source(node.inputs[1])[0] is None
    single = (0,) if is_first and source(node.inputs[0])[0] is not None else (row.weight or 0,)
    return tuple(p for p in POSITIONS.get(node.op, single) if p < len(node.inputs))


def _without_weight(graph: gs.Graph) -> Iterator[Skip]:
    """Nodes that multiply by something that is no float constant."""
    for node in (n for inner in walk(graph) for n in inner.nodes):
        if knowledge(node).role == "lookup":
            continue
        for tensor in (node.inputs[p] for p in _positions(node)):
            if source(tensor)[0] is None:
                yield Skip(node.name, why_no_source(node, tensor))


def _is_plain(use: Use) -> bool:
    """A product that MatMulNBits can take the place of."""
    node = use.node
    is_scaled = any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta"))
    shape = node.inputs[0].shape
    is_vector = shape is not None and len(shape) < 2
    is_second = use.position == 1 and node.op in PRODUCTS and use.turn is None
    return is_second and not (is_scaled or is_vector or node.attrs.get("transA", 0))


def _of_gather(use: Use, rank: int) -> tuple[int, int]:
    """A scale for each index: the axes behind the one that is looked up, or those before."""
    axis = int(use.node.attrs.get("axis", 0)) % rank
    return (axis + 1, rank) if axis + 1 < rank else (0, axis)


def _of_gemm(use: Use, rank: int) -> tuple[int, int]:
    return (1, 2) if use.node.attrs.get("transB", 0) else (0, 1)


def _of_matmul(use: Use, rank: int) -> tuple[int, int]:
    return (rank - 2, rank - 1) if use.position else (rank - 1, rank)


SUMMED: dict[str, Callable[[Use, int], tuple[int, int]]] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), lambda use, rank: (1, rank)),
    "Gemm": _of_gemm,
    "MatMul": _of_matmul,
    **dict.fromkeys(POSITIONS, lambda use, rank: (rank - 1, rank)),
    "Gather": _of_gather,
}
