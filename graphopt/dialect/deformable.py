"""Convolution whose taps are moved by learnt offsets."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .dtypes import compute_type
from .registry import operator


@operator("DeformConv", since=19)
def deform_conv_19(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolve with taps that are moved by learnt offsets and read x in between its pixels, zero outside.

    Args:
        x: `[N, C, *spatial]`.
        weight: `[M, C / group, *kernel]`.
        offset: `[N, offset_group * taps * axes, *out]`, how far each tap is moved along each axis.
        bias: `[M]`.
        mask: `[N, offset_group * taps, *out]`, factors of the taps.
        dilations: distance of the taps per axis.
        group: groups of channels that are convolved apart.
        kernel_shape: of the weight.
        offset_group: groups of channels that share their offsets.
        pads: zeros before and behind each axis.
        strides: distance of the outputs per axis.

    Returns:
        `[N, M, *out]`.
    """
    kernel, out, sizes = list(weight.shape[2:]), list(offset.shape[2:]), list(x.shape[2:])
    rank, taps, wide = len(kernel), math.prod(kernel), compute_type(x.dtype)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    moved = offset.to(wide).reshape(x.shape[0], offset_group, taps, rank, *out)
    places = []
    for axis in range(rank):
        shape = [taps] + [1] * rank
        tap = torch.arange(kernel[axis], device=x.device) * dilations[axis]
        tap = tap.reshape([-1 if i == axis else 1 for i in range(rank)]).expand(kernel).reshape(shape)
        step = torch.arange(out[axis], device=x.device) * strides[axis] - pads[axis]
        step = step.reshape([-1 if i == axis else 1 for i in range(rank)])
        places.append(moved[:, :, :, axis] + (tap + step))
    patches = _sampled(x.to(wide).reshape(x.shape[0], offset_group, -1, *sizes), places, sizes)
    if mask is not None:
        patches = patches * mask.to(wide).reshape(x.shape[0], offset_group, 1, -1)
    # [N, group, C / group * taps, out]: the columns that the weight is multiplied by.
    columns = patches.reshape(x.shape[0], group, -1, math.prod(out)).to(x.dtype)
    y = (weight.reshape(group, weight.shape[0] // group, -1) @ columns).reshape(x.shape[0], -1, *out)
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


def _sampled(x: Tensor, places: list[Tensor], sizes: list[int]) -> Tensor:
    """Interpolate `[N, G, C, *sizes]` at one coordinate per axis, `[N, G, ...]` each: `[N, G, C, points]`."""
    flat, channels = x.flatten(3), x.shape[2]
    lows = [place.detach().floor() for place in places]
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        share = torch.ones((), dtype=x.dtype, device=x.device)
        index = torch.zeros((), dtype=torch.int64, device=x.device)
        for side, place, low, size in zip(corner, places, lows, sizes, strict=True):
            at = low + side
            inside = (at >= 0) & (at < size)
            share = share * (place - low if side else 1 - (place - low)) * inside
            index = index * size + at.clamp(0, size - 1).to(torch.int64)
        spots = index.flatten(2).unsqueeze(2).expand(-1, -1, channels, -1)
        total = total + flat.gather(3, spots) * share.flatten(2).unsqueeze(2)
    return total
