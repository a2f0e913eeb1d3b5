"""Operators that choose, order, or place elements by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtypes import STORED_ONLY, comparable, integers, moved, ordered, scalar
from .registry import operator
from .tensor import take

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Count negative indices from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@operator("Gather")
def gather_1(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Replace an axis by the axes of `indices`, each element a slice of x."""
    axis = axis % x.dim()
    index = _wrapped(indices, x.shape[axis])
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return take(x, index.reshape(-1), axis).reshape(shape)


@operator("GatherElements", since=11)
def gather_elements_11(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Pick one element along an axis for each element of `indices`."""
    index = _wrapped(indices, x.shape[axis])
    return moved(lambda data: torch.gather(data, axis, index), x)


@operator("GatherND", since=11)
def gather_nd_11(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Pick slices of x at the coordinates in the last axis of `indices`, per batch."""
    batch = x.shape[:batch_dims]
    rows, offset = _rows(x.shape, indices, batch_dims)
    rest = x.shape[batch_dims + indices.shape[-1] :]
    flat = x.reshape(-1, math.prod(rest))
    if batch_dims:
        block = math.prod(x.shape[batch_dims : batch_dims + indices.shape[-1]])
        starts = torch.arange(math.prod(batch), device=indices.device) * block
        rows = rows.reshape(math.prod(batch), -1) + starts.unsqueeze(1)
    return take(flat, rows.reshape(-1), 0).reshape((*offset, *rest))


def _rows(shape: torch.Size, indices: Tensor, batch_dims: int = 0) -> tuple[Tensor, torch.Size]:
    """Turn coordinates into row numbers of the tensor flattened over the indexed axes."""
    depth = indices.shape[-1]
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for position in range(depth):
        size = shape[batch_dims + position]
        rows = rows * size + _wrapped(indices[..., position], size)
    return rows, indices.shape[:-1]


@operator("ScatterND", since=11)
def scatter_nd_11(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Place slices of `updates` at the coordinates in the last axis of `indices`."""
    depth = indices.shape[-1]
    rows = _rows(x.shape, indices)[0].reshape(-1)
    rest = math.prod(x.shape[depth:])
    flat, new = x.reshape(-1, rest), updates.reshape(-1, rest)
    index = rows.unsqueeze(1).expand(-1, rest)
    return _scatter(flat, 0, index, new, reduction).reshape(x.shape)


@operator("Scatter", since=9)
def scatter_9(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """Place the elements of `updates` along an axis."""
    return scatter_elements_11(x, indices, updates, axis=axis)


@operator("ScatterElements", since=11)
def scatter_elements_11(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """Place or accumulate the elements of `updates` along an axis."""
    return _scatter(x, axis, _wrapped(indices, x.shape[axis]), updates, reduction)


def _scatter(x: Tensor, axis: int, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return moved(lambda data, new: data.scatter(axis, index, new), x, updates)
    mode = _REDUCE[reduction]
    by_type = ordered if reduction in ("max", "min") else integers
    return by_type(lambda data, new: data.scatter_reduce(axis, index, new, mode), x, updates)


@operator("TensorScatter", since=24)
def tensor_scatter_24(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """Write `update` into a copy of the cache, from each sample's write index on."""
    axis = axis % cache.dim()
    position = torch.arange(update.shape[axis], device=cache.device)
    shape = [1] * cache.dim()
    shape[axis] = update.shape[axis]
    index = position.reshape(shape)
    if write_indices is not None:
        index = index + write_indices.reshape(-1, *(1,) * (cache.dim() - 1))
    if mode == "circular":
        index = index % cache.shape[axis]
    return moved(lambda data, new: data.scatter(axis, index.expand(update.shape), new), cache, update)


@operator("OneHot", since=9, values=(1,))
def one_hot_9(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """Return values[1] where a new axis of size `depth` meets the index, values[0] elsewhere."""
    size = scalar(depth)
    index = _wrapped(indices, size).unsqueeze(axis)
    shape = [1] * index.dim()
    shape[axis] = size
    hit = index == torch.arange(size, device=indices.device).reshape(shape)
    return torch.where(hit, values[1], values[0])


@operator("TopK")
def top_k_1(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the k largest values along an axis and their indices."""
    return _top(x, k, axis, True)


@operator("TopK", since=10, values=(1,))
def top_k_10(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Return the k largest or smallest values along an axis and their indices."""
    return _top(x, scalar(k), axis, bool(largest))


def _top(x: Tensor, k: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    # torch.topk leaves open which of equal values comes first; ONNX wants the lower index.
    index = torch.sort(comparable(x), stable=True, dim=axis, descending=largest)[1].narrow(axis, 0, k)
    return moved(lambda data: torch.gather(data, axis, index), x), index


@operator("NonZero", since=9, values=(0,))
def non_zero_9(x: Tensor) -> Tensor:
    """Return the coordinates of the non-zero elements, `[rank, count]`."""
    return torch.nonzero(x != 0 if x.dtype in STORED_ONLY else x).t()


@operator("Compress", since=9, values=(1,))
def compress_9(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Keep the slices along an axis, or of the flattened tensor, for which the condition holds."""
    kept = torch.nonzero(condition).reshape(-1).to(x.device)
    return take(x.reshape(-1), kept, 0) if axis is None else take(x, kept, axis)


@operator("Unique", since=11, values=(0,), counted=True)
def unique_11(x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int) -> Tensor | tuple[Tensor, ...]:
    """Return the distinct slices, where each first occurs, the inverse mapping, and the counts."""
    data = x.reshape(-1) if axis is None else x
    dim = 0 if axis is None else axis
    values, inverse, counts = torch.unique(data, return_inverse=True, return_counts=True, dim=dim)
    size = counts.shape[0]
    position = torch.arange(inverse.shape[0], device=x.device)
    unset = torch.full((size,), inverse.shape[0], device=x.device)
    first = unset.scatter_reduce(0, inverse, position, "amin")
    if not sorted:
        order = first.argsort()
        values, first, counts = take(values, order, dim), first[order], counts[order]
        inverse = order.argsort()[inverse]
    results = (values, first, inverse, counts)
    return values if outputs == 1 else results[:outputs]


@operator("ReverseSequence", since=10)
def reverse_sequence_10(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first `lengths[b]` steps of each sample."""
    steps_first = x.transpose(0, time_axis) if (time_axis, batch_axis) != (0, 1) else x
    steps = torch.arange(x.shape[time_axis], device=x.device).unsqueeze(1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)
    index = source.reshape(*source.shape, *(1,) * (x.dim() - 2)).expand(steps_first.shape)
    result = moved(lambda data: torch.gather(data, 0, index), steps_first)
    return result.transpose(0, time_axis) if (time_axis, batch_axis) != (0, 1) else result
