"""o_i = s q_i^T (K^T V) + (1 - s q_i . sum_j k_j) mean(V): linear attention, weights that sum to one without division.

The weights may be negative, and two queries share theirs only where they are equal (injectivity). With s = scale / N
they are the first-order expansion of the softmax. In the paper a 3x3 depthwise convolution of the values stands beside
it, whose kernel comes from the mean token.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention" (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.passes.attention.linearize.maps import LinearMap, identity
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.sites import AttentionSite

_TINY = 1e-12
_SIDE = 3


class InlineAttention(LinearReplacement):
    """Bidirectional attention by the covariance of keys and values, with one learned map of the queries per head.

    A map of the keys would change nothing: q W (k U)^T = q (W U^T) k^T, and a shift of the keys cancels out.
    """

    def __init__(self, site: AttentionSite, *, grid: int = 0) -> None:
        """Start from the first-order expansion of the softmax, without a convolution.

        Args:
            site: what is replaced; bidirectional.
            grid: side of the square of tokens for the convolution; tokens before the last grid^2, such as a class
                token, have none. 0 leaves it out, which a varying number of tokens needs.
        """
        super().__init__(site)
        self.grid = grid
        self.query_map = LinearMap(identity(self.heads, self.head_dim), self.dtype, site.scale)
        if grid:
            self.hidden = LinearMap(identity(self.kv_heads, self.value_dim), self.dtype)
            self.kernel = LinearMap(torch.zeros(self.kv_heads, self.value_dim, _SIDE * _SIDE), self.dtype)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearReplacement.attend`; a key of weight w counts as w keys."""
        wide = torch.promote_types(self.dtype, torch.float32)
        query, keys, values = self.query_map(q), k.to(wide), v.to(wide)
        weight = torch.ones_like(torch.narrow(keys, -1, 0, 1)) if key_weight is None else key_weight.to(wide)
        total = torch.sum(weight, 2, keepdim=True) + _TINY
        mean = torch.sum(values * weight, 2, keepdim=True) / total
        # s K^T V - s (sum k) mean(V)^T, as one product: subtracting two large ones would cost digits.
        state = torch.matmul(torch.transpose(keys, -1, -2), (values - mean) * weight) / total
        out = self.spread(mean) + torch.matmul(query, self.spread(state))
        if self.grid:
            out = out + self.spread(self.local(values * weight, mean))
        return out.to(self.dtype)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to a key head [B, Hkv, ..], once for each of its query heads."""
        groups = self.heads // self.kv_heads
        return torch.repeat_interleave(x, groups, 1) if groups > 1 else x

    def local(self, values: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """The depthwise convolution of the values on the grid [B, Hkv, T, Dv], its kernel predicted from the mean."""
        self._require_grid(values)
        count = self.grid * self.grid
        kernel = torch.unsqueeze(self.kernel(F.silu(self.hidden(mean))), 2)  # [B, Hkv, 1, 1, 9]
        square = torch.unflatten(torch.narrow(values, 2, -count, count), 2, (self.grid, self.grid))
        padded = F.pad(square, (0, 0, 1, 1, 1, 1))
        shifted = [
            torch.narrow(torch.narrow(padded, 2, i, self.grid), 3, j, self.grid)
            * torch.narrow(kernel, -1, _SIDE * i + j, 1)
            for i in range(_SIDE)
            for j in range(_SIDE)
        ]
        out = shifted[0]
        for term in shifted[1:]:
            out = out + term
        before = torch.zeros_like(values[:, :, :-count])
        return torch.cat([before, torch.flatten(out, 2, 3)], 2)

    def _require_grid(self, values: torch.Tensor) -> None:
        """Raise a GraphOptError where there are fewer tokens than the grid has places."""
        if isinstance(values, fx.Proxy):
            return  # traced: the recorded values have been looked at before
        if values.shape[2] < self.grid * self.grid:
            raise GraphOptError(
                f"expected at least {self.grid} x {self.grid} tokens for grid={self.grid}, found {values.shape[2]} at "
                f"site {self.site.name!r}; give the side of the model's own grid, or grid=0"
            )
