"""Gradients of softplus_forward.py, with the weights computed again from what it keeps of each row.

    d_ij = (dy_i v_j - dy_i y_i) / sum_j w_ij
    g_ij = d_ij                                                       LSSA
    g_ij = p N_i / (L_i m_i) (x_ij / m_i)^(p-1) d_ij                  LSSAR, m_i = max_j x_ij
    e_ij = (g_ij - sum_k g_ik a_ik / L_i) sigmoid(s_ij)               the gradient of s_ij; the sum is 0 in LSSA
    dq_i = log D log N_i / |q_i| (1 - u u^T) sum_j e_ij k_j / |k_j|                     u = q_i / |q_i|
    dk_j = 1 / |k_j| (1 - u u^T) sum_i e_ij log D log N_i q_i / |q_i|                   u = k_j / |k_j|
    dv_j = sum_i w_ij dy_i / sum_j w_ij

A vector too short to have a direction has no gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows
from .softplus_forward import _FEW, excess_of, power_of, scores_of, share_of, softplus, visible_keys


@triton.jit
def _weights(scores, visible, dy, values, delta, mean, offset, top, share, POWER: tl.constexpr):
    """a_ij, w_ij / sum w and g_ij of a block."""
    a = tl.where(visible, softplus(scores), 0.0)
    gradient = tl.where(visible, (dot(dy, tl.trans(values)) - delta[:, None]) * share[:, None], 0.0)
    w = a
    if POWER > 0:
        x = excess_of(a, mean, offset, top)
        sharp = (top > 0.0)[:, None]
        lower = power_of(x, POWER - 1)
        w = tl.where(sharp, lower * x, a)
        gradient = tl.where(sharp, gradient * lower * (POWER * mean * top)[:, None], gradient)
    return a, w * share[:, None], gradient


@triton.jit
def _row(means, tops, counts, place, rows, T, POWER: tl.constexpr):
    """N / L, O and 1 / max x of a block of rows; zeros for LSSA, which needs none of them."""
    mean = tl.zeros_like(rows).to(tl.float32)
    offset, top = mean, mean
    if POWER > 0:
        mean = tl.load(means + place + rows, mask=rows < T, other=0.0)
        top = tl.load(tops + place + rows, mask=rows < T, other=0.0)
        offset = tl.where(tl.load(counts + rows, mask=rows < T, other=0.0) > _FEW, 1.0, 0.0)
    return mean, offset, top


@triton.jit
def _turned(gradient, x, inverse):
    """(1 - u u^T) times the gradient with u = x / |x|; 0 where `inverse`, 1 / |x|, is."""
    unit = x.to(tl.float32) * inverse[:, None]
    across = gradient - unit * tl.sum(unit * gradient, 1)[:, None]
    return tl.where((inverse > 0.0)[:, None], across, 0.0)


@triton.jit
def _softplus_query_kernel(
    q, k, v, dy, weight, steep, counts, inverse, direction, means, tops, shares, delta, rest, dq,
    T, S, H: tl.constexpr, HKV: tl.constexpr, weight_b, count_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, POWER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries; for LSSAR also `rest`, the sum over k, which takes a sweep of its own."""
    tl.static_assert(BM <= TILE)
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, query_head = head // H, head % H
    group = query_head // (H // HKV)
    rows, feature, column = n * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    position = rows + (S - T)
    queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, feature, T, D)
    upstream = load_rows(dy + head * T * V, V, rows, column, T, V)
    slope = tl.load(steep + head * T + rows, mask=rows < T, other=0.0)
    share = tl.load(shares + head * T + rows, mask=rows < T, other=0.0)
    along = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
    mean, offset, top = _row(means, tops, counts + b * count_b, head * T, rows, T, POWER)
    keys_of, values_of = k + b * k_b + group * k_h, v + b * v_b + group * v_h
    lengths = inverse + (b * HKV + group) * S
    weights_of = weight
    if WEIGHT:
        weights_of += b * weight_b
    end = S
    if CAUSAL:
        end = tl.minimum(tl.maximum(n * BM + BM + (S - T), 0), S)
    others = tl.zeros([BM], tl.float32)
    if POWER > 0:
        for start in range(0, end, BN):
            key = start + tl.arange(0, BN)
            keys = load_rows(keys_of, k_t, key, feature, S, D)
            values = load_rows(values_of, v_t, key, column, S, V)
            scores = scores_of(queries, keys, slope, tl.load(lengths + key, mask=key < S, other=0.0))
            visible = visible_keys(position, key, share_of(weights_of, key, S, WEIGHT), S, WEIGHT, CAUSAL)
            a, _, gradient = _weights(scores, visible, upstream, values, along, mean, offset, top, share, POWER)
            others += tl.sum(gradient * a, 1)
        # 1 / L is (N / L) / N; the row's own sum is 0 where it is not sharpened.
        count = tl.load(counts + b * count_b + rows, mask=rows < T, other=1.0)
        others = tl.where(top > 0.0, others * mean / tl.maximum(count, 1.0), 0.0)
        tl.store(rest + head * T + rows, others, mask=rows < T)
    dqueries = tl.zeros([BM, BD], tl.float32)
    for start in range(0, end, BN):
        key = start + tl.arange(0, BN)
        keys = load_rows(keys_of, k_t, key, feature, S, D)
        values = load_rows(values_of, v_t, key, column, S, V)
        length = tl.load(lengths + key, mask=key < S, other=0.0)
        scores = scores_of(queries, keys, slope, length)
        visible = visible_keys(position, key, share_of(weights_of, key, S, WEIGHT), S, WEIGHT, CAUSAL)
        _, _, gradient = _weights(scores, visible, upstream, values, along, mean, offset, top, share, POWER)
        e = tl.where(visible, (gradient - others[:, None]) * tl.sigmoid(scores), 0.0)
        dqueries += dot(narrow(e * length[None, :], keys.dtype), keys)
    unit = tl.load(direction + head * T + rows, mask=rows < T, other=0.0)
    dqueries = slope[:, None] * _turned(dqueries, queries, unit)
    store_rows(dq + head * T * D, D, rows, feature, T, D, dqueries)


@triton.jit
def _softplus_key_kernel(
    q, k, v, dy, weight, steep, counts, inverse, direction, means, tops, shares, delta, rest, dk, dv,
    T, S, H: tl.constexpr, HKV: tl.constexpr, weight_b, count_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, POWER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and their values, from all heads and queries that see them."""
    tl.static_assert(BN <= TILE)
    n, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    key, feature, column = n * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    keys = load_rows(k + b * k_b + h * k_h, k_t, key, feature, S, D)
    values = load_rows(v + b * v_b + h * v_h, v_t, key, column, S, V)
    length = tl.load(inverse + pair * S + key, mask=key < S, other=0.0)
    weights_of = weight
    if WEIGHT:
        weights_of += b * weight_b
    shown = share_of(weights_of, key, S, WEIGHT)
    begin = 0
    if CAUSAL:
        # Query i stands at key i + (S - T): those that see a key of this block begin there.
        begin = tl.maximum(n * BN - (S - T), 0)
    dkeys = tl.zeros([BN, BD], tl.float32)
    dvalues = tl.zeros([BN, BV], tl.float32)
    groups = H // HKV
    for g in range(groups):
        head = b * H + h * groups + g
        for start in range(begin, T, BM):
            rows = start + tl.arange(0, BM)
            queries = load_rows(q + b * q_b + (h * groups + g) * q_h, q_t, rows, feature, T, D)
            upstream = load_rows(dy + head * T * V, V, rows, column, T, V)
            slope = tl.load(steep + head * T + rows, mask=rows < T, other=0.0)
            # Rows behind the last have no share: their weights and gradients are 0.
            share = tl.load(shares + head * T + rows, mask=rows < T, other=0.0)
            along = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
            mean, offset, top = _row(means, tops, counts + b * count_b, head * T, rows, T, POWER)
            scores = scores_of(queries, keys, slope, length)
            visible = visible_keys(rows + (S - T), key, shown, S, WEIGHT, CAUSAL)
            _, w, gradient = _weights(scores, visible, upstream, values, along, mean, offset, top, share, POWER)
            if POWER > 0:
                gradient -= tl.load(rest + head * T + rows, mask=rows < T, other=0.0)[:, None]
            e = tl.where(visible, gradient * tl.sigmoid(scores), 0.0) * slope[:, None]
            dkeys += dot(tl.trans(narrow(e, queries.dtype)), queries)
            dvalues += dot(tl.trans(narrow(w, upstream.dtype)), upstream)
    unit = tl.load(direction + pair * S + key, mask=key < S, other=0.0)
    dkeys = length[:, None] * _turned(dkeys, keys, unit)
    store_rows(dk + pair * S * D, D, key, feature, S, D, dkeys)
    store_rows(dv + pair * S * V, V, key, column, S, V, dvalues)


_KEY = ("D", "V", "H", "HKV", "WEIGHT", "CAUSAL", "POWER", "TILE")

softplus_query_kernel = Kernel(
    _softplus_query_kernel,
    [
        Config({"BM": 16, "BN": 64}, warps=4, stages=1),
        Config({"BM": 64, "BN": 32}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=8, stages=1),
    ],
    limits={"BM": "TILE"},
    key=_KEY,
)
softplus_key_kernel = Kernel(
    _softplus_key_kernel,
    [
        Config({"BM": 32, "BN": 16}, warps=4, stages=1),
        Config({"BM": 32, "BN": 64}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=8, stages=1),
    ],
    limits={"BN": "TILE"},
    key=_KEY,
)
