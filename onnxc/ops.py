"""OPS: what onnxc knows of each operator. One row an operator; passes name no operator in an `if`.

Roles in quantization:

    weighted     multiplies by a constant weight; computes in integers when input and weight are
                 quantized, and takes an int32 bias at scale s_x * s_w
    product      multiplies two activations (MatMul without a constant)
    sum          inputs and output each have their own scale (Add, Mul, Concat, pools, Sigmoid)
    same         moves values without changing them: input and output share one scale
    activation   absorbed by the kernel in front of it when the output's range says the same
    recurrent    LSTM, GRU: weights quantized, activations quantized on the fly
    lookup       Gather of a constant table
    opaque       everything else: stays float
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

Role = Literal[
    "weighted", "product", "sum", "same", "activation", "recurrent", "lookup", "opaque"
]


@dataclass(frozen=True)
class Op:
    """What is known of one operator.

    data: positions of the activation inputs. weight, bias: positions of the constants, or None.
    out_axis, in_axis: axes of the weight's output and input channels, as functions of the node.
    y_axis: the channel axis of the output. homogeneous: f(s x) = s f(x) for each channel's s > 0.
    bounds: positions of the least and largest output. float_output: the integer kernel can return
    float, so that its output needs no scale. adds: the output is the sum of the data inputs.
    fits: whether a node's attributes suit the integer kernel.
    """

    role: Role = "opaque"
    data: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    out_axis: Callable[[gs.Node], int] | None = None
    in_axis: Callable[[gs.Node], int] | None = None
    y_axis: int = 1
    homogeneous: bool = False
    bounds: tuple[int, ...] = ()
    float_output: bool = False
    adds: bool = False
    fits: Callable[[gs.Node], bool] | None = None


def groups(node: gs.Node) -> int:
    """Number of groups of a convolution."""
    return int(node.attrs.get("group", 1))


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant of the graph."""
    return isinstance(tensor, gs.Constant)


def _gemm_out(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB", 0) else 1


def _matmul_rank(node: gs.Node) -> int:
    return len(node.inputs[1].shape)


def _takes_nearest(node: gs.Node) -> bool:
    return bool(node.attrs.get("mode", "nearest") == "nearest")


OPS: dict[str, Op] = {
    "Conv": Op("weighted", weight=1, bias=2, out_axis=lambda n: 0, in_axis=lambda n: 1),
    "ConvTranspose": Op("weighted", weight=1, bias=2, out_axis=lambda n: 1, in_axis=lambda n: 0),
    "Gemm": Op(
        "weighted",
        weight=1,
        bias=2,
        out_axis=_gemm_out,
        in_axis=lambda n: 1 - _gemm_out(n),
        float_output=True,
    ),
    "MatMul": Op(
        "weighted",
        weight=1,
        out_axis=lambda n: _matmul_rank(n) - 1,
        in_axis=lambda n: _matmul_rank(n) - 2,
        y_axis=-1,
        float_output=True,
    ),
    "LSTM": Op("recurrent", weight=1),
    "GRU": Op("recurrent", weight=1),
    "Gather": Op("lookup", weight=0),
    "Add": Op("sum", data=(0, 1), homogeneous=True, adds=True),
    "Mul": Op("sum", data=(0, 1)),
    "Concat": Op("sum", data=()),
    "AveragePool": Op("sum", homogeneous=True),
    "GlobalAveragePool": Op("sum", homogeneous=True),
    "LeakyRelu": Op("sum", homogeneous=True),
    "Sigmoid": Op("sum"),
    "MaxPool": Op("same", homogeneous=True),
    "Reshape": Op("same"),
    "Transpose": Op("same"),
    "Flatten": Op("same"),
    "Squeeze": Op("same"),
    "Unsqueeze": Op("same"),
    "Slice": Op("same"),
    "Split": Op("same"),
    "Expand": Op("same"),
    "Tile": Op("same"),
    "DepthToSpace": Op("same"),
    "Resize": Op("same", fits=_takes_nearest),
    "Relu": Op("activation", homogeneous=True),
    "Clip": Op("activation", bounds=(1, 2)),
}

OPAQUE = Op(data=())

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def knowledge(node: gs.Node) -> Op:
    """The row of a node; OPAQUE for an operator or a domain that the table does not know."""
    return OPAQUE if node.domain else OPS.get(node.op, OPAQUE)


def data_inputs(node: gs.Node) -> list[gs.Tensor]:
    """The activation inputs of a node; all inputs of a variadic operator."""
    row = knowledge(node)
    positions = row.data or range(len(node.inputs))
    return [node.inputs[i] for i in positions if i < len(node.inputs)]


def weight_of(node: gs.Node) -> gs.Constant | None:
    """The constant float weight of a heavy node, or None."""
    position = knowledge(node).weight
    if position is None or position >= len(node.inputs):
        return None
    tensor = node.inputs[position]
    is_weight = isinstance(tensor, gs.Constant) and tensor.dtype in (np.float32, np.float16)
    return tensor if is_weight and len(tensor.shape) >= 2 else None


def is_depthwise(node: gs.Node) -> bool:
    """A convolution whose every group reads one input channel."""
    weight = weight_of(node)
    return weight is not None and groups(node) > 1 and weight.shape[1] == 1
