"""Entering the kernels into the table of graphopt.ops. Numba is imported when a kernel is first called."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

from graphopt.ops import (
    group_rational,
    kernels,
    linear_rational,
    online_softmax,
    two_pass_softmax,
    unified_max_softmax,
)
from graphopt.ops.group_rational import reference as group_reference
from graphopt.ops.linear_rational import reference as linear_reference
from graphopt.ops.online_softmax import reference as online_reference
from graphopt.ops.two_pass_softmax import reference as two_pass_reference
from graphopt.ops.unified_max_softmax import HIGH, LOW, check_bounds
from graphopt.ops.unified_max_softmax import reference as unified_max_reference

if TYPE_CHECKING:
    from .launch import Algorithm

# The types that are computed in fp32; fp64 is left to the references.
_TYPES = {torch.float32, torch.float16, torch.bfloat16}
# Below as many entries a call takes microseconds either way, and is not worth compiling anything for.
SMALLEST = 1 << 12


def register() -> None:
    """The softmax operators, forward, as their gradient needs the result alone; the rational ones both ways."""
    for op, reference, forward in (
        (two_pass_softmax, two_pass_reference, _two_pass),
        (online_softmax, online_reference, _online),
        (unified_max_softmax, unified_max_reference, _unified_max),
    ):
        kernels.register(op, reference, "cpu", kernels.Kernels(forward, None, supported))
    kernels.register(
        group_rational, group_reference, "cpu", kernels.Kernels(_group_rational, _group_gradients, supported)
    )
    kernels.register(
        linear_rational, linear_reference, "cpu", kernels.Kernels(_linear_rational, _linear_gradients, fits_linear)
    )


def supported(x: torch.Tensor, *others: Any) -> bool:
    """Whether the kernels take it; what they do not take never imports numba."""
    return x.dtype in _TYPES and x.numel() >= SMALLEST and _usable()


def fits_linear(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> bool:
    """As `supported`; what counts is the size of the product."""
    if x.dtype not in _TYPES or x.dtype != weight.dtype or not x.numel() or x.shape[-1:] != weight.shape[1:]:
        return False
    return x.numel() // x.shape[-1] * weight.shape[0] >= SMALLEST and _usable()


@functools.cache
def _usable() -> bool:
    """Whether there is a numba that fits the other packages, and a processor that the loops are made for."""
    try:
        from llvmlite.binding import get_host_cpu_features

        from . import launch
    except ImportError as error:
        if error.name not in ("numba", "llvmlite"):
            warnings.warn(f"operators run without their CPU kernels: numba cannot be imported: {error}", stacklevel=2)
        return False
    # Only x86 names it. Without a fused multiply-add each one would be a call, and no loop would be vectorised.
    return launch is not None and bool(get_host_cpu_features().get("fma", True))


def _two_pass(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    from .launch import TWO_PASS

    return _softmax(x, dim, TWO_PASS)


def _online(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    from .launch import ONLINE

    return _softmax(x, dim, ONLINE)


def _unified_max(
    x: torch.Tensor, dim: int = -1, phi: float = 0.0, low: float = LOW, high: float = HIGH
) -> torch.Tensor:
    from .launch import unified_max

    check_bounds(low, high)
    return _softmax(x, dim, unified_max(phi, low, high))


def _softmax(x: torch.Tensor, dim: int, algorithm: Algorithm) -> torch.Tensor:
    """Other axes are brought to the end first; narrower types go through fp32 and are rounded once."""
    from .launch import softmax

    wide = x.detach().movedim(dim, -1).to(torch.float32).contiguous()
    y = torch.empty_like(wide)
    length = wide.shape[-1]
    softmax(wide.view(-1, length).numpy(), y.view(-1, length).numpy(), algorithm)
    return y.to(x.dtype).movedim(-1, dim).contiguous()


def _group_rational(*inputs: Any) -> torch.Tensor:
    from .launch_rational import group_rational

    return group_rational(*inputs)


def _group_gradients(*inputs: Any) -> tuple[torch.Tensor, ...]:
    from .launch_rational import gradients

    return gradients(*inputs)


def _linear_rational(*inputs: Any) -> torch.Tensor:
    from .launch_rational import linear_rational

    return linear_rational(*inputs)


def _linear_gradients(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
    from .launch_rational import linear_gradients

    return linear_gradients(*inputs)
