"""Hedgehog attention: the learned feature map in place of exp(q k^T), and the loss that trains it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

import graphopt.ops  # noqa: F401  # registers torch.ops.graphopt
from graphopt.sites import AttentionSite

# Maps wider than the head repeat the identity at falling scales, so that no two features start equal.
_SCALES = (1.0, 0.5, 2.0, 0.25)
_NOISE = 0.02


class HedgehogAttention(torch.nn.Module):
    """phi_q(q) (phi_k(k)^T v) / phi_q(q) (phi_k(k)^T 1), in the layout of the site that it replaces."""

    def __init__(self, site: AttentionSite, features: int, activation: str, generator: torch.Generator) -> None:
        """Start from phi(x) = [f(x), f(-x)].

        Args:
            site: what is replaced; heads and head dimension are static.
            features: width of the map per sign.
            activation: `softmax` or `exp`.
            generator: for the noise that tells repeated features apart.
        """
        super().__init__()
        self._site = site
        self._activation = activation
        assert site.query_heads is not None
        assert site.kv_heads is not None
        assert site.head_dim is not None
        # The identity fits logits scaled by 1/sqrt(D); another scale of the site goes into both maps.
        gain = (abs(site.scale) * math.sqrt(site.head_dim)) ** 0.5
        for side, heads in (("query", site.query_heads), ("key", site.kv_heads)):
            weight = gain * _initial(heads, site.head_dim, features, generator)
            self.register_parameter(f"{side}_map", torch.nn.Parameter(weight))
            self.register_parameter(f"{side}_bias", torch.nn.Parameter(torch.zeros(heads, 1, features)))

    def forward(self, *values: Any) -> Any:
        """From the values that enter the site to the value that leaves it."""
        operands = self._site.split(*values)
        out = self.attend(operands.q, operands.k, operands.v, self.weight_of_keys(operands.mask))
        return self._site.merge(out)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention in canonical layout; q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, Hq, T, Dv]."""
        ops = torch.ops.graphopt
        query = ops.hedgehog_map(q, self.query_map, self.query_bias, self._activation)
        keys = ops.hedgehog_map(k, self.key_map, self.key_bias, self._activation)
        out: torch.Tensor = ops.linear_attention(query, keys, v, key_weight, self._site.causal)
        return out

    def weight_of_keys(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Exp of each key's own mask value [B, 1, S, 1]: exp(s + m) = exp(s) exp(m), so hidden keys weigh 0.

        The last row of the mask has what every row has: under a causal mask the last query sees all keys.
        """
        if mask is None or self._site.mask.value is None:
            return None
        row = torch.transpose(torch.narrow(mask, -2, -1, 1), -1, -2)
        return torch.exp(row) if self._site.mask.additive else row.to(torch.float32)


def _initial(heads: int, width: int, features: int, generator: torch.Generator) -> torch.Tensor:
    """[H, D, F]: the identity, repeated at other scales where F > D, cut where F < D."""
    copies = -(-features // width)
    blocks = [_SCALES[i % len(_SCALES)] * torch.eye(width) for i in range(copies)]
    weight = torch.cat(blocks, dim=1)[:, :features].repeat(heads, 1, 1)
    noise = _NOISE * torch.randn(weight.shape, generator=generator)
    return weight + noise if copies > 1 else weight


def attention_transfer_loss(module: torch.nn.Module, inputs: tuple[Any, ...], expected: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the site's output, relative to the output's own mean square."""
    found = module(*inputs)
    return F.mse_loss(found.float(), expected.float()) / expected.float().square().mean().clamp(min=1e-12)
