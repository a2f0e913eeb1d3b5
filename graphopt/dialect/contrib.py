"""Activations and products of onnxruntime's com.microsoft domain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import hard_sigmoid_1, log_softmax_13, softmax_1, softmax_13
from .linear import gemm_1
from .registry import operator

DOMAIN = "com.microsoft"


# How many parameters an activation takes, in the order alpha, beta, gamma, and what it computes.
_ACTIVATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "": (0, lambda x: x),
    "Celu": (1, F.celu),
    "Clip": (2, torch.clamp),
    "Elu": (1, F.elu),
    "HardSigmoid": (2, lambda x, alpha, beta: hard_sigmoid_1(x, alpha=alpha, beta=beta)),
    "HardSwish": (0, F.hardswish),
    "LeakyRelu": (1, F.leaky_relu),
    "ParametricSoftplus": (2, lambda x, alpha, beta: alpha * F.softplus(beta * x)),
    "Relu": (0, torch.relu),
    "ScaledTanh": (2, lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "Selu": (2, lambda x, alpha, gamma: gamma * F.elu(x, alpha)),
    "Sigmoid": (0, torch.sigmoid),
    "Softplus": (0, F.softplus),
    "Softsign": (0, F.softsign),
    "Tanh": (0, torch.tanh),
    "ThresholdedRelu": (1, lambda x, alpha: F.threshold(x, alpha, 0.0)),
}


def activated(x: Tensor, name: str, *parameters: float | None) -> Tensor:
    """Apply the activation that a fusion put behind an operator; parameters that are None do not count."""
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f"the fused activation {name!r} is not covered")
    count, function = _ACTIVATIONS[name]
    return function(x, *[p for p in parameters if p is not None][:count])


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


@operator("BiasSplitGelu", domain=DOMAIN)
def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add the bias, and return the first half of the channels times Gelu of the second."""
    value, gate = (x + bias).chunk(2, -1)
    return value * F.gelu(gate)


@operator("BiasAdd", domain=DOMAIN)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """Return x + bias + skip."""
    return x + bias + skip


@operator("BiasSoftmax", domain=DOMAIN)
def bias_softmax(data: Tensor, bias: Tensor, *, axis: int = 1, is_inner_broadcast: int) -> Tensor:
    """Return the softmax of data + bias over all axes from `axis` on together."""
    return softmax_1(data + bias, axis=axis)


@operator("TransposeMatMul", domain=DOMAIN)
def transpose_mat_mul(a: Tensor, b: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    """Return alpha * a @ b, either operand transposed first: the earlier name of FusedMatMul."""
    return fused_mat_mul(a, b, alpha=alpha, transA=transA, transB=transB)


@operator("FusedMatMulActivation", domain=DOMAIN)
def fused_mat_mul_activation(
    a: Tensor,
    b: Tensor,
    *,
    activation: str,
    activation_alpha: float | None = None,
    activation_axis: int = -1,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Return the activation of FusedMatMul."""
    y = fused_mat_mul(a, b, alpha=alpha, transA=transA, transB=transB, transBatchA=transBatchA, transBatchB=transBatchB)
    if activation in ("Softmax", "LogSoftmax"):
        return (softmax_13 if activation == "Softmax" else log_softmax_13)(y, axis=activation_axis)
    return activated(y, activation, activation_alpha, activation_beta, activation_gamma)


@operator("FusedGemm", domain=DOMAIN)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return the activation of Gemm."""
    y = gemm_1(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return activated(y, activation, activation_alpha, activation_beta, activation_gamma)


@operator("GemmFastGelu", domain=DOMAIN)
def gemm_fast_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh approximation of Gelu of x @ weight + bias."""
    return fast_gelu(x @ weight, bias)
