"""Linear quantisation, and products of quantised tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .cast import convert
from .dtypes import EIGHT_BIT_FLOATS, carrier_of, code_of, dtype_of, widened
from .nn import conv_1
from .registry import operator
from .rounding import to_float8

_UINT8 = 2
# What QuantizeLinear limits its result to, for the integer types that no torch type describes.
_LIMITS = {21: (0, 15), 22: (-8, 7), 25: (0, 3), 26: (-2, 1)}


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Shape a scale or zero point to broadcast with x: per tensor, per slice of an axis, or per block."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = parameter.numel()
    return parameter.reshape(shape)


@operator("QuantizeLinear", since=10, typed=True)
def quantize_linear_10(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    types: tuple[int, ...] = (),
) -> Tensor:
    """saturate(round(x / scale) + zero_point), halves to even.

    The quotient has the precision of the scale, or the stated one.
    """
    known = _UINT8 if zero_point is None else code_of(zero_point, types, 2)
    code = output_dtype or known
    precise = dtype_of(precision) if precision else scale.dtype
    ratio = _quotient(x, _spread(_number(scale), x, axis, block_size), precise)
    offset = None if zero_point is None else _spread(_number(zero_point), x, axis, block_size)
    dtype = carrier_of(code)
    if dtype.is_floating_point:
        y = convert(ratio if offset is None else ratio + offset, code, saturate)
        assert isinstance(y, Tensor)
        return y
    y = torch.round(ratio)
    if offset is not None:
        y = y + offset
    low, high = _LIMITS[code] if code in _LIMITS else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return y.clamp(low, high).to(dtype)


def _quotient(x: Tensor, scale: Tensor, precise: torch.dtype) -> Tensor:
    """Divide by the scale and round to the type `precise`; the result is as wide as what follows needs."""
    if not precise.is_floating_point:
        return x.to(torch.float64) / scale.to(torch.float64)
    if precise in EIGHT_BIT_FLOATS:
        precise = torch.float32
    # float64 holds an int32 exactly; of two narrow floats the float32 quotient rounds like the true one.
    wide = torch.float32 if x.dtype.is_floating_point else torch.float64
    wide = torch.promote_types(wide, precise)
    ratio = x.to(wide) / scale.to(wide)
    return ratio.to(precise).to(torch.promote_types(torch.float32, precise))


def _number(parameter: Tensor) -> Tensor:
    """Return a scale or zero point in a type that torch computes with."""
    if parameter.dtype == torch.uint16:
        return parameter.to(torch.int32)
    return widened(parameter)


@operator("DequantizeLinear", since=10)
def dequantize_linear_10(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """(x - zero_point) * scale in the type of the scale, or the stated one."""
    factor = _spread(_number(scale), x, axis, block_size)
    wide = torch.promote_types(torch.float32, factor.dtype)
    y = x.to(wide)
    if zero_point is not None:
        y = y - _spread(_number(zero_point), x, axis, block_size).to(wide)
    return (y * factor.to(wide)).to(dtype_of(output_dtype) if output_dtype else scale.dtype)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear_11(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to uint8 over the range of x and zero; return the scale and zero point too."""
    low, high = torch.clamp_max(x.amin(), 0), torch.clamp_min(x.amax(), 0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / safe).clamp(0, 255)
    y = (torch.round(x / safe) + zero_point).clamp(0, 255)
    return y.to(torch.uint8), scale, zero_point.to(torch.uint8)


def _centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """Return x - zero_point in int32; a zero point per slice stands beside `axis`."""
    wide = x.to(torch.int32)
    if zero_point is None:
        return wide
    return wide - _beside(zero_point, axis).to(torch.int32)


def _beside(parameter: Tensor, axis: int) -> Tensor:
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.dim() > 1:
        return parameter
    return parameter.unsqueeze(-1) if axis == -2 else parameter


@operator("MatMulInteger", since=10)
def mat_mul_integer_10(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point) in int32."""
    return torch.matmul(_centred(a, a_zero_point, -2), _centred(b, b_zero_point, -1))


@operator("QLinearMatMul", since=10)
def q_linear_mat_mul_10(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """Multiply quantised matrices and quantise the product."""
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        left = widened(a) - widened(_beside(a_zero_point, -2))
        product = torch.matmul(
            left.to(torch.float32), (widened(b) - widened(_beside(b_zero_point, -1))).to(torch.float32)
        )
    else:
        product = mat_mul_integer_10(a, b, a_zero_point, b_zero_point).to(torch.float32)
    scale = _beside(a_scale, -2).to(torch.float32) * _beside(b_scale, -1).to(torch.float32)
    ratio = product * scale / _beside(y_scale, -2).to(torch.float32)
    if y_zero_point.dtype.is_floating_point:
        return to_float8(ratio + widened(_beside(y_zero_point, -2)), y_zero_point.dtype, saturate=True)
    limits = torch.iinfo(y_zero_point.dtype)
    y = torch.round(ratio) + _beside(y_zero_point, -2)
    return y.clamp(limits.min, limits.max).to(y_zero_point.dtype)


@operator("ConvInteger", since=10)
def conv_integer_10(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolve x - x_zero_point with w - w_zero_point in int32."""
    # torch convolves floating point only; float64 holds every sum of int8 products exactly.
    signal = _centred(x, x_zero_point, -1).to(torch.float64)
    offset = None if w_zero_point is None else w_zero_point.reshape(-1, *(1,) * (w.dim() - 1))
    y = conv_1(
        signal,
        _centred(w, offset, -1).to(torch.float64),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.to(torch.int32)


@operator("QLinearConv", since=10)
def q_linear_conv_10(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolve quantised tensors and quantise the result."""
    total = conv_integer_10(
        x, w, x_zero_point, w_zero_point, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads,
        strides=strides,
    )  # fmt: skip
    channels = (-1, *(1,) * (x.dim() - 2))
    if bias is not None:
        total = total + bias.reshape(channels)
    factor = (x_scale * w_scale / y_scale).reshape(channels)
    limits = torch.iinfo(y_zero_point.dtype)
    y = torch.round(total.to(torch.float32) * factor) + y_zero_point
    return y.clamp(limits.min, limits.max).to(y_zero_point.dtype)
