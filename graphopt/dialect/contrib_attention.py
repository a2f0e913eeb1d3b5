"""Attention operators of onnxruntime's com.microsoft domain."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import (
    as_bias,
    join_heads,
    linear_attention_27,
    masked_softmax,
    positions,
    repeat_heads,
    rotate,
    split_heads,
)
from .contrib import DOMAIN
from .dtypes import scalar
from .nn import rms_norm
from .registry import operator


def _padding_bias(mask: Tensor, keys: int, dtype: torch.dtype, filtered: float, batch: int) -> Tensor:
    """Turn any form of the padding mask into a bias `[B, 1, 1 or Tq, Tk]`."""
    if mask.dim() == 1:
        column = torch.arange(keys, device=mask.device)
        if mask.shape[0] not in (batch, 2 * batch):
            raise NotImplementedError("attention masks of shape (3 * batch + 2) are not covered")
        # Exclusive ends, then the starts when there is padding on the left.
        allowed = column < mask[:batch].unsqueeze(1)
        if mask.shape[0] == 2 * batch:
            allowed = allowed & (column >= mask[batch:].unsqueeze(1))
    elif mask.dim() > 3:
        raise NotImplementedError("attention masks of rank 4 are not covered")
    else:
        allowed = mask > 0
    return as_bias(allowed.reshape(batch, 1, -1, keys), dtype, filtered)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, biases: list[Tensor | None], causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the packed output and the weights; the queries stand at the end of the keys."""
    scores = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        behind = positions(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
        biases = [*biases, as_bias(behind >= 0, q.dtype)]
    for bias in biases:
        scores = scores if bias is None else scores + bias
    weights = masked_softmax(scores)
    return join_heads(weights @ v), weights


@operator("Attention", domain=DOMAIN, counted=True)
def microsoft_attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: list[int] | None = None,
    rotary_embedding_dim: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Project `[B, T, I]` by one merged matrix to q, k and v, and attend."""
    if do_rotary or past_present_share_buffer:
        raise NotImplementedError("Attention with rotary embedding or a shared buffer is not covered")
    product = x @ weights if bias is None else x @ weights + bias
    parts = product.split(qkv_hidden_sizes or [product.shape[-1] // 3] * 3, -1)
    q, k, v = (split_heads(part, num_heads) for part in parts)
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    padding = None
    if mask_index is not None:
        padding = _padding_bias(mask_index, k.shape[2], x.dtype, mask_filter_value, x.shape[0])
    y, _ = _attend(q, k, v, scale, [padding, attention_bias], bool(unidirectional))
    return y if outputs == 1 else (y, torch.stack((k, v)))


def _projections(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as `[B, H, T, D]` from any of the layouts of MultiHeadAttention."""
    if key is None:
        parts = [part.flatten(2) for part in query.unbind(3)]
    elif value is None:
        parts = [query, *(part.flatten(2) for part in key.unbind(3))]
    else:
        parts = [query, key, value]
    if bias is not None:
        width = query.shape[-1] if query.dim() == 3 else parts[0].shape[-1]
        added = bias.split([width, width, bias.shape[0] - 2 * width])
        parts = [part if part.dim() == 4 else part + b for part, b in zip(parts, added, strict=True)]
    q, k, v = (part if part.dim() == 4 else split_heads(part, heads) for part in parts)
    return q, k, v


@operator("MultiHeadAttention", domain=DOMAIN, counted=True)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Attend on packed `[B, T, H * D]` inputs, their biases added first."""
    if past_sequence_length is not None or cache_indirection is not None:
        raise NotImplementedError("MultiHeadAttention with a shared buffer is not covered")
    q, k, v = _projections(query, key, value, bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    padding = None
    if key_padding_mask is not None:
        padding = _padding_bias(key_padding_mask, k.shape[2], q.dtype, mask_filter_value, q.shape[0])
    y, weights = _attend(q, k, v, scale, [padding, attention_bias], bool(unidirectional))
    return y if outputs == 1 else (y, k, v, weights)[:outputs]


@operator("RotaryEmbedding", domain=DOMAIN)
def microsoft_rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Rotate pairs of channels; a single position id is that of the first step."""
    if is_packed_batching or scale != 1.0:
        raise NotImplementedError("RotaryEmbedding with packed batching or a scale is not covered")
    packed = x.dim() == 3
    # Without a rotary dimension the whole head rotates, so the cache tells how wide a head is.
    heads = num_heads if rotary_embedding_dim else x.shape[-1] // (2 * cos_cache.shape[-1])
    heads_first = split_heads(x, heads) if packed else x
    if position_ids.dim() == 1:
        position_ids = position_ids + torch.arange(heads_first.shape[2], device=x.device).unsqueeze(0)
    y = _rotated(heads_first, position_ids, cos_cache, sin_cache, bool(interleaved))
    return join_heads(y) if packed else y


def _rotated(x: Tensor, ids: Tensor, cos_cache: Tensor, sin_cache: Tensor, interleaved: bool) -> Tensor:
    cos, sin = (F.embedding(ids, cache).unsqueeze(1) for cache in (cos_cache, sin_cache))
    return rotate(x, cos, sin, interleaved)


def _appended(past: Tensor | None, new: Tensor, total: int, start: Tensor) -> Tensor:
    """Write the new steps of each sample behind its past ones."""
    if past is None:
        return new
    cache = F.pad(past, (0, 0, 0, max(total, past.shape[2]) - past.shape[2]))
    step = start.reshape(-1, 1) + torch.arange(new.shape[2], device=new.device)
    index = step.to(torch.int64)[:, None, :, None].expand(new.shape)
    return cache.scatter(2, index, new)


@operator("GroupQueryAttention", domain=DOMAIN, values=(6,), counted=True)
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    *,
    causal: int = 1,
    do_rotary: int = 0,
    k_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    qk_norm_epsilon: float = 1e-6,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    sliding_window_cache: int = 0,
    smooth_softmax: int = -1,
    softcap: float = 0.0,
    v_quant_type: str = "NONE",
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Attend causally with fewer heads of key and value, each sample at the end of its own past."""
    if qk_output or sliding_window_cache or k_quant_type != "NONE" or v_quant_type != "NONE":
        raise NotImplementedError("qk_output and windowed or quantised caches are not covered")
    if key is None or value is None:
        width = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * width, kv_num_heads * width, kv_num_heads * width], -1)
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, -1, qk_norm_epsilon, 1)[0]
        k = rms_norm(k, k_norm_weight, -1, qk_norm_epsilon, 1)[0]
    steps, total = q.shape[2], scalar(total_sequence_length)
    lengths = seqlens_k.reshape(-1) + 1
    # A first prompt starts at zero even where a sample is shorter than the batch.
    start = torch.zeros_like(lengths) if steps == total else lengths - steps
    if do_rotary and cos_cache is not None and sin_cache is not None:
        ids = position_ids
        if ids is None:
            ids = start.unsqueeze(1) + torch.arange(steps, device=q.device)
        q = _rotated(q, ids, cos_cache, sin_cache, bool(rotary_interleaved))
        k = _rotated(k, ids, cos_cache, sin_cache, bool(rotary_interleaved))
    k, v = _appended(past_key, k, total, start), _appended(past_value, v, total, start)
    scores = (q @ repeat_heads(k, num_heads).transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    behind = positions(steps, k.shape[2], start, q.device)
    valid = torch.arange(k.shape[2], device=q.device) < lengths.reshape(-1, 1, 1, 1)
    allowed = behind >= 0 if causal else valid
    if local_window_size > 0:
        allowed = allowed & (behind < local_window_size)
    scores = scores + as_bias(allowed, q.dtype)
    if attention_bias is not None:
        scores = scores + F.pad(attention_bias, (0, k.shape[2] - attention_bias.shape[-1]))
    y = join_heads(_weights(scores, head_sink, smooth_softmax > 0) @ repeat_heads(v, num_heads))
    return y if outputs == 1 else (y, k, v)[:outputs]


def _weights(scores: Tensor, sink: Tensor | None, smooth: bool) -> Tensor:
    """Return the softmax, with one more term per head in its denominator when there is a sink."""
    if sink is None and not smooth:
        return masked_softmax(scores)
    shape = (*scores.shape[:-1], 1)
    factor = scores.new_zeros(()) if sink is None else sink.to(scores.dtype).reshape(1, -1, 1, 1)
    extra = factor.expand(shape)
    return torch.softmax(torch.cat((scores, extra), -1), -1)[..., :-1]


@operator("LinearAttention", domain=DOMAIN)
def microsoft_linear_attention(
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
    state_window: int = 0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of ai.onnx LinearAttention; return the output and the last state."""
    if state_window:
        raise NotImplementedError("LinearAttention with a state_window is not covered")
    return linear_attention_27(
        query, key, value, past_state, decay, beta, chunk_size=chunk_size, kv_num_heads=kv_num_heads,
        q_num_heads=q_num_heads, scale=scale, update_rule=update_rule,
    )  # fmt: skip
