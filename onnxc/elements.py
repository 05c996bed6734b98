"""Types of elements as ONNX numbers them, and the bytes that a file holds of them.

    dtype(TensorProto.INT4) -> int4        bits(int4) -> 4        packed([1, 2]) -> 0x21

Types of fewer than 8 bits take a byte an element in memory, as types of ml_dtypes, and are packed
in a file. Files are little-endian.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

_BITS = {  # of types that are packed
    **dict.fromkeys(("int2", "uint2"), 2),
    **dict.fromkeys(("int4", "uint4", "float4_e2m1fn"), 4),
    **dict.fromkeys(("float6_e2m3fn", "float6_e3m2fn"), 6),
}


def dtype(number: int) -> np.dtype[Any]:
    """The NumPy type of a type of ONNX. Raises ValueError for texts, and for what is no type."""
    try:
        found: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(number)
    except KeyError as error:
        raise ValueError(f"no type of elements has the number {number}") from error
    if found.hasobject:
        raise ValueError("texts have no fixed size")
    return found


def number(kind: np.dtype[Any]) -> int:
    """The number in ONNX of a NumPy type. Raises ValueError for a type that ONNX does not have."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(kind.newbyteorder("=")))


def bits(kind: np.dtype[Any]) -> int:
    """Bits of an element in a file."""
    return _BITS.get(kind.name, 8 * kind.itemsize)


def is_float(kind: np.dtype[Any]) -> bool:
    """Whether a type is floating point, with those of ml_dtypes (bfloat16, float8)."""
    return kind.kind == "f" or "float" in kind.name


def size(kind: np.dtype[Any], count: int) -> int:
    """Bytes that a file takes for so many elements."""
    return -(-count * bits(kind) // 8)


def packed(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of values in a file: a view of them where the type allows it."""
    if bits(values.dtype) < 8:
        return np.frombuffer(onnx.numpy_helper.from_array(values).raw_data, np.uint8)
    ordered = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8)


def unpacked(data: NDArray[np.uint8], kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The values of bytes of a file: a view of them where the type allows it.

    Raises ValueError when they do not fill the shape.
    """
    if data.size != size(kind, prod(shape)):
        raise ValueError(f"{data.size} bytes do not fill {list(shape)} of {kind.name}")
    if bits(kind) < 8:
        tensor = onnx.TensorProto(data_type=number(kind), dims=shape, raw_data=data.tobytes())
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    return data.view(kind.newbyteorder("<")).reshape(shape)
