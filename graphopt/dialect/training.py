"""Steps of optimisers, each on any number of tensors: given are all values, then all gradients, then all states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import operator

_DOMAIN = "ai.onnx.preview.training"


def _columns(tensors: tuple[Tensor, ...], kinds: int) -> list[tuple[Tensor, ...]]:
    """Return for each optimised tensor its value, its gradient, and its states."""
    count = len(tensors) // kinds
    return list(zip(*(tensors[kind * count : (kind + 1) * count] for kind in range(kinds)), strict=True))


def _flat(steps: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return all first items, then all second items, and so on."""
    return tuple(tensor for kind in zip(*steps, strict=True) for tensor in kind)


@operator("Adagrad", domain=_DOMAIN)
def adagrad_1(
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> tuple[Tensor, ...]:
    """X - R / (1 + T decay) G / (sqrt(H + G^2) + eps), with the gradient G of the loss and of the regulariser.

    Args:
        rate: R, a scalar.
        count: T, how many updates there were.
        tensors: all values X, all gradients, all accumulated squared gradients H.
        decay_factor: how fast the rate falls.
        epsilon: against division by zero.
        norm_coefficient: of the regulariser, half the squared norm of X.

    Returns:
        All new values, then all new H.
    """
    steps = []
    for x, gradient, squares in _columns(tensors, 3):
        total = norm_coefficient * x + gradient
        grown = squares + total * total
        pace = rate.to(x.dtype) / (1 + count.to(x.dtype) * decay_factor)
        steps.append((x - pace * total / (torch.sqrt(grown) + epsilon), grown))
    return _flat(steps)


@operator("Adam", domain=_DOMAIN)
def adam_1(
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Tensor, ...]:
    """(1 - post) (X - R' V / (sqrt(H) + eps)), with running means V of the gradients and H of their squares.

    Args:
        rate: R, a scalar; R' corrects it for the start at zero, from the first update (T > 0) on.
        count: T, how many updates there were.
        tensors: all values X, all gradients, all V, all H.
        alpha: share of the old V.
        beta: share of the old H.
        epsilon: against division by zero.
        norm_coefficient: of the regulariser, half the squared norm of X.
        norm_coefficient_post: how much X shrinks after the update.

    Returns:
        All new values, then all new V, then all new H.
    """
    steps = []
    for x, gradient, mean, squares in _columns(tensors, 4):
        total = norm_coefficient * x + gradient
        mean = alpha * mean + (1 - alpha) * total
        squares = beta * squares + (1 - beta) * total * total
        times = count.to(x.dtype)
        pace = rate.to(x.dtype)
        pace = torch.where(count > 0, pace * torch.sqrt(1 - beta**times) / (1 - alpha**times), pace)
        new = x - pace * mean / (torch.sqrt(squares) + epsilon)
        steps.append(((1 - norm_coefficient_post) * new, mean, squares))
    return _flat(steps)


@operator("Momentum", domain=_DOMAIN)
def momentum_1(
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> tuple[Tensor, ...]:
    """X - R V with V' = alpha V + beta G, or by Nesterov X - R (G + alpha V').

    Args:
        rate: R, a scalar.
        count: T, how many updates there were; beta counts from the second on.
        tensors: all values X, all gradients, all momenta V.
        alpha: share of the old momentum.
        beta: share of the gradient.
        mode: `standard` or `nesterov`.
        norm_coefficient: of the regulariser, half the squared norm of X.

    Returns:
        All new values, then all new momenta.
    """
    steps = []
    for x, gradient, momentum in _columns(tensors, 3):
        total = norm_coefficient * x + gradient
        momentum = alpha * momentum + torch.where(count > 0, beta * total, total)
        direction = total + alpha * momentum if mode == "nesterov" else momentum
        steps.append((x - rate.to(x.dtype) * direction, momentum))
    return _flat(steps)
