"""phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1): the learned feature map of Hedgehog in place of exp(q k^T).

Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (2024).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from graphopt.passes.attention.linearize.features import Activation, FeatureMap, gain_for
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.sites import AttentionSite

_TINY = 1e-12
# Enough rows to learn from, without the [T, S] matrix of all queries.
_ROWS = 128
Loss = Literal["output", "weights"]


class HedgehogAttention(LinearReplacement):
    """Linear attention with learned maps, for sites with and without an order; the base of the hybrids."""

    def __init__(
        self,
        site: AttentionSite,
        features: int,
        activation: Activation,
        generator: torch.Generator,
        *,
        tied: bool = False,
        loss: Loss = "output",
    ) -> None:
        """Start from phi(x) = [f(x), f(-x)].

        Args:
            site: what is replaced.
            features: width of the maps per sign; 0 means the head dimension.
            activation: `softmax` or `exp`.
            generator: for noise.
            tied: one key map per key head, so that the state is shared by the queries of a group; else one per query
                head.
            loss: what the maps learn: the site's output, or its weights by cross-entropy.
        """
        super().__init__(site)
        width, gain = features or self.head_dim, gain_for(site.scale, self.head_dim)
        self.objective = loss
        # Only a causal site carries a state; for the others fewer key maps are simply cheaper.
        self.repeats = 1 if tied or not site.causal else self.heads // self.kv_heads
        self.query_map = FeatureMap(self.heads, self.head_dim, width, activation, gain, generator)
        self.key_map = FeatureMap(self.kv_heads * self.repeats, self.head_dim, width, activation, gain, generator)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        query, keys = self.query_map(q), self.key_map(self.spread(k))
        if not self.site.causal:
            out: torch.Tensor = torch.ops.graphopt.kernel_attention(query, keys, v, key_weight)
            return out
        return self.hybrid(q, k, v, query, keys, key_weight, torch.zeros(1, self.heads, 1, 1), window=0, sinks=0)

    def hybrid(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_features: torch.Tensor,
        key_features: torch.Tensor,
        key_weight: torch.Tensor | None,
        gate: torch.Tensor,
        window: int,
        sinks: int,
    ) -> torch.Tensor:
        """The causal operator with its state; a window of 0 leaves the linear part alone."""
        results = torch.ops.graphopt.windowed_linear_attention(
            q, k, v, query_features, key_features, gate, key_weight, None, window, sinks, self.site.scale
        )
        out: torch.Tensor = results[0]
        return out

    def state_shape(self) -> tuple[int, int, int]:
        """One column more than values: the sum of the features is the denominator."""
        features = self.key_map.weight
        return int(features.shape[0]), 2 * int(features.shape[2]), self.value_dim + 1

    def spread(self, k: torch.Tensor) -> torch.Tensor:
        """Keys for the key maps: each key head once, or once for each query head of its group."""
        return torch.repeat_interleave(k, self.repeats, 1) if self.repeats > 1 else k

    def loss(self, inputs: tuple[Any, ...], expected: torch.Tensor) -> torch.Tensor:
        """Error of the output, or cross-entropy between the softmax weights and the linear ones."""
        if self.objective == "output":
            return super().loss(inputs, expected)
        return self._cross_entropy(inputs)

    def _cross_entropy(self, inputs: tuple[Any, ...]) -> torch.Tensor:
        """-sum_j p_ij log p'_ij, over evenly spaced rows i: a few rows teach what all do."""
        operands = self.site.split(*inputs)
        q, k = operands.q.float(), operands.k.float()
        T, S = q.shape[2], k.shape[2]
        rows = torch.arange(T - 1, -1, -max(1, T // _ROWS)).flip(0)
        q = q[:, :, rows]
        groups = self.heads // self.kv_heads
        logits = self.site.scale * q @ k.repeat_interleave(groups, 1).transpose(-1, -2)
        visible = torch.ones(1, 1, len(rows), S, dtype=torch.bool)
        if self.site.causal:
            visible = (torch.arange(S) <= rows[:, None] + (S - T))[None, None]
        weight = self.weight_of_keys(operands.mask, operands.k)
        if weight is not None:
            visible = visible & (weight.transpose(-1, -2) > 0)
        seen = visible.any(-1, keepdim=True)
        wanted = torch.softmax(logits.masked_fill(~visible & seen, -torch.inf), -1)
        query, keys = self.query_map(q), self.key_map(self.spread(k))
        found = query @ keys.repeat_interleave(self.heads // keys.shape[1], 1).transpose(-1, -2)
        found = found.masked_fill(~visible, 0.0)
        found = found / found.sum(-1, keepdim=True).clamp(min=_TINY)
        entropy = -(wanted * found.clamp(min=_TINY).log()).masked_fill(~visible, 0.0).sum(-1, keepdim=True)
        loss: torch.Tensor = entropy.masked_fill(~seen, 0.0).mean()
        return loss
