"""Softmax of rows longer than a program can hold, each split over several: two reads and one write.

`softmax_parts_kernel` sums each part of a row up to a pair (shift, sum); `softmax_write_kernel` adds up the pairs of
its row and writes a part of it. FORM says what a pair means:

    two_pass   sum 4^shift: e^x = m 4^n of each entry, added as such pairs, without a maximum
    online     sum exp(shift), shift the part's running maximum
    unified    sum exp(shift), shift = phi; a part whose largest entry phi does not fit takes its own as shift

Dukhan and Ablavatski, "Two-Pass Softmax Algorithm" (2020); Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018); Hong et al., "FlashDecoding++" (2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Config, Kernel, narrow

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# ln 2 in two numbers of fp32 (Cody and Waite).
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62E43p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("-0x1.05C61p-29"))
# From here on two fp32 numbers are at least 64 apart: beside the larger one the smaller weighs nothing.
_COARSE = tl.constexpr(2.0**30)
# The exponent of 0: not above any other, and finite, so that the difference of two is not NaN.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def pair(x):
    """(m, n) with e^x = m 4^n for fp32 x, 2 n a whole number; -inf gives m = 0, NaN m = NaN.

    An |x| of 2^30 and more has m = 1 and n = x, which is above log4(e) x, and exact: equal numbers stay equal, and all
    others are as far apart as they should be. Powers of two instead of four would leave the range of fp32. The distance
    of +inf from itself is NaN, and so is any sum with it.
    """
    whole = tl.floor(x * _LOG2_E + 0.5)
    if _INTERPRETED:  # numpy has no fused product and sum: in fp64 the product is exact all the same
        t = (x.to(tl.float64) - whole.to(tl.float64) * _LN2).to(tl.float32)
    else:
        t = tl.fma(whole, -_LN2_LOW, tl.fma(whole, -_LN2_HIGH, x))
    coarse = tl.abs(x) >= _COARSE
    n = tl.where(coarse, x, 0.5 * whole)
    m = tl.exp2(tl.where(coarse, 0.0, t) * _LOG2_E)
    nothing = x == -float("inf")
    return tl.where(nothing, 0.0, m), tl.where(nothing, _LOWEST, n)


@triton.jit
def lift(m, n, largest):
    """M 4^n as a multiple of 4^largest, which n is not above; 0 where fp32 would not hold 4^(n - largest) in full."""
    apart = 2.0 * (n - largest)
    return m * tl.where(apart < -127.0, 0.0, tl.exp2(apart))


@triton.jit
def _shifted(values, shift):
    """Exponentials of the distances to the shift; -inf as a shift is that of entries which are all -inf."""
    return tl.exp(values - tl.where(shift == -float("inf"), 0.0, shift))


@triton.jit
def _softmax_parts_kernel(
    x, shifts, sums, phi, low, high, x_t, N, LENGTH, BN: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """One part of LENGTH entries of one row."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, last = part * LENGTH, tl.minimum(part * LENGTH + LENGTH, N)
    column, source = tl.arange(0, BN), x + row * x_t
    total = tl.zeros([BN], tl.float32)
    if FORM == "two_pass":
        exponent = tl.full([BN], _LOWEST, tl.float32)
        for start in range(first, last, BN):
            at = start + column
            values = tl.load(source + at, mask=at < last, other=-float("inf")).to(tl.float32)
            m, n = pair(values)
            largest = tl.maximum(exponent, n)
            total = lift(total, exponent, largest) + lift(m, n, largest)
            exponent = largest
        shift = tl.max(exponent, 0)
        added = tl.sum(lift(total, exponent, shift), 0)
    else:
        largest = tl.full([BN], -float("inf"), tl.float32)
        for start in range(first, last, BN):
            at = start + column
            values = tl.load(source + at, mask=at < last, other=-float("inf")).to(tl.float32)
            grown = tl.maximum(largest, values)
            if FORM == "online":
                total = total * _shifted(largest, grown) + _shifted(values, grown)
            else:
                total += tl.exp(values - phi)
            largest = grown
        shift = tl.max(largest, 0)
        if FORM == "online":
            added = tl.sum(total * _shifted(largest, shift), 0)
        else:
            added = tl.sum(total, 0)
            if (shift - phi > low) & (shift - phi < high):
                shift = tl.zeros_like(shift) + phi
            else:
                total = tl.zeros([BN], tl.float32)
                for start in range(first, last, BN):
                    at = start + column
                    values = tl.load(source + at, mask=at < last, other=-float("inf")).to(tl.float32)
                    total += _shifted(values, shift)
                added = tl.sum(total, 0)
    tl.store(shifts + row * parts + part, shift)
    tl.store(sums + row * parts + part, added)


@triton.jit
def _softmax_write_kernel(
    x, shifts, sums, out, x_t, N, LENGTH, P: tl.constexpr, BN: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """One part of one row, from the pairs of all P or fewer parts.

    The largest shift fits the whole row. In the form `unified` it is phi, or the row's maximum where phi was too small
    for some part or too large for all of them.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, last = part * LENGTH, tl.minimum(part * LENGTH + LENGTH, N)
    places = tl.arange(0, P)
    # -inf minus a finite number, unlike a difference of two -inf, has the exponential 0 in either form.
    shift = tl.load(shifts + row * parts + places, mask=places < parts, other=-float("inf"))
    added = tl.load(sums + row * parts + places, mask=places < parts, other=0.0)
    largest = tl.max(shift, 0)
    if FORM == "two_pass":
        added = lift(added, shift, largest)
    else:
        added *= _shifted(shift, largest)
    total = tl.sum(added, 0)
    # Only a row of -inf alone has no sum; NaN is not 0, and goes through to all of its row.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    for start in range(first, last, BN):
        at = start + tl.arange(0, BN)
        values = tl.load(x + row * x_t + at, mask=at < last, other=-float("inf")).to(tl.float32)
        if FORM == "two_pass":
            m, n = pair(values)
            y = lift(m * inverse, n, largest)
        else:
            y = _shifted(values, largest) * inverse
        tl.store(out + row * N + at, narrow(y, out.dtype.element_ty), mask=at < last)


@triton.jit
def _softmax_parts_gradient_kernel(dy, y, sums, N, LENGTH, BN: tl.constexpr):
    """sum_j g_j y_j over one part of one row."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, last = part * LENGTH, tl.minimum(part * LENGTH + LENGTH, N)
    total = tl.zeros([BN], tl.float32)
    for start in range(first, last, BN):
        at = start + tl.arange(0, BN)
        probability = tl.load(y + row * N + at, mask=at < last, other=0.0).to(tl.float32)
        total += probability * tl.load(dy + row * N + at, mask=at < last, other=0.0).to(tl.float32)
    tl.store(sums + row * parts + part, tl.sum(total, 0))


@triton.jit
def _softmax_write_gradient_kernel(dy, y, sums, dx, N, LENGTH, P: tl.constexpr, BN: tl.constexpr):
    """The gradient of one part of one row, from the sums of all P or fewer parts."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, last = part * LENGTH, tl.minimum(part * LENGTH + LENGTH, N)
    places = tl.arange(0, P)
    mean = tl.sum(tl.load(sums + row * parts + places, mask=places < parts, other=0.0), 0)
    for start in range(first, last, BN):
        at = start + tl.arange(0, BN)
        probability = tl.load(y + row * N + at, mask=at < last, other=0.0).to(tl.float32)
        upstream = tl.load(dy + row * N + at, mask=at < last, other=0.0).to(tl.float32)
        found = probability * (upstream - mean)
        tl.store(dx + row * N + at, narrow(found, dx.dtype.element_ty), mask=at < last)


_CONFIGS = [Config({"BN": 4096}, warps=8), Config({"BN": 2048}, warps=8), Config({"BN": 1024}, warps=4)]

softmax_parts_kernel = Kernel(_softmax_parts_kernel, _CONFIGS, key=("LENGTH", "FORM"))
softmax_write_kernel = Kernel(_softmax_write_kernel, _CONFIGS, key=("LENGTH", "FORM"))
softmax_parts_gradient_kernel = Kernel(_softmax_parts_gradient_kernel, _CONFIGS, key=("LENGTH",))
softmax_write_gradient_kernel = Kernel(_softmax_write_gradient_kernel, _CONFIGS, key=("LENGTH",))
