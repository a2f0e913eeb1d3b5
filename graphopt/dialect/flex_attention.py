"""Attention whose scores and weights pass through functions of the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .attention import repeat_heads
from .dtypes import compute_type, dtype_of
from .registry import operator


@operator("FlexAttention", domain="ai.onnx.preview")
def flex_attention_1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prob_mod: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    scale: float | None = None,
    score_mod: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    softmax_precision: int | None = None,
) -> Tensor:
    """prob_mod(softmax(score_mod(q k^T * scale))) v.

    A row that `score_mod` masks entirely is NaN, as the softmax of the standard is.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hkv, S, D]`; each head serves H / Hkv neighbouring heads of q.
        v: `[B, Hkv, S, Dv]`.
        prob_mod: what the weights `[B, H, T, S]` pass through.
        scale: 1 / sqrt(D) when omitted.
        score_mod: what the scores `[B, H, T, S]` pass through.
        softmax_precision: element type of scores and weights; float32 when omitted, or that of q if wider.

    Returns:
        `[B, H, T, Dv]`.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    wide = compute_type(q.dtype) if softmax_precision is None else dtype_of(softmax_precision)
    # The standard rounds the root to the type of q, and scales both factors so that neither overflows.
    root = torch.tensor(math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale), dtype=q.dtype)
    root = root.to(q.device)
    scores = ((q * root) @ (k * root).transpose(-1, -2)).to(wide)
    if score_mod is not None:
        (scores,) = score_mod(scores)
    weights = torch.softmax(scores, -1)
    if prob_mod is not None:
        (weights,) = prob_mod(weights)
    return (weights @ v.to(wide)).to(v.dtype)
