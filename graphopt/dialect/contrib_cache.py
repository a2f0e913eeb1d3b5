"""Attention of onnxruntime's com.microsoft domain where each sample has a past of its own length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import as_bias, join_heads, masked_softmax, repeat_heads, split_heads
from .contrib import DOMAIN
from .contrib_rotary import rotated
from .dtypes import scalar
from .nn import rms_norm
from .registry import operator


@dataclass(frozen=True)
class _Columns:
    """The keys that a step attends to, in the order in which they lie."""

    keys: Tensor
    """`[B, H, K, D]`."""
    values: Tensor
    """`[B, H, K, D]`."""
    position: Tensor
    """`[B or 1, K]`: where each stands in its sequence."""
    held: Tensor
    """`[B, K]`: whether it belongs to the sequence at all."""


def _columns(keys: Tensor, values: Tensor, position: Tensor, held: Tensor) -> _Columns:
    # What a buffer holds beside its sequence is anything, even what is no number.
    live = held[:, None, :, None]
    return _Columns(torch.where(live, keys, 0), torch.where(live, values, 0), position, held)


_Pair = tuple[Tensor, Tensor]


def _filled(past: Tensor | None, new: Tensor, total: int, start: Tensor) -> Tensor:
    """Write the new steps of each sample behind its past ones, into a buffer of at least `total` steps."""
    if past is None:
        return new
    cache = F.pad(past, (0, 0, 0, max(total, past.shape[2]) - past.shape[2]))
    step = start.reshape(-1, 1) + torch.arange(new.shape[2], device=new.device)
    index = step.to(torch.int64)[:, None, :, None].expand(new.shape)
    return cache.scatter(2, index, new)


def _linear(
    past: tuple[Tensor | None, Tensor | None], new: _Pair, start: Tensor, lengths: Tensor, total: int
) -> tuple[_Columns, _Pair]:
    """Attend to caches that hold each position where it stands; return them with the new steps too."""
    keys, values = (_filled(old, fresh, total, start) for old, fresh in zip(past, new, strict=True))
    position = torch.arange(total, device=start.device).unsqueeze(0)
    held = position < lengths.unsqueeze(1)
    return _columns(keys[:, :, :total], values[:, :, :total], position, held), (keys, values)


def _resident(tokens: Tensor, capacity: int, window: int) -> Tensor:
    """Return how many of its newest positions a window-sized cache holds after so many steps.

    A full cache drops `capacity - window + 1` positions at once, which keeps the whole window.
    """
    each = capacity - window + 1
    dropped = torch.div(tokens - capacity + each - 1, each, rounding_mode="floor") * each
    return tokens - dropped.clamp(min=0)


def _windowed(past: _Pair, new: _Pair, start: Tensor, lengths: Tensor, window: int) -> tuple[_Columns, _Pair]:
    """Attend to what is left of the past and to the new steps; return the window-sized caches after them too."""
    capacity, steps, device = past[0].shape[2], new[0].shape[2], start.device
    start, lengths = start.unsqueeze(1).to(torch.int64), lengths.unsqueeze(1).to(torch.int64)
    before, after = _resident(start, capacity, window), _resident(lengths, capacity, window)
    row = torch.arange(capacity, device=device)
    old, fresh = start - before + row, start + torch.arange(steps, device=device)
    keys, values = (torch.cat(pair, 2) for pair in zip(past, new, strict=True))
    held = torch.cat((row < before, fresh < lengths), 1)
    columns = _columns(keys, values, torch.cat((old, fresh), 1), held)
    # Each row of the new cache is one of those columns.
    kept = lengths - after + row
    source = torch.where(kept < start, kept - start + before, capacity + kept - start).clamp(max=keys.shape[2] - 1)
    index = source[:, None, :, None]
    live = (row < after)[:, None, :, None]
    caches = (torch.where(live, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), 0) for x in (keys, values))
    return columns, (next(caches), next(caches))


@dataclass(frozen=True)
class _Format:
    """How a cache stores numbers: as they are, or with a scale as integers of 8 or 4 bits."""

    scale: Tensor | None
    bits: int

    @classmethod
    def of(cls, kind: str, scale: Tensor | None, bits: int, past: Tensor | None) -> _Format:
        if kind == "NONE":
            return cls(None, 0)
        if scale is None or bits not in (4, 8) or (past is not None and past.dtype.is_floating_point):
            raise NotImplementedError("GroupQueryAttention covers quantised caches of 8 or 4 bit integers with a scale")
        return cls(scale, bits)

    def read(self, past: Tensor | None) -> Tensor | None:
        """Return the elements of a cache; a byte holds two of 4 bits, the lower first."""
        if past is None or self.bits != 4:
            return past
        low, high = (past & 15).to(torch.int8), (past >> 4).to(torch.int8)
        return torch.stack((low, high), -1).flatten(-2) - 8

    def write(self, elements: Tensor) -> Tensor:
        """Return what `read` reads."""
        if self.bits != 4:
            return elements
        codes = (elements + 8).to(torch.uint8)
        return codes[..., 0::2] | (codes[..., 1::2] << 4)

    def encode(self, x: Tensor) -> Tensor:
        """Return numbers as elements."""
        if self.scale is None:
            return x
        limit = 2 ** (self.bits - 1)
        return torch.round(x.to(self.scale.dtype) / self.scale).clamp(-limit, limit - 1).to(torch.int8)

    def decode(self, elements: Tensor, dtype: torch.dtype) -> Tensor:
        """Return elements as numbers."""
        return elements if self.scale is None else (elements * self.scale).to(dtype)


def _operands(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `[B, H, T, D]` of each, from three inputs or from one that holds all of them."""
    if key is None or value is None:
        width = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * width, kv_heads * width, kv_heads * width], -1)
    return split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads)


def _first(total: int, steps: int, lengths: Tensor) -> Tensor:
    """Return where the new steps start: a first prompt at zero, even where a sample is shorter than the batch."""
    return torch.zeros_like(lengths) if steps == total else lengths - steps


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
    """Attend causally with fewer heads of key and value, each sample at the end of its own past.

    The caches `[B, Hkv, N, D]` may hold 8- or 4-bit integers, and with `sliding_window_cache` only a window of
    positions. What lies behind a sample's last position is the past's, or zero in a window-sized cache.
    """
    q, k, v = _operands(query, key, value, num_heads, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, -1, qk_norm_epsilon, 1)[0]
        k = rms_norm(k, k_norm_weight, -1, qk_norm_epsilon, 1)[0]
    steps, total = q.shape[2], scalar(total_sequence_length)
    lengths = seqlens_k.reshape(-1) + 1
    start = _first(total, steps, lengths)
    place = start.unsqueeze(1) + torch.arange(steps, device=q.device)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        ids = place
        if position_ids is not None:
            # Of a first prompt's positions only the first one counts.
            ids = position_ids.reshape(-1)[0] + place if steps == total else position_ids
        q = rotated(q, ids, cos_cache, sin_cache, bool(rotary_interleaved))
        k = rotated(k, ids, cos_cache, sin_cache, bool(rotary_interleaved))
    stored_k = _Format.of(k_quant_type, k_scale, kv_cache_bit_width, past_key)
    stored_v = _Format.of(v_quant_type, v_scale, kv_cache_bit_width, past_value)
    past_key, past_value = stored_k.read(past_key), stored_v.read(past_value)
    new = stored_k.encode(k), stored_v.encode(v)
    if sliding_window_cache and past_key is not None and past_value is not None:
        columns, (keys, values) = _windowed((past_key, past_value), new, start, lengths, local_window_size)
        attention_bias = None if attention_bias is None else _at(attention_bias, columns.position)
    else:
        columns, (keys, values) = _linear((past_key, past_value), new, start, lengths, total)
    behind = place[:, None, :, None] - columns.position[:, None, None, :]
    allowed = columns.held[:, None, None, :]
    if causal:
        allowed = allowed & (behind >= 0)
    if local_window_size > 0:
        allowed = allowed & (behind < local_window_size)
    seen = repeat_heads(stored_k.decode(columns.keys, q.dtype), num_heads)
    scores = (q @ seen.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_bias is not None:
        scores = scores + attention_bias
    weights = _weights(scores + as_bias(allowed, q.dtype), head_sink, smooth_softmax > 0)
    y = join_heads(weights @ repeat_heads(stored_v.decode(columns.values, q.dtype), num_heads))
    shown = weights if qk_output == 2 else torch.where(allowed, scores, 0)
    return y if outputs == 1 else (y, stored_k.write(keys), stored_v.write(values), shown)[:outputs]


def _at(bias: Tensor, position: Tensor) -> Tensor:
    """Pick the columns of a bias `[1 or B, 1 or H, T, total]` at the positions `[B, K]`."""
    batch = position.shape[0]
    index = position.clamp(0, bias.shape[-1] - 1)[:, None, None, :]
    return bias.expand(batch, -1, -1, -1).gather(3, index.expand(batch, *bias.shape[1:3], -1))


def _weights(scores: Tensor, sink: Tensor | None, smooth: bool) -> Tensor:
    """Return the softmax, with one more term per head in its denominator when there is a sink."""
    if sink is None and not smooth:
        return masked_softmax(scores)
    shape = (*scores.shape[:-1], 1)
    factor = scores.new_zeros(()) if sink is None else sink.to(scores.dtype).reshape(1, -1, 1, 1)
    extra = factor.expand(shape)
    return torch.softmax(torch.cat((scores, extra), -1), -1)[..., :-1]


@operator("SparseAttention", domain=DOMAIN, values=(7,))
def sparse_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    block_row_indices: Tensor,
    block_col_indices: Tensor,
    total_sequence_length: Tensor,
    key_total_sequence_lengths: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    *,
    do_rotary: int = 0,
    kv_num_heads: int,
    num_heads: int,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    sparse_block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend causally to the blocks of keys that a layout per head permits, in compressed sparse rows `[layouts, ...]`.

    The caches `[B, Hkv, N, D]` hold each position where it stands.
    """
    q, k, v = _operands(query, key, value, num_heads, kv_num_heads)
    steps, total = q.shape[2], scalar(total_sequence_length)
    lengths = key_total_sequence_lengths.reshape(-1)
    start = _first(total, steps, lengths)
    place = start.unsqueeze(1) + torch.arange(steps, device=q.device)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        q = rotated(q, place, cos_cache, sin_cache, bool(rotary_interleaved))
        k = rotated(k, place, cos_cache, sin_cache, bool(rotary_interleaved))
    columns, (keys, values) = _linear((past_key, past_value), (k, v), start, lengths, total)
    layouts = _blocks(block_row_indices, block_col_indices)
    rows, blocks = place // sparse_block_size, columns.position[0] // sparse_block_size
    # `[layouts, B, T, total]`, then with a layout per head in turn `[B, H, T, total]`.
    permitted = layouts[:, rows][..., blocks].movedim(0, 1)
    permitted = permitted.repeat(1, num_heads // layouts.shape[0], 1, 1)
    behind = place[:, None, :, None] - columns.position[:, None, None, :]
    allowed = permitted & (behind >= 0) & columns.held[:, None, None, :]
    scores = (q @ repeat_heads(columns.keys, num_heads).transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    weights = masked_softmax(scores + as_bias(allowed, q.dtype))
    return join_heads(weights @ repeat_heads(columns.values, num_heads)), keys, values


def _blocks(starts: Tensor, columns: Tensor) -> Tensor:
    """Return the mask `[layouts, rows, rows]` of which `starts` `[layouts, rows + 1]` begin the rows of `columns`."""
    size = starts.shape[1] - 1
    entry = torch.arange(columns.shape[1], device=columns.device)
    row = (entry.unsqueeze(1) >= starts[:, None, 1:]).sum(-1)
    # Behind the last row the columns are padding.
    live = (row < size) & (columns >= 0)
    index = torch.where(live, row * size + columns, torch.zeros_like(row))
    count = torch.zeros(starts.shape[0], size * size, dtype=torch.int64, device=columns.device)
    return (count.scatter_add(1, index, live.to(torch.int64)) > 0).reshape(-1, size, size)
