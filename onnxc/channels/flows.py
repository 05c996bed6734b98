"""FLOWS: how a channel cut travels through each operator. One row an operator.

A rule gets a node with the labels of its inputs' axes, and returns those of its outputs. On the way
it says which slices of which constants belong to a label, ties labels that go together, and blocks
those that the operator cannot do without. An operator without a row blocks all that reaches it.

    weighted    Y = W X        reads its input's labels, makes new ones
    same        y = f(x)       hands them on
    merge       y = f(a, b)    ties the labels of a and b, index by index, where neither broadcasts
    moved       a view of x    Slice, Concat, Transpose, Reshape, …: done to the labels themselves
    along       f over axes    blocks the axes that it works along, hands on the others

Reshape (C) → (A, B) and grouped convolutions can be cut in two ways: whole rows of A go (**outer**:
an attention head, a group), or the same place in each row (**inner**: channel shuffles).
"""

from __future__ import annotations

from onnxc.channels import elementwise, moves, reshapes, weighted
from onnxc.channels.visit import Rule

_UNARY = (
    *("Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish"),
    *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Gelu", "Swish", "Erf", "Exp", "Log"),
    *("Sqrt", "Reciprocal", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos", "Not"),
    *("Clip", "Cast", "Identity", "Dropout", "IsNaN", "IsInf"),
)
_BINARY = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Max", "Min", "Sum", "Mean", "Where"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
)
_POOLS = (
    *("MaxPool", "AveragePool", "LpPool"),
    *("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
)
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")

FLOWS: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, elementwise.same),
    **dict.fromkeys(_BINARY, elementwise.merge),
    **dict.fromkeys(_POOLS, elementwise.spatial),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), elementwise.reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), elementwise.along(-1)),
    **dict.fromkeys(("ArgMax", "ArgMin"), elementwise.argument),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), elementwise.along(-1, onward=True)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), elementwise.norm),
    "GroupNormalization": elementwise.group_norm,
    "Conv": weighted.conv,
    "ConvTranspose": weighted.conv_transpose,
    "Gemm": weighted.gemm,
    "MatMul": weighted.matmul,
    "LSTM": weighted.recurrent(4),
    "GRU": weighted.recurrent(3),
    "RNN": weighted.recurrent(1),
    "Concat": moves.concat,
    "Split": moves.split,
    "Slice": moves.slice_,
    "Gather": moves.gather,
    "Pad": moves.pad,
    "Transpose": moves.transpose,
    "Squeeze": moves.squeeze,
    "Unsqueeze": moves.unsqueeze,
    "Expand": moves.expand,
    "ConstantOfShape": moves.filled,
    "Tile": moves.tile,
    "Resize": moves.resize,
    "DepthToSpace": reshapes.depth_to_space,
    "SpaceToDepth": reshapes.space_to_depth,
    "Reshape": reshapes.reshape,
    "Flatten": reshapes.reshaped,
    "Shape": moves.shape_of,
}
