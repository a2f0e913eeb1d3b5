"""Softmax of rows that fit on chip, several per program: one read and one write, whatever the form of the sum.

    y_i = exp(x_i - c) / sum_j exp(x_j - c),   c the row's largest entry
    dx_i = y_i (g_i - sum_j g_j y_j)

With the whole row at hand its maximum costs no trip to memory, so neither pairs nor a constant would gain anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, narrow


@triton.jit
def _softmax_rows_kernel(x, out, x_t, rows, N, R: tl.constexpr, BN: tl.constexpr):
    """R rows of N entries; `x` has a stride between rows, `out` is dense."""
    row, column = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    values = tl.load(x + row[:, None] * x_t + column[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    largest = tl.max(values, 1)
    # A row of -inf alone keeps 0 in place of its maximum, so that its exponentials are 0 rather than NaN.
    weights = tl.exp(values - tl.where(largest == -float("inf"), 0.0, largest)[:, None])
    total = tl.sum(weights, 1)
    y = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row[:, None] * N + column[None, :], narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_rows_gradient_kernel(dy, y, dx, rows, N, R: tl.constexpr, BN: tl.constexpr):
    """R dense rows of N entries."""
    row, column = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    probability = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(probability * upstream, 1)
    found = probability * (upstream - mean[:, None])
    tl.store(dx + place, narrow(found, dx.dtype.element_ty), mask=inside)


# The wider the row, the more warps have to hold it.
_CONFIGS = [Config(warps=16), Config(warps=8), Config(warps=4)]

softmax_rows_kernel = Kernel(_softmax_rows_kernel, _CONFIGS, key=("BN", "R"))
softmax_rows_gradient_kernel = Kernel(_softmax_rows_gradient_kernel, _CONFIGS, key=("BN", "R"))
