"""phi(x) = [f(x W + b), f(-x W - b)]: learned feature maps that start from the identity."""

from __future__ import annotations

import math
from typing import Literal

import torch

import graphopt.ops  # noqa: F401  # registers torch.ops.graphopt

Activation = Literal["softmax", "exp"]
# Maps wider than the head repeat the identity at falling scales, so that no two features start equal.
_SCALES = (1.0, 0.5, 2.0, 0.25)
_NOISE = 0.02


class FeatureMap(torch.nn.Module):
    """One map per head: x [B, H, T, D] -> features [B, H, T, 2 F], all positive."""

    def __init__(
        self, heads: int, width: int, features: int, activation: Activation, gain: float, generator: torch.Generator
    ) -> None:
        """Start from the identity.

        Args:
            heads: H.
            width: D.
            features: F, the width of the map per sign.
            activation: f: softmax over the features of a sign, or exp of each.
            gain: scale of the identity.
            generator: for the noise that tells repeated features apart.
        """
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(gain * _identity(heads, width, features, generator))
        self.bias = torch.nn.Parameter(torch.zeros(heads, 1, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The features of x."""
        out: torch.Tensor = torch.ops.graphopt.hedgehog_map(x, self.weight, self.bias, self.activation)
        return out


def gain_for(scale: float, width: int) -> float:
    """The identity fits logits scaled by 1/sqrt(D); another scale of a site is shared by the maps of q and k."""
    return math.sqrt(abs(scale) * math.sqrt(width))


def _identity(heads: int, width: int, features: int, generator: torch.Generator) -> torch.Tensor:
    """[H, D, F]: the identity, repeated at other scales where F > D, cut where F < D."""
    copies = -(-features // width)
    blocks = [_SCALES[i % len(_SCALES)] * torch.eye(width) for i in range(copies)]
    weight = torch.cat(blocks, dim=1)[:, :features].repeat(heads, 1, 1)
    noise = _NOISE * torch.randn(weight.shape, generator=generator)
    return weight + noise if copies > 1 else weight
