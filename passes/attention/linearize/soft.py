"""g k(q, L) (k(L, L) + 0.01 I)^-1 k(L, k) v with k(a, b) = exp(-|a - b|^2 / 2): attention without a softmax.

The paper takes one projection as queries and keys and finds the landmarks L by a convolution on the token grid. Here
queries and keys keep maps of their own, and L are means of consecutive keys, which needs neither a grid nor a fixed
number of tokens.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity" (2021).
"""

from __future__ import annotations

import torch

from graphopt.passes.attention.linearize.maps import LinearMap, halves_of, identity
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.sites import AttentionSite

_TINY = 1e-12


class SoftAttention(LinearReplacement):
    """Gaussian kernel through landmarks, with learned maps of q and k and a learned gain per head."""

    def __init__(self, site: AttentionSite, *, landmarks: int) -> None:
        """Start with the site's own logits: exp(-|q - k|^2 / 2) = exp(q k) exp(-|q|^2 / 2) exp(-|k|^2 / 2).

        Args:
            site: what is replaced; bidirectional.
            landmarks: how many.
        """
        super().__init__(site)
        self.landmarks = landmarks
        for_query, for_key = halves_of(site.scale)
        self.query_map = LinearMap(identity(self.heads, self.head_dim), self.dtype, for_query)
        self.key_map = LinearMap(identity(self.kv_heads, self.head_dim), self.dtype, for_key)
        self.log_gain = torch.nn.Parameter(torch.zeros(1, self.heads, 1, 1))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        query, keys, values = self.query_map(q), self.key_map(k), v.to(wide)
        weight = torch.ones_like(torch.narrow(keys, -1, 0, 1)) if key_weight is None else key_weight.to(wide)
        # The published sum over keys grows with their number; as a mean it is the same function at any one number.
        values = values / (torch.sum(torch.narrow(weight, 1, 0, 1), 2, keepdim=True) + _TINY)
        out: torch.Tensor = torch.ops.graphopt.landmark_attention(query, keys, values, key_weight, self.landmarks)
        return (torch.exp(self.log_gain) * out).to(self.dtype)
