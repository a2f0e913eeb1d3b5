"""Softmax whose first pass keeps a running maximum m and the sum s of exp(x_j - m), which is rescaled as m grows.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

from __future__ import annotations

import torch

from graphopt.ops import kernels
from graphopt.ops.softmax_gradient import register_softmax_gradient
from graphopt.ops.unified_max_softmax import check_floats

# Entries of a row that are taken in at once: one step per entry would be a Python loop over the row.
BLOCK = 1024


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Softmax along one axis.

    Args:
        x: floats of any shape, such as scores [B, H, T, S].
        dim: the axis.

    Returns:
        The shape and type of `x`; computed in fp32 or better. An entry of -inf weighs 0, and a row of them is 0; a row
        with NaN or +inf is NaN.

    Raises:
        ValueError: `x` holds no floats.
    """
    check_floats(x)
    if not x.numel():
        return x.new_empty(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    maximum = torch.full_like(wide.select(dim, 0) if x.dim() else wide, -torch.inf).unsqueeze(dim)
    total = torch.zeros_like(maximum)
    for block in wide.unsqueeze(0).split(BLOCK) if not x.dim() else wide.split(BLOCK, dim):
        grown = torch.maximum(maximum, block.amax(dim, keepdim=True))
        shift = finite(grown)
        total = total * torch.exp(maximum - shift) + torch.exp(block - shift).sum(dim, keepdim=True)
        maximum = grown
    y = torch.exp(wide - finite(maximum)) / total.masked_fill(total == 0, 1)
    return y.view(x.shape).to(x.dtype).contiguous()


def finite(maximum: torch.Tensor) -> torch.Tensor:
    """What to subtract from a row: its maximum, or 0 where it has seen -inf alone, since -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


online_softmax = torch.library.custom_op("graphopt::online_softmax", reference, mutates_args=())


@online_softmax.register_fake
def _(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


register_softmax_gradient(online_softmax)
kernels.look_up(online_softmax, reference, "cpu")
