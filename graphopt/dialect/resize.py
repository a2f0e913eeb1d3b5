"""Resampling: Resize and Upsample one axis after the other, and GridSample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import operator
from .tensor import take


@operator("Upsample")
def upsample_1(x: Tensor, *, height_scale: float, width_scale: float, mode: str = "nearest") -> Tensor:
    """Enlarge `[N, C, H, W]` by the attributes' scales."""
    return _upsample(x, [1.0, 1.0, height_scale, width_scale], "linear" if mode == "bilinear" else mode)


@operator("Upsample", since=7)
def upsample_7(x: Tensor, *, scales: list[float], mode: str = "nearest") -> Tensor:
    """Enlarge by the attribute's scales."""
    return _upsample(x, scales, mode)


@operator("Upsample", since=9, values=(1,))
def upsample_9(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Enlarge by the input's scales."""
    return _upsample(x, scales.tolist(), mode)


@operator("Resize", since=10, values=(1,))
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resample by the scales, with coordinates that map corner to corner of the first pixel."""
    return _upsample(x, scales.tolist(), mode)


def _upsample(x: Tensor, scales: list[float], mode: str) -> Tensor:
    kept, x = x.dtype, _interpolated(x, mode)
    for axis, scale in enumerate(scales):
        size = math.floor(x.shape[axis] * scale)
        # onnxruntime rounds up where it shrinks; the standard is silent.
        nearest = "floor" if scale >= 1 else "ceil"
        x = _resample(x, axis, size, scale, None, mode, "asymmetric", nearest, -0.75, 0, 0, 0.0)
    return _finished(x, kept)


@operator("Resize", since=11, values=(1, 2, 3))
def resize_11(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resample the listed axes by scales or to sizes."""
    named = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
    old = [x.shape[axis] for axis in named]
    if sizes is not None and sizes.numel():
        new = sizes.tolist()
        factors = [after / before for after, before in zip(new, old, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            factor = min(factors) if keep_aspect_ratio_policy == "not_larger" else max(factors)
            factors = [factor] * len(named)
            new = [math.floor(factor * size + 0.5) for size in old]
    elif scales is not None:
        factors = scales.tolist()
        new = [math.floor(size * factor) for size, factor in zip(old, factors, strict=True)]
    else:
        raise ValueError("expected Resize to have scales or sizes, found neither")
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    region = roi.tolist() if crop and roi is not None else None
    kept, x = x.dtype, _interpolated(x, mode)
    for i, axis in enumerate(named):
        box = None if region is None else (region[i], region[i + len(named)])
        x = _resample(
            x, axis, new[i], factors[i], box, mode, coordinate_transformation_mode, nearest_mode,
            cubic_coeff_a, exclude_outside, antialias, extrapolation_value,
        )  # fmt: skip
    return _finished(x, kept)


def _interpolated(x: Tensor, mode: str) -> Tensor:
    """Return integers as floats where they are interpolated: only the last result is rounded."""
    return x if mode == "nearest" or x.dtype.is_floating_point else x.to(torch.float64)


def _finished(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return to the type of the input; integers are rounded once, to nearest, and limited to their range."""
    if x.dtype == dtype or dtype.is_floating_point:
        return x.to(dtype)
    if dtype == torch.bool:
        return torch.round(x) != 0
    limits = torch.iinfo(dtype)
    return torch.round(x).clamp(limits.min, limits.max).to(dtype)


def _resample(
    x: Tensor,
    axis: int,
    size: int,
    scale: float,
    box: tuple[float, float] | None,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float,
    exclude: int,
    antialias: int,
    extrapolation: float,
) -> Tensor:
    """Resample one axis: interpolation in several axes is the product of one in each."""
    old = x.shape[axis]
    if size == old and scale == 1 and box is None:
        return x
    source = _coordinates(size, old, scale, box, coordinates)
    outside = (source < 0) | (source > old - 1) if box is not None else None
    if mode == "nearest":
        index = _nearest(source, nearest).clamp(0, old - 1)
        y = take(x, index.to(x.device), axis)
    else:
        taps, weights = _taps(source, old, min(scale, 1.0) if antialias else 1.0, mode, cubic, exclude)
        y = _weighted(x, axis, taps, weights)
    if outside is None:
        return y
    shape = [1] * x.dim()
    shape[axis] = size
    return torch.where(outside.reshape(shape).to(x.device), torch.full_like(y, extrapolation), y)


def _coordinates(size: int, old: int, scale: float, box: tuple[float, float] | None, mode: str) -> Tensor:
    """Return for each output position the input position it samples, in float64 on the CPU."""
    out = torch.arange(size, dtype=torch.float64)
    if mode == "asymmetric":
        return out / scale
    if mode == "align_corners":
        exact = size if float(size) == scale * old else scale * old
        return out * ((old - 1) / (exact - 1)) if exact != 1 else torch.zeros_like(out)
    if mode == "tf_crop_and_resize" and box is not None:
        low, high = box
        if size == 1:
            return 0.5 * (low + high) * (old - 1) + out
        return low * (old - 1) + out * (high - low) * (old - 1) / (size - 1)
    if mode == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    half = (out + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return half if size > 1 else torch.full_like(out, -0.5)
    if mode == "half_pixel_symmetric":
        # The centre of the output stays the centre of the input when scale * size is no integer.
        return old / 2 * (1 - size / (scale * old)) + half
    if mode == "half_pixel":
        return half
    raise NotImplementedError(f"Resize does not cover the coordinate mode {mode!r}")


def _nearest(source: Tensor, mode: str) -> Tensor:
    if mode == "floor":
        return torch.floor(source).to(torch.int64)
    if mode == "ceil":
        return torch.ceil(source).to(torch.int64)
    if mode == "round_prefer_ceil":
        return torch.floor(source + 0.5).to(torch.int64)
    return torch.ceil(source - 0.5).to(torch.int64)


def _taps(source: Tensor, old: int, shrink: float, mode: str, cubic: float, exclude: int) -> tuple[Tensor, Tensor]:
    """Return the input positions that each output reads and their weights, both `[size, taps]`."""
    radius = {"linear": 1, "cubic": 2}.get(mode)
    if radius is None:
        raise NotImplementedError(f"Resize does not cover the mode {mode!r}")
    reach = math.ceil(radius / shrink)
    taps = torch.floor(source).to(torch.int64).unsqueeze(1) + torch.arange(1 - reach, reach + 1)
    distance = ((taps - source.unsqueeze(1)) * shrink).abs()
    weights = (1 - distance).clamp(min=0) if mode == "linear" else _cubic(distance, cubic)
    if exclude:
        weights = weights * ((taps >= 0) & (taps < old))
    if exclude or shrink < 1:
        weights = weights / weights.sum(1, keepdim=True)
    return taps.clamp(0, old - 1), weights


def _cubic(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def _weighted(x: Tensor, axis: int, taps: Tensor, weights: Tensor) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = taps.shape[0]
    parts = [
        take(x, taps[:, i].to(x.device), axis) * weights[:, i].to(x.device, x.dtype).reshape(shape)
        for i in range(taps.shape[1])
    ]
    return torch.stack(parts).sum(0)


@operator("GridSample", since=16)
def grid_sample_16(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Sample x at the positions in the last axis of the grid, given in [-1, 1]."""
    names = {"linear": "bilinear", "cubic": "bicubic"}
    wide = torch.promote_types(x.dtype, grid.dtype) if x.dtype.is_floating_point else torch.float64
    y = F.grid_sample(x.to(wide), grid.to(wide), names.get(mode, mode), padding_mode, bool(align_corners))
    return _finished(y, x.dtype)


@operator("AffineGrid", since=20, values=(1,))
def affine_grid_20(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """Return the sampling grid of a batch of affine maps."""
    return F.affine_grid(theta, size.tolist(), bool(align_corners))
