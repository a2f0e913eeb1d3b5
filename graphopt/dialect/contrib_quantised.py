"""Operators of onnxruntime's com.microsoft domain that compute on real numbers and store them in 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import softmax_1, softmax_13
from .contrib import DOMAIN
from .pooling import average_pool_1
from .registry import operator

# The types whose carriers hold more than they do.
_LIMITS = {21: (0, 15), 22: (-8, 7)}


def real(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return (x - zero_point) * scale in the type of the scale; both parameters broadcast with x."""
    wide = x.to(scale.dtype)
    return (wide if zero_point is None else wide - _one(zero_point).to(scale.dtype)) * _one(scale)


def stored(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, kind: int = 0) -> Tensor:
    """Return saturate(round(x / scale) + zero_point), halves to even.

    Args:
        x: any shape.
        scale: broadcasts with x.
        zero_point: of the shape of the scale.
        dtype: what the result is stored in.
        kind: the ONNX element type of the result, where its range is not that of `dtype`.
    """
    y = torch.round(x / _one(scale))
    if zero_point is not None:
        y = y + _one(zero_point).to(y.dtype)
    low, high = _LIMITS.get(kind, (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
    return y.clamp(low, high).to(dtype)


def _one(parameter: Tensor) -> Tensor:
    """Drop the axes of a single element, which would add axes to a scalar."""
    return parameter.reshape(()) if parameter.numel() == 1 else parameter


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None or parameter.numel() == 1:
        return _one(parameter)
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


@operator("QuantizeLinear", domain=DOMAIN, typed=True)
def microsoft_quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    types: tuple[int, ...] = (),
) -> Tensor:
    """saturate(round(x / scale) + zero_point), per tensor or per slice of an axis; uint8 without a zero point."""
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    zero = None if zero_point is None else _along(zero_point, x, axis)
    return stored(x, _along(scale, x, axis), zero, dtype, types[2] if len(types) > 2 else 0)


@operator("DequantizeLinear", domain=DOMAIN)
def microsoft_dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int | None = None
) -> Tensor:
    """(x - zero_point) * scale, per tensor or per slice of an axis."""
    return real(x, _along(scale, x, axis), None if zero_point is None else _along(zero_point, x, axis))


@operator("QLinearAdd", domain=DOMAIN)
def q_linear_add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    c_scale: Tensor,
    c_zero_point: Tensor | None = None,
) -> Tensor:
    """Return a + b."""
    return stored(real(a, a_scale, a_zero_point) + real(b, b_scale, b_zero_point), c_scale, c_zero_point, a.dtype)


@operator("QLinearMul", domain=DOMAIN)
def q_linear_mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    c_scale: Tensor,
    c_zero_point: Tensor | None = None,
) -> Tensor:
    """Return a * b."""
    return stored(real(a, a_scale, a_zero_point) * real(b, b_scale, b_zero_point), c_scale, c_zero_point, a.dtype)


@operator("QLinearSigmoid", domain=DOMAIN)
def q_linear_sigmoid(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return stored(torch.sigmoid(real(x, x_scale, x_zero_point)), y_scale, y_zero_point, x.dtype)


@operator("QLinearLeakyRelu", domain=DOMAIN)
def q_linear_leaky_relu(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    alpha: float = 0.01,
) -> Tensor:
    """Return x, times alpha where negative."""
    return stored(F.leaky_relu(real(x, x_scale, x_zero_point), alpha), y_scale, y_zero_point, x.dtype)


@operator("QLinearSoftmax", domain=DOMAIN)
def q_linear_softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    axis: int = -1,
    opset: int,
) -> Tensor:
    """Normalise exp(x) along one axis, or as Softmax of an opset before 13 over all axes from it on together."""
    softmax = softmax_13 if opset >= 13 else softmax_1
    return stored(softmax(real(x, x_scale, x_zero_point), axis=axis), y_scale, y_zero_point, x.dtype)


@operator("QLinearWhere", domain=DOMAIN)
def q_linear_where(
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    z_scale: Tensor,
    z_zero_point: Tensor,
) -> Tensor:
    """Return x where the condition holds, else y."""
    chosen = torch.where(condition, real(x, x_scale, x_zero_point), real(y, y_scale, y_zero_point))
    return stored(chosen, z_scale, z_zero_point, x.dtype)


@operator("QLinearConcat", domain=DOMAIN)
def q_linear_concat(y_scale: Tensor, y_zero_point: Tensor, *inputs: Tensor, axis: int) -> Tensor:
    """Join tensors along an axis, each of which is followed by its scale and its zero point."""
    parts = [real(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)]
    return stored(torch.cat(parts, axis), y_scale, y_zero_point, y_zero_point.dtype)


@operator("QLinearReduceMean", domain=DOMAIN)
def q_linear_reduce_mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axes: list[int],
    keepdims: int,
) -> Tensor:
    """Return the mean over the listed axes, or over all of them."""
    dims = list(axes) or list(range(x.dim()))
    return stored(real(x, x_scale, x_zero_point).mean(dims, bool(keepdims)), y_scale, y_zero_point, x.dtype)


@operator("QLinearAveragePool", domain=DOMAIN)
def q_linear_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the mean of each window of `[N, C, *spatial]`, or with `channels_last` of `[N, *spatial, C]`."""
    numbers = real(x, x_scale, x_zero_point)
    mean = average_pool_1(
        numbers.movedim(-1, 1) if channels_last else numbers,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return stored(mean.movedim(1, -1) if channels_last else mean, y_scale, y_zero_point, x.dtype)


@operator("QLinearGlobalAveragePool", domain=DOMAIN)
def q_linear_global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    channels_last: int = 0,
) -> Tensor:
    """Return the mean over the spatial axes of `[N, C, *spatial]`, or with `channels_last` of `[N, *spatial, C]`."""
    first = 1 if channels_last else 2
    mean = real(x, x_scale, x_zero_point).mean(list(range(first, first + x.dim() - 2)), keepdim=True)
    return stored(mean, y_scale, y_zero_point, x.dtype)
