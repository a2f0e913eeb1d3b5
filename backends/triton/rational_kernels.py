"""P(x) / Q(x) with coefficients for each group of channels, and its gradients: one sweep over a group's channels.

    R = P / Q,   dx = (P' - R Q') / Q,   da_i = sum x^i / Q,   db_i = -sum R D_i / Q,   D_i = dQ / db_i

with all of it times the gradient of the result; or relu(x) - R(min(|x|, FARTHEST)). A program takes a range of rows and
the channels of one group, so the coefficients stay in registers, and in the backward pass one sum per coefficient and
place of the tile, which are added up once per program.

Raffel & Chen, "FlashKAT" (2025).
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.ops.group_rational import FARTHEST

from .launch import Config, Kernel, narrow

_FARTHEST = tl.constexpr(FARTHEST)


@triton.jit
def load_coefficients(pointer, COUNT: tl.constexpr, MAGNITUDES: tl.constexpr = False):
    """COUNT numbers from `pointer` on, or of each pointer of a tensor; of them the magnitudes, if told."""
    found = ()
    for i in tl.static_range(COUNT):
        value = tl.load(pointer + i)
        if MAGNITUDES:
            value = tl.abs(value)
        found += (value,)  # type: ignore[assignment]  # mypy knows tuples of one length
    return found


@triton.jit
def _horner(x, coefficients):
    """c_0 + x (c_1 + x (c_2 + ...)), 0 without coefficients; fused multiply-adds whatever the compiler's flags."""
    value = tl.zeros_like(x)
    if len(coefficients) > 0:
        value += coefficients[len(coefficients) - 1]
        for i in tl.static_range(1, len(coefficients)):
            value = tl.fma(value, x, tl.zeros_like(x) + coefficients[len(coefficients) - 1 - i])
    return value


@triton.jit
def _horner_with_slope(x, coefficients):
    """What `_horner` gives, and its derivative."""
    value = tl.zeros_like(x)
    slope = tl.zeros_like(x)
    if len(coefficients) > 0:
        value += coefficients[len(coefficients) - 1]
        for i in tl.static_range(1, len(coefficients)):
            slope = tl.fma(slope, x, value)
            value = tl.fma(value, x, tl.zeros_like(x) + coefficients[len(coefficients) - 1 - i])
    return value, slope


@triton.jit
def _with_sign(value, like):
    """`value` times the sign of `like`, which is 0 at 0."""
    return tl.where(like > 0.0, value, tl.where(like < 0.0, -value, 0.0))


@triton.jit
def _argument(x, SPLIT: tl.constexpr):
    """What the polynomials are evaluated at."""
    if SPLIT:
        x = tl.abs(x)
        # A comparison keeps NaN, which the minimum of two numbers would not.
        x = tl.where(x > _FARTHEST, _FARTHEST, x)
    return x


@triton.jit
def rational(x, a, b, FORM: tl.constexpr, SPLIT: tl.constexpr):
    """The function at `x` in fp32; `b` are magnitudes if FORM is `sum_abs`."""
    t = _argument(x, SPLIT)
    if FORM == "sum_abs":
        base = tl.abs(t)
        q = tl.fma(base, _horner(base, b), tl.full(x.shape, 1.0, tl.float32))
    else:
        q = 1.0 + tl.abs(t * _horner(t, b))
    value = _horner(t, a) / q
    if SPLIT:
        value = tl.where(x < 0.0, 0.0, x) - value
    return value


@triton.jit
def _gradient(g, x, a, b, FORM: tl.constexpr, SPLIT: tl.constexpr):
    """dx, and what the powers of which number are multiplied with: in da, and in db but for the signs of `sum_abs`."""
    t = _argument(x, SPLIT)
    p, slope = _horner_with_slope(t, a)
    base = t
    if FORM == "sum_abs":
        base = tl.abs(t)
    h, h_slope = _horner_with_slope(base, b)
    product = base * h
    inverse = 1.0 / (1.0 + tl.abs(product))
    r = p * inverse
    scaled = g * inverse
    if SPLIT:
        scaled = -scaled
    # r times the sign that a magnitude in Q brings into its derivative, which is 0 at 0. With SPLIT, |x| counts as
    # rising there, so only the sign of h is left of that of the product.
    turned = r
    if FORM == "abs_sum":
        turned = _with_sign(r, h if SPLIT else product)
    elif not SPLIT:
        turned = _with_sign(r, t)
    below = -scaled * (turned if FORM == "abs_sum" else r)
    dx = scaled * tl.fma(-turned, tl.fma(base, h_slope, h), slope)
    if SPLIT:
        # Behind FARTHEST the argument does not move; a NaN of the gradient stays one.
        dx = tl.where(tl.abs(x) > _FARTHEST, 0.0 * g, dx)
        dx = tl.where(x > 0.0, dx + g, -dx)
    return dx, t, base, scaled, below


@triton.jit
def _group_rational_kernel(
    x, numerator, denominator, out, rows, length, x_t, group_t, a_b, b_b,
    M: tl.constexpr, N: tl.constexpr, FORM: tl.constexpr, SPLIT: tl.constexpr,
    BC: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`length` rows of one group of `group_t` channels; tensors are dense, and `x_t` is their number of channels."""
    BR: tl.constexpr = SIZE // BC
    group, first = tl.program_id(0), tl.program_id(1) * length
    rows = tl.minimum(rows - first, length)
    a = load_coefficients(numerator + group * a_b, M + 1)
    b = load_coefficients(denominator + group * b_b, N, FORM == "sum_abs")
    row, column = tl.arange(0, BR), tl.arange(0, BC)
    offset = row[:, None] * x_t + column[None, :]
    for across in range(0, group_t, BC):
        for down in tl.range(0, rows, BR, num_stages=STAGES):
            inside = (row < rows - down)[:, None] & (column < group_t - across)[None, :]
            place = (first.to(tl.int64) + down) * x_t + (group * group_t + across)
            value = tl.load(x + place + offset, mask=inside, other=0.0).to(tl.float32)
            y = rational(value, a, b, FORM, SPLIT)
            tl.store(out + place + offset, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _group_rational_gradient_kernel(
    dy, x, numerator, denominator, dx, partials, rows, length, x_t, group_t, a_b, b_b,
    M: tl.constexpr, N: tl.constexpr, FORM: tl.constexpr, SPLIT: tl.constexpr,
    BC: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of `length` rows of one group, and what they add to the gradients of its coefficients.

    Partials are [programs along the rows, G, M + 1 + N], every entry written once: their sum does not depend on which
    program ends first, as sums by atomics would.
    """
    BR: tl.constexpr = SIZE // BC
    group, part, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    first = part * length
    rows = tl.minimum(rows - first, length)
    a = load_coefficients(numerator + group * a_b, M + 1)
    b = load_coefficients(denominator + group * b_b, N, FORM == "sum_abs")
    sums = ()
    for _ in tl.static_range(M + 1 + N):
        sums += (tl.zeros([BR, BC], tl.float32),)  # type: ignore[assignment]  # see above
    row, column = tl.arange(0, BR), tl.arange(0, BC)
    offset = row[:, None] * x_t + column[None, :]
    for across in range(0, group_t, BC):
        for down in tl.range(0, rows, BR, num_stages=STAGES):
            inside = (row < rows - down)[:, None] & (column < group_t - across)[None, :]
            place = (first.to(tl.int64) + down) * x_t + (group * group_t + across)
            value = tl.load(x + place + offset, mask=inside, other=0.0).to(tl.float32)
            # Outside the gradient is 0, and so is what it adds.
            g = tl.load(dy + place + offset, mask=inside, other=0.0).to(tl.float32)
            found, t, base, scaled, below = _gradient(g, value, a, b, FORM, SPLIT)
            tl.store(dx + place + offset, narrow(found, dx.dtype.element_ty), mask=inside)
            sums = _added(sums, t, base, scaled, below, M, N)
    for i in tl.static_range(M + 1 + N):
        total = tl.sum(tl.sum(sums[i], 1), 0)
        if FORM == "sum_abs":
            if i > M:
                total = _with_sign(total, tl.load(denominator + group * b_b + (i - M - 1)))
        tl.store(partials + (part * groups + group) * (M + 1 + N) + i, total)


@triton.jit
def _added(sums, t, base, scaled, below, M: tl.constexpr, N: tl.constexpr):
    """`sums` with t^i scaled added to the first M + 1, and base^i below to the others; base is t or |t|."""
    above = (sums[0] + scaled,)
    others = ()
    power, magnitude = t, base
    for i in tl.static_range(1, (M if M > N else N) + 1):
        if i > 1:
            power = power * t
            magnitude = magnitude * base
        if i <= M:
            above += (tl.fma(scaled, power, sums[i]),)  # type: ignore[assignment]  # see above
        if i <= N:
            others += (tl.fma(below, magnitude, sums[M + i]),)  # type: ignore[assignment]  # see above
    return above + others


# Elements of a tile, and loads that run ahead or do not. A thread holds SIZE / 128 of each sum.
group_rational_kernel = Kernel(
    _group_rational_kernel,
    [Config({"SIZE": size, "STAGES": stages}, warps=4) for stages in (1, 3) for size in (1024, 2048)],
    key=("BC", "M", "N", "FORM", "SPLIT"),
)
group_rational_gradient_kernel = Kernel(
    _group_rational_gradient_kernel,
    [Config({"SIZE": size, "STAGES": stages}, warps=4) for stages in (1, 3) for size in (512, 1024)],
    key=("BC", "M", "N", "FORM", "SPLIT"),
)
