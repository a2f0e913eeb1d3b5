"""Convolutions and normalisations."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_type
from .registry import operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(
    sizes: list[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int] | None,
    auto_pad: str,
) -> tuple[list[int], list[int]]:
    """Return how much each spatial axis is padded at its begin and at its end."""
    rank = len(sizes)
    if auto_pad in ("NOTSET", ""):
        return (list(pads[:rank]), list(pads[rank:])) if pads else ([0] * rank, [0] * rank)
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    begins, ends = [], []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size)
        less, more = total // 2, total - total // 2
        begins.append(less if auto_pad == "SAME_UPPER" else more)
        ends.append(more if auto_pad == "SAME_UPPER" else less)
    return begins, ends


def pad_spatial(x: Tensor, begins: list[int], ends: list[int], value: float = 0.0) -> Tensor:
    """Pad, or crop where negative, the last axes of x."""
    flat = [amount for pair in zip(reversed(begins), reversed(ends), strict=True) for amount in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def conv_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolve `[N, C, *spatial]` with `[M, C / group, *kernel]`."""
    rank = x.dim() - 2
    if rank not in _CONV:
        raise NotImplementedError(f"Conv covers 1 to 3 spatial axes, found {rank}")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    begins, ends = padding(list(x.shape[2:]), list(weight.shape[2:]), strides, dilations, pads, auto_pad)
    if begins != ends:
        x, begins = pad_spatial(x, begins, ends), [0] * rank
    return _CONV[rank](x, weight, bias, strides, begins, dilations, group)


@operator("ConvTranspose")
def conv_transpose_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Spread `[N, C, *spatial]` by `[C, M / group, *kernel]`: the gradient of a convolution."""
    rank = x.dim() - 2
    if rank not in _CONV_TRANSPOSE:
        raise NotImplementedError(f"ConvTranspose covers 1 to 3 spatial axes, found {rank}")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    extra = output_padding or [0] * rank
    spread = [(size - 1) * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    full = [
        span + (taps - 1) * dilation + 1
        for span, taps, dilation in zip(spread, weight.shape[2:], dilations, strict=True)
    ]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is None:
        begins, ends = padding(full, [1] * rank, strides, dilations, pads, auto_pad)
    else:
        totals = [a + b - c for a, b, c in zip(full, extra, output_shape[-rank:], strict=True)]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        begins, ends = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    transposed = _CONV_TRANSPOSE[rank]
    if begins == ends and min(begins) >= 0:
        return transposed(x, weight, bias, strides, begins, extra, group, dilations)
    # Cropped or extended afterwards, so the bias has to come last to reach the extension too.
    y = transposed(x, weight, None, strides, [0] * rank, [0] * rank, group, dilations)
    y = pad_spatial(y, [-begin for begin in begins], [a - end for a, end in zip(extra, ends, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


@operator("CausalConvWithState", since=27)
def causal_conv_with_state_27(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel of `[B, C, T]` with its past; the other output is the last k - 1 steps."""
    carried = weight.shape[-1] - 1
    longer = F.pad(x, (carried, 0)) if past is None else torch.cat((past, x), -1)
    y = F.conv1d(longer, weight, bias, groups=x.shape[1])
    state = longer.narrow(-1, longer.shape[-1] - carried, carried)
    return (F.silu(y) if activation in ("silu", "swish") else y), state


def _by_statistics(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float) -> Tensor:
    if not (mean.requires_grad or var.requires_grad):
        # Not F.batch_norm: before torch 2.12 it refuses an epsilon of 0, which real models have.
        return torch.batch_norm(x, scale, bias, mean, var, False, 0.0, epsilon, False)
    # That kernel refuses statistics that need a gradient.
    shape = (-1, *(1,) * (x.dim() - 2))
    factor = scale * torch.rsqrt(var + epsilon)
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


@operator("BatchNormalization", counted=True)
def batch_normalization_1(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    is_test: int = 0,
    outputs: int,
) -> Tensor:
    """Normalise with the given mean and variance of each channel."""
    if outputs > 1:
        raise NotImplementedError("BatchNormalization in training mode is covered from opset 14 on")
    if x.shape[1] != scale.shape[0]:
        raise NotImplementedError("BatchNormalization whose statistics do not fit the channels")
    if not spatial:
        return (x - mean) * torch.rsqrt(var + epsilon) * scale + bias
    return _by_statistics(x, scale, bias, mean, var, epsilon)


@operator("BatchNormalization", since=14, counted=True)
def batch_normalization_14(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise with the given statistics of each channel, or in training mode with those of x."""
    kept, stored = x.dtype, mean.dtype
    wide = functools.reduce(torch.promote_types, (kept, scale.dtype, stored))
    x, scale, bias, mean, var = (p.to(wide) for p in (x, scale, bias, mean, var))
    if not training_mode:
        return _by_statistics(x, scale, bias, mean, var, epsilon).to(kept)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    now_var, now_mean = torch.var_mean(x, axes, correction=0)
    y = _by_statistics(x, scale, bias, now_mean, now_var, epsilon).to(kept)
    pairs = ((mean, now_mean), (var, now_var))
    running = tuple((old * momentum + new * (1 - momentum)).to(stored) for old, new in pairs)
    return y if outputs == 1 else (y, *running)[:outputs]


@operator("InstanceNormalization")
def instance_normalization_1(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample over its spatial axes."""
    return torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization", since=18)
def group_normalization_18(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int) -> Tensor:
    """Normalise each group of channels; scale and bias are per group."""
    each = x.shape[1] // num_groups
    return torch.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@operator("GroupNormalization", since=21)
def group_normalization_21(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1
) -> Tensor:
    """Normalise each group of channels; scale and bias are per channel."""
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


# The standard has it from opset 17 on; onnxruntime's fusions put it into older models with the same meaning.
@operator("LayerNormalization", counted=True)
def layer_normalization_1(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise over the axes from `axis` on; the other outputs are the mean and 1 / standard deviation."""
    shape = x.shape[axis:]
    y = F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if outputs == 1:
        return y
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.to(compute_type(x.dtype, stash_type))
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return (y, mean, torch.rsqrt(var + epsilon))[:outputs]


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float, stash_type: int) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square from `axis` on, times scale; and 1 / root mean square."""
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.to(compute_type(x.dtype, stash_type))
    inverse = torch.rsqrt(torch.mean(wide * wide, axes, keepdim=True) + epsilon)
    return (wide * inverse).to(scale.dtype) * scale, inverse


@operator("RMSNormalization", since=23)
def rms_normalization_23(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Divide by the root mean square over the axes from `axis` on, and scale."""
    return rms_norm(x, scale, axis, epsilon, stash_type)[0]


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization_9(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation, by default of each channel."""
    var, mean = torch.var_mean(x, axes or [0, 2, 3], correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


@operator("LpNormalization")
def lp_normalization_1(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the p-norm along an axis, leaving zeros where it is zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    # The divisor is replaced too, so that no infinity enters the gradient.
    y = x / torch.where(norm == 0, torch.ones_like(norm), norm)
    return torch.where(norm == 0, torch.zeros_like(x), y)


@operator("LRN")
def lrn_1(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    """Divide by a power of the local sum of squares over `size` neighbouring channels."""
    before, after = (size - 1) // 2, math.ceil((size - 1) / 2)
    # F.local_response_norm puts the longer side of an even window before the channel, ONNX behind it.
    squares = pad_spatial((x * x).movedim(1, -1), [before], [after]).unfold(-1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares.movedim(-1, 1)) ** beta
