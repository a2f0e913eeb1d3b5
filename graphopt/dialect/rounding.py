"""Rounding to the element types that torch does not have, or does not round to as ONNX does.

A float64 is rounded to float32 first, as onnxruntime and onnx.reference do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 23
_LARGEST_POWER = 254
_NOT_A_NUMBER = 255


def to_small_integer(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Round to nearest, halves to even, and keep the lowest bits; the result is int8 or uint8 of the same shape."""
    if x.dtype.is_floating_point:
        x = torch.round(x)
    kept = x.to(torch.int32) & ((1 << bits) - 1)
    if not signed:
        return kept.to(torch.uint8)
    sign = 1 << (bits - 1)
    return ((kept ^ sign) - sign).to(torch.int8)


def to_minifloat(x: Tensor, smallest_normal: float, mantissa: int, largest: float) -> Tensor:
    """Round to a float type of few exponents, halves to even, and limit to its largest number; NaN becomes -0.

    Args:
        x: numbers of any shape.
        smallest_normal: below it the numbers are evenly spaced.
        mantissa: stored bits of the fraction.
        largest: the largest number of the type.
    """
    x = x.to(torch.float32)
    magnitude = x.abs().clamp(max=largest)
    step = torch.full_like(magnitude, smallest_normal * 2.0**-mantissa)
    power = 2 * smallest_normal
    while power <= largest:
        step = torch.where(magnitude >= power, power * 2.0**-mantissa, step)
        power *= 2
    rounded = torch.copysign(torch.round(magnitude / step) * step, x)
    return torch.where(torch.isnan(x), -torch.zeros_like(x), rounded)


def to_power_of_two(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Round to float8e8m0, the powers of two from 2^-127 to 2^127, and NaN.

    What is smaller than 2^-127 (zero and negative numbers, too) or larger than 2^127 is limited, or NaN unless
    `saturate`; NaN stays NaN.
    """
    x = x.to(torch.float32)
    bits = x.view(torch.int32)
    mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
    code = (bits >> _MANTISSA_BITS) & 255
    half = 1 << (_MANTISSA_BITS - 1)
    # A subnormal float32 has no leading one: 2^-127 is its highest bit, and less than that is out of range.
    fraction = torch.where(code == 0, 2 * (mantissa - half), mantissa)
    small = (fraction < 0) | (x < 0)
    large = (code > _LARGEST_POWER) | ((code == _LARGEST_POWER) & (fraction > 0))
    if round_mode != "down":
        code = code + (fraction > 0 if round_mode == "up" else fraction >= half).to(torch.int32)
    code = torch.where(large, _LARGEST_POWER if saturate else _NOT_A_NUMBER, code)
    code = torch.where(small, 0 if saturate else _NOT_A_NUMBER, code)
    code = torch.where(torch.isnan(x), _NOT_A_NUMBER, code)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Round to nearest, halves to even; out of range is limited if `saturate`, else infinite, or NaN without one."""
    x = x.to(torch.float32)
    if saturate:
        largest = torch.finfo(dtype).max
        return x.clamp(-largest, largest).to(dtype)
    if dtype == torch.float8_e4m3fn:
        # Alone among these types it saturates in torch: 464 is the last number that rounds to its maximum.
        x = torch.where(x.abs() > 464, torch.full_like(x, float("nan")), x)
    return x.to(dtype)
