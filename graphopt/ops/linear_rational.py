"""A linear layer and the grouped rational function of what it gives, in one operator.

Kernels apply the function while a tile of the product is at hand, so that the product is never stored; the gradient
computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ops import kernels
from graphopt.ops.group_rational import check
from graphopt.ops.group_rational import gradients as group_gradients
from graphopt.ops.group_rational import reference as group_rational


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> torch.Tensor:
    """`group_rational` of x W^T + b.

    Args:
        x: [.., K].
        weight: W [C, K], in the type of `x`; any strides.
        bias: b [C], or None.
        numerator: [G, m + 1] or [1, m + 1], as `group_rational` takes it, as is all that follows.
        denominator: [G, n] or [1, n].
        form: which denominator.
        split: relu minus the rational function of the magnitude.

    Returns:
        [.., C] in the type of `x`.

    Raises:
        ValueError: sizes do not fit each other, or there is no such form.
    """
    return group_rational(F.linear(x, weight, bias), numerator, denominator, form, split)


linear_rational = torch.library.custom_op("graphopt::linear_rational", reference, mutates_args=())


@linear_rational.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    check(y, numerator, denominator, form)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, numerator, denominator, *rest = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, *([bias] if ctx.has_bias else []), numerator, denominator)
    ctx.options = tuple(rest)


def gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *function: Any,
    of_function: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = group_gradients,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Of x, weight, bias, numerator and denominator; the product is computed again.

    Args:
        gradient: of the result [.., C].
        x: as in `reference`.
        weight: as in `reference`.
        bias: as in `reference`; without one its gradient is None.
        function: what else `reference` takes.
        of_function: what computes `graphopt.ops.group_rational.gradients`.
        wanted: whether those of x and of weight are; None else.
    """
    dz, da, db = of_function(gradient, F.linear(x, weight, bias), *function)
    rows = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight if wanted[0] else None
    dw = rows.transpose(0, 1) @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
    return dx, dw, None if bias is None else rows.sum(0), da, db


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    x, weight, *others = ctx.saved_tensors
    bias = others.pop(0) if ctx.has_bias else None
    found = gradients(gradient, x, weight, bias, *others, *ctx.options, wanted=ctx.needs_input_grad[:2])
    return *found, None, None


linear_rational.register_autograd(_backward, setup_context=_setup)
kernels.look_up(linear_rational, reference, "cpu")
