"""dx = y (g - sum(g y)): the gradient that all forms of softmax share, from the result alone."""

from __future__ import annotations

from typing import Any

import torch


def register_softmax_gradient(op: torch._library.custom_ops.CustomOpDef) -> None:
    """Give `op(x, dim, ...)`, a softmax over `dim`, its gradient; a row of zeros has a gradient of zeros.

    Only the result is kept for the backward pass, which is one fused operator of torch on every device. So kernels for
    such an operator need no backward function of their own.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        # An argument that was left at its default has no entry in `inputs`.
        ctx.dim = inputs[1] if len(inputs) > 1 else -1
        ctx.count = len(inputs)

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        found = torch._softmax_backward_data(gradient.contiguous(), y, ctx.dim, y.dtype)
        return (found, *[None] * (ctx.count - 1))

    # `graphopt.ops.kernels` looks for the inputs among the saved tensors, unless a gradient has this mark.
    backward.table = True  # type: ignore[attr-defined]
    op.register_autograd(backward, setup_context=setup_context)
