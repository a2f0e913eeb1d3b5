"""RMSNorm(phi(q) (phi(k)^T v)): linear attention normalised by its own size in place of a denominator.

Gradients through the denominator are unbounded; through the norm they are not. Early layers attend within blocks of
tokens only, by softmax, which keeps their attention local.

Qin et al., "The Devil in Linear Transformer" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.passes.attention.linearize.maps import LinearMap, halves_of, identity
from graphopt.passes.attention.linearize.recurrent import RecurrentReplacement
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.sites import AttentionSite

_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class BlockSite(AttentionSite):
    """One of the first sites, which keep the softmax within blocks."""

    @classmethod
    def of(cls, site: AttentionSite) -> BlockSite:
        """The same site, marked."""
        return cls(**{f.name: getattr(site, f.name) for f in fields(site)})


class TransNormerAttention(RecurrentReplacement):
    """phi(x) = 1 + elu(W x); a recurrence in causal sites, two products in the others."""

    def __init__(self, site: AttentionSite) -> None:
        """Start from maps that give the site's own logits, and a gain of 1."""
        super().__init__(site, window=0)
        for_query, for_key = halves_of(site.scale)
        self.query_map = LinearMap(identity(self.heads, self.head_dim), self.dtype, for_query)
        self.key_map = LinearMap(identity(self.kv_heads, self.head_dim), self.dtype, for_key)
        self.gain = torch.nn.Parameter(torch.ones(1, self.heads, 1, self.value_dim))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        weight = self.new_weight(key_weight, q)
        query, keys = 1 + F.elu(self.query_map(q)), 1 + F.elu(self.key_map(self.new(k, q)))
        # Sums without a denominator outgrow fp16, so they stay wide until they are normalised.
        wide = torch.promote_types(self.dtype, torch.float32)
        values = self.new(v, q).to(wide)
        if weight is not None:
            keys = keys * weight.to(wide)
        sums = self.sums(query, keys, values)
        return (F.rms_norm(sums, (self.value_dim,), eps=_EPS) * self.gain).to(self.dtype)

    def sums(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """phi(q) (phi(k)^T v) over the keys that each query sees [B, Hq, T, Dv]."""
        if self.site.causal:
            results = torch.ops.graphopt.linear_attention(query, keys, values, None, None, None, "linear", 1.0)
            out: torch.Tensor = results[0]
            return out
        state = torch.matmul(torch.transpose(keys, -1, -2), values)
        if self.heads > self.kv_heads:
            state = torch.repeat_interleave(state, self.heads // self.kv_heads, 1)
        return torch.matmul(query, state)

    def state_shape(self) -> tuple[int, int, int]:
        """The recurrence has no denominator."""
        return self.kv_heads, self.head_dim, self.value_dim


class BlockAttention(LinearReplacement):
    """softmax within blocks that are counted from the first token, with a learned temperature per head."""

    def __init__(self, site: AttentionSite, *, block: int) -> None:
        """Start from the site's own temperature.

        Args:
            site: what is replaced; without a cache, which would need each token's place in its block.
            block: number of tokens in a block.
        """
        super().__init__(site)
        self.block = block
        self.temperature = torch.nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        self._require_one_length(q, k)
        out: torch.Tensor = torch.ops.graphopt.block_attention(
            q * self.temperature, k, v, key_weight, self.block, self.site.causal, self.site.scale
        )
        return out

    def _require_one_length(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Raise a GraphOptError where queries and keys are of two sequences, which have no blocks in common."""
        if isinstance(q, fx.Proxy):
            return  # traced: the recorded values have been looked at before
        if q.shape[2] != k.shape[2]:
            raise GraphOptError(
                f"expected as many keys as queries for block_layers, found {k.shape[2]} and {q.shape[2]} at site "
                f"{self.site.name!r}; leave it out by layers or use block_layers=0"
            )
