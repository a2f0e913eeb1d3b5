"""What the methods with a plain recurrence share: new tokens only, a share for the window, no common denominator."""

from __future__ import annotations

import torch

from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.sites import AttentionSite

_TINY = 1e-12
# Logit of the window's share at a start that is nearly the window alone: 0.98.
_NEAR = 4.0


class RecurrentReplacement(LinearReplacement):
    """(1 - m) times a recurrence plus m times softmax over a window, with one learned m per head."""

    def __init__(self, site: AttentionSite, *, window: int, sinks: int = 0, start: str = "window") -> None:
        """Start with a large share for the window, or with equal ones.

        Args:
            site: what is replaced; causal.
            window: how many keys the softmax sees; 0 leaves the recurrence alone.
            sinks: how many of the first keys it sees besides.
            start: `window`: the recurrence is faint at first; `identity`: equal shares.
        """
        super().__init__(site)
        self.window, self.sinks = window, sinks
        if window:
            self.share = torch.nn.Parameter(torch.full((1, self.heads, 1, 1), _NEAR if start == "window" else 0.0))

    def mixed(
        self,
        recurrence: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """The two shares together; they add up to one."""
        if not self.window:
            return recurrence.to(self.dtype)
        near = torch.ops.graphopt.window_attention(q, k, v, key_weight, self.window, self.sinks, self.site.scale)
        # The share is in fp32, so that it can be trained; what leaves the site has the site's type.
        out: torch.Tensor = (recurrence + torch.sigmoid(self.share) * (near - recurrence)).to(self.dtype)
        return out

    def new(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens that come with this call: what a cache joins in front is in the state already."""
        if self.site.past is None:
            return x
        out: torch.Tensor = torch.ops.graphopt.last_rows(x, q)
        return out

    def new_weight(self, key_weight: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
        """The weights of those tokens [B or 1, 1, T, 1]."""
        return None if key_weight is None else self.new(key_weight, q)


def unit(x: torch.Tensor) -> torch.Tensor:
    """X over its length along the last axis."""
    return x * torch.rsqrt(torch.sum(x * x, -1, keepdim=True) + _TINY)
