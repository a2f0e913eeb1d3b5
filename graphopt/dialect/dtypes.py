"""ONNX element types as torch dtypes, and integer types that torch stores but does not compute with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.onnxfile.packed import CARRIERS
from graphopt.onnxfile.tensors import ONNX_DTYPES, TORCH_DTYPES

__all__ = [
    "EIGHT_BIT_FLOATS",
    "STORED_ONLY",
    "STRING",
    "carrier_of",
    "code_of",
    "comparable",
    "compute_type",
    "dtype_of",
    "from_comparable",
    "integers",
    "moved",
    "ordered",
    "scalar",
    "widened",
]

STRING = 8
"""The ONNX element type of text, which is an object array of `str` here."""

STORED_ONLY = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Integer types for which torch has storage and casts but hardly any arithmetic."""

EIGHT_BIT_FLOATS = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)
"""Float types that torch stores and casts, but neither promotes nor computes with."""

_SAME_WIDTH = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    **dict.fromkeys(EIGHT_BIT_FLOATS, torch.uint8),
}
_LOWEST = torch.iinfo(torch.int64).min


def dtype_of(code: int) -> torch.dtype:
    """Return the torch dtype of an ONNX element type code.

    Raises:
        NotImplementedError: for strings and the types of fewer than 8 bits.
    """
    if code not in TORCH_DTYPES:
        raise NotImplementedError(f"ONNX element type {code} has no torch dtype")
    return TORCH_DTYPES[code]


def carrier_of(code: int) -> torch.dtype:
    """Return the torch dtype that holds the values of an ONNX element type: its own, or a wider one.

    Raises:
        NotImplementedError: for strings.
    """
    return CARRIERS[code] if code in CARRIERS else dtype_of(code)


def code_of(x: object, types: tuple[int, ...], index: int) -> int:
    """Return the ONNX element type of the input `x` at `index`: the known one, else that of its torch dtype."""
    if index < len(types) and types[index]:
        return types[index]
    return ONNX_DTYPES[x.dtype] if isinstance(x, Tensor) else STRING


def widened(x: Tensor) -> Tensor:
    """Return x in a type that torch computes with: float32 for 8-bit floats."""
    return x.to(torch.float32) if x.dtype in EIGHT_BIT_FLOATS else x


def integers(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply arithmetic, by way of int64 when the element type of the first tensor is stored only."""
    kept = tensors[0].dtype
    if kept not in STORED_ONLY:
        return function(*tensors)
    result = function(*(tensor.to(torch.int64) for tensor in tensors))
    return result if result.dtype == torch.bool else result.to(kept)


def ordered(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a comparison or a choice by size, by way of int64 when the type of the first tensor is stored only."""
    kept = tensors[0].dtype
    if kept not in STORED_ONLY:
        return function(*tensors)
    result = function(*map(comparable, tensors))
    return result if result.dtype == torch.bool else from_comparable(result, kept)


def comparable(x: Tensor) -> Tensor:
    """Return numbers in the order of x, of a type that torch compares."""
    if x.dtype == torch.uint64:
        # As int64 the upper half would be negative: without its highest bit it follows the lower half.
        return x.view(torch.int64) ^ _LOWEST
    return x.to(torch.int64) if x.dtype in STORED_ONLY else x


def from_comparable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `comparable`, where `dtype` is the type that it was given."""
    return (x ^ _LOWEST).view(torch.uint64) if dtype == torch.uint64 else x.to(dtype)


def moved(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function that only moves elements, by way of integers of the same width for types torch cannot move."""
    kept = tensors[0].dtype
    if kept not in _SAME_WIDTH:
        return function(*tensors)
    return function(*(tensor.view(_SAME_WIDTH[kept]) for tensor in tensors)).view(kept)


def compute_type(dtype: torch.dtype, stash_type: int = 1) -> torch.dtype:
    """Return the type in which a `stash_type` operator computes: never narrower than its input."""
    return torch.promote_types(dtype, dtype_of(stash_type))


def scalar(tensor: Tensor) -> int:
    """Return the one integer in a tensor of rank 0 or 1."""
    return int(tensor.reshape(()).item())
