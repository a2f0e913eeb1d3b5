"""Softmax in fp32 as loops over e^x = m 2^n, which LLVM turns into vector instructions.

All algorithms are made of the same loops, so a comparison of them compares their passes over memory. A sum is kept as
`total` 2^e e^shift: two-pass softmax moves e, the others subtract a shift from x first. One file, because numba
compiles a function again only if its own file has changed.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from graphopt.ops.two_pass_softmax import COEFFICIENTS, LARGEST_EXPONENT, LN2_HIGH, LN2_LOW, LOG2_E

f32, i32 = np.float32, np.int32

_LOG2_E = f32(LOG2_E)
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = f32(-LN2_HIGH), f32(-LN2_LOW)
_C6, _C5, _C4, _C3, _C2, _ONE = (f32(c) for c in COEFFICIENTS[:-1])

# Sums with an exponent beyond it are computed with their own maximum, as in the reference.
_LIMIT = f32(LARGEST_EXPONENT)
# What lies below is raised to it: -inf would give NaN, and beside any pair that counts its 2^n is 0 all the same.
LOWEST = f32(-2 * LARGEST_EXPONENT)

# 2^23 + i keeps a whole number i >= 0 in its low bits. Moved to where a float has its exponent they are 2^(i - 127),
# and 0 for i = 0: pairs 127 or more exponents below the sum are flushed without a branch.
_FLUSHED, _BIAS = f32(2**23), f32(2**23 + 127)
_FLUSHED_BITS, _BIAS_BITS, _MANTISSA_BITS = _FLUSHED.view(i32), _BIAS.view(i32), i32(23)

# Entries that are summed in fp32, lane by lane; blocks are added in fp64. It is 4 KB, which stay in the L1 cache.
BLOCK = 1024

_LN2 = math.log(2)
# The total where an algorithm could not form its sum: its constant or its exponents do not reach that far.
UNKNOWN = -1.0
# A block's sum may lie this many exponents above the pair's before the pair is moved: 2^64 times a block is finite.
_SLACK = 64

# Up to this length a row is in cache, 16 MB of it, or so near that to write the exponentials and then scale them is
# cheaper than to compute them twice. Beyond, that would be one more pass over the memory.
IN_CACHE = 1 << 22

# Lanes may be added in any order. Nothing else may: reordered, x - n high - n low would be x - n (high + low).
_ANY_ORDER = {"reassoc", "nsz", "contract"}


@intrinsic
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Multiply and add, rounded once: LLVM's own operation, for processors that have it."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.fma(*values)

    return numba.float32(numba.float32, numba.float32, numba.float32), generate


@numba.njit(cache=True)
def raised(x):
    """The larger of x and LOWEST; NaN stays NaN."""
    return LOWEST if x < LOWEST else x


@numba.njit(cache=True)
def within(e):
    """Whether the reduction is exact for this exponent."""
    return -_LIMIT < e < _LIMIT


@numba.njit(cache=True)
def exponent(x):
    """The n of e^x = m 2^n, as a float."""
    return np.rint(f32(x * _LOG2_E))


@numba.njit(cache=True)
def mantissa(x, n):
    """The m of e^x = m 2^n: Cody and Waite's reduction, and the polynomial of the reference."""
    t = fma(n, _MINUS_LN2_LOW, fma(n, _MINUS_LN2_HIGH, x))
    m = fma(_C6, t, _C5)
    m = fma(m, t, _C4)
    m = fma(m, t, _C3)
    m = fma(m, t, _C2)
    m = fma(m, t, _ONE)
    return fma(m, t, _ONE)


@numba.njit(cache=True)
def encoded(n, bias):
    """The bits of 2^23 + max(n - e + 127, 0), where `bias` is 2^23 + 127 - e. As integers they compare as n does."""
    return max(f32(n + bias).view(i32), _FLUSHED_BITS)


@numba.njit(cache=True)
def power(bits):
    """2^(n - e) from what `encoded` gives."""
    return i32(i32(bits) << _MANTISSA_BITS).view(f32)


@numba.njit(cache=True)
def ordered(x):
    """The bits of x as an integer that compares as x does, and its own inverse; NaN lies beyond infinity."""
    bits = f32(x).view(i32)
    return i32(bits ^ i32(i32(bits >> i32(31)) & i32(0x7FFFFFFF)))


@numba.njit(cache=True)
def largest(x):
    """The largest entry of x [N]; -inf for none. Integers, because a maximum of floats is not vectorised."""
    found = ordered(f32(-np.inf))
    for j in range(x.size):
        found = max(found, ordered(x[j]))
    return i32(ordered(i32(found).view(f32))).view(f32)


@numba.njit(cache=True, fastmath=_ANY_ORDER)
def block_sum(x, shift, e):
    """Sum of e^(x - shift) in units of 2^e, and the largest exponent beside e: NaN in x makes the sum NaN."""
    bias = f32(_BIAS - e)
    total = f32(0)
    top = _FLUSHED_BITS
    for j in range(x.size):
        v = raised(f32(x[j] - shift))
        n = exponent(v)
        bits = encoded(n, bias)
        top = max(top, bits)
        total += mantissa(v, n) * power(bits)
    return total, top - _BIAS_BITS


@numba.njit(cache=True, fastmath=_ANY_ORDER)
def block_weights(x, y, e):
    """As `block_sum` without a shift, with the terms of the sum in y."""
    bias = f32(_BIAS - e)
    total = f32(0)
    top = _FLUSHED_BITS
    for j in range(x.size):
        v = raised(x[j])
        n = exponent(v)
        bits = encoded(n, bias)
        top = max(top, bits)
        weight = mantissa(v, n) * power(bits)
        y[j] = weight
        total += weight
    return total, top - _BIAS_BITS


@numba.njit(cache=True, nogil=True)
def scale(y, factor):
    """Y times the factor, in place."""
    for j in range(y.size):
        y[j] *= factor


@numba.njit(cache=True)
def shifted_sum(x, shift):
    """Sum of e^(x - shift) in fp64 over x [N], and the largest exponent in it."""
    total, top = 0.0, -127
    for start in range(0, x.size, BLOCK):
        found, reached = block_sum(x[start : start + BLOCK], shift, f32(0))
        total += found
        top = max(top, reached)
    return total, top


@numba.njit(cache=True, nogil=True)
def write(x, y, shift, e, total):
    """The last pass, y = e^(x - shift) / (total 2^e). Without anything to weigh y is 0, and with NaN it is NaN."""
    if not total > 0:
        y[:] = f32(total)
        return
    bias = f32(_BIAS - e)
    inverse = f32(1 / total)
    for j in range(x.size):
        v = raised(f32(x[j] - shift))
        n = exponent(v)
        y[j] = mantissa(v, n) * inverse * power(encoded(n, bias))


@numba.njit(cache=True, nogil=True)
def two_pass_sum(x):
    """The sum of e^x over x [N] as (shift, e, total), in one pass that keeps a pair: e follows the largest exponent."""
    e, total = exponent(raised(largest(x[:BLOCK]))), 0.0
    for start in range(0, x.size, BLOCK):
        block = x[start : start + BLOCK]
        found, above = block_sum(block, f32(0), e)
        if above > _SLACK:
            higher = exponent(raised(largest(block)))
            total *= 2.0 ** np.float64(e - higher)
            e = higher
            found, above = block_sum(block, f32(0), e)
        total += found
    if not within(e) or math.isnan(total):
        return f32(0), f32(0), UNKNOWN
    return f32(0), e, total


@numba.njit(cache=True, nogil=True)
def online_sum(x):
    """As `two_pass_sum`, in one pass that keeps a maximum and the sum beside it, block by block."""
    maximum, total = f32(-np.inf), 0.0
    for start in range(0, x.size, BLOCK):
        block = x[start : start + BLOCK]
        found = largest(block)
        grown = maximum if found <= maximum else found  # NaN is taken over
        shift = f32(0) if grown == -np.inf else grown
        if total != 0:
            total *= math.exp(np.float64(maximum) - np.float64(shift))
        total += block_sum(block, shift, f32(0))[0]
        maximum = grown
    return f32(0) if maximum == -np.inf else maximum, f32(0), total


@numba.njit(cache=True, nogil=True)
def three_pass_sum(x):
    """As `two_pass_sum`, with one pass for the maximum and one for the sum."""
    maximum = largest(x)
    shift = f32(0) if maximum == -np.inf else maximum
    return shift, f32(0), shifted_sum(x, shift)[0]


@numba.njit(cache=True, nogil=True)
def unified_max_sum(x, phi, low, high):
    """As `two_pass_sum`, in one pass with a constant shift; the largest exponent tells whether it fitted."""
    total, top = shifted_sum(x, phi)
    # The largest entry lies within half an exponent of it.
    if (top - 0.5) * _LN2 > low and (top + 0.5) * _LN2 < high and total > 0:
        return phi, f32(0), total
    return phi, f32(0), UNKNOWN


@numba.njit(cache=True, nogil=True)
def two_pass_kept(x, y):
    """As `two_pass_sum`, with the terms of the sum left in y."""
    e, total = exponent(raised(largest(x[:BLOCK]))), 0.0
    for start in range(0, x.size, BLOCK):
        block, weights = x[start : start + BLOCK], y[start : start + BLOCK]
        found, above = block_weights(block, weights, e)
        if above > _SLACK:
            higher = exponent(raised(largest(block)))
            factor = 2.0 ** np.float64(e - higher)
            total *= factor
            scale(y[:start], f32(factor))
            e = higher
            found, above = block_weights(block, weights, e)
        total += found
    if not within(e) or math.isnan(total):
        return f32(0), f32(0), UNKNOWN
    return f32(0), e, total


@numba.njit(cache=True)
def _finish(x, y, shift, e, total):
    """The last pass; a row that an algorithm could not sum takes its own maximum."""
    if total < 0:
        shift, e, total = three_pass_sum(x)
    write(x, y, shift, e, total)


@numba.njit(cache=True, nogil=True)
def two_pass_recomputed(x, y):
    """Softmax of each row of x [R, N] into y; the exponentials are computed twice, as published."""
    for i in range(x.shape[0]):
        shift, e, total = two_pass_sum(x[i])
        _finish(x[i], y[i], shift, e, total)


@numba.njit(cache=True, nogil=True)
def two_pass(x, y):
    """Softmax of each row of x [R, N] into y; the exponentials are computed once where the row stays in cache."""
    if x.shape[1] > IN_CACHE:
        two_pass_recomputed(x, y)
        return
    for i in range(x.shape[0]):
        total = two_pass_kept(x[i], y[i])[2]
        if total > 0:
            scale(y[i], f32(1 / total))
        else:
            _finish(x[i], y[i], f32(0), f32(0), UNKNOWN)


@numba.njit(cache=True, nogil=True)
def online(x, y):
    """Softmax of each row of x [R, N] into y."""
    for i in range(x.shape[0]):
        shift, e, total = online_sum(x[i])
        _finish(x[i], y[i], shift, e, total)


@numba.njit(cache=True, nogil=True)
def three_pass(x, y):
    """Softmax of each row of x [R, N] into y."""
    for i in range(x.shape[0]):
        shift, e, total = three_pass_sum(x[i])
        _finish(x[i], y[i], shift, e, total)


@numba.njit(cache=True, nogil=True)
def unified_max(x, y, phi, low, high):
    """Softmax of each row of x [R, N] into y."""
    for i in range(x.shape[0]):
        shift, e, total = unified_max_sum(x[i], phi, low, high)
        _finish(x[i], y[i], shift, e, total)
