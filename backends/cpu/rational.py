"""The grouped rational function in fp32 and its gradients as loops that LLVM turns into vector instructions.

Numbers lie flat, `width` channels in a row per group. Coefficients travel as tuples: their number is part of the type,
so each pair of degrees is compiled on its own and Horner's rule is unrolled over values in registers. One file, because
numba compiles a function again only if its own file has changed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from graphopt.ops.group_rational import FARTHEST

f32 = np.float32

_FARTHEST = f32(FARTHEST)
_ZERO, _ONE = f32(0), f32(1)

# Terms of a coefficient's gradient that are summed in fp32, lane by lane; blocks are added in fp64. What the sums of a
# block are formed of stays in the L1 cache: three times 4 KB.
BLOCK = 1024

# Lanes may be added in any order; nothing else may be reordered.
_ANY_ORDER = {"reassoc", "nsz"}


@intrinsic
def horner(_context: Any, coefficients: Any, _t: Any) -> Any:
    """c_0 + t (c_1 + t (c_2 + ...)) of a tuple, with multiply-adds that round once; 0 without coefficients."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, t = values
        if not len(coefficients):
            return context.get_constant(types.float32, 0.0)
        value = builder.extract_value(given, len(coefficients) - 1)
        for i in reversed(range(len(coefficients) - 1)):
            value = builder.fma(value, t, builder.extract_value(given, i))
        return value

    return types.float32(coefficients, types.float32), generate


@intrinsic
def loaded(_context, row, like):
    """The first entries of a contiguous row as a tuple, as many as `like` has."""
    kind = types.UniTuple(types.float32, len(like))

    def generate(context, builder, signature, values):
        data = arrayobj.make_array(row)(context, builder, values[0]).data
        entries = [builder.load(cgutils.gep(builder, data, i)) for i in range(len(like))]
        return context.make_tuple(builder, kind, entries)

    return kind(row, like), generate


@numba.njit(cache=True, error_model="numpy")
def value(v, a, b, split, magnitude):
    """R(v) or relu(v) - R(|v|); `magnitude` means powers of |v| in the denominator, and that b is at least 0."""
    t = v
    if split:
        t = abs(v)
        t = _FARTHEST if t > _FARTHEST else t  # NaN stays NaN
    base = abs(t) if magnitude else t
    below = f32(base * horner(b, base)) if len(b) else _ZERO  # 0 times infinity would be NaN
    r = f32(horner(a, t) / f32(_ONE + abs(below)))
    return f32((_ZERO if v <= _ZERO else v) - r) if split else r


@numba.njit(cache=True, error_model="numpy")
def evaluate(x, y, a, b, split, magnitude):
    """The function of x [N] into y [N], which shares no memory with x: vectors are used only where that is so."""
    for j in range(x.size):
        y[j] = value(x[j], a, b, split, magnitude)


@numba.njit(cache=True, error_model="numpy")
def evaluate_in_place(x, a, b, split, magnitude):
    """The function of x [N] in its place."""
    for j in range(x.size):
        x[j] = value(x[j], a, b, split, magnitude)


@numba.njit(cache=True, error_model="numpy")
def differentiate(x, g, dx, t, da, db, a, b, slopes, inner, split, magnitude):
    """One block of `graphopt.ops.group_rational.gradients`.

    Args:
        x: [N].
        g: gradient of the result [N].
        dx: [N], filled.
        t: [N], filled with what is multiplied in each power of the numerator.
        da: [N], filled with what a_0 is multiplied with in the loss.
        db: [N], filled with what b_1 is multiplied with.
        a: a_0, a_1, ..
        b: b_1, b_2, .., with `magnitude` their absolute values.
        slopes: a_1, 2 a_2, ..
        inner: b_1, 2 b_2, ..
        split: relu(x) - R(|x|).
        magnitude: powers of |x| in the denominator.
    """
    for j in range(x.size):
        v = x[j]
        u = v
        side = _ONE if v > _ZERO else (-_ONE if v < _ZERO else _ZERO)
        if split:
            u = abs(v)
            u = _FARTHEST if u > _FARTHEST else u
            side = _ONE
        base = abs(u) if magnitude else u
        below = horner(b, base)
        q = f32(_ONE + abs(f32(base * below))) if len(b) else _ONE
        sign = _ONE if below > _ZERO else (-_ONE if below < _ZERO else _ZERO)
        r = f32(horner(a, u) / q)
        scaled = f32((-g[j] if split else g[j]) / q)
        d = f32(scaled * f32(horner(slopes, u) - f32(r * f32(f32(side * sign) * horner(inner, base)))))
        if split:
            d = _ZERO if abs(v) > _FARTHEST else d
            d = f32(d + g[j]) if v > _ZERO else -d
        elif not magnitude:
            sign = f32(sign * side)
        dx[j] = d
        t[j] = u
        da[j] = scaled
        db[j] = -f32(f32(scaled * r) * f32(sign * base))


@numba.njit(cache=True, fastmath=_ANY_ORDER)
def summed(w, t, magnitude):
    """The sum of w [N]; then w is multiplied by t, or by |t|, for the next power."""
    total = _ZERO
    for j in range(w.size):
        total += w[j]
        w[j] *= abs(t[j]) if magnitude else t[j]
    return total


@numba.njit(cache=True, nogil=True)
def forward(x, y, numerator, denominator, like, first, width, split, magnitude):
    """Fill y with the rational function of x.

    Args:
        x: [N], a part of all numbers.
        y: [N]; may be x.
        numerator: [G or 1, m + 1].
        denominator: [G or 1, n], at least 0 with `magnitude`.
        like: two tuples of m + 1 and n numbers.
        first: how many numbers lie before x.
        width: channels of a group.
        split: relu(x) - R(|x|).
        magnitude: powers of |x| in the denominator.
    """
    groups, same = max(len(numerator), len(denominator)), x.ctypes.data == y.ctypes.data
    start = 0
    while start < x.size:
        run = (first + start) // width
        stop = min(x.size, (run + 1) * width - first)
        a = loaded(numerator[run % groups % len(numerator)], like[0])
        b = loaded(denominator[run % groups % len(denominator)], like[1])
        if same:
            evaluate_in_place(y[start:stop], a, b, split, magnitude)
        else:
            evaluate(x[start:stop], y[start:stop], a, b, split, magnitude)
        start = stop


@numba.njit(cache=True, nogil=True)
def backward(x, g, dx, sums, numerator, denominator, slopes, inner, like, first, width, split, magnitude):
    """Fill dx with the gradient of x, and add up those of the coefficients.

    Args:
        x: [N], a part of all numbers.
        g: gradient of the result [N].
        dx: [N], filled.
        sums: [G, m + 1 + n] in fp64, added to: of each group's coefficients.
        numerator: [G or 1, m + 1].
        denominator: [G or 1, n].
        slopes: a_1, 2 a_2, .. [G or 1, m].
        inner: b_1, 2 b_2, .. [G or 1, n].
        like: three tuples of m + 1, n and m numbers.
        first: as in `forward`, as is all that follows.
        width: channels of a group.
        split: relu(x) - R(|x|).
        magnitude: powers of |x| in the denominator.
    """
    groups, count = len(sums), len(like[0])
    t, da, db = np.empty(BLOCK, f32), np.empty(BLOCK, f32), np.empty(BLOCK, f32)
    start = 0
    while start < x.size:
        run = (first + start) // width
        stop = min(x.size, (run + 1) * width - first, start + BLOCK)
        group = run % groups
        i, k = group % len(numerator), group % len(denominator)
        a, c = loaded(numerator[i], like[0]), loaded(slopes[i], like[2])
        b, d = loaded(denominator[k], like[1]), loaded(inner[k], like[1])
        part = slice(0, stop - start)
        here = slice(start, stop)
        differentiate(x[here], g[here], dx[here], t[part], da[part], db[part], a, b, c, d, split, magnitude)
        for power in range(count):
            sums[group, power] += summed(da[part], t[part], False)
        for power in range(len(like[1])):
            sums[group, count + power] += summed(db[part], t[part], magnitude)
        start = stop
