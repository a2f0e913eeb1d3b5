"""Activations, softmax in both of its meanings, and dropout at inference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import STORED_ONLY
from .math import _aligned
from .random import uniform
from .registry import operator


@operator("Relu")
def relu_1(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return torch.relu(x)


@operator("Sigmoid")
def sigmoid_1(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


@operator("Tanh")
def tanh_1(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent."""
    return torch.tanh(x)


@operator("LeakyRelu")
def leaky_relu_1(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """Return x, times alpha where negative."""
    return F.leaky_relu(x, alpha)


@operator("PRelu")
def prelu_1(x: Tensor, slope: Tensor) -> Tensor:
    """Return x, times the slope of its channel where negative."""
    return prelu_7(x, _aligned(x, slope, 1, int(slope.dim() == 1 and x.dim() > 1 and slope.numel() > 1)))


@operator("PRelu", since=7)
def prelu_7(x: Tensor, slope: Tensor) -> Tensor:
    """Return x, times the broadcast slope where negative."""
    return x if x.dtype in STORED_ONLY else torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu_1(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x, or alpha * (exp(x) - 1) where negative."""
    return F.elu(x, alpha)


@operator("Celu", since=12)
def celu_12(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x, or alpha * (exp(x / alpha) - 1) where negative."""
    return F.celu(x, alpha)


@operator("Selu")
def selu_1(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Return gamma * x, or gamma * alpha * (exp(x) - 1) where negative."""
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid_1(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Return alpha * x + beta limited to [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("HardSwish", since=14)
def hard_swish_14(x: Tensor) -> Tensor:
    """Return x * clamp(x / 6 + 1 / 2, 0, 1)."""
    return F.hardswish(x)


@operator("Mish", since=18)
def mish_18(x: Tensor) -> Tensor:
    """Return x * tanh(softplus(x))."""
    return F.mish(x)


@operator("Swish", since=24)
def swish_24(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Softplus")
def softplus_1(x: Tensor) -> Tensor:
    """Return log(1 + exp(x))."""
    return F.softplus(x)


@operator("Softsign")
def softsign_1(x: Tensor) -> Tensor:
    """Return x / (1 + |x|)."""
    return F.softsign(x)


@operator("ThresholdedRelu", since=10)
def thresholded_relu_10(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x where above alpha, else 0."""
    return F.threshold(x, alpha, 0.0)


@operator("Shrink", since=9)
def shrink_9(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Return x moved by the bias towards zero, and 0 where |x| <= lambd."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Softmax")
def softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Normalise exp(x) over all axes from `axis` on together."""
    return torch.softmax(_as_rows(x, axis), -1).reshape(x.shape)


@operator("LogSoftmax")
def log_softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return the logarithm of the softmax over all axes from `axis` on together."""
    return torch.log_softmax(_as_rows(x, axis), -1).reshape(x.shape)


@operator("Hardmax")
def hardmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return 1 at the first maximum over all axes from `axis` on together, else 0."""
    return hardmax_13(_as_rows(x, axis)).reshape(x.shape)


@operator("Softmax", since=13)
def softmax_13(x: Tensor, *, axis: int = -1) -> Tensor:
    """Normalise exp(x) along one axis."""
    return torch.softmax(x, axis)


@operator("LogSoftmax", since=13)
def log_softmax_13(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return the logarithm of the softmax along one axis."""
    return torch.log_softmax(x, axis)


@operator("Hardmax", since=13)
def hardmax_13(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return 1 at the first maximum along one axis, else 0."""
    hit = x == torch.amax(x, axis, keepdim=True)
    # Of equal maxima only the first one counts.
    return (hit & (torch.cumsum(hit, axis) == 1)).to(x.dtype)


@operator("Dropout", counted=True)
def dropout_1(x: Tensor, *, ratio: float = 0.5, is_test: int = 0, outputs: int) -> Tensor | tuple[Tensor, Tensor]:
    """Return x: at inference nothing is dropped; the mask is of the type of x."""
    return x if outputs == 1 else (x, torch.ones_like(x))


@operator("Dropout", since=10, counted=True)
def dropout_10(x: Tensor, *, ratio: float = 0.5, outputs: int) -> Tensor | tuple[Tensor, Tensor]:
    """Return x: at inference nothing is dropped; the mask is boolean."""
    return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Dropout", since=12, values=(1, 2), counted=True)
def dropout_12(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Drop elements of x at random in training mode and scale up the others; the mask is boolean.

    At inference, or with ratio zero, nothing is dropped. A seed fixes the mask: see the module `random`.
    """
    share = 0.5 if ratio is None else float(ratio)
    if training_mode is None or not bool(training_mode) or share == 0:
        return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))
    mask = uniform(x.shape, seed, x.device) >= share
    kept = 1 / (1 - share) if share < 1 else 0.0
    y = x * (mask * kept).to(x.dtype)
    return y if outputs == 1 else (y, mask)
