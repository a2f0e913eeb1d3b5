"""Attention, rotary embedding, and linear attention of the ai.onnx domain."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_type, dtype_of
from .registry import operator


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * D]` to `[B, H, T, D]`."""
    shape = (*x.shape[:2], heads, x.shape[2] // heads)
    return x.reshape(shape).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`[B, H, T, D]` to `[B, T, H * D]`."""
    return x.transpose(1, 2).flatten(2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of the heads of `[B, Hkv, T, D]` until there are `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def positions(queries: int, keys: int, offset: Tensor | int, device: torch.device) -> Tensor:
    """Return how far key j lies behind query i, `[Tq, Tk]` or with one offset per sample `[B, 1, Tq, Tk]`."""
    start = offset.reshape(-1, 1, 1, 1) if isinstance(offset, Tensor) else offset
    row = torch.arange(queries, device=device).unsqueeze(1) + start
    return row - torch.arange(keys, device=device)


def as_bias(allowed: Tensor, dtype: torch.dtype, filtered: float = float("-inf")) -> Tensor:
    """Turn a boolean mask into what is added to the scores: 0 where allowed."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.full((), filtered, dtype=dtype, device=allowed.device))


def masked_softmax(scores: Tensor) -> Tensor:
    """Return the softmax along the last axis, all zeros (not NaN) for a row that attends nothing."""
    empty = torch.amax(scores, -1, keepdim=True) == float("-inf")
    # The scores of such a row are replaced before the softmax, so that no NaN enters the gradient either.
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def _additive(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Turn the mask input into a bias, and extend one that is shorter than the keys."""
    bias = as_bias(mask, dtype) if mask.dtype == torch.bool else mask.to(dtype)
    missing = keys - mask.shape[-1]
    return F.pad(bias, (0, missing), value=float("-inf")) if missing > 0 else bias


def _bias(
    mask: Tensor | None,
    queries: int,
    keys: int,
    offset: Tensor | int,
    causal: bool,
    window: tuple[int, int],
    valid: Tensor | None,
    like: Tensor,
) -> Tensor | None:
    """Return the sum of all that is added to the scores, or None when nothing is."""
    bias = None if mask is None else _additive(mask, keys, like.dtype)
    behind = positions(queries, keys, offset, like.device)
    rules = []
    if causal:
        rules.append(behind >= 0)
    if window[0] >= 0:
        rules.append(behind <= window[0])
    if window[1] >= 0:
        rules.append(-behind <= window[1])
    if valid is not None:
        rules.append(torch.arange(keys, device=like.device) < valid.reshape(-1, 1, 1, 1))
    for rule in rules:
        bias = as_bias(rule, like.dtype) if bias is None else bias + as_bias(rule, like.dtype)
    return bias


@operator("Attention", since=23, counted=True)
def attention_23(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(softcap(q k^T * scale) + bias) v, for `[B, H, T, D]` or packed `[B, T, H * D]`.

    Query i stands at position `offset + i`: after the past keys, or at the end of the valid ones.
    """
    packed = q.dim() == 3
    if packed:
        if q_num_heads is None or kv_num_heads is None:
            raise ValueError("expected packed inputs with q_num_heads and kv_num_heads, found no heads")
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset: Tensor | int = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    elif nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - q.shape[2]
    present_key, present_value = k, v
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    window = (left_window_size, right_window_size)
    bias = _bias(attn_mask, q.shape[2], k.shape[2], offset, bool(is_causal), window, nonpad_kv_seqlen, q)
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    raw = (q * root) @ (k * root).transpose(-1, -2)
    capped = softcap * torch.tanh(raw / softcap) if softcap > 0 else raw
    scores = capped if bias is None else capped + bias
    wide = scores if softmax_precision is None else scores.to(dtype_of(softmax_precision))
    weights = masked_softmax(wide).to(q.dtype)
    both = torch.promote_types(q.dtype, v.dtype)
    y = (weights.to(both) @ v.to(both)).to(q.dtype)
    y = join_heads(y) if packed else y
    if outputs == 1:
        return y
    return (y, present_key, present_value, (raw, capped, scores, weights)[qk_matmul_output_mode])[:outputs]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of x by the angles, pairing halves or neighbours."""
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        pairs = torch.stack((real, imaginary), -1).flatten(-2)
        return torch.cat((pairs, kept), -1)
    return torch.cat((real, imaginary, kept), -1)


@operator("RotaryEmbedding", since=23)
def rotary_embedding_23(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotate pairs of channels of `[B, H, T, D]` or `[B, T, H * D]` by the angles of their positions."""
    if position_ids is not None:
        cos_cache, sin_cache = F.embedding(position_ids, cos_cache), F.embedding(position_ids, sin_cache)
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)
    if x.dim() == 4:
        return rotate(x, cos, sin, bool(interleaved))
    if not num_heads:
        raise ValueError("expected RotaryEmbedding on packed inputs to have num_heads, found none")
    return join_heads(rotate(split_heads(x, num_heads), cos, sin, bool(interleaved)))


@operator("LinearAttention", since=27)
def linear_attention_27(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T;  o_t = scale * S_t^T q_t.

    The gate is left out by the rules `linear` and `delta`, the correction of v_t by `linear` and `gated`.

    Args:
        query: `[B, T, Hq * dk]`.
        key: `[B, T, Hkv * dk]`.
        value: `[B, T, Hkv * dv]`.
        past_state: `[B, Hkv, dk, dv]`.
        decay: `[B, T, Hkv * dk]` or `[B, T, Hkv]`, the logarithm of the gate.
        beta: `[B, T, Hkv]` or `[B, T, 1]`.
        chunk_size: how many steps the ungated rule takes at a time.
        kv_num_heads: heads of key and value.
        q_num_heads: heads of the query.
        scale: 1 / sqrt(dk) when zero.
        update_rule: `linear`, `gated`, `delta` or `gated_delta`.

    Returns:
        The output `[B, T, max(Hq, Hkv) * dv]` and the state after the last step.
    """
    wide = compute_type(query.dtype)
    heads = max(q_num_heads, kv_num_heads)
    q, k, v = (
        split_heads(x.to(wide), count)
        for x, count in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    q = repeat_heads(q * (scale or 1 / math.sqrt(q.shape[-1])), heads)
    shape = (k.shape[0], kv_num_heads, k.shape[-1], v.shape[-1])
    state = torch.zeros(shape, dtype=wide, device=k.device) if past_state is None else past_state.to(wide)
    gate = None
    if update_rule in ("gated", "gated_delta"):
        if decay is None:
            raise ValueError(f"expected the rule {update_rule!r} to have a decay, found none")
        # One gate per channel, or one per head that all channels share.
        gate = split_heads(decay.to(wide), kv_num_heads).exp().unsqueeze(-1)
    if update_rule == "linear":
        o, state = _ungated(q, k, v, state, chunk_size)
    else:
        rate = None
        if update_rule in ("delta", "gated_delta"):
            if beta is None:
                raise ValueError(f"expected the rule {update_rule!r} to have a beta, found none")
            rate = beta.to(wide).transpose(1, 2).unsqueeze(-1)
        o, state = _stepwise(q, k, v, state, gate, rate)
    final = state.to(query.dtype if past_state is None else past_state.dtype)
    return join_heads(o).to(query.dtype), final


def _ungated(q: Tensor, k: Tensor, v: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Attend within a chunk by the masked product, to earlier chunks through the state."""
    heads, out = q.shape[1], []
    for start in range(0, k.shape[2], chunk):
        now = slice(start, start + chunk)
        keys, values = k[:, :, now], v[:, :, now]
        inner = torch.tril(q[:, :, now] @ repeat_heads(keys, heads).transpose(-1, -2))
        out.append(inner @ repeat_heads(values, heads) + q[:, :, now] @ repeat_heads(state, heads))
        state = state + keys.transpose(-1, -2) @ values
    return torch.cat(out, 2), state


def _stepwise(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, gate: Tensor | None, rate: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads, out = q.shape[1], []
    for step in range(k.shape[2]):
        key, value = k[:, :, step], v[:, :, step]
        if gate is not None:
            state = state * gate[:, :, step]
        if rate is not None:
            value = rate[:, :, step] * (value - (key.unsqueeze(-2) @ state).squeeze(-2))
        state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
        out.append(q[:, :, step].unsqueeze(-2) @ repeat_heads(state, heads))
    return torch.cat(out, 2), state
