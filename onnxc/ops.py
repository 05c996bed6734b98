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

from onnxc.edit import values
from onnxc.numerics.patches import Window

Role = Literal["weighted", "product", "sum", "same", "activation", "recurrent", "lookup", "opaque"]


@dataclass(frozen=True)
class Op:
    """What is known of one operator.

    data: positions of the activation inputs. weight, bias: positions of the constants, or None.
    out_axis, in_axis: axes of the weight's output and input channels, as functions of the node.
    y_axis: the channel axis of the output. homogeneous: f(s x) = s f(x) for each channel's s > 0.
    bounds: positions of the least and largest output. float_output: the integer kernel can return
    float, so that its output needs no scale. adds: the output is the sum of the data inputs.
    copies: the output holds the values of all of them, so that one scale may do for all.
    multiplies: the output is the product of the data inputs. gains: positions of the constants, one
    number a channel of y_axis, that scale the output together.
    x_axis, window: the axis of the input that the weight's input channels multiply, and how the
    input is cut into the rows that it multiplies, as functions of the node.
    fits: whether a node suits the integer kernel. bare: the row of a node whose weight is computed.
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
    copies: bool = False
    multiplies: bool = False
    gains: tuple[int, ...] = ()
    x_axis: Callable[[gs.Node], int] | None = None
    window: Callable[[gs.Node], Window] | None = None
    fits: Callable[[gs.Node], bool] | None = None
    bare: Op | None = None


def groups(node: gs.Node) -> int:
    """Number of groups of a convolution."""
    return int(node.attrs.get("group", 1))


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant of the graph."""
    return isinstance(tensor, gs.Constant)


def bounds(node: gs.Node) -> tuple[float, float]:
    """Least and largest output of a Clip or Relu; NaN where they are computed."""
    row, found = knowledge(node), [-np.inf, np.inf]
    if not row.bounds:
        return 0.0, np.inf
    for index, position in enumerate(row.bounds):
        given = node.inputs[position] if position < len(node.inputs) else None
        if given is not None and given.name:
            found[index] = float(values(given).reshape(())) if is_constant(given) else np.nan
    return found[0], found[1]


def _gemm_out(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB", 0) else 1


def _matmul_rank(node: gs.Node) -> int:
    return len(node.inputs[1].shape)


def _conv_window(node: gs.Node) -> Window:
    def numbers(name: str) -> tuple[int, ...]:
        return tuple(map(int, node.attrs.get(name, ())))

    kernel = tuple(map(int, node.inputs[1].shape[2:]))
    auto_pad = str(node.attrs.get("auto_pad", "NOTSET"))
    lists = (numbers("strides"), numbers("dilations"), numbers("pads"))
    return Window(kernel, *lists, auto_pad, groups(node))


def _recurrent_window(node: gs.Node) -> Window:
    return Window(samples=0 if node.attrs.get("layout", 0) else 1)


def _takes_nearest(node: gs.Node) -> bool:
    return bool(node.attrs.get("mode", "nearest") == "nearest")


def _returns_one(node: gs.Node) -> bool:
    return len([tensor for tensor in node.outputs if tensor.name]) == 1


def _clips_from_zero(node: gs.Node) -> bool:
    """Clip(x, 0, h): a range of unsigned integers has the same bounds."""
    low, high = bounds(node)
    return low == 0.0 and high > 0.0


OPS: dict[str, Op] = {
    "Conv": Op(
        "weighted",
        weight=1,
        bias=2,
        out_axis=lambda n: 0,
        in_axis=lambda n: 1,
        x_axis=lambda n: 1,
        window=_conv_window,
    ),
    "ConvTranspose": Op(
        "weighted",
        weight=1,
        bias=2,
        out_axis=lambda n: 1,
        in_axis=lambda n: 0,
        x_axis=lambda n: 1,
        window=lambda n: Window(groups=groups(n)),
    ),
    "Gemm": Op(
        "weighted",
        weight=1,
        bias=2,
        out_axis=_gemm_out,
        in_axis=lambda n: 1 - _gemm_out(n),
        float_output=True,
        x_axis=lambda n: 0 if n.attrs.get("transA", 0) else 1,
        window=lambda n: Window(),
    ),
    "MatMul": Op(
        "weighted",
        weight=1,
        out_axis=lambda n: _matmul_rank(n) - 1,
        in_axis=lambda n: _matmul_rank(n) - 2,
        y_axis=-1,
        float_output=True,
        x_axis=lambda n: -1,
        window=lambda n: Window(),
    ),
    "LSTM": Op("recurrent", weight=1, x_axis=lambda n: -1, window=_recurrent_window),
    "GRU": Op("recurrent", weight=1, x_axis=lambda n: -1, window=_recurrent_window),
    "Gather": Op("lookup", weight=0, bare=Op("same")),
    "Add": Op("sum", data=(0, 1), homogeneous=True, adds=True),
    "Mul": Op("sum", data=(0, 1), multiplies=True),
    "Concat": Op("sum", data=(), copies=True),
    "AveragePool": Op("sum", homogeneous=True),
    "GlobalAveragePool": Op("sum", homogeneous=True),
    "LeakyRelu": Op("sum", homogeneous=True),
    "Sigmoid": Op("sum"),
    "MaxPool": Op("same", homogeneous=True, fits=_returns_one),
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
    "Clip": Op("activation", bounds=(1, 2), fits=_clips_from_zero),
    "LayerNormalization": Op(gains=(1, 2), y_axis=-1),
    "RMSNormalization": Op(gains=(1,), y_axis=-1),
    "InstanceNormalization": Op(gains=(1, 2)),
}

OPAQUE = Op(data=())

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def knowledge(node: gs.Node) -> Op:
    """The row of a node; OPAQUE for an operator or a domain that the table does not know."""
    row = OPAQUE if node.domain else OPS.get(node.op, OPAQUE)
    if row.bare is None or (row.weight is not None and is_constant(node.inputs[row.weight])):
        return row
    return row.bare


def is_absorbed(node: gs.Node) -> bool:
    """Whether a node is an activation that the kernel in front of it takes in."""
    row = knowledge(node)
    return row.role == "activation" and (row.fits is None or row.fits(node))


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


def channels_of(node: gs.Node) -> int:
    """Output channels of a heavy node with one axis of them."""
    weight, row = weight_of(node), knowledge(node)
    assert weight is not None and row.out_axis is not None
    axis = row.out_axis(node)
    return int(weight.shape[axis]) * (groups(node) if axis else 1)


def has_bias(node: gs.Node) -> bool:
    position = knowledge(node).bias
    return position is not None and position < len(node.inputs) and bool(node.inputs[position].name)


def is_odd_bias(node: gs.Node) -> bool:
    """Whether a bias is there that is not one constant for each output channel, or one for all.

    Gemm adds a matrix as well, and a column: a number for each row.
    """
    if not has_bias(node):
        return False
    bias, n = node.inputs[knowledge(node).bias], channels_of(node)
    return not is_constant(bias) or tuple(bias.shape) not in ((), (1,), (1, 1), (n,), (1, n))


def is_depthwise(node: gs.Node) -> bool:
    """A convolution whose every group reads one input channel."""
    weight = weight_of(node)
    return weight is not None and groups(node) > 1 and weight.shape[1] == 1
