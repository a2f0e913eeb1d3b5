"""(I + M)^-1 with M_ij = beta_i k_i k_j exp(G_i - G_j) for j < i: what each token of a chunk adds, after the others.

By forward substitution in blocks of 16 rows and in fp32: products of powers of M, which would need fewer steps, cancel
catastrophically where keys resemble each other. Yang et al., "Parallelizing Linear Transformers with the Delta Rule
over Sequence Length" (2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows


@triton.jit
def _block(
    keys_of, k_t, total, start, beta, i, j, T,
    K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The block of M with R rows from row i and R columns from row j; `start` is where the head's sums begin."""
    row, column = i + tl.arange(0, R), j + tl.arange(0, R)
    M = tl.zeros([R, R], tl.float32)
    for first in range(0, K, BK):
        feature = first + tl.arange(0, BK)
        left = load_rows(keys_of, k_t, row, feature, T, K)
        M += dot(left, tl.trans(load_rows(keys_of, k_t, column, feature, T, K)))
    lower = row[:, None] > column[None, :]
    if DECAY == 1:
        apart = tl.load(total + start + row)[:, None] - tl.load(total + start + column)[None, :]
        M *= tl.exp(tl.where(lower, apart, 0.0))
    return tl.where(lower, tl.load(beta + row, mask=row < T, other=0.0)[:, None] * M, 0.0)


@triton.jit
def _diagonal(M, R: tl.constexpr):
    """(I + M)^-1 of one block, a row at a time: row i of the inverse is e_i - M_i (the rows above it)."""
    row = tl.arange(0, R)
    X = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for i in range(1, R):
        line = tl.sum(tl.where((row == i)[:, None], M, 0.0), 0)
        found = tl.sum(line[:, None] * X, 0)
        X -= tl.where((row == i)[:, None], found[None, :], 0.0)
    return X


@triton.jit
def _store(pointer, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr, R: tl.constexpr, value):
    row, column = i * R + tl.arange(0, R), j * R + tl.arange(0, R)
    tl.store(pointer + row[:, None] * C + column[None, :], value)


@triton.jit
def _solve_kernel(
    k, total, beta, inverse, T, HKV, k_b, k_h, k_t,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One chunk of one head; C = 4 R."""
    n, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    N = tl.cdiv(T, C)
    keys_of = k + (pair // HKV) * k_b + (pair % HKV) * k_h
    b, start = beta + pair * T, pair * N * C
    t0 = n * C
    t1, t2, t3 = t0 + R, t0 + 2 * R, t0 + 3 * R
    X00 = _diagonal(_block(keys_of, k_t, total, start, b, t0, t0, T, K, R, BK, DECAY), R)
    X11 = _diagonal(_block(keys_of, k_t, total, start, b, t1, t1, T, K, R, BK, DECAY), R)
    X22 = _diagonal(_block(keys_of, k_t, total, start, b, t2, t2, T, K, R, BK, DECAY), R)
    X33 = _diagonal(_block(keys_of, k_t, total, start, b, t3, t3, T, K, R, BK, DECAY), R)
    M10 = _block(keys_of, k_t, total, start, b, t1, t0, T, K, R, BK, DECAY)
    M20 = _block(keys_of, k_t, total, start, b, t2, t0, T, K, R, BK, DECAY)
    M21 = _block(keys_of, k_t, total, start, b, t2, t1, T, K, R, BK, DECAY)
    M30 = _block(keys_of, k_t, total, start, b, t3, t0, T, K, R, BK, DECAY)
    M31 = _block(keys_of, k_t, total, start, b, t3, t1, T, K, R, BK, DECAY)
    M32 = _block(keys_of, k_t, total, start, b, t3, t2, T, K, R, BK, DECAY)
    # X_ij = -X_ii sum_{j <= m < i} M_im X_mj
    X10 = -dot(X11, dot(M10, X00))
    X21 = -dot(X22, dot(M21, X11))
    X32 = -dot(X33, dot(M32, X22))
    X20 = -dot(X22, dot(M20, X00) + dot(M21, X10))
    X31 = -dot(X33, dot(M31, X11) + dot(M32, X21))
    X30 = -dot(X33, dot(M30, X00) + dot(M31, X10) + dot(M32, X20))
    # The blocks above the diagonal stay as they came: zeros.
    pointer = inverse + (pair * N + n) * C * C
    _store(pointer, 0, 0, C, R, X00)
    _store(pointer, 1, 0, C, R, X10)
    _store(pointer, 1, 1, C, R, X11)
    _store(pointer, 2, 0, C, R, X20)
    _store(pointer, 2, 1, C, R, X21)
    _store(pointer, 2, 2, C, R, X22)
    _store(pointer, 3, 0, C, R, X30)
    _store(pointer, 3, 1, C, R, X31)
    _store(pointer, 3, 2, C, R, X32)
    _store(pointer, 3, 3, C, R, X33)


solve_kernel = Kernel(
    _solve_kernel,
    [Config({"BK": 32}, warps=1), Config({"BK": 64}, warps=1), Config({"BK": 64}, warps=2)],
    limits={"BK": "K"},
    key=("K", "DECAY"),
)
