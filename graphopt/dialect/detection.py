"""Operators of object detectors: suppressing overlapping boxes, and pooling over regions."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_type, scalar
from .registry import operator

_REGIONS_AT_ONCE = 64
"""How many regions are pooled at a time: their sampled points are held in memory for all channels."""
_PAIRS_AT_ONCE = 2**20
"""How many pairs of boxes are compared at a time."""


@operator("NonMaxSuppression", since=10, values=(0, 1, 2, 3, 4))
def non_max_suppression_10(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Pick the best box, drop those that overlap it too much, and so on, for each sample and class.

    Args:
        boxes: `[B, N, 4]`, two corners (y, x, y, x), or (x, y, width, height) when `center_point_box`.
        scores: `[B, C, N]`; of equal scores the lower box index counts as the better one.
        max_output_boxes_per_class: how many boxes to pick at most; none when omitted.
        iou_threshold: boxes overlap too much above it; 0 when omitted.
        score_threshold: boxes that do not score above it are never picked.
        center_point_box: the format of the boxes.

    Returns:
        `[picked, 3]` in int64: sample, class, box; by sample, then class, then falling score.
    """
    samples, classes, count = scores.shape
    limit = 0 if max_output_boxes_per_class is None else min(scalar(max_output_boxes_per_class), count)
    if limit <= 0 or scores.numel() == 0:
        return torch.zeros((0, 3), dtype=torch.int64, device=scores.device)
    # One row per sample and class, its candidates in falling order.
    rows = scores.detach().reshape(-1, count)
    alive = torch.ones_like(rows, dtype=torch.bool) if score_threshold is None else rows > score_threshold.reshape(())
    order = torch.sort(rows.masked_fill(~alive, float("-inf")), dim=1, descending=True, stable=True)[1]
    longest = int(alive.sum(1).max())
    order, alive = order[:, :longest], alive.gather(1, order)[:, :longest]
    sample = torch.arange(samples, device=boxes.device).repeat_interleave(classes).unsqueeze(1)
    candidates = _corners(boxes.detach(), bool(center_point_box))[sample, order]
    threshold = torch.zeros((), device=boxes.device) if iou_threshold is None else iou_threshold.reshape(())
    row, rank = torch.nonzero(_greedy(candidates, alive, threshold, limit), as_tuple=True)
    return torch.stack((row // classes, row % classes, order[row, rank]), 1)


def _greedy(boxes: Tensor, alive: Tensor, threshold: Tensor, limit: int) -> Tensor:
    """Return which of `[R, N, 4]` boxes are picked: in order, up to the limit, unless a picked one is too close."""
    counts = torch.zeros((boxes.shape[0], 1), dtype=torch.int64, device=boxes.device)
    block = max(16, math.isqrt(_PAIRS_AT_ONCE // boxes.shape[0]))
    picked, chosen = torch.zeros_like(alive), boxes[:, :0]
    for start in range(0, boxes.shape[1], block):
        now = boxes[:, start : start + block]
        free = alive[:, start : start + block]
        for earlier in chosen.split(block, 1):
            free = free & ~_close(earlier, now, threshold).any(1)
        pairs = _close(now, now, threshold).triu(1)
        # A box only depends on better ones, so each round settles at least one more box of each row for good.
        keep, before = free, ~free
        while not torch.equal(keep, before):
            keep, before = free & ~(pairs & keep.unsqueeze(2)).any(1), keep
        keep = keep & (counts + keep.cumsum(1) <= limit)
        counts = counts + keep.sum(1, keepdim=True)
        picked[:, start : start + block] = keep
        if bool((counts == limit).all()):
            break
        # The picked boxes move to the front; what fills up the shorter rows has no area, and so is close to nothing.
        front = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
        moved = now.gather(1, front.unsqueeze(2).expand(-1, -1, 4))
        chosen = torch.cat((chosen, moved * keep.gather(1, front).unsqueeze(2)), 1)
    return picked


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """Return the least and the greatest coordinates of each box, `[..., 4]`."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centred:
        return torch.cat((first - second / 2, first + second / 2), -1)
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), -1)


def _close(a: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """Return for pairs of `[R, N, 4]` and `[R, M, 4]` boxes if intersection over union exceeds the threshold."""
    a, b = a.unsqueeze(2), b.unsqueeze(1)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area, other = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    union = area + other - common
    return (common > 0) & (area > 0) & (other > 0) & (union > 0) & (common / union > threshold)


@operator("RoiAlign", since=10)
def roi_align_10(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pool interpolated points of regions, whose coordinates are taken as they are; see opset 16."""
    size = (output_height, output_width)
    return _roi_align(x, rois, batch_indices, size, sampling_ratio, spatial_scale, mode == "max", False)


@operator("RoiAlign", since=16)
def roi_align_16(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pool interpolated points of regions into `[R, C, output_height, output_width]`.

    Args:
        x: `[N, C, H, W]`.
        rois: `[R, 4]`, (x1, y1, x2, y2) in units of x / `spatial_scale`.
        batch_indices: `[R]`, the sample of each region.
        coordinate_transformation_mode: `half_pixel` moves the regions by half a pixel, as a pixel's centre is its
            coordinate then.
        mode: `avg`, or `max`: the greatest of the weighted corners of all points, not of the interpolated values.
        output_height: bins along y.
        output_width: bins along x.
        sampling_ratio: points per bin and axis; 0: one per pixel.
        spatial_scale: size of x by the size of what the regions were measured on.
    """
    size = (output_height, output_width)
    half_pixel = coordinate_transformation_mode.lower() == "half_pixel"
    return _roi_align(x, rois, batch_indices, size, sampling_ratio, spatial_scale, mode == "max", half_pixel)


def _roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    size: tuple[int, int],
    ratio: int,
    scale: float,
    greatest: bool,
    half_pixel: bool,
) -> Tensor:
    shape = (rois.shape[0], x.shape[1], *size)
    if x.is_meta or rois.is_meta or batch_indices.is_meta:
        # How many points there are depends on the regions, the shape of the result does not.
        return torch.empty(shape, dtype=x.dtype, device="meta")
    wide = compute_type(x.dtype)
    pixels = x.to(wide).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    scaled = rois.to(wide) * scale - (0.5 if half_pixel else 0.0)
    parts = [
        _aligned(pixels, regions, index, (x.shape[2], x.shape[3]), size, ratio, greatest, not half_pixel)
        for regions, index in zip(scaled.split(_REGIONS_AT_ONCE), batch_indices.split(_REGIONS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).reshape(-1, *size, x.shape[1]).permute(0, 3, 1, 2).to(x.dtype)


def _aligned(
    pixels: Tensor,
    regions: Tensor,
    index: Tensor,
    image: tuple[int, int],
    size: tuple[int, int],
    ratio: int,
    greatest: bool,
    grown: bool,
) -> Tensor:
    """Pool `[R, 4]` regions over pixels `[N * H * W, C]` into bins `[R * bins, C]`; `grown`: to one pixel at least."""
    start = regions[:, [1, 0]]
    extent = regions[:, [3, 2]] - start
    extent = extent.clamp(min=1.0) if grown else extent
    step = extent / torch.tensor(size, dtype=extent.dtype, device=extent.device)
    points = torch.full_like(step, ratio) if ratio > 0 else step.detach().ceil().clamp(min=0)
    counts = points.to(torch.int64).repeat_interleave(size[0] * size[1], 0)
    which, *offsets = _points(counts[:, 0], counts[:, 1])
    region, bin_ = which // (size[0] * size[1]), which % (size[0] * size[1])
    rows, weights = index.to(torch.int64)[region].unsqueeze(1), torch.ones_like(start[region, :1])
    for axis, place in enumerate((bin_ // size[1], bin_ % size[1])):
        width = step[region, axis]
        at = start[region, axis] + place * width + (offsets[axis] + 0.5) * width / points[region, axis]
        ends, shares = _between(at, image[axis])
        # The two neighbours along this axis for each of those along the axes before.
        rows = (rows.unsqueeze(2) * image[axis] + ends.unsqueeze(1)).flatten(1)
        weights = (weights.unsqueeze(2) * shares.unsqueeze(1)).flatten(1)
    if greatest:
        corners = zip(rows.unbind(1), weights.unbind(1), strict=True)
        weighted = (pixels.index_select(0, row) * weight.unsqueeze(1) for row, weight in corners)
        return _maxima(functools.reduce(torch.maximum, weighted), which, counts.shape[0])
    per_bin = counts.prod(1)
    starts = (per_bin.cumsum(0) - per_bin) * rows.shape[1]
    total = F.embedding_bag(rows.reshape(-1), pixels, starts, mode="sum", per_sample_weights=weights.reshape(-1))
    return total / per_bin.clamp(min=1).unsqueeze(1)


def _points(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the points of one grid per bin: the bin, row, and column of each point."""
    sizes = rows * columns
    which = torch.arange(sizes.shape[0], device=sizes.device).repeat_interleave(sizes)
    rank = torch.arange(which.shape[0], device=sizes.device) - (sizes.cumsum(0) - sizes)[which]
    return which, rank // columns[which], rank % columns[which]


def _between(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the two pixels around each coordinate and their shares, which are zero more than one pixel outside."""
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    low = at.detach().floor()
    share = at - low
    ends = torch.stack((low, (low + 1).clamp(max=size - 1)), 1).to(torch.int64)
    return ends, torch.stack((1 - share, share), 1) * inside.unsqueeze(1)


def _maxima(values: Tensor, which: Tensor, bins: int) -> Tensor:
    """Return the maximum of the points `[P, C]` of each bin, 0 for a bin without points."""
    index = which.unsqueeze(1).expand_as(values)
    return values.new_zeros((bins, values.shape[1])).scatter_reduce(0, index, values, "amax", include_self=False)


@operator("MaxRoiPool")
def max_roi_pool_1(x: Tensor, rois: Tensor, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> Tensor:
    """Return the maximum of each bin of the regions.

    Args:
        x: `[N, C, H, W]`.
        rois: `[R, 5]`, (sample, x1, y1, x2, y2), the second corner belongs to the region.
        pooled_shape: bins along y and x.
        spatial_scale: size of x by the size of what the regions were measured on.

    Returns:
        `[R, C, *pooled_shape]`.
    """
    shape = (rois.shape[0], x.shape[1], *pooled_shape)
    if x.is_meta or rois.is_meta:
        return torch.empty(shape, dtype=x.dtype, device="meta")
    pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    image, parts = (x.shape[2], x.shape[3]), []
    for regions in rois.detach().to(compute_type(rois.dtype)).split(_REGIONS_AT_ONCE):
        # Halves are rounded away from zero, as C does; float64 holds the sum with 0.5 exactly.
        scaled = (regions[:, 1:] * spatial_scale).to(torch.float64)
        corners = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
        spans = [_bins(corners[:, 1 - axis], corners[:, 3 - axis], pooled_shape[axis], image[axis]) for axis in (0, 1)]
        counts = [(end - start).clamp(min=0) for start, end in spans]
        full = (regions.shape[0], *pooled_shape)
        tall, broad = counts[0].unsqueeze(2).expand(full).reshape(-1), counts[1].unsqueeze(1).expand(full).reshape(-1)
        which, row, column = _points(tall, broad)
        region, bin_ = which // math.prod(pooled_shape), which % math.prod(pooled_shape)
        row = row + spans[0][0][region, bin_ // pooled_shape[1]]
        column = column + spans[1][0][region, bin_ % pooled_shape[1]]
        place = (regions[:, 0].to(torch.int64)[region] * image[0] + row) * image[1] + column
        parts.append(_maxima(pixels[place], which, tall.shape[0]))
    return torch.cat(parts).reshape(-1, *pooled_shape, x.shape[1]).permute(0, 3, 1, 2)


def _bins(first: Tensor, last: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return where the bins of each region begin and end along an axis, `[R, count]` each; they may overlap."""
    length = (last - first + 1).clamp(min=1).to(torch.float32)
    step, place = (length / count).unsqueeze(1), torch.arange(count, device=first.device)
    begin, end = (place * step).floor() + first.unsqueeze(1), ((place + 1) * step).ceil() + first.unsqueeze(1)
    return begin.clamp(0, size).to(torch.int64), end.clamp(0, size).to(torch.int64)
