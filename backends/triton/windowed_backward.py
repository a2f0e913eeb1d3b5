"""Gradients of the window part of windowed.py, from those of numerator and denominator.

    dn_i = dy_i / total_i,   dt_i = - y_i dy_i / total_i
    e_ij = exp(s q_i k_j - c_i) w_j,   f_ij = dn_i v_j + dt_i
    d_ij = e_ij f_ij but for the peak p_i, the key whose exponent c_i is: there, minus the sum r_i of the others
    dq_i = g s sum_j d_ij k_j,        dk_j = g s sum_i d_ij q_i
    dv_j = g sum_i e_ij dn_i,         dg   = sum_ij e_ij f_ij

The linear sum is not scaled by exp(-c_i), so c_i does not cancel: its gradient is -sum_j e_ij f_ij, and all of it goes
to the peak, whose own term thereby leaves only those of the others. Of equal exponents the first is the peak, where
torch.amax shares evenly: either is a subgradient, and a key's number, unlike an equality of exponents, does not depend
on how each kernel rounds them.

The linear part is linear attention with h_j for values and [dn, dt] for output gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows
from .windowed import visible_keys


@triton.jit
def _exponentials(
    queries, keys, position, key, share, largest, scale, window, sinks, T, S, SINKS: tl.constexpr
):  # fmt: skip
    """Which pairs of a block of queries and one of keys are visible, and their e_ij."""
    visible = visible_keys(position, key, share != 0.0, window, sinks, SINKS) & (position < S)[:, None]
    scores = tl.where(visible, scale * dot(queries, tl.trans(keys)) - largest[:, None], -float("inf"))
    return visible, tl.exp(scores) * share[None, :]


@triton.jit
def _share(weight, key, S, WEIGHT: tl.constexpr):
    share = tl.where(key < S, 1.0, 0.0)
    if WEIGHT:
        share = tl.load(weight + key, mask=key < S, other=0.0)
    return share


@triton.jit
def _query_part(
    queries, position, dn, dt, largest, peak, keys_of, k_t, values_of, v_t, weight, first, last, scale, window, sinks,
    T, S, dqueries, others, dfactor,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        keys = load_rows(keys_of, k_t, key, tl.arange(0, BD), S, D)
        values = load_rows(values_of, v_t, key, tl.arange(0, BV), S, V)
        share = _share(weight, key, S, WEIGHT)
        _, e = _exponentials(queries, keys, position, key, share, largest, scale, window, sinks, T, S, SINKS)
        ef = e * (dot(dn, tl.trans(values)) + dt[:, None])
        dfactor += tl.sum(ef, 1)
        ef = tl.where(key[None, :] == peak[:, None], 0.0, ef)
        others += tl.sum(ef, 1)
        dqueries += dot(narrow(ef, keys.dtype), keys)
    return dqueries, others, dfactor


@triton.jit
def _hybrid_query_kernel(
    q, k, v, dnumerator, dtotal, maxima, peaks, rest, weight, gate, dq, dgate,
    scale, T, S, H: tl.constexpr, HKV: tl.constexpr, window, sinks, gate_b, weight_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk of queries, r_i, and what each query adds to the gradient of the gate."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, query_head = head // H, head % H
    group = query_head // (H // HKV)
    rows = n * C + tl.arange(0, C)
    position = rows + (S - T)
    queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, tl.arange(0, BD), T, D)
    dn = load_rows(dnumerator + head * T * V, V, rows, tl.arange(0, BV), T, V)
    dt = tl.load(dtotal + head * T + rows, mask=rows < T, other=0.0)
    largest = tl.load(maxima + head * T + rows, mask=rows < T, other=0.0)
    peak = tl.load(peaks + head * T + rows, mask=rows < T, other=-1)
    keys_of, values_of = k + b * k_b + group * k_h, v + b * v_b + group * v_h
    dqueries = tl.zeros([C, BD], tl.float32)
    others = tl.zeros([C], tl.float32)
    dfactor = tl.zeros([C], tl.float32)
    weights = weight
    if WEIGHT:
        weights += b * weight_b
    if SINKS:
        dqueries, others, dfactor = _query_part(
            queries, position, dn, dt, largest, peak, keys_of, k_t, values_of, v_t, weights, 0, tl.minimum(sinks, S),
            scale, window, sinks, T, S, dqueries, others, dfactor, D, V, BD, BV, BN, WEIGHT, True,
        )  # fmt: skip
    begin = tl.maximum(n.to(tl.int32) * C + (S - T) - window + 1, 0)
    end = tl.minimum(n.to(tl.int32) * C + C + (S - T), S)
    dqueries, others, dfactor = _query_part(
        queries, position, dn, dt, largest, peak, keys_of, k_t, values_of, v_t, weights, begin, end,
        scale, window, sinks, T, S, dqueries, others, dfactor, D, V, BD, BV, BN, WEIGHT, False,
    )  # fmt: skip
    factor = tl.load(gate + b * gate_b + query_head).to(tl.float32)
    dqueries -= others[:, None] * load_rows(keys_of, k_t, peak, tl.arange(0, BD), S, D)
    store_rows(dq + head * T * D, D, rows, tl.arange(0, BD), T, D, factor * scale * dqueries)
    tl.store(rest + head * T + rows, others, mask=rows < T)
    tl.store(dgate + head * T + rows, dfactor, mask=rows < T)


@triton.jit
def _key_part(
    q, dnumerator, dtotal, maxima, peaks, rest, gate, keys, values, key, share, first, last, scale, window, sinks,
    T, S, H, HKV, b, h, gate_b, q_b, q_h, q_t, dkeys, dvalues,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    groups = H // HKV
    for g in range(groups):
        query_head = h * groups + g
        head = b * H + query_head
        factor = tl.load(gate + b * gate_b + query_head).to(tl.float32)
        for start in range(first, last, BM):
            rows = start + tl.arange(0, BM)
            queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, tl.arange(0, BD), T, D)
            dn = load_rows(dnumerator + head * T * V, V, rows, tl.arange(0, BV), T, V)
            dt = tl.load(dtotal + head * T + rows, mask=rows < T, other=0.0)
            largest = tl.load(maxima + head * T + rows, mask=rows < T, other=0.0)
            peak = tl.load(peaks + head * T + rows, mask=rows < T, other=-1)
            others = tl.load(rest + head * T + rows, mask=rows < T, other=0.0)
            visible, e = _exponentials(
                queries, keys, rows + (S - T), key, share, largest, scale, window, sinks, T, S, SINKS
            )  # fmt: skip
            ef = e * (dot(dn, tl.trans(values)) + dt[:, None])
            ef = factor * tl.where(visible & (key[None, :] == peak[:, None]), -others[:, None], ef)
            e *= factor
            dkeys += dot(tl.trans(narrow(ef, queries.dtype)), queries)
            dvalues += dot(tl.trans(narrow(e, dn.dtype)), dn)
    return dkeys, dvalues


@triton.jit
def _hybrid_key_kernel(
    q, k, v, dnumerator, dtotal, maxima, peaks, rest, weight, gate, dk, dv,
    scale, T, S, H: tl.constexpr, HKV: tl.constexpr, window, sinks, gate_b, weight_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    WEIGHT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk of keys, and the window's part of those of its values."""
    n, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    key = n * C + tl.arange(0, C)
    keys = load_rows(k + b * k_b + h * k_h, k_t, key, tl.arange(0, BD), S, D)
    values = load_rows(v + b * v_b + h * v_h, v_t, key, tl.arange(0, BV), S, V)
    weights = weight
    if WEIGHT:
        weights += b * weight_b
    share = _share(weights, key, S, WEIGHT)
    dkeys = tl.zeros([C, BD], tl.float32)
    dvalues = tl.zeros([C, BV], tl.float32)
    # Query i stands at key i + (S - T): those that see a key of this chunk begin there.
    begin = tl.maximum(n * C - (S - T), 0)
    if SINKS:
        if n * C < sinks:
            dkeys, dvalues = _key_part(
                q, dnumerator, dtotal, maxima, peaks, rest, gate, keys, values, key, share, begin, T, scale, window,
                sinks, T, S, H, HKV, b, h, gate_b, q_b, q_h, q_t, dkeys, dvalues, D, V, BD, BV, BM, True,
            )  # fmt: skip
    end = tl.minimum(n * C + C - 1 + window - (S - T), T)
    dkeys, dvalues = _key_part(
        q, dnumerator, dtotal, maxima, peaks, rest, gate, keys, values, key, share, begin, end, scale, window,
        sinks, T, S, H, HKV, b, h, gate_b, q_b, q_h, q_t, dkeys, dvalues, D, V, BD, BV, BM, False,
    )  # fmt: skip
    store_rows(dk + pair * S * D, D, key, tl.arange(0, BD), S, D, scale * dkeys)
    store_rows(dv + pair * S * V, V, key, tl.arange(0, BV), S, V, dvalues)


hybrid_query_kernel = Kernel(
    _hybrid_query_kernel,
    [Config({"BN": 32}, warps=4, stages=1), Config({"BN": 64}, warps=4, stages=2), Config({"BN": 64}, warps=8)],
    key=("D", "V", "H", "HKV", "WEIGHT", "SINKS"),
)
hybrid_key_kernel = Kernel(
    _hybrid_key_kernel,
    [Config({"BM": 32}, warps=4, stages=1), Config({"BM": 64}, warps=4, stages=2), Config({"BM": 64}, warps=8)],
    key=("D", "V", "H", "HKV", "WEIGHT", "SINKS"),
)
