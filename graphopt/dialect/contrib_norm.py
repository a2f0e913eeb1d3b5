"""Norms of onnxruntime's com.microsoft domain, and its RMS norm in ai.onnx."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN
from .nn import layer_normalization_1, rms_norm
from .registry import operator


@operator("SimplifiedLayerNormalization", counted=True)
def simplified_layer_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int
) -> Tensor | tuple[Tensor, ...]:
    """Divide by the root mean square, scale; the other output is 1 / root mean square."""
    y, inverse = rms_norm(x, scale, axis, epsilon, stash_type)
    return y if outputs == 1 else (y, inverse)


def _skipped(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip
    return total if bias is None else total + bias


@operator("SkipLayerNormalization", domain=DOMAIN, counted=True)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise x + skip + bias; the fourth output is that sum."""
    total = _skipped(x, skip, bias)
    results = layer_normalization_1(total, gamma, beta, epsilon=epsilon, outputs=3)
    return results[0] if outputs == 1 else (*results, total)[:outputs]


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN, counted=True)
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int,
) -> Tensor | tuple[Tensor | None, ...]:
    """Divide x + skip + bias by its root mean square; the fourth output is that sum, the second is unset."""
    total = _skipped(x, skip, bias)
    y, inverse = rms_norm(total, gamma, -1, epsilon, 1)
    return y if outputs == 1 else (y, None, inverse, total)[:outputs]


@operator("GroupNorm", domain=DOMAIN)
def group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
) -> Tensor:
    """Normalise each group of channels, `[N, *spatial, C]` or `[N, C, *spatial]`; with activation 1 follows SiLU."""
    first = x.movedim(-1, 1) if channels_last else x
    wide = first.to(torch.promote_types(x.dtype, gamma.dtype))
    y = torch.group_norm(wide, groups, gamma.to(wide.dtype), beta.to(wide.dtype), epsilon)
    y = (F.silu(y) if activation else y).to(x.dtype)
    return y.movedim(1, -1) if channels_last else y


@operator("SkipGroupNorm", domain=DOMAIN, counted=True)
def skip_group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x + skip + bias as GroupNorm does; the other output is that sum.

    The skip is of the shape of x, or without the spatial axes `[N, C]`.
    """
    spatial = (1,) * (x.dim() - 2)
    channels = (-1, *((*spatial,) if not channels_last else ()))
    if skip.dim() == 2:
        skip = skip.reshape(skip.shape[0], *spatial, -1) if channels_last else skip.reshape(*skip.shape, *spatial)
    total = x + skip
    total = total if bias is None else total + bias.reshape(channels)
    y = group_norm(
        total, gamma, beta, activation=activation, channels_last=channels_last, epsilon=epsilon, groups=groups
    )
    return y if outputs == 1 else (y, total)
