"""Faster implementations of the operators on one kind of device, beside the references.

A backend enters its functions with `register`. Tensors on that device then take them, forward and backward, wherever
they support types and sizes; all others take the reference as before. An operator that was told to `look_up` enables
the backend that is named after the device when it first runs there, so nobody has to ask for its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt import registry

_Op = torch._library.custom_ops.CustomOpDef


@dataclass(frozen=True)
class Kernels:
    """One operator on one device; `inputs` are all arguments of the operator, in order."""

    forward: Callable[..., Any]
    """forward(*inputs) -> what the operator returns."""
    backward: Callable[..., tuple[Any, ...]] | None
    """backward(*output_gradients, *inputs) -> a gradient or None per input; an output gradient may be None.
    None leaves the operator the gradient that it has."""
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
    _put_in_front(op, reference, device)
    if kernels.backward is not None:
        _register_autograd(op)


def look_up(op: _Op, reference: Callable[..., Any], device: str) -> None:
    """Let the first call of `op` on this type of device enable the backend of its name, which may `register` kernels.

    Args:
        op: an operator of `graphopt.ops`.
        reference: its plain-torch implementation, which runs where there are none.
        device: a torch device type, and the name of a backend; there need not be one.
    """
    _put_in_front(op, reference, device, lambda: _enable(device))


@functools.cache
def _enable(device: str) -> None:
    if device in registry.names(registry.BACKENDS):
        registry.backend(device).enable()


def _put_in_front(
    op: _Op, reference: Callable[..., Any], device: str, prepare: Callable[[], None] | None = None
) -> None:
    """Asks the table at each call."""

    def forward(*inputs: Any) -> Any:
        if prepare is not None:
            prepare()
        chosen = registered(op, device)
        if chosen is None or not chosen.supports(*inputs):
            return reference(*inputs)
        return chosen.forward(*inputs)

    op.register_kernel(device)(forward)


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
        if kernels is None or kernels.backward is None or any(wanted[i] for i in kernels.constant):
            return fallback(ctx, *gradients)
        if not kernels.supports(*inputs):
            return fallback(ctx, *gradients)
        found = kernels.backward(*gradients, *inputs)
        padded = (*found, *[None] * (len(inputs) - len(found)))
        return tuple(x if want else None for x, want in zip(padded, wanted, strict=True))

    backward.table = True  # type: ignore[attr-defined]
    op.register_autograd(backward, setup_context=setup_context)
