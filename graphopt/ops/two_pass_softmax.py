"""Softmax in two passes over the row: e^x = m 2^n, and the sum is kept as such a pair, so no maximum is needed first.

Dukhan and Ablavatski, "Two-Pass Softmax Algorithm" (2020).
"""

from __future__ import annotations

import math

import torch

from graphopt.ops import kernels
from graphopt.ops.softmax_gradient import register_softmax_gradient
from graphopt.ops.unified_max_softmax import check_floats, with_own_maximum

LOG2_E = math.log2(math.e)
# ln 2 in two parts (Cody and Waite): n times the first is exact, so x - n ln 2 loses nothing to cancellation.
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62E43p-1"), float.fromhex("-0x1.05C61p-29")
LN2_HIGH_64, LN2_LOW_64 = float.fromhex("0x1.62E42FEEp-1"), float.fromhex("0x1.A39EF35793C76p-33")

# e^t = 1 + t + c2 t^2 + ... + c6 t^6 on [-ln2/2, ln2/2], highest first: the least relative error in fp32 (0.05 of half
# an ulp). The published degree 5 is off by 1.9 ulp; with degree 6 the rounding of the products is what is left.
COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in ("0x1.6A2434p-10", "0x1.1239E2p-7", "0x1.5558F2p-5", "0x1.555492p-3", "0x1.FFFFFCp-2", "1.0", "1.0")
)

# Exponents at which a pair counts for nothing beside another: such powers of two are below the normal numbers.
FLUSH = {torch.float32: -127.0, torch.float64: -1023.0}
# Beyond this exponent n ln 2 is no longer exact: rows whose sum lies there are computed with their own maximum.
LARGEST_EXPONENT = 2.0**20


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Softmax along one axis.

    Args:
        x: floats of any shape, such as scores [B, H, T, S].
        dim: the axis.

    Returns:
        The shape and type of `x`; computed in fp32 or better. An entry of -inf weighs 0, and a row of them is 0; a row
        with NaN or +inf is NaN.

    Raises:
        ValueError: `x` holds no floats.
    """
    check_floats(x)
    if not x.numel():
        return x.new_empty(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.movedim(dim, -1) if x.dim() else wide.view(1)
    mantissas, exponents = pairs(rows)
    mantissa, exponent = total(mantissas, exponents)
    y = mantissas * (1 / mantissa) * power_of_two(exponents - exponent)
    fits = exponent.abs() < LARGEST_EXPONENT
    if not fits.all():
        y = torch.where(fits, y, with_own_maximum(rows, -1))
    y = y.movedim(-1, dim) if x.dim() else y.view(())
    return y.to(x.dtype).contiguous()


def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, n) with e^x = m 2^n and m in [0.7, 1.42]; n is a whole number in the type of `x`, fp32 or fp64.

    NaN and +inf give m = NaN. What lies below e^(-2 LARGEST_EXPONENT) is raised to it: beside any pair that counts,
    its weight is 0 all the same, and -inf needs no case of its own.
    """
    x = torch.where(x < -2 * LARGEST_EXPONENT, -2 * LARGEST_EXPONENT, x)
    n = torch.round(x * LOG2_E)
    if x.dtype == torch.float64:
        return torch.exp(x - n * LN2_HIGH_64 - n * LN2_LOW_64), n
    # Each difference is rounded once, as by a fused multiply-add: products of two fp32 numbers are exact in fp64.
    t = (x.double() - n.double() * LN2_HIGH).to(x.dtype)
    t = (t.double() - n.double() * LN2_LOW).to(x.dtype)
    m = torch.full_like(t, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        m = m * t + coefficient
    return m, n


def total(mantissas: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of pairs along the last axis as one pair [.., 1]: halves are added until one entry is left."""
    while mantissas.shape[-1] > 1:
        half = mantissas.shape[-1] // 2
        m_a, m_b, m_rest = mantissas.split([half, half, mantissas.shape[-1] % 2], -1)
        n_a, n_b, n_rest = exponents.split([half, half, exponents.shape[-1] % 2], -1)
        e = torch.maximum(n_a, n_b)
        m = m_a * power_of_two(n_a - e) + m_b * power_of_two(n_b - e)
        # An odd one out goes on to the next round.
        mantissas, exponents = torch.cat([m, m_rest], -1), torch.cat([e, n_rest], -1)
    return mantissas, exponents


def power_of_two(n: torch.Tensor) -> torch.Tensor:
    """2^n for whole n <= 0; 0 below the flush, NaN for NaN."""
    return torch.where(n <= FLUSH[n.dtype], 0.0, torch.exp2(n))


two_pass_softmax = torch.library.custom_op("graphopt::two_pass_softmax", reference, mutates_args=())


@two_pass_softmax.register_fake
def _(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


register_softmax_gradient(two_pass_softmax)
kernels.look_up(two_pass_softmax, reference, "cpu")
