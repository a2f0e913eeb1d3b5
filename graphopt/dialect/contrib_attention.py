"""Attention operators of onnxruntime's com.microsoft domain whose samples share the length of their past."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import as_bias, join_heads, linear_attention_27, masked_softmax, positions, split_heads
from .contrib import DOMAIN
from .contrib_integer import mat_mul_integer_to_float
from .dtypes import scalar
from .registry import operator


def padding_bias(mask: Tensor, like: Tensor, steps: int, keys: int, filtered: float) -> Tensor | None:
    """Turn any form of the padding mask into a bias on the scores of `steps` queries, the last of `keys` positions.

    Args:
        mask: `[B]`, the ends of the samples; `[2 * B]`, their ends and starts; `[3 * B + 2]`, their ends and
            offsets that only packed kernels use; `[B, keys]`; `[B, steps, keys]`; or `[B, 1, N, N]` over all
            positions. One that is `[B, 1]` or `[1, 1]` stands for no mask.
        like: a tensor `[B, ...]` whose type and device the bias gets.
        steps: how many queries there are.
        keys: how many keys there are.
        filtered: what is added where nothing may be attended.

    Returns:
        The bias `[B, 1, 1 or steps, keys]`, or None where nothing is masked.
    """
    batch = like.shape[0]
    if mask.dim() == 1:
        column = torch.arange(keys, device=mask.device)
        allowed = column < mask[:batch].unsqueeze(1)
        if mask.shape[0] == 2 * batch:
            allowed = allowed & (column >= mask[batch:].unsqueeze(1))
    elif mask.dim() == 4:
        allowed = mask[:, :, keys - steps : keys, :keys] > 0
    elif mask.dim() == 2 and mask.shape[1] == 1 != keys:
        return None
    else:
        allowed = mask > 0
    return as_bias(allowed.reshape(batch, 1, -1, keys), like.dtype, filtered)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, biases: list[Tensor | None], causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the packed output and the scores before softmax; the queries stand at the end of the keys."""
    scores = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        behind = positions(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
        # The lowest number rather than infinity, because the scores may be an output.
        biases = [*biases, as_bias(behind >= 0, q.dtype, torch.finfo(q.dtype).min)]
    for bias in biases:
        scores = scores if bias is None else scores + bias
    return join_heads(masked_softmax(scores) @ v), scores


def _extended(
    past: Tensor | None, new: Tensor, length: Tensor | None, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return all keys or values `[B, H, T, D]` that the queries see, and the cache that holds them.

    Args:
        past: the past ones, or with `length` a buffer of which only so many steps are filled.
        new: the new ones, which come behind the past.
        length: how much of the buffer is filled, one number for all samples.
        origin: `[B / beams, beams, N]`, from which beam each step of a sample's past comes.
    """
    if past is None:
        return new, new
    if length is None:
        joined = torch.cat((past, new), 2)
        return joined, joined
    start = scalar(length)
    end = start + new.shape[2]
    cache = torch.cat((past[:, :, :start], new, past[:, :, end:]), 2)
    seen = cache[:, :, :end]
    return (seen if origin is None else _of_beams(seen, origin[:, :, :start])), cache


def _of_beams(x: Tensor, origin: Tensor) -> Tensor:
    """Collect each past step of `[B * beams, H, T, D]` from the beam that it comes from; new steps are a beam's own."""
    groups, beams, past = origin.shape
    first = torch.arange(groups, device=x.device).reshape(-1, 1, 1) * beams
    own = first + torch.arange(beams, device=x.device).reshape(1, -1, 1)
    rows = torch.cat((first + origin, own.expand(groups, beams, x.shape[2] - past)), 2).flatten(0, 1)
    return x.transpose(1, 2)[rows, torch.arange(x.shape[2], device=x.device)].transpose(1, 2)


def _self_attention(
    product: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    past: Tensor | None,
    attention_bias: Tensor | None,
    length: Tensor | None,
    sizes: list[int] | None,
    heads: int,
    filtered: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend on the product of the input with the merged weights; the other outputs are the keys and the values."""
    product = product if bias is None else product + bias
    parts = product.split(sizes or [product.shape[-1] // 3] * 3, -1)
    q, k, v = (split_heads(part, heads) for part in parts)
    k, keys = _extended(None if past is None else past[0], k, length)
    v, values = _extended(None if past is None else past[1], v, length)
    padding = None if mask is None else padding_bias(mask, q, q.shape[2], k.shape[2], filtered)
    y, _ = _attend(q, k, v, scale, [padding, attention_bias], causal)
    return y, keys, values


@operator("Attention", domain=DOMAIN, values=(6,), counted=True)
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Project `[B, T, I]` by one merged matrix to q, k and v, and attend."""
    if do_rotary:
        raise NotImplementedError("Attention with rotary embedding, whose base it does not state, is not covered")
    y, keys, values = _self_attention(
        x @ weights, bias, mask_index, past, attention_bias, past_sequence_length, qkv_hidden_sizes, num_heads,
        mask_filter_value, scale, bool(unidirectional),
    )  # fmt: skip
    return y if outputs == 1 else (y, torch.stack((keys, values)))


@operator("QAttention", domain=DOMAIN, counted=True)
def q_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    mask_index: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    past: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    past_present_share_buffer: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend as Attention does, after a projection of quantised inputs by a quantised matrix."""
    if do_rotary or past_present_share_buffer:
        raise NotImplementedError("QAttention with rotary embedding or a shared buffer is not covered")
    product = mat_mul_integer_to_float(x, weight, input_scale, weight_scale, input_zero_point, weight_zero_point, bias)
    y, keys, values = _self_attention(
        product, None, mask_index, past, None, None, None, num_heads, mask_filter_value, scale, bool(unidirectional)
    )
    return y if outputs == 1 else (y, torch.stack((keys, values)))


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


@operator("MultiHeadAttention", domain=DOMAIN, values=(8,), counted=True)
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
    """Attend on packed `[B, T, H * D]` inputs, their biases added first; the fourth output is the biased scores."""
    q, k, v = _projections(query, key, value, bias, num_heads)
    k, keys = _extended(past_key, k, past_sequence_length, cache_indirection)
    v, values = _extended(past_value, v, past_sequence_length, cache_indirection)
    padding = None
    if key_padding_mask is not None:
        padding = padding_bias(key_padding_mask, q, q.shape[2], k.shape[2], mask_filter_value)
    y, scores = _attend(q, k, v, scale, [padding, attention_bias], bool(unidirectional))
    return y if outputs == 1 else (y, keys, values, scores)[:outputs]


@operator("DecoderMaskedMultiHeadAttention", domain=DOMAIN, values=(7,), counted=True)
def decoder_masked_multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask_index: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    beam_width: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    output_qk: int = 0,
    past_present_share_buffer: int = 0,
    scale: float = 0.0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Attend with one query per sample, `[B, 1, H * D]`, to a buffer of past steps or to all of a cross attention."""
    if key is None and past_key is not None:
        width = num_heads * past_key.shape[-1]
        query, key, value = query.split([width, width, query.shape[-1] - 2 * width], -1)
    q, k, v = _projections(query, key, value, bias, num_heads)
    k, keys = _extended(past_key, k, past_sequence_length, cache_indirection)
    v, values = _extended(past_value, v, past_sequence_length, cache_indirection)
    padding = None
    if mask_index is not None:
        padding = padding_bias(mask_index, q, q.shape[2], k.shape[2], mask_filter_value)
    y, scores = _attend(q, k, v, scale, [padding, attention_bias], False)
    return y if outputs == 1 else (y, keys, values, scores)[:outputs]


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
    """Run the recurrence of ai.onnx LinearAttention; return the output and the last state.

    With a `state_window` of W the states are `[W, B, H, dk, dv]`: those after the last W steps, zeros where there
    were fewer.
    """
    state = past_state[-1] if state_window and past_state is not None else past_state
    steps = query.shape[1]
    # One piece up to the first state that is asked for, then step by step.
    first = max(1, steps - state_window + 1) if state_window else steps
    parts, states = [], []
    for start, end in [(0, first), *((step, step + 1) for step in range(first, steps))]:
        q, k, v = (x.narrow(1, start, end - start) for x in (query, key, value))
        g, b = (None if x is None else x.narrow(1, start, end - start) for x in (decay, beta))
        y, state = linear_attention_27(
            q, k, v, state, g, b, chunk_size=chunk_size, kv_num_heads=kv_num_heads, q_num_heads=q_num_heads,
            scale=scale, update_rule=update_rule,
        )  # fmt: skip
        parts.append(y)
        states.append(state)
    if not state_window:
        return parts[0], states[0]
    missing = [torch.zeros_like(states[0])] * (state_window - len(states))
    return torch.cat(parts, 1), torch.stack(missing + states)
