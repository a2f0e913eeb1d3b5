"""Element types of fewer than 8 bits: how they lie in a file, and the wider torch types that carry their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import torch

_P = onnx.TensorProto
_Array = np.ndarray[Any, Any]

CARRIERS: dict[int, torch.dtype] = {
    _P.INT4: torch.int8,
    _P.UINT4: torch.uint8,
    _P.INT2: torch.int8,
    _P.UINT2: torch.uint8,
    # float8_e4m3fn holds every value of these three exactly.
    _P.FLOAT4E2M1: torch.float8_e4m3fn,
    _P.FLOAT6E2M3: torch.float8_e4m3fn,
    _P.FLOAT6E3M2: torch.float8_e4m3fn,
}
"""The torch type that holds the values of an ONNX element type for which torch has none."""

BITS: dict[int, int] = {
    _P.INT4: 4,
    _P.UINT4: 4,
    _P.INT2: 2,
    _P.UINT2: 2,
    _P.FLOAT4E2M1: 4,
    _P.FLOAT6E2M3: 6,
    _P.FLOAT6E3M2: 6,
}
"""Bits of an element, for the types in `CARRIERS`."""


def numpy_type(elem_type: int) -> np.dtype[Any]:
    """The numpy (ml_dtypes) type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def packed_size(elem_type: int, dims: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return -(-math.prod(dims) * BITS[elem_type] // 8)


def pack(array: _Array, elem_type: int) -> bytes:
    """The bytes of an ml_dtypes array in a file: elements one behind another, lowest bits first."""
    bits = BITS[elem_type]
    codes = np.ascontiguousarray(array).view(np.uint8).reshape(-1) & np.uint8((1 << bits) - 1)
    if 8 % bits:
        stream = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
        return np.packbits(stream.reshape(-1), bitorder="little").tobytes()
    each = 8 // bits
    rows = np.concatenate([codes, np.zeros(-codes.size % each, np.uint8)]).reshape(-1, each)
    packed: _Array = np.bitwise_or.reduce(rows << _shifts(bits), axis=1)
    return packed.tobytes()


def unpack(data: _Array, elem_type: int, dims: Sequence[int]) -> _Array:
    """The inverse of `pack`; `data` has at least `packed_size` bytes."""
    bits, count = BITS[elem_type], math.prod(dims)
    data = data[: packed_size(elem_type, dims)]
    if 8 % bits:
        stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
        codes: _Array = np.packbits(stream, axis=1, bitorder="little")
    else:
        codes = (data[:, None] >> _shifts(bits)) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:count].view(numpy_type(elem_type)).reshape(dims)


def _shifts(bits: int) -> _Array:
    return np.arange(0, 8, bits, dtype=np.uint8)
