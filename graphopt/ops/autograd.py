"""Gradients of a custom operator from its reference: run it again with gradients on, and differentiate that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_reference_autograd(op: torch._library.custom_ops.CustomOpDef, reference: Callable[..., Any]) -> None:
    """Give `op` the gradient of `reference`, which returns a tensor or a tuple of them.

    Only the inputs are kept for the backward pass.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [other[0] if other is not None else next(saved) for other in ctx.others]
        needed = [i for i, want in enumerate(ctx.needs_input_grad) if want]
        with torch.enable_grad():
            for i in needed:
                inputs[i] = inputs[i].detach().requires_grad_(True)
            results = reference(*inputs)
            outputs = results if isinstance(results, tuple) else (results,)
            # An output that nothing used, or that does not depend on these inputs, adds nothing.
            used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in used], [inputs[i] for i in needed], [g for _, g in used], allow_unused=True
            )
        result: list[Any] = [None] * len(inputs)
        for i, value in zip(needed, found, strict=True):
            result[i] = value
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)
