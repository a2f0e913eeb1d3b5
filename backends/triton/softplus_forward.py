"""Softplus attention, LSSA and LSSAR, in one and two sweeps over the keys; nothing is rescaled, no [T, S] tensor.

    s_ij = log D log N_i cos(q_i, k_j),   a_ij = softplus(s_ij),   L_i = sum_j a_ij     over the N_i visible keys
    w_ij = a_ij                                                                         LSSA
    w_ij = (x_ij / max_j x_ij)^p,   x_ij = relu(N_i a_ij / L_i - O_i)                   LSSAR
    y_i = sum_j w_ij v_j / sum_j w_ij

The first sweep of LSSAR finds L_i and the largest a_ij, from which the largest x_ij follows. A row with no x_ij above
the rounding of scores keeps w_ij = a_ij.

Cosines come from products of the operands as they are: `steep` is log D log N_i / |q_i|, and `inverse` 1 / |k_j|.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.ops.softplus_attention import FEW

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows

_FEW = tl.constexpr(FEW)
# As `evenness` of graphopt.ops.softplus_attention has it for fp32.
_EVEN = tl.constexpr(128 * 2.0**-23)


@triton.jit
def scores_of(queries, keys, steep, inverse):
    """s_ij of a block."""
    return dot(queries, tl.trans(keys)) * steep[:, None] * inverse[None, :]


@triton.jit
def visible_keys(position, key, share, S, WEIGHT: tl.constexpr, CAUSAL: tl.constexpr):
    """Which [query, key] pairs of a block count, or keys for all queries; `share` is 0 where a key is padding."""
    visible = (key < S)[None, :]
    if CAUSAL:
        visible = visible & (key[None, :] <= position[:, None])
    if WEIGHT:
        visible = visible & (share != 0.0)[None, :]
    return visible


@triton.jit
def share_of(weight, key, S, WEIGHT: tl.constexpr):
    """The weight of each key, or 1."""
    share = tl.where(key < S, 1.0, 0.0)
    if WEIGHT:
        share = tl.load(weight + key, mask=key < S, other=0.0)
    return share


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    u = tl.exp(-tl.abs(x))
    grown = 1.0 + u
    # What 1 + u loses of a small u is lost from grown - 1 as well: the quotient gives it back.
    exact = tl.log(grown) * (u / tl.where(grown == 1.0, 1.0, grown - 1.0))
    return tl.maximum(x, 0.0) + tl.where(grown == 1.0, u, exact)


@triton.jit
def excess_of(weights, mean, offset, top):
    """x_ij over the row's largest; `mean` is N_i / L_i, and `top` 1 over the largest, 0 where there is none."""
    return tl.maximum(weights * mean[:, None] - offset[:, None], 0.0) * top[:, None]


@triton.jit
def power_of(x, POWER: tl.constexpr):
    """x^POWER for x in [0, 1], with 0^0 = 0."""
    result = tl.where(x > 0.0, 1.0, 0.0)
    for _ in tl.static_range(POWER):
        result *= x
    return result


@triton.jit
def _softplus_attention_kernel(
    q, k, v, weight, steep, counts, inverse, out, means, tops, shares,
    T, S, H: tl.constexpr, HKV: tl.constexpr, weight_b, count_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, POWER: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head.

    KEEP: store N / L, 1 / max x and 1 / sum w of each row. TILE: rows there are, by which block sizes are chosen.
    """
    tl.static_assert(BM <= TILE)
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, query_head = head // H, head % H
    group = query_head // (H // HKV)
    rows, feature, column = n * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    position = rows + (S - T)
    queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, feature, T, D)
    slope = tl.load(steep + head * T + rows, mask=rows < T, other=0.0)
    count = tl.load(counts + b * count_b + rows, mask=rows < T, other=0.0)
    keys_of, values_of = k + b * k_b + group * k_h, v + b * v_b + group * v_h
    lengths = inverse + (b * HKV + group) * S
    weights_of = weight
    if WEIGHT:
        weights_of += b * weight_b
    end = S
    if CAUSAL:
        end = tl.minimum(tl.maximum(n * BM + BM + (S - T), 0), S)
    mean = tl.zeros([BM], tl.float32)
    top = tl.zeros([BM], tl.float32)
    offset = tl.where(count > _FEW, 1.0, 0.0)
    if POWER > 0:
        total = tl.zeros([BM], tl.float32)
        largest = tl.zeros([BM], tl.float32)
        for start in range(0, end, BN):
            key = start + tl.arange(0, BN)
            keys = load_rows(keys_of, k_t, key, feature, S, D)
            scores = scores_of(queries, keys, slope, tl.load(lengths + key, mask=key < S, other=0.0))
            visible = visible_keys(position, key, share_of(weights_of, key, S, WEIGHT), S, WEIGHT, CAUSAL)
            a = tl.where(visible, softplus(scores), 0.0)
            total += tl.sum(a, 1)
            largest = tl.maximum(largest, tl.max(a, 1))
        mean = count / tl.where(total == 0.0, 1.0, total)
        excess = largest * mean - offset
        top = tl.where(excess > _EVEN, 1.0 / tl.where(excess > _EVEN, excess, 1.0), 0.0)
    numerator = tl.zeros([BM, BV], tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    for start in range(0, end, BN):
        key = start + tl.arange(0, BN)
        keys = load_rows(keys_of, k_t, key, feature, S, D)
        values = load_rows(values_of, v_t, key, column, S, V)
        scores = scores_of(queries, keys, slope, tl.load(lengths + key, mask=key < S, other=0.0))
        visible = visible_keys(position, key, share_of(weights_of, key, S, WEIGHT), S, WEIGHT, CAUSAL)
        w = tl.where(visible, softplus(scores), 0.0)
        if POWER > 0:
            w = tl.where((top > 0.0)[:, None], power_of(excess_of(w, mean, offset, top), POWER), w)
        denominator += tl.sum(w, 1)
        numerator += dot(narrow(w, values.dtype), values)
    share = tl.where(denominator == 0.0, 0.0, 1.0 / tl.where(denominator == 0.0, 1.0, denominator))
    store_rows(out + head * T * V, V, rows, column, T, V, numerator * share[:, None])
    if KEEP:
        tl.store(shares + head * T + rows, share, mask=rows < T)
        if POWER > 0:
            tl.store(means + head * T + rows, mean, mask=rows < T)
            tl.store(tops + head * T + rows, top, mask=rows < T)


softplus_attention_kernel = Kernel(
    _softplus_attention_kernel,
    [
        Config({"BM": 16, "BN": 64}, warps=4, stages=2),
        Config({"BM": 64, "BN": 32}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=4, stages=3),
        Config({"BM": 128, "BN": 64}, warps=4, stages=2),
        Config({"BM": 128, "BN": 32}, warps=8, stages=2),
        Config({"BM": 128, "BN": 64}, warps=8, stages=2),
    ],
    limits={"BM": "TILE"},
    key=("D", "V", "H", "HKV", "WEIGHT", "CAUSAL", "POWER", "TILE"),
)
