"""Casts between all ONNX element types, by the tables of the standard."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import EIGHT_BIT_FLOATS, STRING, carrier_of, code_of, widened
from .numerals import Texts, from_texts, to_texts
from .registry import operator
from .rounding import to_float8, to_minifloat, to_power_of_two, to_small_integer

# Smallest normal number, bits of mantissa, largest number.
_MINIFLOATS = {23: (1.0, 1, 6.0), 27: (1.0, 3, 7.5), 28: (0.25, 2, 28.0)}
# Bits, and whether there is a sign.
_SMALL_INTEGERS = {21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}
_FLOAT4_BITS = 4


def convert(x: Tensor | Texts, code: int, saturate: int = 1, round_mode: str = "up") -> Tensor | Texts:
    """Convert to an ONNX element type.

    Args:
        x: numbers, or text as an object array of `str`; any shape, which the result keeps.
        code: the ONNX element type; 2- and 4-bit integers wrap around, floats of 4 and 6 bits saturate.
        saturate: whether floats of 8 bits limit what lies outside their range, rather than make it infinite or NaN.
        round_mode: of float8e8m0: "up", "down" or "nearest".
    """
    if code == STRING:
        return x if not isinstance(x, Tensor) else to_texts(widened(x))
    if not isinstance(x, Tensor):
        return convert(from_texts(x, carrier_of(code)), code, saturate, round_mode)
    dtype = carrier_of(code)
    x = widened(x)
    if code in _SMALL_INTEGERS:
        bits, signed = _SMALL_INTEGERS[code]
        return to_small_integer(x, bits, signed)
    if code in _MINIFLOATS:
        return to_minifloat(x, *_MINIFLOATS[code]).to(dtype)
    if dtype == torch.float8_e8m0fnu:
        return to_power_of_two(x, bool(saturate), round_mode)
    return to_float8(x, dtype, bool(saturate)) if dtype in EIGHT_BIT_FLOATS else x.to(dtype)


@operator("Cast")
def cast_1(x: Tensor | Texts, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor | Texts:
    """Convert to the element type `to`."""
    return convert(x, to, saturate, round_mode)


@operator("CastLike", since=15, typed=True)
def cast_like_15(
    x: Tensor | Texts,
    like: Tensor | Texts,
    *,
    saturate: int = 1,
    round_mode: str = "up",
    types: tuple[int, ...] = (),
) -> Tensor | Texts:
    """Convert to the element type of `like`."""
    return convert(x, code_of(like, types, 1), saturate, round_mode)


@operator("BitCast", since=26)
def bit_cast_26(x: Tensor, *, to: int) -> Tensor:
    """Reinterpret the bits as an element type of the same width."""
    if to == 23 or (to in _SMALL_INTEGERS and x.dtype == torch.float8_e4m3fn):
        return _float4_bits(x, to)
    if to in _SMALL_INTEGERS:
        bits, signed = _SMALL_INTEGERS[to]
        return to_small_integer(x, bits, signed)
    return x.view(carrier_of(to))


def _float4_bits(x: Tensor, to: int) -> Tensor:
    """Reinterpret 4 bits where one of the two types is float4e2m1."""
    if x.dtype == torch.float8_e4m3fn and to == 23:
        return x
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    if x.dtype == torch.float8_e4m3fn:
        value = x.to(torch.float32)
        codes = torch.searchsorted(positive, value.abs()) + 8 * torch.signbit(value)
        return to_small_integer(codes, _FLOAT4_BITS, _SMALL_INTEGERS[to][1])
    values = torch.cat([positive, -positive])
    return values[to_small_integer(x, _FLOAT4_BITS, signed=False).to(torch.int64)].to(torch.float8_e4m3fn)
