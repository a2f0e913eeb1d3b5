"""Activations, norms and products of onnxruntime's com.microsoft domain, and its RMS norm in ai.onnx."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .nn import layer_normalization_1, rms_norm
from .registry import operator

DOMAIN = "com.microsoft"


@operator("Gelu", domain=DOMAIN)
def microsoft_gelu(x: Tensor) -> Tensor:
    """Return x times the normal distribution function of x."""
    return F.gelu(x)


@operator("FastGelu", domain=DOMAIN)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh approximation of Gelu of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("BiasGelu", domain=DOMAIN)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return Gelu of x + bias."""
    return F.gelu(x + bias)


@operator("QuickGelu", domain=DOMAIN)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """Return x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


@operator("FusedMatMul", domain=DOMAIN)
def fused_mat_mul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Return alpha * a @ b, either operand transposed first."""
    y = torch.matmul(_turned(a, transA, transBatchA), _turned(b, transB, transBatchB))
    return y if alpha == 1.0 else y * alpha


def _turned(x: Tensor, matrix: int, batch: int) -> Tensor:
    if batch:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if matrix and x.dim() > 1 else x


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
