"""The four rules one token at a time, for decoding: the state stays in registers.

S' = exp(decay_t) S,   S = S' + k_t u_t^T,   u_t = v_t  or  beta_t (v_t - S'^T k_t),   o_t = scale S^T q_t
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, load_rows, narrow, store_rows


@triton.jit
def _recurrent_kernel(
    q, k, v, decay, beta, start, out, final,
    scale, T, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One head and one block of V. DECAY: 0 none, 1 one per token, 2 one per feature."""
    pid_v, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid // HKV, pid % HKV
    groups = H // HKV
    feature, column = tl.arange(0, BK), pid_v * BV + tl.arange(0, BV)
    wide, tall = column < V, feature < K
    S = tl.zeros([BK, BV], tl.float32)
    if START:
        S += load_rows(start + pid * K * V, V, feature, column, K, V)
    for t in range(T):
        key = tl.load(k + b * k_b + h * k_h + t * k_t + feature, mask=tall, other=0.0).to(tl.float32)
        u = tl.load(v + b * v_b + h * v_h + t * v_t + column, mask=wide, other=0.0).to(tl.float32)
        if DECAY == 1:
            S *= tl.exp(tl.load(decay + pid * T + t))
        if DECAY == 2:
            S *= tl.exp(tl.load(decay + (pid * T + t) * K + feature, mask=tall, other=0.0))[:, None]
        if DELTA:
            u = tl.load(beta + pid * T + t) * (u - tl.sum(key[:, None] * S, 0))
        S += key[:, None] * u[None, :]
        for g in range(groups):
            head = h * groups + g
            query = tl.load(q + b * q_b + head * q_h + t * q_t + feature, mask=tall, other=0.0).to(tl.float32)
            o = scale * tl.sum(query[:, None] * S, 0)
            tl.store(out + ((b * H + head) * T + t) * V + column, narrow(o, out.dtype.element_ty), mask=wide)
    store_rows(final + pid * K * V, V, feature, column, K, V, S)


recurrent_kernel = Kernel(
    _recurrent_kernel,
    [Config({"BV": 16}, warps=1, stages=1), Config({"BV": 32}, warps=2), Config({"BV": 64}, warps=4)],
    limits={"BV": "V"},
    key=("K", "V", "H", "HKV", "DECAY", "DELTA"),
)
