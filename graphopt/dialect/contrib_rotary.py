"""Rotary embeddings of onnxruntime's com.microsoft domain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import join_heads, rotate, split_heads
from .contrib import DOMAIN
from .registry import operator


def rotated(x: Tensor, ids: Tensor, cos_cache: Tensor, sin_cache: Tensor, interleaved: bool) -> Tensor:
    """Rotate `[B, H, T, D]` by the angles that the caches `[N, R / 2]` hold for the positions `[B, T]`."""
    cos, sin = (F.embedding(ids, cache).unsqueeze(1) for cache in (cos_cache, sin_cache))
    return rotate(x, cos, sin, interleaved)


# Both operators declare a scale and packed batching; onnxruntime reads the first not at all, and the second only
# to permit more steps than the caches have rows, because each sample of a packed batch starts from position zero.


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
    packed = x.dim() == 3
    # Without a rotary dimension the whole head rotates, so the cache tells how wide a head is.
    heads = num_heads if rotary_embedding_dim else x.shape[-1] // (2 * cos_cache.shape[-1])
    heads_first = split_heads(x, heads) if packed else x
    if position_ids.dim() == 1:
        position_ids = position_ids + torch.arange(heads_first.shape[2], device=x.device).unsqueeze(0)
    y = rotated(heads_first, position_ids, cos_cache, sin_cache, bool(interleaved))
    return join_heads(y) if packed else y


@operator("MRotaryEmbedding", domain=DOMAIN)
def m_rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    mrope_layout: int = 0,
    mrope_section: list[int],
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Rotate pairs of channels by positions in time, height and width `[3, B, T]`, a section of the pairs by each."""
    heads_first = split_heads(x, num_heads) if x.dim() == 3 else x
    stream = _streams(mrope_section, mrope_layout, x.device)
    angles = (F.embedding(position_ids, cache) for cache in (cos_cache, sin_cache))
    # `[3, B, T, pairs]` to `[B, 1, T, pairs]`: each pair takes the angle of its stream.
    index = stream.expand(1, *position_ids.shape[1:], stream.shape[0])
    cos, sin = (torch.gather(angle, 0, index).transpose(0, 1) for angle in angles)
    y = rotate(heads_first, cos, sin, bool(interleaved))
    return join_heads(y) if x.dim() == 3 else y


def _streams(sections: list[int], layout: int, device: torch.device) -> Tensor:
    """Return which of the three positions turns each pair of channels."""
    if layout == 0:
        named = [stream for stream, size in enumerate(sections) for _ in range(size)]
        return torch.tensor(named, dtype=torch.int64, device=device)
    # Interleaved: every third pair is height's or width's as long as their sections last, the others are time's.
    named = [0] * sum(sections)
    for stream in (1, 2):
        for pair in range(stream, min(3 * sections[stream], len(named)), 3):
            named[pair] = stream
    return torch.tensor(named, dtype=torch.int64, device=device)
