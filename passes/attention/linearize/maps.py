"""f (x + c) W: a learned linear map per head that starts from the identity."""

from __future__ import annotations

import math

import torch


class LinearMap(torch.nn.Module):
    """One map per head: x [B, H, T, D] -> [B, H, T, F], in fp32 or better."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
        """Start without a shift.

        Args:
            weight: W [H, D, F].
            dtype: of x.
            factor: f; a weight that starts near 1 learns at the same rate at every scale of the logits.
        """
        super().__init__()
        self.wide, self.factor = torch.promote_types(dtype, torch.float32), factor
        self.weight = torch.nn.Parameter(weight)
        self.shift = torch.nn.Parameter(torch.zeros(weight.shape[0], 1, weight.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map of x."""
        weight = self.weight.to(self.wide)
        # On the weight and not on x: a product of constants, which runtimes compute when they load the model.
        return torch.matmul(x.to(self.wide) + self.shift, weight if self.factor == 1 else self.factor * weight)


def identity(heads: int, width: int) -> torch.Tensor:
    """[H, D, D]."""
    return torch.eye(width).repeat(heads, 1, 1)


def halves_of(scale: float) -> tuple[float, float]:
    """Factors for q and k whose product is the scale of the logits."""
    root = math.sqrt(abs(scale))
    return math.copysign(root, scale), root
