"""The four rules chunk by chunk.

For a chunk of C tokens with G_i = decay_1 + .. + decay_i, and S the state before it:

    u   = v                                          linear, gated
    u   = (I + M)^-1 (beta (v - exp(G) k S))         delta, gated_delta;  M: see solve.py
    o_i = scale [ exp(G_i) q_i S + sum_{j <= i} A_ij u_j ],   A_ij = sum_d q_id k_jd exp(G_id - G_jd)
    S  <- exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j^T

No exponent is positive. `forward_kernel` carries S through all chunks of one head, and either computes the
outputs on its way, or only stores the states, from which `output_kernel` computes all outputs at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows


@triton.jit
def _forward_kernel(
    q, k, v, total, inside, inverse, beta, start, out, states, fresh, final,
    scale, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, START: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """DECAY: 0 none, 1 one per token, 2 one per feature. KEEP: store the states, and u for the delta rules."""
    pid_v, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid // HKV, pid % HKV
    groups, N = H // HKV, tl.cdiv(T, C)
    feature, column = tl.arange(0, BK), pid_v * BV + tl.arange(0, BV)
    chunk = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if START:
        S += load_rows(start + pid * K * V, V, feature, column, K, V)
    for n in range(N):
        rows = n * C + chunk
        if KEEP:
            store_rows(states + (pid * N + n) * K * V, V, feature, column, K, V, S)
        keys = load_rows(k + b * k_b + h * k_h, k_t, rows, feature, T, K)
        u = load_rows(v + b * v_b + h * v_h, v_t, rows, column, T, V)
        held = narrow(S, keys.dtype)
        if DECAY == 1:
            G = tl.load(total + pid * N * C + rows)
            last = tl.load(total + pid * N * C + n * C + C - 1)
        if DECAY == 2:
            G = load_rows(total + pid * N * C * K, K, rows, feature, N * C, K)
            last = tl.load(total + (pid * N * C + n * C + C - 1) * K + feature, mask=feature < K, other=0.0)
        if DELTA:
            found = dot(keys, held)
            if DECAY == 1:
                found *= tl.exp(G)[:, None]
            strength = tl.load(beta + pid * T + rows, mask=rows < T, other=0.0)
            wanted = strength[:, None] * (u.to(tl.float32) - found)
            solved = tl.load(inverse + (pid * N + n) * C * C + chunk[:, None] * C + chunk[None, :])
            u = narrow(dot(narrow(solved, keys.dtype), narrow(wanted, keys.dtype)), keys.dtype)
            if KEEP:
                store_rows(fresh + pid * T * V, V, rows, column, T, V, u)
        if OUTPUT:
            for g in range(groups):
                head = b * H + h * groups + g
                queries = load_rows(q + b * q_b + (h * groups + g) * q_h, q_t, rows, feature, T, K)
                if DECAY == 2:
                    A = tl.load(inside + (head * N + n) * C * C + chunk[:, None] * C + chunk[None, :])
                    far = dot(narrow(queries * tl.exp(G), keys.dtype), held)
                else:
                    A = dot(queries, tl.trans(keys))
                    far = dot(queries, held)
                    lower = chunk[:, None] >= chunk[None, :]
                    if DECAY == 1:
                        far *= tl.exp(G)[:, None]
                        A *= tl.exp(tl.where(lower, G[:, None] - G[None, :], 0.0))
                    A = tl.where(lower, A, 0.0)
                o = scale * (far + dot(narrow(A, keys.dtype), u))
                store_rows(out + head * T * V, V, rows, column, T, V, o)
        if DECAY == 0:
            S += dot(tl.trans(keys), u)
        if DECAY == 1:
            S = tl.exp(last) * S + dot(tl.trans(keys), narrow(tl.exp(last - G)[:, None] * u, keys.dtype))
        if DECAY == 2:
            S = tl.exp(last)[:, None] * S + dot(tl.trans(narrow(tl.exp(last[None, :] - G) * keys, keys.dtype)), u)
    store_rows(final + pid * K * V, V, feature, column, K, V, S)


@triton.jit
def _output_kernel(
    q, k, u, total, inside, states, out,
    scale, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t, u_b, u_h, u_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk of one head, from the state before it."""
    pid_v, n, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, query_head = head // H, head % H
    h, N = query_head // (H // HKV), tl.cdiv(T, C)
    pair = b * HKV + h
    column, chunk = pid_v * BV + tl.arange(0, BV), tl.arange(0, C)
    rows = n * C + chunk
    A = tl.zeros([C, C], tl.float32)
    o = tl.zeros([C, BV], tl.float32)
    values = load_rows(u + b * u_b + h * u_h, u_t, rows, column, T, V)
    for first in range(0, K, BK):
        feature = first + tl.arange(0, BK)
        queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, feature, T, K)
        S = narrow(load_rows(states + (pair * N + n) * K * V, V, feature, column, K, V), values.dtype)
        if DECAY == 2:
            G = load_rows(total + pair * N * C * K, K, rows, feature, N * C, K)
            o += dot(narrow(queries * tl.exp(G), values.dtype), S)
        else:
            keys = load_rows(k + b * k_b + h * k_h, k_t, rows, feature, T, K)
            A += dot(queries, tl.trans(keys))
            o += dot(queries, S)
    if DECAY == 2:
        A += tl.load(inside + (head * N + n) * C * C + chunk[:, None] * C + chunk[None, :])
    else:
        lower = chunk[:, None] >= chunk[None, :]
        if DECAY == 1:
            G = tl.load(total + pair * N * C + rows)
            o *= tl.exp(G)[:, None]
            A *= tl.exp(tl.where(lower, G[:, None] - G[None, :], 0.0))
        A = tl.where(lower, A, 0.0)
    o = scale * (o + dot(narrow(A, values.dtype), values))
    store_rows(out + head * T * V, V, rows, column, T, V, o)


forward_kernel = Kernel(
    _forward_kernel,
    [
        Config({"BV": 16}, warps=4, stages=1),
        Config({"BV": 32}, warps=4, stages=2),
        Config({"BV": 32}, warps=4, stages=3),
        Config({"BV": 64}, warps=4, stages=2),
        Config({"BV": 64}, warps=8, stages=2),
        Config({"BV": 128}, warps=8, stages=2),
    ],
    limits={"BV": "V"},
    key=("K", "V", "H", "HKV", "DECAY", "DELTA", "OUTPUT"),
)
output_kernel = Kernel(
    _output_kernel,
    [
        Config({"BK": 32, "BV": 32}, warps=4, stages=2),
        Config({"BK": 64, "BV": 64}, warps=4, stages=3),
        Config({"BK": 64, "BV": 128}, warps=4, stages=3),
        Config({"BK": 128, "BV": 128}, warps=8, stages=2),
    ],
    limits={"BK": "K", "BV": "V"},
    key=("K", "V", "DECAY"),
)
