"""What replaces an attention site: from the values that enter it to the value that leaves it, by way of q, k and v."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.sites import AttentionSite, MaskKind


class AttentionReplacement(torch.nn.Module):
    """A module in the place of an attention site; subclasses say what it computes from q, k and v.

    Every option of the method is a plain attribute: the module is traced with torch.fx, so nothing in `attend` may
    depend on the values or sizes of tensors.
    """

    def __init__(self, site: AttentionSite) -> None:
        """Remember the site, whose heads and head dimension are static."""
        super().__init__()
        assert site.query_heads is not None
        assert site.kv_heads is not None
        assert site.head_dim is not None
        self.site = site
        self.heads, self.kv_heads, self.head_dim = site.query_heads, site.kv_heads, site.head_dim
        self.value_dim = site.value_dim or site.head_dim
        self.dtype = site.dtype

    def forward(self, *values: Any) -> Any:
        """From the values of the site's inputs to the value of its output."""
        operands = self.site.split(*values)
        out = self.attend(operands.q, operands.k, operands.v, self.weight_of_keys(operands.mask, operands.k))
        return self.site.merge(out)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention in canonical layout.

        Args:
            q: [B, Hq, T, D], unscaled.
            k: [B, Hkv, S, D].
            v: [B, Hkv, S, Dv].
            key_weight: [B or 1, 1, S, 1]; 0 hides a key.

        Returns:
            [B, Hq, T, Dv].
        """
        raise NotImplementedError

    def weight_of_keys(self, mask: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor | None:
        """Exp of each key's own mask value [B, 1, S, 1]: exp(s + m) = exp(s) exp(m), so hidden keys weigh 0.

        The last row of the mask has what every row has: under a causal mask the last query sees all keys.
        """
        if mask is None or self.site.mask.kind is MaskKind.CAUSAL:
            return None
        row = torch.transpose(torch.narrow(mask, -2, -1, 1), -1, -2)
        return torch.exp(row) if self.site.mask.additive else row.to(torch.float32)
