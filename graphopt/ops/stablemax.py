"""s(x_i) / sum_j s(x_j) with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below: StableMax, a softmax without exponentials.

Prieto et al., "Grokking at the Edge of Numerical Stability" (2025).
"""

from __future__ import annotations

import torch

from graphopt.ops.autograd import register_reference_autograd


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Probabilities along one axis, in the order of the softmax's but other ones; they change where x is shifted.

    Args:
        x: of any shape; computed in fp32 or better.
        dim: the axis.

    Returns:
        As `x`. An entry of -inf weighs 0, a row of -inf alone gives zeros, a row with NaN is NaN throughout.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The branch that is not taken must not divide by 1 - 1 either: where multiplies its gradient by 0.
    weights = torch.where(wide >= 0, wide + 1, 1 / (1 - wide.clamp(max=0)))
    total = weights.sum(dim, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)).to(x.dtype)


stablemax = torch.library.custom_op("graphopt::stablemax", reference, mutates_args=())


@stablemax.register_fake
def _(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.empty_like(x)


register_reference_autograd(stablemax, reference)
