"""phi(x) = [f(x W + b), f(-x W - b)]: the learned feature map of Hedgehog (Zhang et al., 2024)."""

from __future__ import annotations

import torch

from graphopt.ops.autograd import register_reference_autograd

ACTIVATIONS = ("softmax", "exp")


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "softmax"
) -> torch.Tensor:
    """Features of `x`, all positive.

    Args:
        x: [B, H, T, D].
        weight: [H, D, F], one map per head.
        bias: [H, 1, F].
        activation: `softmax` over the features of each sign, or `exp` of each feature. `exp` is not shifted by a
            maximum: the shift would differ between keys and not cancel; keep |x W + b| below 80.

    Returns:
        [B, H, T, 2 F], in the type of `x`; computed in fp32 or better.

    Raises:
        ValueError: there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {ACTIVATIONS}, got {activation!r}")
    wide = torch.promote_types(x.dtype, torch.float32)
    projected = x.to(wide) @ weight.to(wide)
    if bias is not None:
        projected = projected + bias.to(wide)
    both = torch.stack([projected, -projected], dim=-2)  # [B, H, T, 2, F]
    features = torch.softmax(both, dim=-1) if activation == "softmax" else torch.exp(both)
    return features.flatten(-2).to(x.dtype)


hedgehog_map = torch.library.custom_op("graphopt::hedgehog_map", reference, mutates_args=())


@hedgehog_map.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "softmax"
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 2 * weight.shape[-1]))


register_reference_autograd(hedgehog_map, reference)
