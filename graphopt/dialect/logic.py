"""Comparison, boolean logic, and bitwise operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import STORED_ONLY, integers, ordered
from .math import _aligned
from .registry import operator


@operator("Equal")
def equal_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a == b with the broadcasting of opsets before 7."""
    return a == _aligned(a, b, axis, broadcast)


@operator("Greater")
def greater_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a > b with the broadcasting of opsets before 7."""
    return a > _aligned(a, b, axis, broadcast)


@operator("Less")
def less_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a < b with the broadcasting of opsets before 7."""
    return a < _aligned(a, b, axis, broadcast)


@operator("And")
def and_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a and b with the broadcasting of opsets before 7."""
    return a & _aligned(a, b, axis, broadcast)


@operator("Or")
def or_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a or b with the broadcasting of opsets before 7."""
    return a | _aligned(a, b, axis, broadcast)


@operator("Xor")
def xor_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a exclusive-or b with the broadcasting of opsets before 7."""
    return a ^ _aligned(a, b, axis, broadcast)


@operator("Equal", since=7)
def equal_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a == b."""
    return torch.eq(a, b)


@operator("Greater", since=7)
def greater_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a > b."""
    return ordered(torch.gt, a, b)


@operator("Less", since=7)
def less_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a < b."""
    return ordered(torch.lt, a, b)


@operator("GreaterOrEqual", since=12)
def greater_or_equal_12(a: Tensor, b: Tensor) -> Tensor:
    """Return a >= b."""
    return ordered(torch.ge, a, b)


@operator("LessOrEqual", since=12)
def less_or_equal_12(a: Tensor, b: Tensor) -> Tensor:
    """Return a <= b."""
    return ordered(torch.le, a, b)


@operator("And", since=7)
def and_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a and b."""
    return torch.logical_and(a, b)


@operator("Or", since=7)
def or_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a or b."""
    return torch.logical_or(a, b)


@operator("Xor", since=7)
def xor_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a exclusive-or b."""
    return torch.logical_xor(a, b)


@operator("Not")
def not_1(x: Tensor) -> Tensor:
    """Return not x."""
    return torch.logical_not(x)


@operator("BitwiseAnd", since=18)
def bitwise_and_18(a: Tensor, b: Tensor) -> Tensor:
    """Return the bitwise and."""
    return integers(torch.bitwise_and, a, b)


@operator("BitwiseOr", since=18)
def bitwise_or_18(a: Tensor, b: Tensor) -> Tensor:
    """Return the bitwise or."""
    return integers(torch.bitwise_or, a, b)


@operator("BitwiseXor", since=18)
def bitwise_xor_18(a: Tensor, b: Tensor) -> Tensor:
    """Return the bitwise exclusive or."""
    return integers(torch.bitwise_xor, a, b)


@operator("BitwiseNot", since=18)
def bitwise_not_18(x: Tensor) -> Tensor:
    """Return the bitwise complement."""
    return integers(torch.bitwise_not, x)


@operator("BitShift", since=11)
def bit_shift_11(x: Tensor, amount: Tensor, *, direction: str) -> Tensor:
    """Shift the bits of x; bits that leave the type are lost, as is everything when amount >= its width."""
    width = torch.iinfo(x.dtype).bits
    wide, by = (x.to(torch.int64), amount.to(torch.int64)) if x.dtype in STORED_ONLY else (x, amount)
    gone = (by < 0) | (by >= width)
    by = torch.where(gone, torch.zeros_like(by), by)
    if direction == "LEFT":
        return torch.where(gone, torch.zeros_like(by), wide << by).to(x.dtype)
    fill = torch.where(wide < 0, torch.full_like(wide, -1), torch.zeros_like(wide))
    if x.dtype == torch.uint64:
        # int64 shifts copies of its sign bit in, which for uint64 is a bit like any other.
        low = torch.bitwise_not(torch.where(by == 0, 0, torch.full_like(by, -1) << (64 - by).clamp(max=63)))
        wide, fill = (wide >> by) & low, torch.zeros_like(wide)
        return torch.where(gone, fill, wide).to(x.dtype)
    return torch.where(gone, fill, wide >> by).to(x.dtype)
