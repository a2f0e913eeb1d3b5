"""softmax(scale q k^T) v, causal or not, with one constant phi in place of each row's running maximum.

    y_i = sum_j exp(s_ij - phi) v_j / sum_j exp(s_ij - phi)

Without a maximum nothing is rescaled as keys come in, and no block of keys waits for the one before. The row's sum is
the guard: if n keys sum up to more than n e^low and less than e^high, their largest exponent is between low and high. A
block with a row outside is computed once more, with a running maximum, by the same program.

FlashDecoding++ (Hong et al., 2023).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from graphopt.errors import GraphOptError
from graphopt.ops.unified_max_softmax import HIGH, LOW, check_bounds

from . import linear_attention
from .launch import Config, Kernel, dot, load_rows, narrow, padded, rows_of, store_rows, strides, tile

# What products of fp16 hold: their largest factor is below 65504, and one of e^-6 keeps its bits.
_FP16 = (-6.0, 11.0)


@triton.jit
def _sweep(
    queries, position, keys_of, k_t, values_of, v_t, first, last, factor, phi, S, numerator, denominator, largest,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` to `last`. EDGE: some may be hidden. RUNNING: by a running maximum instead of phi."""
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        keys = load_rows(keys_of, k_t, key, tl.arange(0, BD), S, D)
        values = load_rows(values_of, v_t, key, tl.arange(0, BV), S, V)
        scores = factor * dot(queries, tl.trans(keys))
        if EDGE:
            visible = (key < S)[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= position[:, None])
            scores = tl.where(visible, scores, -float("inf"))
        if RUNNING:
            grown = tl.maximum(largest, tl.max(scores, 1))
            # A row that has seen no key keeps -inf; 0 in its place makes all its exponentials 0 rather than NaN.
            bound = tl.where(grown == -float("inf"), 0.0, grown)
            shrink = tl.exp2(largest - bound)
            denominator *= shrink
            numerator *= shrink[:, None]
            p = tl.exp2(scores - bound[:, None])
            largest = grown
        else:
            p = tl.exp2(scores - phi)
        denominator += tl.sum(p, 1)
        numerator += dot(narrow(p, values.dtype), values)
    return numerator, denominator, largest


@triton.jit
def _unified_attention_kernel(
    q, k, v, out, flagged, factor, phi, floor, ceiling, T, S, H: tl.constexpr, HKV: tl.constexpr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; `factor` and `phi` are of powers of two.

    KEEP: store which rows are outside. TILE: rows there are, by which block sizes are chosen.
    """
    tl.static_assert(BM <= TILE)
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, query_head = head // H, head % H
    group = query_head // (H // HKV)
    rows = n * BM + tl.arange(0, BM)
    position = rows + (S - T)
    queries = load_rows(q + b * q_b + query_head * q_h, q_t, rows, tl.arange(0, BD), T, D)
    keys_of, values_of = k + b * k_b + group * k_h, v + b * v_b + group * v_h
    end, whole = S, S
    count = tl.zeros([BM], tl.int32) + S
    if CAUSAL:
        end = tl.minimum(tl.maximum(n * BM + BM + (S - T), 0), S)
        whole = tl.minimum(tl.maximum(n * BM + 1 + (S - T), 0), S)
        count = tl.minimum(tl.maximum(position + 1, 0), S)
    # Blocks of keys that all rows see need no mask.
    whole = whole // BN * BN
    nothing = tl.full([BM], -float("inf"), tl.float32)
    numerator, denominator, _ = _sweep(
        queries, position, keys_of, k_t, values_of, v_t, 0, whole, factor, phi, S,
        tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32), nothing,
        D, V, BD, BV, BN, CAUSAL, False, False,
    )  # fmt: skip
    numerator, denominator, _ = _sweep(
        queries, position, keys_of, k_t, values_of, v_t, whole, end, factor, phi, S, numerator, denominator, nothing,
        D, V, BD, BV, BN, CAUSAL, True, False,
    )  # fmt: skip
    inside = (denominator > floor * count.to(tl.float32)) & (denominator < ceiling)
    outside = tl.where(inside | (count == 0) | (rows >= T), 0, 1)
    if tl.max(outside, 0) > 0:
        numerator, denominator, _ = _sweep(
            queries, position, keys_of, k_t, values_of, v_t, 0, end, factor, phi, S,
            tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32), nothing,
            D, V, BD, BV, BN, CAUSAL, True, True,
        )  # fmt: skip
    y = numerator / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    store_rows(out + head * T * V, V, rows, tl.arange(0, BV), T, V, y)
    if KEEP:
        tl.store(flagged + head * T + rows, outside, mask=rows < T)


unified_attention_kernel = Kernel(
    _unified_attention_kernel,
    [
        Config({"BM": 16, "BN": 64}, warps=4, stages=2),
        Config({"BM": 64, "BN": 32}, warps=4, stages=2),
        Config({"BM": 64, "BN": 64}, warps=4, stages=3),
        Config({"BM": 128, "BN": 32}, warps=8, stages=2),
        Config({"BM": 128, "BN": 64}, warps=4, stages=3),
        Config({"BM": 128, "BN": 64}, warps=8, stages=2),
    ],
    limits={"BM": "TILE"},
    key=("D", "V", "H", "HKV", "CAUSAL", "TILE"),
)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    phi: float = 0.0,
    low: float = LOW,
    high: float = HIGH,
    flagged: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention, forward only; the result does not depend on `phi` but for rounding.

    Args:
        q: [B, H, T, D]; D and V at most 256.
        k: [B, Hkv, S, D]; Hkv divides H.
        v: [B, Hkv, S, V].
        causal: query i sees keys up to i + (S - T); else all.
        scale: factor on q k^T; None is D^-0.5.
        phi: what takes the place of the largest exponent of each row.
        low: rows are flagged unless their largest exponent minus phi is surely above this ...
        high: ... and below this. Products of fp16 hold no more than -6 to 11.
        flagged: int32 [B, H, T], set to 1 for rows outside these bounds, to 0 for others. Their whole block of rows is
            computed again.

    Returns:
        [B, H, T, V] in the type of `v`; zeros where nothing is visible.

    Raises:
        GraphOptError: the kernel does not take these types or sizes.
        ValueError: the bounds are none that fp32 can keep.
    """
    if not linear_attention.supported(q, k, v):
        raise GraphOptError(
            f"expected fp16, bf16 or fp32 tensors with at least one element and dimensions up to 256, got {q.dtype} "
            f"{list(q.shape)} and {list(v.shape)}; torch's scaled_dot_product_attention takes others"
        )
    check_bounds(low, high)
    B, H, T, D = q.shape
    HKV, S, V = k.shape[1], k.shape[2], v.shape[-1]
    out = torch.empty((B, H, T, V), dtype=v.dtype, device=v.device)
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    if dtype == torch.float16:
        low, high = max(low, _FP16[0]), min(high, _FP16[1])
    q, k, v = (rows_of(x.to(dtype)) for x in (q, k, v))
    power = math.log2(math.e)
    unified_attention_kernel(
        lambda meta: (-(-T // meta["BM"]), B * H),
        q=q, k=k, v=v, out=out, flagged=flagged, factor=(D**-0.5 if scale is None else float(scale)) * power,
        phi=float(phi) * power, floor=math.exp(low), ceiling=math.exp(high), T=T, S=S, H=H, HKV=HKV,
        **strides("q", q), **strides("k", k), **strides("v", v),
        D=D, V=V, BD=padded(D), BV=padded(V), CAUSAL=causal, KEEP=flagged is not None,
        TILE=tile(T),
    )  # fmt: skip
    return out
