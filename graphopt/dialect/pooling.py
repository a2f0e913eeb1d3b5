"""Pooling over windows and over all positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .nn import pad_spatial, padding
from .registry import operator

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Windows:
    """Where the windows of a pooling operator lie, once for all spatial axes."""

    def __init__(
        self,
        x: Tensor,
        kernel: list[int],
        strides: list[int] | None,
        dilations: list[int] | None,
        pads: list[int] | None,
        auto_pad: str,
        ceil_mode: int,
    ) -> None:
        rank = len(kernel)
        self.kernel = kernel
        self.strides = strides or [1] * rank
        self.dilations = dilations or [1] * rank
        self.spans = [(taps - 1) * d + 1 for taps, d in zip(kernel, self.dilations, strict=True)]
        self.begins, self.ends = padding(list(x.shape[2:]), kernel, self.strides, self.dilations, pads, auto_pad)
        self.overhang = [0] * rank
        for axis, size in enumerate(x.shape[2:]):
            room = size + self.begins[axis] + self.ends[axis] - self.spans[axis]
            steps = room // self.strides[axis]
            # A window that would start in the end padding is dropped.
            if ceil_mode and (steps + 1) * self.strides[axis] < size + self.begins[axis]:
                steps = -(-room // self.strides[axis])
            self.overhang[axis] = max(0, steps * self.strides[axis] - room)

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Extend x so that every window lies inside of it."""
        ends = [end + over for end, over in zip(self.ends, self.overhang, strict=True)]
        return pad_spatial(x, self.begins, ends, value)

    def cut(self, x: Tensor) -> Tensor:
        """Return the windows of a padded x: `[N, C, *positions, taps]`."""
        for axis, (span, stride, dilation) in enumerate(zip(self.spans, self.strides, self.dilations, strict=True)):
            x = x.unfold(axis + 2, span, stride)[..., ::dilation]
        return x.flatten(-len(self.kernel))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of each window of a padded x."""
        if len(self.kernel) == 2 and self.spans == self.kernel:
            return F.avg_pool2d(x, self.kernel, self.strides, divisor_override=1)
        return self.cut(x).sum(-1)


@operator("MaxPool", counted=True)
def max_pool_1(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the maximum of each window, and where in the flattened input it stands."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    lowest = float("-inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    extended = windows.padded(x, lowest)
    rank = len(kernel_shape)
    if outputs == 1 and x.dtype.is_floating_point and rank in _MAX_POOL:
        return _MAX_POOL[rank](extended, kernel_shape, windows.strides, 0, windows.dilations)
    cuts = windows.cut(extended)
    if outputs == 1:
        return cuts.amax(-1)
    values, which = cuts.max(-1)
    # Positions count through the whole tensor; column major numbering swaps the spatial axes only.
    shape = (*x.shape[:2], *reversed(x.shape[2:])) if storage_order else x.shape
    position = torch.arange(x.numel(), device=x.device).reshape(shape)
    if storage_order:
        position = position.permute(0, 1, *reversed(range(2, x.dim())))
    spots = windows.cut(windows.padded(position))
    return values, torch.gather(spots, -1, which.unsqueeze(-1)).squeeze(-1)


@operator("AveragePool")
def average_pool_1(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the mean of each window, over its padding too when `count_include_pad`."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    total = windows.total(windows.padded(x))
    if not any((*windows.begins, *windows.ends, *windows.overhang)):
        return total / math.prod(kernel_shape)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_include_pad:
        counted = pad_spatial(counted, windows.begins, windows.ends, 1.0)
        over = pad_spatial(counted, [0] * len(kernel_shape), windows.overhang)
        return total / windows.total(over)
    return total / windows.total(windows.padded(counted))


@operator("LpPool")
def lp_pool_1(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Return the p-norm of each window."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    norm: Tensor = torch.linalg.vector_norm(windows.cut(windows.padded(x)), p, -1)
    return norm


@operator("GlobalAveragePool")
def global_average_pool_1(x: Tensor) -> Tensor:
    """Return the mean over the spatial axes."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool_1(x: Tensor) -> Tensor:
    """Return the maximum over the spatial axes."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool_1(x: Tensor, *, p: int = 2) -> Tensor:
    """Return the p-norm over the spatial axes."""
    norm: Tensor = torch.linalg.vector_norm(x, p, list(range(2, x.dim())), keepdim=True)
    return norm


@operator("MaxUnpool", since=9, values=(2,))
def max_unpool_9(
    x: Tensor,
    indices: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Put each maximum back at its position in the flattened output, zeros elsewhere."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * 2 * rank
    inferred = [
        (size - 1) * stride - pads[axis] - pads[axis + rank] + taps
        for axis, (size, stride, taps) in enumerate(zip(x.shape[2:], strides, kernel_shape, strict=True))
    ]
    small = [*x.shape[:2], *inferred]
    # The indices count through the inferred shape; a larger output shape only adds zeros behind.
    flat = torch.zeros(math.prod(small), dtype=x.dtype, device=x.device)
    y = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(small)
    if output_shape is None:
        return y
    ends = [after - now for after, now in zip(output_shape.tolist()[2:], inferred, strict=True)]
    return pad_spatial(y, [0] * rank, ends)
