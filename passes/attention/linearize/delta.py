"""S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T: the delta rule, which replaces what a key held before.

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024); beta up to 2 gives
eigenvalues in [-1, 1], which track states: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative
Eigenvalues" (2025).
"""

from __future__ import annotations

import torch

from graphopt.passes.attention.linearize.recurrent import RecurrentReplacement, unit
from graphopt.sites import AttentionSite


class DeltaAttention(RecurrentReplacement):
    """Unit queries and keys through learned maps, beta from the key."""

    def __init__(
        self, site: AttentionSite, *, window: int, sinks: int = 0, start: str = "window", negative: bool = False
    ) -> None:
        """Start from the identity and beta = 1/2 (1 with `negative`).

        Args:
            site: what is replaced.
            window: see `RecurrentReplacement`.
            sinks: see `RecurrentReplacement`.
            start: see `RecurrentReplacement`.
            negative: beta up to 2: eigenvalues in [-1, 1].
        """
        super().__init__(site, window=window, sinks=sinks, start=start)
        self.range = 2.0 if negative else 1.0
        eye = torch.eye(self.head_dim)
        self.query_map = torch.nn.Parameter(eye.repeat(self.heads, 1, 1))
        self.key_map = torch.nn.Parameter(eye.repeat(self.kv_heads, 1, 1))
        self.strength = torch.nn.Parameter(torch.zeros(self.kv_heads, self.head_dim, 1))
        self.offset = torch.nn.Parameter(torch.zeros(1, self.kv_heads, 1, 1))
        self.gain = torch.nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        fresh, weight = self.new(k, q), self.new_weight(key_weight, q)
        wide = torch.promote_types(self.dtype, torch.float32)
        query = unit(torch.matmul(q.to(wide), self.query_map.to(wide)))
        fresh = fresh.to(wide)
        keys = unit(torch.matmul(fresh, self.key_map.to(wide)))
        beta = self.range * torch.sigmoid(torch.matmul(fresh, self.strength.to(wide)) + self.offset.to(wide))
        if weight is not None:
            beta = beta * weight  # a hidden token writes nothing
        out = torch.ops.graphopt.linear_attention(query, keys, self.new(v, q), None, beta, None, "delta", 1.0)[0]
        return self.mixed(self.gain * out, q, k, v, key_weight)

    def state_shape(self) -> tuple[int, int, int]:
        """The recurrence has no denominator."""
        return self.kv_heads, self.head_dim, self.value_dim
