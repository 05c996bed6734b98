"""Elements of all types of ONNX: their bytes in files, as onnx itself writes and reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from onnxc import elements

NUMBERS = [n for n in TensorProto.DataType.values() if n not in (0, TensorProto.STRING)]
NAMES = [TensorProto.DataType.Name(number) for number in NUMBERS]
SHAPES = [(3, 5), (), (0, 4), (1,)]
every_type = pytest.mark.parametrize("number", NUMBERS, ids=NAMES)


def drawn(number: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Small whole numbers, which all types but that of powers of two have."""
    kind = elements.dtype(number)
    whole = np.random.default_rng(number).integers(0, 2, shape)
    return np.asarray(2**whole if "e8m0" in kind.name else whole).astype(kind)


@every_type
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_onnx(number: int, shape: tuple[int, ...]) -> None:
    values = drawn(number, shape)
    tensor = onnx.numpy_helper.from_array(values)
    data = elements.packed(values)
    assert data.tobytes() == tensor.raw_data
    assert data.size == elements.size(values.dtype, values.size)
    assert elements.number(values.dtype) == tensor.data_type == number
    back = elements.unpacked(data, values.dtype, shape)
    assert back.dtype == values.dtype and back.shape == shape
    assert np.array_equal(back, values)


@every_type
def test_bytes_that_do_not_fill_the_shape_are_refused(number: int) -> None:
    data = elements.packed(drawn(number, (8,)))
    with pytest.raises(ValueError):
        elements.unpacked(data[:-1], elements.dtype(number), (8,))


@pytest.mark.parametrize("number", [0, -1, 99])
def test_numbers_that_are_no_type(number: int) -> None:
    with pytest.raises(ValueError, match=f"has the number {number}"):
        elements.dtype(number)


def test_texts_have_no_size() -> None:
    with pytest.raises(ValueError, match="no fixed size"):
        elements.dtype(TensorProto.STRING)


def test_values_of_another_order_of_bytes() -> None:
    swapped = np.arange(4, dtype=">f4")
    assert elements.packed(swapped).tobytes() == swapped.astype("<f4").tobytes()
    assert elements.number(swapped.dtype) == TensorProto.FLOAT


def test_views_where_the_type_allows_it() -> None:
    values = np.arange(4, dtype=np.float32)
    assert np.shares_memory(elements.packed(values), values)
    assert np.shares_memory(elements.unpacked(values.view(np.uint8), values.dtype, (4,)), values)
