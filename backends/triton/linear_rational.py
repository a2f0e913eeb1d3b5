"""`graphopt::linear_rational` and its gradients on the kernels: the host's side."""

from __future__ import annotations

import torch

from graphopt.errors import GraphOptError
from graphopt.ops.linear_rational import gradients

from . import group_rational
from .group_rational import DTYPES, LARGEST_DEGREE, coefficients
from .launch import padded, rows_of, tile
from .linear_rational_kernel import linear_rational_kernel

# Columns of the widest tile. Without tensor cores, which take no fp32, threads hold more of the operands.
_WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}


def supported(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> bool:
    """Whether the kernels compute these types and sizes: one type of fp16, bf16 or fp32, degrees up to 7."""
    if x.dtype not in DTYPES or x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if x.numel() == 0 or weight.numel() == 0:
        return False
    if any(other.dtype != x.dtype or other.device != x.device for other in (weight, bias) if other is not None):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return group_rational.fits(weight.shape[0], x, numerator, denominator, form)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> torch.Tensor:
    """The operator in one kernel: products of the inputs' type, sums and the function in fp32, rounded once at the end.

    Args:
        x: [.., K].
        weight: [C, K], in the type of `x`; copied only if neither dimension is dense.
        bias: [C] in the type of `x`, or None.
        numerator: [G, m + 1], or [1, m + 1] for all groups; m at most 7.
        denominator: [G, n], or [1, n]; n at most 7, and G divides C.
        form: which denominator, out of `graphopt.ops.group_rational.FORMS`.
        split: relu minus the rational function of the magnitude.

    Returns:
        [.., C] in the type of `x`, contiguous.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or there is no such form.
    """
    _check(x, weight, bias, numerator, denominator, form)
    C, K = weight.shape
    source = rows_of(x.reshape(-1, K))
    transposed = weight.stride(1) != 1 and weight.stride(0) == 1
    given = weight.t() if transposed else rows_of(weight)
    functions = coefficients(numerator, denominator, form, split)
    out = torch.empty((*x.shape[:-1], C), dtype=x.dtype, device=x.device)
    linear_rational_kernel(
        lambda meta: (-(-source.shape[0] // meta["BM"]) * -(-C // meta["BN"]),),
        x=source, weight=given, bias=None if bias is None else bias.contiguous(), out=out, rows=source.shape[0],
        x_t=source.stride(0), w_t=given.stride(0), K=K, C=C, G=functions.groups, TRANSPOSED=transposed,
        TILE=tile(source.shape[0]), SPAN=min(padded(C), _WIDEST[x.dtype]), **functions.common(),
    )  # fmt: skip
    return out


def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, bias, numerator and denominator in their types.

    The product is computed again by torch, as are the three products of the linear layer's gradient; what lies between
    is the kernel of `group_rational`.

    Args:
        gradient: of the result [.., C].
        x: this and all others as in `forward`.
        weight: see there.
        bias: see there; without one its gradient is None.
        numerator: see there.
        denominator: see there.
        form: see there.
        split: see there.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or there is no such form.
    """
    _check(x, weight, bias, numerator, denominator, form)
    function = (numerator, denominator, form, split)
    return gradients(gradient, x, weight, bias, *function, of_function=group_rational.backward)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str,
) -> None:
    if not supported(x, weight, bias, numerator, denominator, form):
        raise GraphOptError(
            f"expected fp16, bf16 or fp32 tensors of one type with at least one element, sizes that fit each other, "
            f"degrees up to {LARGEST_DEGREE} and a known form, got {x.dtype} {list(x.shape)}, {weight.dtype} "
            f"{list(weight.shape)}, coefficients {list(numerator.shape)} and {list(denominator.shape)} and {form!r}; "
            "the torch implementation takes others"
        )
