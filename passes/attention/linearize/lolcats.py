"""softmax over a window, linear attention over everything before it, one denominator: LoLCATs.

    y_i = [ g sum_{j > i-w} exp(s q_i k_j - c_i) v_j + phi(q_i)^T sum_{j <= i-w} phi(k_j) v_j^T ] / [same, v -> 1]

Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models" (2024).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from graphopt.passes.attention.linearize.hedgehog import HedgehogAttention
from graphopt.sites import AttentionSite

Branches = Literal["both", "window", "linear"]
Start = Literal["window", "identity"]
# As published: the window starts with a tenth of its weight, so that the linear part is heard while it learns.
_GATE = 0.1
# A start that is the window alone, but for a hundredth: features of queries and keys peak at different places. With the
# published one the linear sum grows with the text and drowns the window until the maps have unlearned it.
_NEAR_GATE, _APART = 0.9, 4.0


class LolcatsAttention(HedgehogAttention):
    """Hedgehog's maps for the distant keys, softmax for the near ones."""

    def __init__(
        self,
        site: AttentionSite,
        *args: Any,
        window: int,
        sinks: int = 0,
        branches: Branches = "both",
        start: Start = "window",
        **options: Any,
    ) -> None:
        """Start as `start` says.

        Args:
            site: what is replaced; causal.
            args: see `HedgehogAttention`.
            window: how many keys are seen exactly.
            sinks: how many of the first keys are seen exactly by all queries.
            branches: `window` and `linear` leave the other part away, to see what each contributes.
            start: `window`: the linear part is faint at first; `identity`: as published, g = 0.1 and no bias.
            options: see `HedgehogAttention`.
        """
        super().__init__(site, *args, **options)
        self.window, self.sinks, self.branches = window, sinks, branches
        if branches == "linear":
            self.window = self.sinks = 0
        faint = start == "window" and branches == "both"
        gate = _NEAR_GATE if faint else _GATE
        self.gate = torch.nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(gate / (1 - gate))))
        if faint:
            self._set_apart()
        if branches == "window":
            self.requires_grad_(False)  # softmax has nothing to learn

    def _set_apart(self) -> None:
        """Biases of opposite signs: phi(q) phi(k) is exp(-2 b) of what it is without."""
        signs = torch.ones_like(self.query_map.bias.data)
        signs[..., 1::2] = -1
        self.query_map.bias.data += _APART * signs
        self.key_map.bias.data -= _APART * signs[:1]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`."""
        if self.branches == "window":
            out: torch.Tensor = torch.ops.graphopt.window_attention(
                q, k, v, key_weight, self.window, self.sinks, self.site.scale
            )
            return out
        query, keys = self.query_map(q), self.key_map(self.spread(k))
        return self.hybrid(q, k, v, query, keys, key_weight, torch.sigmoid(self.gate), self.window, self.sinks)
