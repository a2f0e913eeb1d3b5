"""Entering the kernels into the table of graphopt.ops."""

from __future__ import annotations

import torch

from graphopt.ops import kernels, linear_attention, windowed_linear_attention
from graphopt.ops.linear_attention import chunked
from graphopt.ops.windowed_linear_attention import reference

from . import linear_attention as linear
from . import windowed_attention as windowed
from .linear_gradients import backward as linear_backward
from .windowed_gradients import backward as windowed_backward

# Position of key_weight among the arguments of windowed_linear_attention: a mask, which is not trained.
_KEY_WEIGHT = 6


def register(device: str) -> None:
    """Both operators on this type of device, forward and backward."""
    kernels.register(
        linear_attention,
        chunked,
        device,
        kernels.Kernels(linear.forward, linear_backward, _supports_linear),
    )
    kernels.register(
        windowed_linear_attention,
        reference,
        device,
        kernels.Kernels(windowed.forward, windowed_backward, _supports_windowed, constant=(_KEY_WEIGHT,)),
    )


def _supports_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *others: object,
) -> bool:
    # The reference says what is wrong with arguments that fit no rule, and knows decays per feature for all of them.
    fine = decay is not None and decay.shape[-1] > 1
    return linear.supported(q, k, v) and not (fine and beta is not None)


def _supports_windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    *others: object,
) -> bool:
    return windowed.supported(q, k, v, query_features, key_features)
