"""Faster implementations of the operators on one kind of device, beside the references.

A backend enters its functions with `register`. Tensors on that device then take them, forward and backward, wherever
they support types and sizes; all others take the reference as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_Op = torch._library.custom_ops.CustomOpDef


@dataclass(frozen=True)
class Kernels:
    """One operator on one device; `inputs` are all arguments of the operator, in order."""

    forward: Callable[..., Any]
    """forward(*inputs) -> what the operator returns."""
    backward: Callable[..., tuple[Any, ...]]
    """backward(*output_gradients, *inputs) -> a gradient or None per input; an output gradient may be None."""
    supports: Callable[..., bool]
    """supports(*inputs) -> whether both take these types and sizes."""
    constant: tuple[int, ...] = ()
    """Positions of inputs whose gradients `backward` does not compute: the reference does where one is wanted."""


# Name of the operator and type of the device -> its implementation there.
_TABLE: dict[tuple[str, str], Kernels] = {}


def registered(op: _Op, device: str) -> Kernels | None:
    """What runs `op` on tensors of this type of device, if not the reference."""
    return _TABLE.get((op._qualname, device))


def register(op: _Op, reference: Callable[..., Any], device: str, kernels: Kernels) -> None:
    """Let `kernels` compute `op` on tensors of this type of device, from now on.

    Args:
        op: an operator of `graphopt.ops`.
        reference: its plain-torch implementation, for what the kernels do not support.
        device: a torch device type, such as `cuda` (which is also what torch calls HIP devices).
        kernels: the functions.
    """
    known = (op._qualname, device) in _TABLE
    _TABLE[op._qualname, device] = kernels
    if known:
        return

    def forward(*inputs: Any) -> Any:
        chosen = _TABLE[op._qualname, device]
        return chosen.forward(*inputs) if chosen.supports(*inputs) else reference(*inputs)

    op.register_kernel(device)(forward)
    _register_autograd(op)


def _register_autograd(op: _Op) -> None:
    """Puts the table in front of the gradient that the operator has."""
    setup, fallback = op._setup_context_fn, op._backward_fn
    if setup is None or fallback is None or hasattr(fallback, "table"):
        return

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)
        ctx.layout = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.layout]
        kernels = registered(op, inputs[0].device.type)
        # Arguments that were left at their defaults have no entry of their own.
        wanted = [*ctx.needs_input_grad, *[False] * (len(inputs) - len(ctx.needs_input_grad))]
        if kernels is None or any(wanted[i] for i in kernels.constant) or not kernels.supports(*inputs):
            return fallback(ctx, *gradients)
        found = kernels.backward(*gradients, *inputs)
        padded = (*found, *[None] * (len(inputs) - len(found)))
        return tuple(x if want else None for x, want in zip(padded, wanted, strict=True))

    backward.table = True  # type: ignore[attr-defined]
    op.register_autograd(backward, setup_context=setup_context)
