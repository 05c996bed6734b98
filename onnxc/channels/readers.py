"""The weights that read the channels of a group, as matrices over the rows of their inputs.

A row x of a reader's input has d entries in each of g groups, and Y = W x with W (g, M, d). A
channel stands for some of the g·d columns: one in a product, those of all kernel offsets in a
convolution, the same place of every group where groups are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxc.channels.groups import Group
from onnxc.channels.visit import Slot
from onnxc.core import Key
from onnxc.edit import values
from onnxc.moments import matrix, moments_key
from onnxc.ops import groups, knowledge

Array = NDArray[Any]


@dataclass(frozen=True)
class Reader:
    """A slot that reads channels, of a node.

    key: of the moments of the rows that its weight multiplies, None where there are none.
    """

    node: gs.Node
    slot: Slot

    @property
    def key(self) -> Key | None:
        is_main = self.slot.position == knowledge(self.node).weight
        return moments_key(self.node) if is_main else None

    @property
    def weight(self) -> Array:
        return values(self.node.inputs[self.slot.position])

    def matrix(self) -> Array:
        """W (g, M, d), float64."""
        weight = self.weight.astype(np.float64)
        if self._has_rows():
            return matrix(self.node, weight)
        rows = np.moveaxis(weight, self.slot.axis, -1)
        return rows.reshape(1, -1, rows.shape[-1])

    def to_weight(self, W: Array) -> Array:
        """The weight whose matrix is W."""
        old = self.weight
        if self._has_rows():
            is_first = self._in_axis() == 1
            rows = W if is_first else W.transpose(0, 2, 1)
            return rows.reshape(old.shape).astype(old.dtype)
        moved = np.moveaxis(old, self.slot.axis, -1).shape
        back = np.moveaxis(W.reshape(moved), -1, self.slot.axis)
        return np.ascontiguousarray(back, dtype=old.dtype)

    def columns(self, channels: Iterable[int]) -> list[Array]:
        """Numbers of the columns of each channel, among all g·d."""
        places = self._places()
        labels = self.slot.labels
        return [places[labels == channel].reshape(-1) for channel in channels]

    def _places(self) -> Array:
        """Numbers of columns (n, m) of each index of the slot's axis."""
        count = len(self.slot.labels)
        if not self._has_rows() or self._in_axis() != 1:
            return np.arange(count)[:, None]
        g, offsets = groups(self.node), math.prod(self.weight.shape[2:])
        inside = np.arange(count)[:, None, None] * offsets + np.arange(offsets)
        every = inside + np.arange(g)[None, :, None] * (count * offsets)
        return np.asarray(every.reshape(count, -1))

    def _has_rows(self) -> bool:
        row = knowledge(self.node)
        is_main = self.slot.position == row.weight and row.out_axis is not None
        return is_main and self.key is not None

    def _in_axis(self) -> int:
        in_axis = knowledge(self.node).in_axis
        assert in_axis is not None
        return in_axis(self.node)


def readers(group: Group, nodes: Mapping[str, gs.Node]) -> Sequence[Reader]:
    """All readers of the channels of a group."""
    return [Reader(nodes[slot.node], slot) for slot in group.slots if slot.role == "reads"]
