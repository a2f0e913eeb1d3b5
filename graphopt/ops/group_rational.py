"""P(x) / Q(x) with coefficients for each group of channels: the learned activation of KAT.

Yang & Wang, "Kolmogorov-Arnold Transformer" (2024). Its paper and its kernels use different denominators, both without
poles; here each has its name.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ops import kernels

FARTHEST = 4096.0
"""With `split`, |x| counts as this where it is larger, so that no power overflows; what vanishes has vanished there."""

FORMS = ("abs_sum", "sum_abs")
"""`abs_sum`: Q = 1 + |b_1 x + ... + b_n x^n|, as in the paper; `sum_abs`: Q = 1 + |b_1| |x| + ... + |b_n| |x|^n, as in
the published kernels."""


def reference(
    x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str = "abs_sum", split: bool = False
) -> torch.Tensor:
    """R(x) = (a_0 + a_1 x + ... + a_m x^m) / Q(x), or relu(x) - R(|x|).

    Args:
        x: [.., C].
        numerator: [G, m + 1], a_0 first, or [1, m + 1] for all groups.
        denominator: [G, n], b_1 first, or [1, n]; C is a multiple of G, and a group is C / G channels in a row.
        form: which denominator; see `FORMS`.
        split: relu(x) - R(min(|x|, FARTHEST)) in place of R(x).

    Returns:
        [.., C] in the type of `x`; computed in fp32 or better.

    Raises:
        ValueError: sizes do not fit each other, or there is no such form.
    """
    check(x, numerator, denominator, form)
    grouped, a, b = _operands(x, numerator, denominator)
    t = _argument(grouped, split)
    value = horner(t, a) / _denominator(t, b, form)[0]
    if split:
        value = grouped.relu() - value
    return value.flatten(-2).to(x.dtype)


def horner(x: torch.Tensor, coefficients: list[torch.Tensor]) -> torch.Tensor:
    """c_0 + x (c_1 + x (c_2 + ...)) in the shape of `x`; 0 without coefficients."""
    if not coefficients:
        return torch.zeros_like(x)
    value = coefficients[-1].expand_as(x)
    for c in reversed(coefficients[:-1]):
        value = torch.addcmul(c, value, x)
    return value


def check(x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str) -> None:
    """Raise what `reference` raises."""
    if form not in FORMS:
        raise ValueError(f"expected form to be one of {FORMS}, got {form!r}")
    first, second = numerator.shape[0], denominator.shape[0]
    if first != second and first != 1 and second != 1:
        raise ValueError(f"expected as many groups of numerators as of denominators, got {first} and {second}")
    if x.shape[-1] % max(first, second):
        raise ValueError(f"expected a number of channels that {max(first, second)} groups divide, got {x.shape[-1]}")


def _operands(
    x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The grouped channels [.., G, C / G], and coefficients [G, 1] by power."""
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = max(numerator.shape[0], denominator.shape[0])
    a, b = (list(c.to(wide).unsqueeze(-1).unbind(1)) for c in (numerator, denominator))
    return x.to(wide).unflatten(-1, (groups, -1)), a, b


def _argument(x: torch.Tensor, split: bool) -> torch.Tensor:
    return x.abs().clamp(max=FARTHEST) if split else x


def _denominator(x: torch.Tensor, b: list[torch.Tensor], form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, and what b_1 is multiplied with in it before its sign: x, or its magnitude."""
    zero = torch.zeros_like(b[0]) if b else x.new_zeros(())
    if form == "sum_abs":
        base = x.abs()
        return 1 + horner(base, [zero, *(c.abs() for c in b)]), base
    return 1 + horner(x, [zero, *b]).abs(), x


group_rational = torch.library.custom_op("graphopt::group_rational", reference, mutates_args=())


@group_rational.register_fake
def _(
    x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str = "abs_sum", split: bool = False
) -> torch.Tensor:
    check(x, numerator, denominator, form)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, numerator, denominator, *rest = inputs
    ctx.save_for_backward(x, numerator, denominator)
    ctx.options = tuple(rest)


def gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of x, numerator and denominator, in closed form; differentiable once more.

    With R = P / Q: dx = (P' - R Q') / Q, da_i = x^i / Q, db_i = -R D_i / Q, where D_i is the derivative of Q by b_i.
    With `split`, relu'(x) - R'(|x|) sign(x), at x = 0 the derivative from the left, and da, db change their signs.
    """
    grouped, a, b = _operands(x, numerator, denominator)
    t = _argument(grouped, split)
    q, base = _denominator(t, b, form)
    r = horner(t, a) / q
    outer = gradient.to(grouped.dtype).unflatten(-1, grouped.shape[-2:])
    scaled = (-outer if split else outer) / q
    slope = horner(t, [i * c for i, c in enumerate(a)][1:])
    # Of |t| a magnitude has the derivative from the right, 1; at 0 a number has none, and counts 0.
    side = torch.ones_like(t) if split else t.sign()
    if form == "sum_abs":
        signs = [c.sign() for c in b]
        inner = side * horner(base, [i * c.abs() for i, c in enumerate(b, 1)])
    else:
        sign = side * horner(t, b).sign()
        signs = [sign] * len(b)
        inner = sign * horner(t, [i * c for i, c in enumerate(b, 1)])
    dx = scaled * (slope - r * inner)
    if split:
        right = (grouped > 0).to(dx.dtype)
        dx = dx * (2 * right - 1) * (grouped.abs() <= FARTHEST) + outer * right
    da = _summed(scaled, t, [1.0] * len(a), numerator, first=0)
    db = _summed(-scaled * r, base, signs, denominator, first=1)
    return dx.flatten(-2).to(x.dtype), da, db


def _summed(factor: torch.Tensor, base: torch.Tensor, signs: list[Any], like: torch.Tensor, first: int) -> torch.Tensor:
    """Sums over everything that shares a coefficient of factor * sign * base^i [G or 1, count], i from `first` on."""
    power = torch.ones_like(base) if first == 0 else base
    columns = []
    for sign in signs:
        product = factor * power * sign
        kept = product.transpose(-1, -2).reshape(-1, product.shape[-2]).sum(0)  # [G]
        columns.append(kept if like.shape[0] > 1 else kept.sum(0, keepdim=True))
        power = power * base
    if not columns:
        return torch.zeros_like(like)
    return torch.stack(columns, dim=1).expand(like.shape).to(like.dtype)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    x, numerator, denominator = ctx.saved_tensors
    return *gradients(gradient, x, numerator, denominator, *ctx.options), None, None


group_rational.register_autograd(_backward, setup_context=_setup)
kernels.look_up(group_rational, reference, "cpu")
