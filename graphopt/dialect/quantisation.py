"""Linear quantisation, and products of quantised tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import dtype_of
from .math import cast_1
from .nn import conv_1
from .registry import operator

_FLOAT8 = {17, 18, 19, 20}
_CODES = {
    torch.float8_e4m3fn: 17,
    torch.float8_e4m3fnuz: 18,
    torch.float8_e5m2: 19,
    torch.float8_e5m2fnuz: 20,
    torch.uint8: 2,
    torch.int8: 3,
    torch.uint16: 4,
    torch.int16: 5,
    torch.int32: 6,
}


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Shape a scale or zero point to broadcast with x: per tensor, per slice of an axis, or per block."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block:
        repeated = parameter.to(torch.int32 if parameter.dtype == torch.uint16 else parameter.dtype)
        return repeated.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = parameter.numel()
    return parameter.reshape(shape)


@operator("QuantizeLinear", since=10)
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
) -> Tensor:
    """saturate(round(x / scale) + zero_point), halves to even."""
    code = output_dtype or (2 if zero_point is None else _CODES[zero_point.dtype])
    dtype = dtype_of(code)
    wide = dtype_of(precision) if precision else torch.promote_types(torch.float32, scale.dtype)
    ratio = x.to(wide) / _spread(scale, x, axis, block_size).to(wide)
    if code in _FLOAT8:
        return cast_1(ratio, to=code, saturate=saturate)
    y = torch.round(ratio)
    if zero_point is not None:
        y = y + _spread(zero_point, x, axis, block_size).to(wide)
    limits = torch.iinfo(dtype)
    return y.clamp(limits.min, limits.max).to(dtype)


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
    """(x - zero_point) * scale in the type of the scale."""
    wide = torch.promote_types(torch.float32, scale.dtype)
    y = x.to(wide)
    if zero_point is not None:
        y = y - _spread(zero_point, x, axis, block_size).to(wide)
    return (y * _spread(scale, x, axis, block_size).to(wide)).to(
        dtype_of(output_dtype) if output_dtype else scale.dtype
    )


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
    product = mat_mul_integer_10(a, b, a_zero_point, b_zero_point).to(torch.float32)
    scale = _beside(a_scale, -2).to(torch.float32) * _beside(b_scale, -1).to(torch.float32)
    limits = torch.iinfo(y_zero_point.dtype)
    y = torch.round(product * scale / _beside(y_scale, -2).to(torch.float32))
    return (y + _beside(y_zero_point, -2)).clamp(limits.min, limits.max).to(y_zero_point.dtype)


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
