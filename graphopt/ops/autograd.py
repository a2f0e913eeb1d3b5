"""Gradients of a custom operator from its reference: run it again with gradients on, and differentiate that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_reference_autograd(
    op: torch._library.custom_ops.CustomOpDef, reference: Callable[..., torch.Tensor]
) -> None:
    """Give `op` the gradient of `reference`; only the inputs are kept for the backward pass."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [other[0] if other is not None else next(saved) for other in ctx.others]
        needed = [i for i, want in enumerate(ctx.needs_input_grad) if want]
        with torch.enable_grad():
            for i in needed:
                inputs[i] = inputs[i].detach().requires_grad_(True)
            output = reference(*inputs)
            found = torch.autograd.grad(output, [inputs[i] for i in needed], gradient, allow_unused=True)
        gradients: list[Any] = [None] * len(inputs)
        for i, value in zip(needed, found, strict=True):
            gradients[i] = value
        return tuple(gradients)

    op.register_autograd(backward, setup_context=setup_context)
