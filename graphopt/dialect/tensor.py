"""Shapes, layout, and assembly of tensors: everything that moves elements without choosing among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_type, dtype_of, moved, scalar
from .registry import operator


@operator("Constant")
def constant_1(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
) -> Tensor:
    """Return the one attribute that is given as a tensor."""
    if value is not None:
        return value
    integer = value_int if value_int is not None else value_ints
    if integer is not None:
        return torch.tensor(integer, dtype=torch.int64)
    number = value_float if value_float is not None else value_floats
    if number is None:
        raise NotImplementedError("Constant covers tensors, floats and integers only")
    return torch.tensor(number, dtype=torch.float32)


@operator("Identity")
def identity_1(x: Tensor) -> Tensor:
    """Return x itself."""
    return x


@operator("Shape")
def shape_1(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return the sizes of axes [start, end) as int64, a real tensor even when x is on the meta device."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@operator("Size")
def size_1(x: Tensor) -> Tensor:
    """Return the number of elements as int64, a real tensor even when x is on the meta device."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape")
def reshape_1(x: Tensor, *, shape: list[int]) -> Tensor:
    """Reshape to the attribute; 0 keeps the size of that axis, -1 is inferred."""
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


@operator("Reshape", since=5, values=(1,))
def reshape_5(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Reshape to the input; 0 keeps the size of that axis unless `allowzero`, -1 is inferred."""
    return x.reshape(shape.tolist()) if allowzero else reshape_1(x, shape=shape.tolist())


@operator("Flatten")
def flatten_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to a matrix: axes before `axis` into rows, the others into columns."""
    # Slicing at a negative axis counts from the end, as ONNX does, and no axis but `rank` lies beyond.
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose_1(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    """Permute the axes, by default into reverse order."""
    return x.permute(perm if perm is not None else list(range(x.dim()))[::-1])


@operator("Squeeze")
def squeeze_1(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Remove the axes of size one that are listed, or all of them."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Squeeze", since=13, values=(1,))
def squeeze_13(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Remove the axes of size one that are listed, or all of them."""
    return squeeze_1(x, axes=None if axes is None else axes.tolist())


@operator("Unsqueeze")
def unsqueeze_1(x: Tensor, *, axes: list[int]) -> Tensor:
    """Insert axes of size one; `axes` are positions in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Unsqueeze", since=13, values=(1,))
def unsqueeze_13(x: Tensor, axes: Tensor) -> Tensor:
    """Insert axes of size one; `axes` are positions in the result."""
    return unsqueeze_1(x, axes=axes.reshape(-1).tolist())


@operator("Concat")
def concat_1(*inputs: Tensor, axis: int = 1) -> Tensor:
    """Join the inputs along an axis, by default the second."""
    return torch.cat(inputs, axis)


@operator("Concat", since=4)
def concat_4(*inputs: Tensor, axis: int) -> Tensor:
    """Join the inputs along an axis."""
    return torch.cat(inputs, axis)


@operator("Split", values=(1,), counted=True)
def split_1(
    x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, split: list[int] | None = None, outputs: int
) -> Tensor | tuple[Tensor, ...]:
    """Cut x along an axis into parts of the given sizes, or into equal ones."""
    return split_2(x, axis=axis, split=split if sizes is None else sizes.tolist(), outputs=outputs)


@operator("Split", since=2, counted=True)
def split_2(x: Tensor, *, axis: int = 0, split: list[int] | None = None, outputs: int) -> Tensor | tuple[Tensor, ...]:
    """Cut x along an axis into parts of the attribute's sizes, or into equal ones."""
    return _split(x, split or _even(x.shape[axis], outputs), axis, outputs)


@operator("Split", since=13, values=(1,), counted=True)
def split_13(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> Tensor | tuple[Tensor, ...]:
    """Cut x along an axis into parts of the given sizes, or into `num_outputs` with a smaller last one."""
    sizes = _even(x.shape[axis], num_outputs or outputs) if split is None else split.tolist()
    return _split(x, sizes, axis, outputs)


def _even(size: int, parts: int) -> list[int]:
    chunk = -(-size // parts)
    return [max(0, min(chunk, size - start * chunk)) for start in range(parts)]


def _split(x: Tensor, sizes: list[int], axis: int, outputs: int) -> Tensor | tuple[Tensor, ...]:
    parts = torch.split(x, sizes, axis)
    return parts[0] if outputs == 1 else tuple(parts)


@operator("Slice")
def slice_1(x: Tensor, *, starts: list[int], ends: list[int], axes: list[int] | None = None) -> Tensor:
    """Return the ranges [start, end) of the listed axes."""
    return _slice(x, starts, ends, axes, None)


@operator("Slice", since=10, values=(1, 2, 3, 4))
def slice_10(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """Return every step-th element of the ranges [start, end) of the listed axes; steps may be negative."""
    named = None if axes is None else axes.tolist()
    return _slice(x, starts.tolist(), ends.tolist(), named, None if steps is None else steps.tolist())


def _slice(x: Tensor, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> Tensor:
    named = axes if axes is not None else range(len(starts))
    for axis, start, end, step in zip(named, starts, ends, steps or [1] * len(starts), strict=True):
        first, last, stride = slice(start, end, step).indices(x.shape[axis])
        if stride > 0:
            index = [slice(None)] * (axis % x.dim()) + [slice(first, max(first, last), stride)]
            x = x[tuple(index)]
        else:
            # torch has no negative strides.
            x = take(x, torch.arange(first, min(first, last), stride, device=x.device), axis)
    return x


def take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Select along an axis by a one-dimensional index, for the element types torch cannot index too."""
    return moved(lambda data: data.index_select(axis, index), x)


@operator("Expand", since=8, values=(1,))
def expand_8(x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast x and `shape` against each other."""
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@operator("Tile", values=(1, 2))
def tile_1(x: Tensor, tiles: Tensor, axis: Tensor) -> Tensor:
    """Repeat x along one axis."""
    repeats = [1] * x.dim()
    repeats[scalar(axis)] = scalar(tiles)
    return x.repeat(repeats)


@operator("Tile", since=6, values=(1,))
def tile_6(x: Tensor, repeats: Tensor) -> Tensor:
    """Repeat x along each axis."""
    return x.repeat(repeats.tolist())


@operator("Pad")
def pad_1(x: Tensor, *, paddings: list[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad every axis; `paddings` lists all begins, then all ends."""
    return pad_axes(x, range(x.dim()), paddings, mode, value)


@operator("Pad", since=2)
def pad_2(x: Tensor, *, pads: list[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad every axis; `pads` lists all begins, then all ends."""
    return pad_axes(x, range(x.dim()), pads, mode, value)


@operator("Pad", since=11, values=(1, 3))
def pad_11(
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Pad the listed axes, or all; `pads` lists all begins, then all ends; negative ones crop."""
    named = range(x.dim()) if axes is None else axes.tolist()
    # On the meta device only the shape counts.
    fill = 0 if value is None or value.is_meta else value.item()
    return pad_axes(x, named, pads.tolist(), mode, fill)


def pad_axes(x: Tensor, axes: Sequence[int], pads: Sequence[int], mode: str, value: float) -> Tensor:
    """Pad the listed axes by pads[i] at the begin and pads[len(axes) + i] at the end."""
    amounts = {axis % x.dim(): (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if mode == "constant":
        flat = [amount for axis in reversed(range(x.dim())) for amount in amounts.get(axis, (0, 0))]
        return F.pad(x, flat, value=value)
    for axis, (begin, end) in amounts.items():
        if (begin, end) != (0, 0):
            size = x.shape[axis]
            source = [_source(position, size, mode) for position in range(-begin, size + end)]
            x = take(x, torch.tensor(source, dtype=torch.int64, device=x.device), axis)
    return x


def _source(position: int, size: int, mode: str) -> int:
    """Return which element of an axis stands at a position that may lie outside of it."""
    if mode == "edge":
        return min(max(position, 0), size - 1)
    if mode == "wrap":
        return position % size
    if mode != "reflect":
        raise NotImplementedError(f"Pad mode {mode!r} is not covered")
    turn = max(2 * (size - 1), 1)
    return min(position % turn, -position % turn)


@operator("ConstantOfShape", since=9, values=(0,))
def constant_of_shape_9(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """Return a tensor of the given shape filled with the one element of `value`, float zero by default."""
    if value is None:
        return torch.zeros(shape.tolist(), dtype=torch.float32)
    return torch.full(shape.tolist(), value.item(), dtype=value.dtype)


@operator("Range", since=11, values=(0, 1, 2))
def range_11(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """Return start, start + delta, ... up to but without limit."""
    first, last, step = start.item(), limit.item(), delta.item()
    wide = compute_type(start.dtype, stash_type) if start.dtype.is_floating_point else torch.int64
    count = max(0, math.ceil((last - first) / step))
    return (torch.arange(count, dtype=wide) * step + first).to(start.dtype)


@operator("EyeLike", since=9)
def eye_like_9(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Return a matrix of the shape of x with ones on the k-th diagonal."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns - rows == k).to(x.dtype if dtype is None else dtype_of(dtype))


@operator("Trilu", since=14, values=(1,))
def trilu_14(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Keep the upper or lower triangle of the matrices, from the k-th diagonal on."""
    diagonal = 0 if k is None else scalar(k)
    return moved(lambda data: torch.triu(data, diagonal) if upper else torch.tril(data, diagonal), x)


@operator("DepthToSpace")
def depth_to_space_1(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move channels into blocks of space: `[N, C, H, W]` to `[N, C / b^2, H * b, W * b]`."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        blocks = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth_1(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move blocks of space into channels: `[N, C, H, W]` to `[N, C * b^2, H / b, W / b]`."""
    n, c, h, w = x.shape
    b = blocksize
    blocks = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, c * b * b, h // b, w // b)


@operator("CenterCropPad", since=18, values=(1,))
def center_crop_pad_18(x: Tensor, shape: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Crop or zero-pad the axes around their centre to the given sizes."""
    named = list(range(x.dim())) if axes is None else axes
    begins, ends = [], []
    for axis, size in zip(named, shape.tolist(), strict=True):
        missing = size - x.shape[axis]
        # The odd element is added behind, and removed behind.
        begin = missing // 2 if missing >= 0 else -(-missing // 2)
        begins.append(begin)
        ends.append(missing - begin)
    return pad_axes(x, named, begins + ends, "constant", 0)
