"""How many weights of a model are zero, and what a file that codes them could save.

A weight of n values, z of them zero, p = z / n, can be coded as its positions and its other values:

    bytes = n h(p) / 8 + (n − z) · size of a value,    h(p) = −p log₂ p − (1 − p) log₂(1 − p)

n h(p) bits tell zeros from the rest when they lie anywhere (Shannon 1948); patterns take fewer. The
other values are counted in full: the mantissas of floats hardly compress.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxc.graph import Model, nbytes, size, values, walk
from onnxc.ops import knowledge, weight_of


@dataclass(frozen=True)
class Zeros:
    """The weights of a model's heavy nodes. coded: bytes of the model with its zeros coded.

    bits: a weight, for the positions of the zeros.
    """

    weights: int
    zeros: int
    bits: float
    coded: int

    @property
    def share(self) -> float:
        return self.zeros / max(self.weights, 1)


def count_zeros(model: Model) -> Zeros:
    """Count the zeros in the float weights of Conv, Gemm, MatMul and their like."""
    total, zeros, bits, coded = 0, 0, 0.0, size(model)
    for weight in _weights(model.graph):
        array = values(weight)
        empty = array.size - int(np.count_nonzero(array))
        places = array.size * entropy(empty / max(array.size, 1))
        values_left = (array.size - empty) * array.itemsize
        total, zeros, bits = total + array.size, zeros + empty, bits + places
        coded += min(0, round(places / 8) + values_left - nbytes(weight))
    return Zeros(total, zeros, bits / max(total, 1), coded)


def entropy(p: float) -> float:
    """h(p) in bits."""
    return -sum(float(q * np.log2(q)) for q in (p, 1 - p) if q > 0)


def _weights(graph: gs.Graph) -> list[gs.Constant]:
    """Each weight once, nested bodies included."""
    nodes = (node for inner in walk(graph) for node in inner.nodes)
    found = (weight_of(node) for node in nodes if knowledge(node).window is not None)
    return list({id(weight): weight for weight in found if weight is not None}.values())
