"""Softmax over a window and a linear sum over everything before it, under one denominator (LoLCATs).

    y_i = [ g sum_{j in window of i} exp(s q_i k_j - c_i) w_j v_j + phi(q_i) (S + sum_{j <= i} phi(k_j) h_j) ]
        / [ the same with 1 in place of v_j ]

c_i is the largest exponent of the window. `features` and `held` are phi(k_j) and h_j = w_j [v_j, 1], moved so that row
i is the key that leaves the window of query i; j runs from the start of i's chunk, and S, the state before that chunk,
comes from forward.py.

`hybrid_kernel` takes one chunk of queries: first its linear part, then its sinks and its window with a running maximum,
which a row rescales by whenever it grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, narrow, store_rows


@triton.jit
def visible_keys(position, keys, seen, window, sinks, SINKS: tl.constexpr):
    """Which [query, key] pairs one of the two softmax parts has: the sinks, or the window without them."""
    causal = keys[None, :] <= position[:, None]
    part = (keys >= sinks)[None, :] & (position[:, None] - keys[None, :] < window)
    if SINKS:
        part = (keys < sinks)[None, :]
    return causal & part & seen[None, :]


@triton.jit
def _attend(
    queries, position, keys_of, k_t, values_of, v_t, weight, first, last, scale, window, sinks, S,
    column, numerator, denominator, largest, peak,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr, SINKS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` to `last` to the sums of a running softmax; KEEP: finds the key of the maximum too."""
    feature = tl.arange(0, BD)
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        keys = load_rows(keys_of, k_t, key, feature, S, D)
        values = load_rows(values_of, v_t, key, column, S, V)
        share = tl.where(key < S, 1.0, 0.0)
        if WEIGHT:
            share = tl.load(weight + key, mask=key < S, other=0.0)
        visible = visible_keys(position, key, share != 0.0, window, sinks, SINKS)
        scores = tl.where(visible, scale * dot(queries, tl.trans(keys)), -float("inf"))
        if KEEP:
            top, at = tl.max(scores, 1, return_indices=True)
            peak = tl.where(top > largest, start + at, peak)
        else:
            top = tl.max(scores, 1)
        grown = tl.maximum(largest, top)
        # A row that has seen no key keeps -inf; 0 in its place makes all its exponentials 0 rather than NaN.
        bound = tl.where(grown == -float("inf"), 0.0, grown)
        p = tl.exp(scores - bound[:, None]) * share[None, :]
        shrink = tl.exp(largest - bound)
        denominator = denominator * shrink + tl.sum(p, 1)
        numerator = numerator * shrink[:, None] + dot(narrow(p, values.dtype), values)
        largest = grown
    return numerator, denominator, largest, peak


@triton.jit
def _hybrid_kernel(
    q, k, v, query_features, features, held, states, weight, gate, out, maxima, peaks, sums,
    scale, T, S, H: tl.constexpr, HKV: tl.constexpr, HF: tl.constexpr, window, sinks, gate_b, weight_b,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, f_b, f_h, f_t,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, HELD: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    WEIGHT: tl.constexpr, SINKS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """HELD: columns of h. KEEP: store c_i, its key (-1: none) and the denominators for the backward pass."""
    pid_v, n, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, query_head = head // H, head % H
    group, pair = query_head // (H // HKV), b * HF + query_head // (H // HF)
    chunk, column, feature = tl.arange(0, C), pid_v * BV + tl.arange(0, BV), tl.arange(0, BD)
    rows, N = n * C + chunk, tl.cdiv(T, C)
    far = tl.zeros([C, BV], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    total = tl.zeros([C], tl.float32)
    before = states + (pair * N + n) * F * HELD
    for first in range(0, F, BF):
        inner = first + tl.arange(0, BF)
        asked = load_rows(query_features + b * f_b + query_head * f_h, f_t, rows, inner, T, F)
        given = load_rows(features + pair * T * F, F, rows, inner, T, F)
        state = load_rows(before, HELD, inner, column, F, V)
        ones = tl.load(before + inner * HELD + V, mask=inner < F, other=0.0)
        A += dot(asked, tl.trans(given))
        far += dot(asked, narrow(state, asked.dtype))
        total += tl.sum(asked.to(tl.float32) * ones.to(tl.float32)[None, :], 1)
    A = tl.where(chunk[:, None] >= chunk[None, :], A, 0.0)
    values = load_rows(held + pair * T * HELD, HELD, rows, column, T, V)
    share = tl.load(held + pair * T * HELD + rows * HELD + V, mask=rows < T, other=0.0).to(tl.float32)
    far += dot(narrow(A, values.dtype), values)
    total += tl.sum(A * share[None, :], 1)

    position = rows + (S - T)
    queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, feature, T, D)
    keys_of, values_of = k + b * k_b + group * k_h, v + b * v_b + group * v_h
    near = tl.zeros([C, BV], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    largest = tl.full([C], -float("inf"), tl.float32)
    peak = tl.full([C], -1, tl.int32)
    weights = weight
    if WEIGHT:
        weights += b * weight_b
    if SINKS:
        near, denominator, largest, peak = _attend(
            queries, position, keys_of, k_t, values_of, v_t, weights, 0, tl.minimum(sinks, S), scale, window, sinks, S,
            column, near, denominator, largest, peak, D, V, BD, BN, WEIGHT, True, KEEP,
        )  # fmt: skip
    begin = tl.maximum(n.to(tl.int32) * C + (S - T) - window + 1, 0)
    end = tl.minimum(n.to(tl.int32) * C + C + (S - T), S)
    near, denominator, largest, peak = _attend(
        queries, position, keys_of, k_t, values_of, v_t, weights, begin, end, scale, window, sinks, S,
        column, near, denominator, largest, peak, D, V, BD, BN, WEIGHT, False, KEEP,
    )  # fmt: skip
    factor = tl.load(gate + b * gate_b + query_head).to(tl.float32)
    total = tl.maximum(factor * denominator + total, 1e-30)
    y = (factor * near + far) / total[:, None]
    store_rows(out + head * T * V, V, rows, column, T, V, y)
    if KEEP:
        if pid_v == 0:
            tl.store(maxima + head * T + rows, tl.where(largest == -float("inf"), 0.0, largest), mask=rows < T)
            tl.store(peaks + head * T + rows, peak, mask=rows < T)
            tl.store(sums + head * T + rows, total, mask=rows < T)


hybrid_kernel = Kernel(
    _hybrid_kernel,
    [
        Config({"BF": 32, "BV": 32, "BN": 32}, warps=4, stages=1),
        Config({"BF": 64, "BV": 64, "BN": 64}, warps=4, stages=2),
        Config({"BF": 64, "BV": 128, "BN": 64}, warps=4, stages=2),
        Config({"BF": 64, "BV": 128, "BN": 64}, warps=8, stages=2),
        Config({"BF": 128, "BV": 128, "BN": 64}, warps=8, stages=2),
    ],
    limits={"BF": "F", "BV": "V"},
    key=("D", "V", "F", "H", "HKV", "WEIGHT", "SINKS"),
)
