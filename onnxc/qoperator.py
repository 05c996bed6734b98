"""Integer operators (QOperator): what each takes in place of an operator between Q/DQ pairs.

One row an operator: its name, the order of its inputs, and the attributes that go along. Its
activations share one 8-bit type and have one scale each; a weight may have one a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.edit import values

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Integers:
    """Integers q and what they stand for: x = s (q - z). axis: of a vector of s, else None."""

    q: gs.Tensor
    scale: gs.Constant
    zero: gs.Constant
    axis: int | None

    @property
    def flat(self) -> list[gs.Tensor]:
        return [self.q, self.scale, self.zero]

    @property
    def kind(self) -> str:
        return str(np.dtype(self.zero.dtype))

    def is_like(self, other: Integers) -> bool:
        """Whether equal integers stand for equal values."""
        pairs = ((self.scale, other.scale), (self.zero, other.zero))
        same = all(np.array_equal(values(a), values(b)) for a, b in pairs)
        return same and self.kind == other.kind and self.axis == other.axis


@dataclass(frozen=True)
class Result:
    """What an output becomes. quantizer: its Q; behind: the Relu and Clip nodes between."""

    integers: Integers
    quantizer: gs.Node
    behind: tuple[gs.Node, ...] = ()


@dataclass(frozen=True)
class Site:
    """A node between Q/DQ: its operands, its bias, and its result; None where that stays float."""

    node: gs.Node
    operands: tuple[Integers, ...]
    bias: gs.Tensor | None = None
    result: Result | None = None

    @property
    def read(self) -> list[gs.Tensor]:
        return [tensor for operand in self.operands for tensor in operand.flat]

    @property
    def written(self) -> list[gs.Tensor]:
        return [] if self.result is None else self.result.integers.flat[1:]


@dataclass(frozen=True)
class Form:
    """An integer operator. inputs: its inputs in order. keeps: attributes that go along.

    weight_axis: the axis of the second operand that may have a scale for each index. floats: the
    form that returns float; None if there is none.
    """

    op: str
    inputs: Callable[[Site], list[gs.Tensor]]
    keeps: tuple[str, ...] = ()
    domain: str = MICROSOFT
    weight_axis: Callable[[gs.Node], int] | None = None
    floats: Form | None = None


def _plain(site: Site) -> list[gs.Tensor]:
    return [*site.read, *site.written]


def _with_bias(site: Site) -> list[gs.Tensor]:
    return [*_plain(site), *([] if site.bias is None else [site.bias])]


def _bias_inside(site: Site) -> list[gs.Tensor]:
    bias = gs.Variable.empty() if site.bias is None else site.bias
    return [*site.read, bias, *site.written]


def _result_first(site: Site) -> list[gs.Tensor]:
    return [*site.written, *site.read]


def _by_kind(site: Site) -> list[gs.Tensor]:
    a, s_a, z_a, b, s_b, z_b = site.read
    return [a, b, s_a, s_b, z_a, z_b]


def _columns(gemm: gs.Node) -> int:
    return 1 - int(gemm.attrs.get("transB", 0))


WINDOW = ("auto_pad", "kernel_shape", "pads", "strides")
CONV = (*WINDOW, "dilations", "group")
POOL = (*WINDOW, "ceil_mode", "count_include_pad")
TO_FLOAT = Form("MatMulIntegerToFloat", _by_kind, weight_axis=lambda node: 1)
GEMM = Form("QGemm", _bias_inside, ("transB",), weight_axis=_columns)

FORMS: dict[str, Form] = {
    "Conv": Form("QLinearConv", _with_bias, CONV, domain="", weight_axis=lambda node: 0),
    "Gemm": replace(GEMM, floats=GEMM),
    "MatMul": Form("QLinearMatMul", _plain, domain="", weight_axis=lambda node: 1, floats=TO_FLOAT),
    "Add": Form("QLinearAdd", _plain),
    "Mul": Form("QLinearMul", _plain),
    "Concat": Form("QLinearConcat", _result_first, ("axis",)),
    "AveragePool": Form("QLinearAveragePool", _plain, POOL),
    "GlobalAveragePool": Form("QLinearGlobalAveragePool", _plain),
    "Sigmoid": Form("QLinearSigmoid", _plain),
    "LeakyRelu": Form("QLinearLeakyRelu", _plain, ("alpha",)),
}
