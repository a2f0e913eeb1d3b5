"""Convolutions, pooling and image operators of onnxruntime's com.microsoft domain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN, activated
from .nn import conv_1, conv_transpose_1
from .pooling import max_pool_1
from .registry import operator
from .resize import grid_sample_16


@operator("FusedConv", domain=DOMAIN)
def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: list[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the activation of Conv plus a tensor of its output's shape."""
    y = conv_1(x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return activated(y if added is None else y + added, activation, *(activation_params or ()))


@operator("NhwcConv", domain=DOMAIN)
def nhwc_conv(
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
    """Convolve `[N, *spatial, C]` with `[M, C / group, *kernel]`."""
    return conv_1(
        x.movedim(-1, 1), weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides
    ).movedim(1, -1)


@operator("NhwcFusedConv", domain=DOMAIN)
def nhwc_fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: list[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the activation of NhwcConv plus a tensor of its output's shape."""
    y = nhwc_conv(x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return activated(y if added is None else y + added, activation, *(activation_params or ()))


@operator("ConvTransposeWithDynamicPads", domain=DOMAIN, values=(2,))
def conv_transpose_with_dynamic_pads(
    x: Tensor,
    weight: Tensor,
    pads: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return ConvTranspose with its padding given as an input."""
    return conv_transpose_1(
        x,
        weight,
        bias,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        output_padding=output_padding,
        pads=None if pads is None else pads.tolist(),
        strides=strides,
    )


@operator("CausalConvWithState", domain=DOMAIN)
def microsoft_causal_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
    channels_last: int = 0,
    dilation: int = 1,
    ndim: int = 1,
    state_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its past; the other output is what the next call needs of this one.

    Args:
        x: `[B, C, T]`, or with `channels_last` `[B, T, *channels]`.
        weight: `[C, 1, k]`.
        bias: `[C]`.
        past_state: as the second output; zeros when it is omitted.
        activation: `silu`, `swish` or `none`.
        channels_last: whether the channels stand behind the steps.
        dilation: how far apart the taps lie.
        ndim: the number of spatial axes, of which only one is covered.
        state_window: for how many of the last steps the state is wanted.

    Returns:
        The output, of the shape of x, and the state: of each channel the last `(k - 1) * dilation` steps, or with a
        `state_window` of W that after each of the last W steps, `[W, ...]`, zeros where there were fewer.
    """
    if ndim != 1:
        raise NotImplementedError("CausalConvWithState over several spatial axes is not covered")
    if state_window and past_state is not None:
        past_state = past_state[-1]
    shape = x.shape[2:]
    if channels_last:
        x, past_state = _channels_first(x), None if past_state is None else _channels_first(past_state)
    carried = (weight.shape[-1] - 1) * dilation
    longer = F.pad(x, (carried, 0)) if past_state is None else torch.cat((past_state, x), -1)
    y = conv_1(longer, weight, bias, dilations=[dilation], group=x.shape[1])
    y = F.silu(y) if activation in ("silu", "swish") else y
    steps = x.shape[-1]
    states = [
        longer.narrow(-1, end, carried) if end > 0 else torch.zeros_like(longer.narrow(-1, 0, carried))
        for end in range(steps - state_window + 1, steps + 1)
    ] or [longer.narrow(-1, steps, carried)]
    if channels_last:
        y = _channels_behind(y, shape)
        states = [_channels_behind(state, shape) for state in states]
    return y, torch.stack(states) if state_window else states[0]


def _channels_first(x: Tensor) -> Tensor:
    """`[B, T, *channels]` to `[B, C, T]`."""
    return x.flatten(2).transpose(1, 2)


def _channels_behind(x: Tensor, channels: torch.Size) -> Tensor:
    """`[B, C, T]` to `[B, T, *channels]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *channels)


@operator("NhwcMaxPool", domain=DOMAIN)
def nhwc_max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the maximum of each window of `[N, *spatial, C]`."""
    y = max_pool_1(
        x.movedim(-1, 1),
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        dilations=dilations,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
        outputs=1,
    )
    assert isinstance(y, Tensor)
    return y.movedim(1, -1)


@operator("GridSample", domain=DOMAIN)
def microsoft_grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Sample `[N, C, H, W]` at the positions `[N, H_out, W_out, 2]`."""
    return grid_sample_16(x, grid, align_corners=align_corners, mode=mode, padding_mode=padding_mode)


@operator("CropAndResize", domain=DOMAIN, values=(3,))
def crop_and_resize(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    crop_size: Tensor,
    *,
    extrapolation_value: float = 0.0,
    mode: str = "bilinear",
) -> Tensor:
    """Resample boxes `[R, 4]` of `[N, C, H, W]`, given as y1, x1, y2, x2 in [0, 1], to `[R, C, *crop_size]`."""
    height, width = crop_size.tolist()
    top, left, bottom, right = rois.unbind(1)
    rows, inside_rows = _samples(top, bottom, height, x.shape[2])
    columns, inside_columns = _samples(left, right, width, x.shape[3])
    images = x[batch_indices.to(torch.int64)]
    inside = (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1)
    if mode == "nearest":
        # Halves away from zero, as C rounds.
        y = _picked(images, torch.floor(rows + 0.5), torch.floor(columns + 0.5))
    else:
        low_y, low_x = torch.floor(rows), torch.floor(columns)
        high_y, high_x = torch.ceil(rows), torch.ceil(columns)
        part_x = (columns - low_x)[:, None, None, :]
        part_y = (rows - low_y)[:, None, :, None]
        above = torch.lerp(_picked(images, low_y, low_x), _picked(images, low_y, high_x), part_x)
        below = torch.lerp(_picked(images, high_y, low_x), _picked(images, high_y, high_x), part_x)
        y = torch.lerp(above, below, part_y)
    return torch.where(inside, y, extrapolation_value)


def _samples(start: Tensor, end: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return where each box is sampled along an axis `[R, count]`, and whether that lies inside of the image."""
    if count > 1:
        step = (end - start) * (size - 1) / (count - 1)
        where = start.unsqueeze(1) * (size - 1) + torch.arange(count, device=start.device) * step.unsqueeze(1)
    else:
        where = (0.5 * (start + end) * (size - 1)).unsqueeze(1)
    inside = (where >= 0) & (where <= size - 1)
    # Outside of the image nothing is read, and a gradient of zero is what then flows back.
    return torch.where(inside, where, torch.zeros_like(where)), inside


def _picked(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the pixels `[R, C, h, w]` of one image per box at whole positions `[R, h]` and `[R, w]`."""
    shape = (*images.shape[:2], rows.shape[1], images.shape[3])
    lines = images.gather(2, rows.to(torch.int64)[:, None, :, None].expand(shape))
    index = columns.to(torch.int64)[:, None, None, :].expand(*shape[:3], columns.shape[1])
    return lines.gather(3, index)
