"""Matrix products, determinants, and running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dtypes import compute_type, integers, scalar
from .registry import operator


@operator("Gemm")
def gemm_1(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    """Return alpha * a @ b + beta * c; `broadcast` of early opsets permits what later ones always do."""
    a, b = a.t() if transA else a, b.t() if transB else b
    if c is not None and c.dtype.is_floating_point and alpha == beta == 1.0 and c.dim() < 3:
        return torch.addmm(c, a, b)
    product = matmul_1(a, b)
    if not a.dtype.is_floating_point and (alpha, beta) != (1.0, 1.0):
        # Of integers only the sum is rounded, towards zero.
        exact = alpha * product.to(torch.float64)
        return (exact if c is None else exact + beta * c.to(torch.float64)).to(a.dtype)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else integers(torch.add, product, c if beta == 1.0 else c * beta)


@operator("MatMul")
def matmul_1(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices, batched and broadcast as in numpy."""
    return integers(torch.matmul, a, b)


@operator("Einsum", since=12)
def einsum_12(*inputs: Tensor, equation: str) -> Tensor:
    """Return the sum of products that the equation states."""
    # A sum alone would be int64 for every integer type.
    terms = equation.replace(" ", "")
    return integers(lambda *wide: torch.einsum(terms, *wide), *inputs).to(inputs[0].dtype)


@operator("Det", since=11)
def det_11(x: Tensor) -> Tensor:
    """Return the determinants of the matrices in the last two axes."""
    determinant: Tensor = torch.linalg.det(x.to(compute_type(x.dtype)))
    return determinant.to(x.dtype)


@operator("CumSum", since=11, values=(1,))
def cum_sum_11(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return running sums along an axis."""
    return _running(torch.cumsum, 0, x, axis, exclusive, reverse)


@operator("CumProd", since=26, values=(1,))
def cum_prod_26(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return running products along an axis."""
    return _running(torch.cumprod, 1, x, axis, exclusive, reverse)


def _running(scan: Any, neutral: int, x: Tensor, axis: Tensor, exclusive: int, reverse: int) -> Tensor:
    return integers(lambda wide: _scan(scan, neutral, wide, scalar(axis), bool(exclusive), bool(reverse)), x)


def _scan(scan: Any, neutral: int, x: Tensor, dim: int, exclusive: bool, reverse: bool) -> Tensor:
    ordered = x.flip(dim) if reverse else x
    if exclusive:
        first = torch.full_like(ordered.narrow(dim, 0, 1), neutral)
        ordered = torch.cat((first, ordered.narrow(dim, 0, x.shape[dim] - 1)), dim)
    # Without a dtype torch would accumulate small integers in int64.
    result: Tensor = scan(ordered, dim, dtype=x.dtype)
    return result.flip(dim) if reverse else result
