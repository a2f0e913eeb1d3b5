"""A_ij = sum_d q_id k_jd exp(G_id - G_jd) for j <= i in one chunk, with a decay per feature; and its gradients.

exp(G_i - G_j) is no product of a row and a column that both stay below 1 for all pairs at once. For i in a block of 16
rows and all j before that block it is: with R the G of the last row before the block, exp(G_i - R) exp(R - G_j).
Within a block, each pair takes its own difference. Yang et al., "Gated Linear Attention" (2024), section 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows


@triton.jit
def _row(pointer, stride, row, columns, T, WIDTH: tl.constexpr):
    inside = (columns < WIDTH) & (columns * 0 + row < T)
    return tl.load(pointer + row * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pairs_kernel(
    q, k, total, inside, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows [n C + s R, ... + R) of A, for one head."""
    s, n, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, query_head = head // H, head % H
    h, N = query_head // (H // HKV), tl.cdiv(T, C)
    sums, keys_of = total + (b * HKV + h) * N * C * K, k + b * k_b + h * k_h
    chunk, block = tl.arange(0, C), tl.arange(0, R)
    rows, earlier = n * C + s * R + block, n * C + chunk
    A = tl.zeros([R, C], tl.float32)
    for first in range(0, K, BK):
        feature = first + tl.arange(0, BK)
        queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, feature, T, K)
        G = load_rows(sums, K, rows, feature, N * C, K)
        if s > 0:
            reference = _row(sums, K, n * C + s * R - 1, feature, N * C, K)[None, :]
            before = (chunk < s * R)[:, None]
            keys = load_rows(keys_of, k_t, earlier, feature, T, K)
            apart = reference - load_rows(sums, K, earlier, feature, N * C, K)
            keys = narrow(tl.where(before, keys * tl.exp(tl.where(before, apart, 0.0)), 0.0), queries.dtype)
            A += dot(narrow(queries * tl.exp(G - reference), queries.dtype), tl.trans(keys))
        for j in range(R):
            row = n * C + s * R + j
            apart = tl.where((block >= j)[:, None], G - _row(sums, K, row, feature, N * C, K)[None, :], 0.0)
            pair = tl.sum(queries * _row(keys_of, k_t, row, feature, T, K)[None, :] * tl.exp(apart), 1)
            A += tl.where((chunk == s * R + j)[None, :] & (block >= j)[:, None], pair[:, None], 0.0)
    tl.store(inside + (head * N + n) * C * C + (s * R + block)[:, None] * C + chunk[None, :], A)


@triton.jit
def _pairs_backward_kernel(
    q, k, total, dinside, dq_far, dk_far, tail, dq, dk, dtotal, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Adds what comes through A to the gradients through the states, and gathers those of G; for one block of rows."""
    pid, n, pair = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    s, feature = pid % (C // R), (pid // (C // R)) * BK + tl.arange(0, BK)
    b, h = pair // HKV, pair % HKV
    groups, N = H // HKV, tl.cdiv(T, C)
    sums, keys_of = total + pair * N * C * K, k + b * k_b + h * k_h
    chunk, block = tl.arange(0, C), tl.arange(0, R)
    rows, whole = n * C + s * R + block, n * C + chunk
    G = load_rows(sums, K, rows, feature, N * C, K)
    every = load_rows(sums, K, whole, feature, N * C, K)
    keys = load_rows(keys_of, k_t, rows, feature, T, K)
    all_keys = load_rows(keys_of, k_t, whole, feature, T, K)
    # Earlier rows seen from this block, and this block seen from later rows, each through a row between the two.
    before, behind = (chunk < s * R)[:, None], (chunk >= (s + 1) * R)[:, None]
    reference = _row(sums, K, tl.maximum(n * C + s * R - 1, 0), feature, N * C, K)[None, :]
    bound = _row(sums, K, n * C + s * R + R - 1, feature, N * C, K)[None, :]
    near = narrow(tl.where(before, all_keys * tl.exp(tl.where(before, reference - every, 0.0)), 0.0), keys.dtype)
    grown = tl.exp(tl.where(behind, every - bound, 0.0))
    dkeys = load_rows(dk_far + pair * T * K, K, rows, feature, T, K)
    dG = tl.zeros([R, BK], tl.float32)
    for g in range(groups):
        head = b * H + h * groups + g
        queries_of = q + b * q_b + (h * groups + g) * q_h
        queries = load_rows(queries_of, q_t, rows, feature, T, K)
        all_queries = load_rows(queries_of, q_t, whole, feature, T, K)
        dA = dinside + (head * N + n) * C * C
        across = tl.load(dA + (s * R + block)[:, None] * C + chunk[None, :])
        down = tl.load(dA + (s * R + block)[:, None] + chunk[None, :] * C)
        dqueries = load_rows(dq_far + head * T * K, K, rows, feature, T, K)
        if s > 0:
            dqueries += tl.exp(G - reference) * dot(narrow(across, keys.dtype), near)
        later = narrow(tl.where(behind, all_queries * grown, 0.0), keys.dtype)
        dkeys += tl.exp(bound - G) * dot(narrow(down, keys.dtype), later)
        for j in range(R):
            row = n * C + s * R + j
            other = _row(sums, K, row, feature, N * C, K)[None, :]
            below, above = (block >= j)[:, None], (block <= j)[:, None]
            column = tl.load(dA + (s * R + block) * C + s * R + j)[:, None]
            line = tl.load(dA + (s * R + j) * C + s * R + block)[:, None]
            key = _row(keys_of, k_t, row, feature, T, K)[None, :]
            query = _row(queries_of, q_t, row, feature, T, K)[None, :]
            dqueries += tl.where(below, column * key * tl.exp(tl.where(below, G - other, 0.0)), 0.0)
            dkeys += tl.where(above, line * query * tl.exp(tl.where(above, other - G, 0.0)), 0.0)
        dG += queries * dqueries
        store_rows(dq + head * T * K, K, rows, feature, T, K, dqueries)
    dG -= keys * dkeys
    rest = _row(tail + pair * N * K, K, n, feature, N, K)[None, :]
    dG += tl.where((s * R + block == C - 1)[:, None], rest, 0.0)
    store_rows(dk + pair * T * K, K, rows, feature, T, K, dkeys)
    store_rows(dtotal + pair * N * C * K, K, rows, feature, N * C, K, dG)


pairs_kernel = Kernel(
    _pairs_kernel,
    [Config({"BK": 32}, warps=1), Config({"BK": 64}, warps=2), Config({"BK": 128}, warps=4)],
    limits={"BK": "K"},
    key=("K",),
)
pairs_backward_kernel = Kernel(
    _pairs_backward_kernel,
    [Config({"BK": 32}, warps=2), Config({"BK": 64}, warps=4)],
    limits={"BK": "K"},
    key=("K",),
)
