"""S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with the gate taken from the keys: Liger.

q and k are softmaxes over the head dimension of the projections before any rotation, log a_t = logsigmoid(k_t) / 16 of
the same key projection, and the output is half of o_t and half of softmax attention over a window (here the halves are
learned shares).

Lan et al., "Liger: Linearizing Large Language Models to Gated Recurrent Structures" (2025).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from graphopt.passes.attention.linearize.recurrent import RecurrentReplacement
from graphopt.sites import AttentionSite

# The published temperature of the gate: a forgets slowly, as exp(logsigmoid(0) / 16) = 0.96.
_TEMPERATURE = 16.0


class LigerAttention(RecurrentReplacement):
    """Gated recurrence without parameters of its own, but for the shares of the two parts."""

    def __init__(self, site: AttentionSite, *, window: int, sinks: int = 0, start: str = "window") -> None:
        """See `RecurrentReplacement`; the site has been extended by its unrotated queries and keys."""
        super().__init__(site, window=window, sinks=sinks, start=start)

    def forward(self, *values: Any) -> Any:
        """From the values of the site's inputs to the value of its output."""
        operands = self.site.split(*values)
        query, keys = self.site.unrotated(*values) if self.site.unrotated else (operands.q, operands.k)
        key_weight = self.weight_of_keys(operands.mask, operands.k)
        fresh, values_ = self.new(keys, query), self.new(operands.v, query)
        weight = self.new_weight(key_weight, query)
        recurrence = self.recurrence(query, fresh, values_, weight)
        out = self.mixed(recurrence, operands.q, operands.k, operands.v, key_weight)
        return self.site.merge(out)

    def state_shape(self) -> tuple[int, int, int]:
        """The recurrence has no denominator."""
        return self.kv_heads, self.head_dim, self.value_dim

    def recurrence(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """The gated part; q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], weight [B or 1, 1, T, 1]."""
        decay = F.logsigmoid(k) * (1 / _TEMPERATURE)
        query, keys = torch.softmax(q, -1), torch.softmax(k, -1)
        if weight is not None:
            keys = keys * weight
        out: torch.Tensor = torch.ops.graphopt.linear_attention(query, keys, v, decay, None, None, "gated", 1.0)[0]
        return out
