"""Embeddings of onnxruntime's com.microsoft domain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN
from .contrib_quantised import real
from .registry import operator


@operator("EmbedLayerNormalization", domain=DOMAIN, counted=True)
def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise the sum of the embeddings of words, positions and segments.

    Args:
        input_ids: `[B, T]`.
        segment_ids: `[B, T]`.
        word_embedding: `[words, H]`.
        position_embedding: `[positions, H]`.
        segment_embedding: `[segments, H]`.
        gamma: `[H]`.
        beta: `[H]`.
        mask: `[B, T]`.
        position_ids: `[B, T]` or `[1, T]`, by default 0, 1, ...
        epsilon: added to the variance.
        mask_index_type: says whether the second output is wanted.
        outputs: how many outputs there are.

    Returns:
        The normalised sum `[B, T, H]`, how many ones each row of the mask has `[B]`, and the sum itself.
    """
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    total = F.embedding(input_ids, word_embedding) + F.embedding(position_ids, position_embedding)
    if segment_ids is not None and segment_embedding is not None:
        total = total + F.embedding(segment_ids, segment_embedding)
    y = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    return y if outputs == 1 else (y, _ones(mask, input_ids), total)[:outputs]


def _ones(mask: Tensor | None, ids: Tensor) -> Tensor:
    if mask is None:
        return torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    return (mask == 1).sum(1).to(torch.int32)


@operator("QEmbedLayerNormalization", domain=DOMAIN)
def q_embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    word_scale: Tensor,
    position_scale: Tensor,
    segment_scale: Tensor | None,
    gamma_scale: Tensor,
    beta_scale: Tensor,
    word_zero_point: Tensor,
    position_zero_point: Tensor,
    segment_zero_point: Tensor | None,
    gamma_zero_point: Tensor,
    beta_zero_point: Tensor,
    *,
    epsilon: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """Run EmbedLayerNormalization on embeddings, gamma and beta of 8 bits."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    # The looked up rows are made real, not the whole tables.
    total = real(_rows(word_embedding, input_ids), word_scale, word_zero_point)
    total = total + real(_rows(position_embedding, positions), position_scale, position_zero_point)
    if segment_ids is not None and segment_embedding is not None and segment_scale is not None:
        total = total + real(_rows(segment_embedding, segment_ids), segment_scale, segment_zero_point)
    weight, bias = real(gamma, gamma_scale, gamma_zero_point), real(beta, beta_scale, beta_zero_point)
    return F.layer_norm(total, gamma.shape, weight, bias, epsilon), _ones(mask, input_ids)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return table.index_select(0, ids.reshape(-1)).reshape(*ids.shape, *table.shape[1:])


@operator("TorchEmbedding", domain=DOMAIN)
def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: Tensor | None = None, scale_grad_by_freq: Tensor | None = None
) -> Tensor:
    """Return the rows of weight at the indices; the other inputs only concern training."""
    return _rows(weight, indices)
