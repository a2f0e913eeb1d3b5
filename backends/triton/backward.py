"""Gradients of the four rules; letters as in forward.py, dS the gradient of the state behind a chunk.

    du_j = scale sum_{i >= j} A_ij do_i + exp(G_C - G_j) k_j dS          dr = (I + M)^-T du   (delta; else dv = du)
    dS  <- exp(G_C) dS + scale sum_i exp(G_i) q_i do_i^T - sum_i beta_i exp(G_i) k_i dr_i^T
    dq_i = scale [ exp(G_i) do_i S^T + sum_j dA_ij exp(G_i - G_j) k_j ],     dA_ij = do_i u_j
    dk_j = exp(G_C - G_j) u_j dS^T + scale sum_i dA_ij exp(G_i - G_j) q_i    (the key's side)
    y_i  = - exp(G_i) dr_i S^T - sum_{j < i} dr_i u_j exp(G_i - G_j) k_j     (delta: k_i reads the state, too)
    dk_i = .. + beta_i y_i - sum_{l > i} beta_l dr_l u_i exp(G_l - G_i) k_l, dv = beta dr, dbeta_i = dr_i v_i + k_i y_i
    dG_i = q_i dq_i + beta_i k_i y_i - k_i (dk_i of the key's side),         dG_C += sum (S behind the chunk) dS

`reverse_kernel` walks the chunks backwards with dS; `gradient_kernel` then takes all chunks at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows


@triton.jit
def _reverse_kernel(
    q, k, dout, total, inside, inverse, beta, dfinal, dstates, dr, dv, dstart,
    scale, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Gradients of the state behind every chunk and of v, for one head and one block of V."""
    pid_v, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid // HKV, pid % HKV
    groups, N = H // HKV, tl.cdiv(T, C)
    feature, column = tl.arange(0, BK), pid_v * BV + tl.arange(0, BV)
    chunk = tl.arange(0, C)
    dS = tl.zeros([BK, BV], tl.float32)
    if FINAL:
        dS += load_rows(dfinal + pid * K * V, V, feature, column, K, V)
    for m in range(N):
        n = N - 1 - m
        rows = n * C + chunk
        store_rows(dstates + (pid * N + n) * K * V, V, feature, column, K, V, dS)
        keys = load_rows(k + b * k_b + h * k_h, k_t, rows, feature, T, K)
        held = narrow(dS, keys.dtype)
        if DECAY == 0:
            du = dot(keys, held)
        if DECAY == 1:
            G = tl.load(total + pid * N * C + rows)
            last = tl.load(total + pid * N * C + n * C + C - 1)
            du = tl.exp(last - G)[:, None] * dot(keys, held)
            dS = tl.exp(last) * dS
        if DECAY == 2:
            G = load_rows(total + pid * N * C * K, K, rows, feature, N * C, K)
            last = tl.load(total + (pid * N * C + n * C + C - 1) * K + feature, mask=feature < K, other=0.0)
            du = dot(narrow(tl.exp(last[None, :] - G) * keys, keys.dtype), held)
            dS = tl.exp(last)[:, None] * dS
        for g in range(groups):
            head = b * H + h * groups + g
            queries = load_rows(q + b * q_b + (h * groups + g) * q_h, q_t, rows, feature, T, K)
            do = load_rows(dout + head * T * V, V, rows, column, T, V)
            if DECAY == 2:
                At = tl.load(inside + (head * N + n) * C * C + chunk[:, None] + chunk[None, :] * C)
                queries = narrow(tl.exp(G) * queries, keys.dtype)
            else:
                upper = chunk[:, None] <= chunk[None, :]
                At = dot(keys, tl.trans(queries))
                if DECAY == 1:
                    At *= tl.exp(tl.where(upper, G[None, :] - G[:, None], 0.0))
                At = tl.where(upper, At, 0.0)
            du += scale * dot(narrow(At, keys.dtype), do)
            if DECAY == 1:
                do = narrow(tl.exp(G)[:, None] * do, keys.dtype)
            dS += scale * dot(tl.trans(queries), do)
        if DELTA:
            solved = tl.load(inverse + (pid * N + n) * C * C + chunk[:, None] + chunk[None, :] * C)
            strength = tl.load(beta + pid * T + rows, mask=rows < T, other=0.0)[:, None]
            found = dot(narrow(solved, keys.dtype), narrow(du, keys.dtype))
            store_rows(dr + pid * T * V, V, rows, column, T, V, found)
            du = strength * found
            if DECAY == 1:
                dS -= dot(tl.trans(keys), narrow(tl.exp(G)[:, None] * du, keys.dtype))
            else:
                dS -= dot(tl.trans(keys), narrow(du, keys.dtype))
        store_rows(dv + pid * T * V, V, rows, column, T, V, du)
    store_rows(dstart + pid * K * V, V, feature, column, K, V, dS)


@triton.jit
def _gradient_kernel(
    q, k, v, u, dout, dr, total, beta, states, dstates, dq, dk, dinside, tail, dtotal, dbeta,
    scale, T, H: tl.constexpr, HKV: tl.constexpr, PAIRS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, u_b, u_h, u_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk and one block of K; those of G and beta are partial sums over that block."""
    pid_k, n, pair = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    groups, N = H // HKV, tl.cdiv(T, C)
    feature, chunk = pid_k * BK + tl.arange(0, BK), tl.arange(0, C)
    rows = n * C + chunk
    keys = load_rows(k + b * k_b + h * k_h, k_t, rows, feature, T, K)
    before, behind = states + (pair * N + n) * K * V, dstates + (pair * N + n) * K * V
    values_of = u + b * u_b + h * u_h
    lower = chunk[:, None] >= chunk[None, :]
    if DECAY == 1:
        G = tl.load(total + pair * N * C + rows)
        last = tl.load(total + pair * N * C + n * C + C - 1)
        apart = tl.exp(tl.where(lower, G[:, None] - G[None, :], 0.0))
    if DECAY == 2:
        G = load_rows(total + pair * N * C * K, K, rows, feature, N * C, K)
        last = tl.load(total + (pair * N * C + n * C + C - 1) * K + feature, mask=feature < K, other=0.0)

    dkeys = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    y = tl.zeros([C, BK], tl.float32)
    D = tl.zeros([C, C], tl.float32)
    dstrength = tl.zeros([C], tl.float32)
    for first in range(0, V, BV):
        column = first + tl.arange(0, BV)
        S = load_rows(before, V, feature, column, K, V)
        dS = load_rows(behind, V, feature, column, K, V)
        values = load_rows(values_of, u_t, rows, column, T, V)
        dkeys += dot(values, tl.trans(narrow(dS, keys.dtype)))
        if DECAY > 0:
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if DELTA:
            back = load_rows(dr + pair * T * V, V, rows, column, T, V)
            y -= dot(back, tl.trans(narrow(S, keys.dtype)))
            D -= dot(back, tl.trans(values))
            if pid_k == 0:
                given = load_rows(v + b * v_b + h * v_h, v_t, rows, column, T, V)
                dstrength += tl.sum(back.to(tl.float32) * given.to(tl.float32), 1)
    if DECAY == 1:
        dkeys *= tl.exp(last - G)[:, None]
        rest = tl.exp(last) * tl.sum(kept) + tl.sum(dkeys * keys)
    if DECAY == 2:
        dkeys *= tl.exp(last[None, :] - G)
        rest = tl.exp(last) * kept + tl.sum(dkeys * keys, 0)
        tl.store(tail + (pair * N + n) * K + feature, rest, mask=feature < K)
    dG = tl.zeros([C], tl.float32)
    if DELTA:
        strength = tl.load(beta + pair * T + rows, mask=rows < T, other=0.0)
        D = tl.where(chunk[:, None] > chunk[None, :], D, 0.0)
        if DECAY == 1:
            y *= tl.exp(G)[:, None]
            D *= apart
        y += dot(narrow(D, keys.dtype), keys)
        dkeys += dot(tl.trans(narrow(strength[:, None] * D, keys.dtype)), keys)
        reading = tl.sum(keys * y, 1)
        dstrength += reading
        dG += strength * reading
        tl.store(dbeta + (pid_k * PAIRS + pair) * T + rows, dstrength, mask=rows < T)
    for g in range(groups):
        head = b * H + h * groups + g
        queries = load_rows(q + b * q_b + (h * groups + g) * q_h, q_t, rows, feature, T, K)
        dqueries = tl.zeros([C, BK], tl.float32)
        dA = tl.zeros([C, C], tl.float32)
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            do = load_rows(dout + head * T * V, V, rows, column, T, V)
            S = load_rows(before, V, feature, column, K, V)
            values = load_rows(values_of, u_t, rows, column, T, V)
            dqueries += dot(do, tl.trans(narrow(S, keys.dtype)))
            dA += dot(do, tl.trans(values))
        dA = tl.where(lower, scale * dA, 0.0)
        if DECAY == 2:
            dqueries *= scale * tl.exp(G)
            if pid_k == 0:
                tl.store(dinside + (head * N + n) * C * C + chunk[:, None] * C + chunk[None, :], dA)
        else:
            if DECAY == 1:
                dqueries *= scale * tl.exp(G)[:, None]
                dA *= apart
            else:
                dqueries *= scale
            dqueries += dot(narrow(dA, keys.dtype), keys)
            dkeys += dot(tl.trans(narrow(dA, keys.dtype)), queries)
            dG += tl.sum(queries * dqueries, 1)
        store_rows(dq + head * T * K, K, rows, feature, T, K, dqueries)
    if DECAY == 1:
        dG -= tl.sum(keys * dkeys, 1)
        dG += tl.where(chunk == C - 1, rest, 0.0)
        tl.store(dtotal + (pid_k * PAIRS + pair) * N * C + rows, dG)
    if DELTA:
        dkeys += strength[:, None] * y
    store_rows(dk + pair * T * K, K, rows, feature, T, K, dkeys)


reverse_kernel = Kernel(
    _reverse_kernel,
    [
        Config({"BV": 16}, warps=4, stages=1),
        Config({"BV": 32}, warps=4, stages=2),
        Config({"BV": 64}, warps=4, stages=2),
        Config({"BV": 64}, warps=8, stages=2),
    ],
    limits={"BV": "V"},
    key=("K", "V", "H", "HKV", "DECAY", "DELTA"),
)
# BK is chosen by the host: the buffers of the partial sums depend on it.
gradient_kernel = Kernel(
    _gradient_kernel,
    [
        Config({"BV": 32}, warps=4, stages=1),
        Config({"BV": 64}, warps=4, stages=2),
        Config({"BV": 64}, warps=8, stages=2),
    ],
    limits={"BV": "V"},
    key=("K", "V", "H", "HKV", "DECAY", "DELTA"),
)
