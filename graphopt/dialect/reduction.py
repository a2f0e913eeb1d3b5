"""Reductions along axes; the axes were an attribute first and became an input later."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import comparable, integers, ordered
from .registry import operator

_Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _by_attribute(reduce: _Reduce, x: Tensor, axes: list[int] | None, keepdims: int) -> Tensor:
    return _reduced(reduce, x, axes if axes else list(range(x.dim())), bool(keepdims))


def _by_input(reduce: _Reduce, x: Tensor, axes: Tensor | None, keepdims: int, noop: int) -> Tensor:
    named = [] if axes is None else axes.reshape(-1).tolist()
    if not named and not noop:
        named = list(range(x.dim()))
    return _reduced(reduce, x, named, bool(keepdims))


def _reduced(reduce: _Reduce, x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    by_type = ordered if reduce in (_max, _min) else integers
    return by_type(lambda wide: reduce(wide, axes, keepdim), x)


def _sum(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    # torch takes an empty list for all axes, and accumulates small integers in int64.
    return torch.sum(x, axes, keepdim, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.mean(x, axes, keepdim) if axes else x
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(_sum(x, axes, keepdim), count, rounding_mode="trunc")


def _prod(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim, dtype=x.dtype)
    return x


def _lowest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return False
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return True
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


def _extremum(x: Tensor, axes: list[int], keepdim: bool, largest: bool) -> Tensor:
    if not axes:
        return x
    if any(x.shape[axis] == 0 for axis in axes):
        # Nothing to choose from: the neutral element.
        empty = torch.sum(x, axes, keepdim, dtype=x.dtype)
        return torch.full_like(empty, _lowest(x.dtype) if largest else _highest(x.dtype))
    return torch.amax(x, axes, keepdim) if largest else torch.amin(x, axes, keepdim)


def _max(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return _extremum(x, axes, keepdim, True)


def _min(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return _extremum(x, axes, keepdim, False)


def _l1(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return _sum(torch.abs(x), axes, keepdim)


def _l2(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if x.dtype.is_floating_point and axes:
        norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim)
        return norm
    return torch.sqrt(_sum(x * x, axes, keepdim)).to(x.dtype)


def _sum_square(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return _sum(x * x, axes, keepdim)


def _log_sum(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.log(_sum(x, axes, keepdim)).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    if not axes:
        return torch.log(torch.exp(x))
    return torch.logsumexp(x, axes, keepdim).to(x.dtype)


@operator("ReduceSum")
def reduce_sum_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the sum over the axes of the attribute."""
    return _by_attribute(_sum, x, axes, keepdims)


@operator("ReduceSum", since=13, values=(1,))
def reduce_sum_13(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the sum over the axes of the input."""
    return _by_input(_sum, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceMean")
def reduce_mean_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the mean over the axes of the attribute."""
    return _by_attribute(_mean, x, axes, keepdims)


@operator("ReduceMean", since=18, values=(1,))
def reduce_mean_18(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the mean over the axes of the input."""
    return _by_input(_mean, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceProd")
def reduce_prod_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the product over the axes of the attribute."""
    return _by_attribute(_prod, x, axes, keepdims)


@operator("ReduceProd", since=18, values=(1,))
def reduce_prod_18(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the product over the axes of the input."""
    return _by_input(_prod, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceMax")
def reduce_max_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the maximum over the axes of the attribute."""
    return _by_attribute(_max, x, axes, keepdims)


@operator("ReduceMax", since=18, values=(1,))
def reduce_max_18(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the maximum over the axes of the input."""
    return _by_input(_max, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceMin")
def reduce_min_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the minimum over the axes of the attribute."""
    return _by_attribute(_min, x, axes, keepdims)


@operator("ReduceMin", since=18, values=(1,))
def reduce_min_18(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the minimum over the axes of the input."""
    return _by_input(_min, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceL1")
def reduce_l1_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the sum of absolute values over the axes of the attribute."""
    return _by_attribute(_l1, x, axes, keepdims)


@operator("ReduceL1", since=18, values=(1,))
def reduce_l1_18(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the sum of absolute values over the axes of the input."""
    return _by_input(_l1, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceL2")
def reduce_l2_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the Euclidean norm over the axes of the attribute."""
    return _by_attribute(_l2, x, axes, keepdims)


@operator("ReduceL2", since=18, values=(1,))
def reduce_l2_18(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the Euclidean norm over the axes of the input."""
    return _by_input(_l2, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceSumSquare")
def reduce_sum_square_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the sum of squares over the axes of the attribute."""
    return _by_attribute(_sum_square, x, axes, keepdims)


@operator("ReduceSumSquare", since=18, values=(1,))
def reduce_sum_square_18(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the sum of squares over the axes of the input."""
    return _by_input(_sum_square, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceLogSum")
def reduce_log_sum_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the logarithm of the sum over the axes of the attribute."""
    return _by_attribute(_log_sum, x, axes, keepdims)


@operator("ReduceLogSum", since=18, values=(1,))
def reduce_log_sum_18(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the logarithm of the sum over the axes of the input."""
    return _by_input(_log_sum, x, axes, keepdims, noop_with_empty_axes)


@operator("ReduceLogSumExp")
def reduce_log_sum_exp_1(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Return the logarithm of the sum of exponentials over the axes of the attribute."""
    return _by_attribute(_log_sum_exp, x, axes, keepdims)


@operator("ReduceLogSumExp", since=18, values=(1,))
def reduce_log_sum_exp_18(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the logarithm of the sum of exponentials over the axes of the input."""
    return _by_input(_log_sum_exp, x, axes, keepdims, noop_with_empty_axes)


@operator("ArgMax")
def arg_max_1(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return the index of the largest element along an axis, the first or the last of equal ones."""
    return _arg(x, axis, bool(keepdims), bool(select_last_index), True)


@operator("ArgMin")
def arg_min_1(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return the index of the smallest element along an axis, the first or the last of equal ones."""
    return _arg(x, axis, bool(keepdims), bool(select_last_index), False)


def _arg(x: Tensor, axis: int, keepdim: bool, last: bool, largest: bool) -> Tensor:
    # torch.argmax leaves open which of equal elements it returns.
    x = comparable(x)
    hit = x == _extremum(x, [axis], True, largest)
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    position = torch.arange(x.shape[axis], device=x.device).reshape(shape)
    if last:
        return torch.where(hit, position, -1).amax(axis, keepdim)
    return torch.where(hit, position, x.shape[axis]).amin(axis, keepdim)
