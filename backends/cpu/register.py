"""Entering the kernels into the table of graphopt.ops. Numba is imported when a kernel is first called."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

from graphopt.ops import kernels, online_softmax, two_pass_softmax, unified_max_softmax
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
    """All three operators on the CPU, forward; their gradient needs the result alone."""
    for op, reference, forward in (
        (two_pass_softmax, two_pass_reference, _two_pass),
        (online_softmax, online_reference, _online),
        (unified_max_softmax, unified_max_reference, _unified_max),
    ):
        kernels.register(op, reference, "cpu", kernels.Kernels(forward, None, supported))


def supported(x: torch.Tensor, *others: Any) -> bool:
    """Whether the kernels take it; what they do not take never imports numba."""
    return x.dtype in _TYPES and x.numel() >= SMALLEST and _usable()


@functools.cache
def _usable() -> bool:
    """Whether there is a numba that fits the other packages, and a processor that the loops are made for."""
    try:
        from llvmlite.binding import get_host_cpu_features

        from . import launch
    except ImportError as error:
        if error.name not in ("numba", "llvmlite"):
            warnings.warn(f"softmax runs without its CPU kernels: numba cannot be imported: {error}", stacklevel=2)
        return False
    # Only x86 names it. Without a fused multiply-add each one would be a call, and the reduction of x not exact.
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
