"""The rational kernels on torch tensors: in fp32 and in one piece, spread over threads, behind a product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphopt.ops.group_rational import check
from graphopt.ops.group_rational import gradients as reference_gradients
from graphopt.ops.linear_rational import gradients as reference_linear_gradients

from . import rational as compiled
from .threads import parts, together

Array = np.ndarray[Any, np.dtype[np.float32]]
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Fewer numbers than these are not worth waking a thread for.
GRAIN = 1 << 18
# Gradients of coefficients are added up within so many numbers, and then over these pieces in their order, so that the
# number of threads changes no bit.
PIECE = 1 << 16


@dataclass(frozen=True)
class _Function:
    """One rational function as the kernels take it."""

    numerator: Array
    denominator: Array
    groups: int
    split: bool
    magnitude: bool

    @classmethod
    def of(cls, numerator: torch.Tensor, denominator: torch.Tensor, form: str, split: bool) -> _Function:
        magnitude = form == "sum_abs"
        a, b = _plain(numerator).numpy(), _plain(denominator).numpy()
        return cls(a, np.abs(b) if magnitude else b, max(len(a), len(b)), split, magnitude)

    @property
    def like(self) -> tuple[tuple[np.float32, ...], tuple[np.float32, ...]]:
        """The degrees, as types."""
        zero = (np.float32(0),)
        return zero * self.numerator.shape[1], zero * self.denominator.shape[1]

    def width(self, channels: int, count: int) -> int:
        """Channels of a group in a row; everything where all share their coefficients."""
        return channels // self.groups if self.groups > 1 else max(count, 1)


def group_rational(
    x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str = "abs_sum", split: bool = False
) -> torch.Tensor:
    """`graphopt.ops.group_rational`; narrower types go through fp32 and are rounded once."""
    check(x, numerator, denominator, form)
    wide = _plain(x)
    y = torch.empty_like(wide)
    fill(y, wide, numerator, denominator, form, split)
    # The reference keeps the order of the axes in memory.
    return y if x.dtype == y.dtype and x.is_contiguous() else torch.empty_like(x).copy_(y)


def fill(
    y: torch.Tensor, x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str, split: bool
) -> None:
    """Fill y [.., C] with `group_rational` of x [.., C]; both are contiguous and in fp32, and may be the same."""
    function = _Function.of(numerator, denominator, form, split)
    width = function.width(x.shape[-1], x.numel())
    _evaluate(x.view(-1).numpy(), y.view(-1).numpy(), function, width)


def gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> _Gradients:
    """Of x, numerator and denominator, as `graphopt.ops.group_rational.gradients`, which gradients of them run."""
    if torch.is_grad_enabled():
        return reference_gradients(gradient, x, numerator, denominator, form, split)
    wide, outer = _plain(x), _plain(gradient)
    dx = torch.empty_like(wide)
    function = _Function.of(numerator, denominator, form, split)
    sums = _differentiate(
        wide.view(-1).numpy(),
        outer.view(-1).numpy(),
        dx.view(-1).numpy(),
        function,
        function.width(x.shape[-1], x.numel()),
    )
    da, db = (torch.from_numpy(part) for part in np.split(sums, [numerator.shape[1]], axis=1))
    if function.magnitude:
        db = db * denominator.sign()
    return dx.to(x.dtype), _shared(da, numerator), _shared(db, denominator)


def linear_rational(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> torch.Tensor:
    """`graphopt.ops.linear_rational`: the product, and the function in its place.

    To go by blocks of rows, whose product stays in cache, is no faster: what the function gains the product loses,
    which brings the weight into its own layout for each block.
    """
    if x.dtype != torch.float32:
        z = F.linear(x.detach(), weight.detach(), None if bias is None else bias.detach())
        return group_rational(z, numerator, denominator, form, split)
    z = _product(_plain(x).view(-1, x.shape[-1]), weight.detach(), None if bias is None else bias.detach())
    check(z, numerator, denominator, form)
    fill(z, z, numerator, denominator, form, split)
    return z.view(*x.shape[:-1], len(weight))


def linear_gradients(gradient: torch.Tensor, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the tensors that `linear_rational` takes; the product is computed again."""
    wanted = x.requires_grad, rest[0].requires_grad
    return reference_linear_gradients(gradient, x, *rest, of_function=gradients, wanted=wanted)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float32).contiguous()


def _shared(sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sums of each group [G, count], or over all groups where these share the coefficients."""
    kept = sums if len(like) > 1 else sums.sum(0, keepdim=True)
    return kept.expand(like.shape).to(like.dtype)


def _evaluate(x: Array, y: Array, function: _Function, width: int) -> None:
    """Fill y [N] with the function of x [N], on as many threads as torch uses."""
    run = partial(_run, x, y, function, width)
    threads = min(torch.get_num_threads(), x.size // GRAIN)
    if threads <= 1:
        run(slice(0, x.size))
    else:
        together([partial(run, part) for part in parts(x.size, threads)])


def _run(x: Array, y: Array, f: _Function, width: int, part: slice) -> None:
    rest = (f.like, part.start, width, f.split, f.magnitude)
    compiled.forward(x[part], y[part], f.numerator, f.denominator, *rest)


def _differentiate(x: Array, g: Array, dx: Array, f: _Function, width: int) -> np.ndarray[Any, Any]:
    """Fill dx [N], and give the sums for the coefficients [G, m + 1 + n] in fp64."""
    pieces = [slice(start, min(start + PIECE, x.size)) for start in range(0, x.size, PIECE)]
    slopes = np.ascontiguousarray((f.numerator * np.arange(f.numerator.shape[1], dtype=np.float32))[:, 1:])
    inner = f.denominator * np.arange(1, f.denominator.shape[1] + 1, dtype=np.float32)
    sums = np.zeros((len(pieces), f.groups, f.numerator.shape[1] + f.denominator.shape[1]))
    like = (*f.like, f.like[0][1:])

    def run(numbers: range) -> None:
        for i in numbers:
            part = pieces[i]
            coefficients = (f.numerator, f.denominator, slopes, inner, like)
            rest = (part.start, width, f.split, f.magnitude)
            compiled.backward(x[part], g[part], dx[part], sums[i], *coefficients, *rest)

    threads = max(1, min(torch.get_num_threads(), len(pieces)))
    together([partial(run, range(i, len(pieces), threads)) for i in range(threads)])
    total: np.ndarray[Any, Any] = sums.sum(0)
    return total


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """X W^T + b of rows x [R, K]."""
    linear = onednn()
    plain = weight.is_contiguous() or weight.t().is_contiguous()
    if linear is None or not plain or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(x, weight, bias)
    return linear(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


@functools.cache
def onednn() -> Callable[..., torch.Tensor] | None:
    """The product that torch.compile uses on CPUs, faster than that of F.linear on many; not every torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default
