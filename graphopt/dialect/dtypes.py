"""ONNX element types as torch dtypes, and integer types that torch stores but does not compute with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["STORED_ONLY", "compute_type", "dtype_of", "integers", "scalar"]

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
    24: torch.float8_e8m0fnu,
}

STORED_ONLY = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Integer types for which torch has storage and casts but hardly any arithmetic."""


def dtype_of(code: int) -> torch.dtype:
    """Return the torch dtype of an ONNX element type code.

    Raises:
        NotImplementedError: for strings and the packed types of fewer than 8 bits.
    """
    if code not in _DTYPES:
        raise NotImplementedError(f"ONNX element type {code} has no torch dtype")
    return _DTYPES[code]


def integers(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply `function`, by way of int64 when the element type of the first tensor is stored only."""
    kept = tensors[0].dtype
    if kept not in STORED_ONLY:
        return function(*tensors)
    result = function(*(tensor.to(torch.int64) for tensor in tensors))
    return result if result.dtype == torch.bool else result.to(kept)


def compute_type(dtype: torch.dtype, stash_type: int = 1) -> torch.dtype:
    """Return the type in which a `stash_type` operator computes: never narrower than its input."""
    return torch.promote_types(dtype, dtype_of(stash_type))


def scalar(tensor: Tensor) -> int:
    """Return the one integer in a tensor of rank 0 or 1."""
    return int(tensor.reshape(()).item())
