"""S_t = a_h S_{t-1} + phi(k_t) [v_t, 1]^T: linear attention whose memory fades at a learned rate per head.

The per-head decay is that of RetNet (Sun et al., 2023) and Lightning Attention-2 (Qin et al., 2024), the feature map
Hedgehog's (Zhang et al., 2024); the same decay in the denominator keeps the weights summing to one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from graphopt.passes.attention.linearize.features import Activation, FeatureMap, gain_for
from graphopt.passes.attention.linearize.recurrent import RecurrentReplacement
from graphopt.sites import AttentionSite

_TINY = 1e-12
# Half-lives at the start, spread over the heads as in RetNet.
_SHORTEST, _LONGEST = 16.0, 4096.0


class GatedAttention(RecurrentReplacement):
    """Learned maps, one learned decay per key head."""

    def __init__(
        self,
        site: AttentionSite,
        features: int,
        activation: Activation,
        generator: torch.Generator,
        *,
        window: int,
        sinks: int = 0,
        start: str = "window",
    ) -> None:
        """Start with half-lives between 16 and 4,096 tokens.

        Args:
            site: what is replaced.
            features: width of the maps per sign; 0 means the head dimension.
            activation: `softmax` or `exp`.
            generator: for noise.
            window: see `RecurrentReplacement`.
            sinks: see `RecurrentReplacement`.
            start: see `RecurrentReplacement`.
        """
        super().__init__(site, window=window, sinks=sinks, start=start)
        width, gain = features or self.head_dim, gain_for(site.scale, self.head_dim)
        self.query_map = FeatureMap(self.heads, self.head_dim, width, activation, gain, generator)
        self.key_map = FeatureMap(self.kv_heads, self.head_dim, width, activation, gain, generator)
        lives = torch.logspace(math.log2(_SHORTEST), math.log2(_LONGEST), self.kv_heads, base=2)
        # -softplus(rate) = log 0.5 / half-life
        rate = torch.log(torch.expm1(math.log(2) / lives))
        self.rate = torch.nn.Parameter(rate.reshape(1, -1, 1, 1))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        fresh, weight = self.new(k, q), self.new_weight(key_weight, q)
        keys = self.key_map(fresh)
        if weight is not None:
            keys = keys * weight
        values = self.new(v, q)
        ones = torch.ones_like(torch.narrow(values, -1, 0, 1))
        decay = F.logsigmoid(-self.rate) * torch.ones_like(torch.narrow(fresh, -1, 0, 1))
        sums = torch.ops.graphopt.linear_attention(
            self.query_map(q), keys, torch.cat([values, ones], -1), decay, None, None, "gated", 1.0
        )[0]
        held, total = torch.narrow(sums, -1, 0, self.value_dim), torch.narrow(sums, -1, self.value_dim, 1)
        return self.mixed(held / (total + _TINY), q, k, v, key_weight)

    def state_shape(self) -> tuple[int, int, int]:
        """One column more than values: the fading sum of the features is the denominator."""
        return self.kv_heads, 2 * int(self.key_map.weight.shape[2]), self.value_dim + 1
