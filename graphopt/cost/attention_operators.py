"""FLOPs of the operators in `graphopt.ops`, in the chunked forms that are run."""

from __future__ import annotations

import sympy

from graphopt.cost.contractions import SOFTMAX
from graphopt.cost.table import Call, elements, flops

_CHUNK, _FINE_CHUNK = 64, 16
# Newton steps of the inverse of the landmarks' kernel, two products each.
_NEWTON = 20
# Mantissa and exponent of e^x: rounding 2, two multiply-subtracts 4, a polynomial of degree 6 12. Adding two pairs:
# maximum, two differences, two powers, two products, a sum. Writing: difference, power, two products.
_TWO_PASS = 18 + 8 + 4
# Maximum, subtract, exp, sum; then subtract, exp, divide. Rescaling the sum is rare beside them.
_ONLINE = 7


@flops("graphopt::hedgehog_map", contraction=True)
def feature_map(call: Call) -> sympy.Expr:
    """A linear map per head `[B, H, T, D] x [H, D, F]`, then a softmax over the features of either sign."""
    B, H, T, D = call.input(0)
    return B * H * T * call.input(1)[-1] * (2 * D + int(call.has(2))) + SOFTMAX * elements(call.output())


@flops("graphopt::last_rows")
def last_rows(call: Call) -> sympy.Expr:
    """Nothing is computed."""
    return sympy.Integer(0)


@flops("graphopt::kernel_attention", contraction=True)
def kernel_attention(call: Call) -> sympy.Expr:
    """phi(q) (phi(k)^T [v, 1]), then a division."""
    (B, H, T, F), (_, K, S, _), D = call.input(0), call.input(1), call.input(2)[3]
    weigh = elements(call.input(1)) if call.has(3) else sympy.Integer(0)
    return 2 * B * F * (D + 1) * (K * S + H * T) + B * H * T * (D + 1) + weigh


@flops("graphopt::linear_attention", contraction=True)
def linear_attention(call: Call) -> sympy.Expr:
    """Masked products in chunks, the state's update and read-out; the delta rules solve a system in each chunk."""
    q, k, v = call.input(0), call.input(1), call.input(2)
    rule = str(call.attrs.get("rule", "linear"))
    fine = call.has(3) and call.input(3)[3] != 1
    chunk = _FINE_CHUNK if fine else _CHUNK
    found = _chunked(q, k, v[3], chunk)
    if rule.endswith("delta"):
        B, H, T, F = k
        found += B * H * T * (2 * chunk * F + chunk * (F + v[3]) + 2 * F * v[3])
    return found


def _chunked(q: tuple[sympy.Expr, ...], k: tuple[sympy.Expr, ...], width: sympy.Expr, chunk: int) -> sympy.Expr:
    B, H, T, F = q
    return 2 * B * H * T * (chunk * (F + width) + F * width) + 2 * B * k[1] * T * F * width


@flops("graphopt::window_attention", contraction=True)
def window_attention(call: Call) -> sympy.Expr:
    """Scores, softmax and values of two blocks of keys for each query, and of the sinks."""
    return _near(call)


def _near(call: Call) -> sympy.Expr:
    (B, H, T, D), V = call.input(0), call.input(2)[3]
    keys = 2 * int(call.attrs.get("window", 64)) + int(call.attrs.get("sinks", 0))
    return B * H * T * keys * (2 * D + 2 * (V + 1) + SOFTMAX)


@flops("graphopt::windowed_linear_attention", contraction=True)
def windowed_linear_attention(call: Call) -> sympy.Expr:
    """The window, the linear part in chunks, their sum and its division."""
    (B, H, T, _), V = call.input(0), call.input(2)[3]
    return _near(call) + _chunked(call.input(3), call.input(4), V + 1, _CHUNK) + 3 * B * H * T * (V + 1)


@flops("graphopt::block_attention", contraction=True)
def block_attention(call: Call) -> sympy.Expr:
    """Each query with the keys of its own block."""
    (B, H, T, D), V = call.input(0), call.input(2)[3]
    return B * H * T * int(call.attrs.get("block", 64)) * (2 * D + 2 * V + SOFTMAX)


@flops("graphopt::landmark_attention", contraction=True)
def landmark_attention(call: Call) -> sympy.Expr:
    """Segment means, three kernels with the landmarks, the inverse by Newton steps, and two products with values."""
    (B, H, T, D), (_, K, S, _), V = call.input(0), call.input(1), call.input(2)[3]
    L = int(call.attrs.get("landmarks", 49))
    kernels = (2 * D + 4) * L * (H * T + K * (S + L))
    products = 2 * L * (K * S * (D + V) + H * T * V + K * L * V)
    return B * (kernels + products + _NEWTON * 4 * K * L**3)


@flops("graphopt::two_pass_softmax")
def two_pass_softmax(call: Call) -> sympy.Expr:
    """Pairs of mantissa and exponent, their sum, and the quotient."""
    return _TWO_PASS * elements(call.output())


@flops("graphopt::online_softmax")
def online_softmax(call: Call) -> sympy.Expr:
    """Two passes with an exponential each."""
    return _ONLINE * elements(call.output())


@flops("graphopt::unified_max_softmax")
def unified_max_softmax(call: Call) -> sympy.Expr:
    """As a softmax: the maximum is still looked for, since it guards the constant."""
    return SOFTMAX * elements(call.output())


@flops("graphopt::softplus_attention", contraction=True)
def softplus_attention(call: Call) -> sympy.Expr:
    """Directions, scores, softplus and values of all pairs; re-weighting compares, divides and multiplies them."""
    (B, H, T, D), (_, _, S, V) = call.input(0), call.input(2)
    power = int(call.attrs.get("power", 0))
    # Scale, softplus, sum, divide; the multiplications of a power by squares are its bits.
    weigh = 6 + ((5 + power.bit_length() + power.bit_count()) if power else 0)
    return B * H * T * S * (2 * D + 2 * V + weigh) + 3 * (elements(call.input(0)) + elements(call.input(1)))
