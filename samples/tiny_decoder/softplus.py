"""Softplus attention as an attention function of the decoder, for training from scratch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST = 3
"""Rows that re-weighting leaves as they are but for the power: they see too few keys to single some out."""


class SoftplusAttention:
    """LSSA, and LSSAR where a power is given (softplus attention, 2025), causal over whole windows.

    A_ij = softplus(log D log(i + 1) cos(q_i, k_j)) over the i + 1 visible keys, each row divided by its sum. LSSAR
    sharpens what exceeds the mean: relu((i + 1) A_ij - 1)^power, divided by the row's sum; a row of which nothing
    exceeds it stays as it was.
    """

    def __init__(self, power: int | None = None) -> None:
        self.power = power

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, H, T, D] -> [B, H, T, D]; scores of [B, H, T, T] are kept for the gradient.

        Raises:
            ValueError: There is a mask: the count of visible keys would be wrong.
        """
        if mask is not None:
            raise ValueError("expected causal attention over whole windows, found a mask; train without padding")
        visible = torch.arange(1, q.shape[-2] + 1, dtype=torch.float32, device=q.device)[:, None]
        q = F.normalize(q.float(), dim=-1) * (math.log(q.shape[-1]) * visible.log())
        k = F.normalize(k.float(), dim=-1)
        weights = F.softplus(q @ k.transpose(-1, -2)).float().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        if self.power is not None:
            weights = self._sharpened(weights, visible)
        return weights.to(v.dtype) @ v

    def _sharpened(self, weights: Tensor, visible: Tensor) -> Tensor:
        offset = torch.where(visible > _FIRST, 1.0, 0.0)
        excess = (weights * visible - offset).relu()
        # Divided by its maximum a row keeps its proportions, and no power of it overflows.
        largest = excess.amax(-1, keepdim=True).detach()
        powers = (excess / torch.where(largest > 0, largest, 1.0)) ** self.power
        total = powers.sum(-1, keepdim=True)
        return torch.where(total > 0, powers / torch.where(total > 0, total, 1.0), weights)
