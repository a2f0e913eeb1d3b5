"""Entering the kernels into the table of graphopt.ops."""

from __future__ import annotations

import functools

import torch

from graphopt.ops import (
    group_rational,
    kernels,
    linear_attention,
    linear_rational,
    online_softmax,
    softplus_attention,
    two_pass_softmax,
    unified_max_softmax,
    windowed_linear_attention,
)
from graphopt.ops.group_rational import reference as group_rational_reference
from graphopt.ops.linear_attention import chunked
from graphopt.ops.linear_rational import reference as linear_rational_reference
from graphopt.ops.online_softmax import reference as online_reference
from graphopt.ops.softplus_attention import reference as softplus_reference
from graphopt.ops.two_pass_softmax import reference as two_pass_reference
from graphopt.ops.unified_max_softmax import reference as unified_reference
from graphopt.ops.windowed_linear_attention import reference

from . import group_rational as grouped
from . import linear_attention as linear
from . import linear_rational as linear_grouped
from . import softmax
from . import softplus_attention as softplus
from . import windowed_attention as windowed
from .linear_gradients import backward as linear_backward
from .windowed_gradients import backward as windowed_backward

# Position of key_weight among the arguments of windowed_linear_attention: a mask, which is not trained.
_KEY_WEIGHT = 6


def register(device: str) -> None:
    """All operators that have kernels, on this type of device."""
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
    kernels.register(
        softplus_attention,
        softplus_reference,
        device,
        kernels.Kernels(softplus.forward, softplus.backward, _supports_softplus),
    )
    kernels.register(
        group_rational,
        group_rational_reference,
        device,
        kernels.Kernels(grouped.forward, grouped.backward, grouped.supported),
    )
    kernels.register(
        linear_rational,
        linear_rational_reference,
        device,
        kernels.Kernels(linear_grouped.forward, linear_grouped.backward, linear_grouped.supported),
    )
    softmaxes = (
        (two_pass_softmax, two_pass_reference, "two_pass"),
        (online_softmax, online_reference, "online"),
        (unified_max_softmax, unified_reference, "unified"),
    )
    for operator, plain, form in softmaxes:
        # Their gradient needs the result alone, and is the same for all: it stays torch's.
        forward = functools.partial(softmax.forward, form=form)
        kernels.register(operator, plain, device, kernels.Kernels(forward, None, _supports_softmax))


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


def _supports_softplus(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    *others: object,
) -> bool:
    return softplus.supported(q, k, v, power)


def _supports_softmax(x: torch.Tensor, *others: object) -> bool:
    return softmax.supported(x)
