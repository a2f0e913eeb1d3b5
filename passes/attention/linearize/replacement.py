"""What all methods share: keys that a cache of bounded length still holds, a state, attention transfer."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.passes.attention.replacement import AttentionReplacement

# Weight of the output's mean square below which a relative error means nothing.
_SILENT = 1e-12


class LinearReplacement(AttentionReplacement):
    """A replacement that learns the site's output, and in causal sites may carry a state."""

    def weight_of_keys(self, mask: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor | None:
        """See `AttentionReplacement.weight_of_keys`; as many keys as there are."""
        weight = super().weight_of_keys(mask, k)
        if weight is not None and self.site.past is not None:
            # Where other layers keep their whole cache, the mask covers more positions than this one's window.
            weight = torch.ops.graphopt.last_rows(weight, k)
        return weight

    def state_shape(self) -> tuple[int, int, int]:
        """Heads, features and values of the state that a causal method carries."""
        raise NotImplementedError

    def loss(self, inputs: tuple[Any, ...], expected: torch.Tensor) -> torch.Tensor:
        """Attention transfer: mean squared error of the output, relative to the original output's mean square."""
        difference = (self(*inputs).float() - expected.float()).square().mean()
        loss: torch.Tensor = difference / expected.float().square().mean().clamp(min=_SILENT)
        return loss
