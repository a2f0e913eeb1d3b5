"""Elementwise arithmetic."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import STORED_ONLY, integers, ordered, widened
from .registry import operator


def _aligned(a: Tensor, b: Tensor, axis: int | None, broadcast: int) -> Tensor:
    """Shape `b` for the broadcasting of opsets before 7, where it may match `a` from `axis` on."""
    if not broadcast or axis is None:
        return b
    start = axis % a.dim()
    return b.reshape(*b.shape, *(1,) * (a.dim() - start - b.dim()))


@operator("Add")
def add_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a + b with the broadcasting of opsets before 7."""
    return a + _aligned(a, b, axis, broadcast)


@operator("Sub")
def sub_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a - b with the broadcasting of opsets before 7."""
    return a - _aligned(a, b, axis, broadcast)


@operator("Mul")
def mul_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a * b with the broadcasting of opsets before 7."""
    return a * _aligned(a, b, axis, broadcast)


@operator("Div")
def div_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a / b with the broadcasting of opsets before 7."""
    return div_7(a, _aligned(a, b, axis, broadcast))


@operator("Pow")
def pow_1(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """Return a ** b with the broadcasting of opsets before 7."""
    return pow_7(a, _aligned(a, b, axis, broadcast))


@operator("Add", since=7)
def add_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b."""
    return integers(torch.add, a, b)


@operator("Sub", since=7)
def sub_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b."""
    return integers(torch.sub, a, b)


@operator("Mul", since=7)
def mul_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a * b."""
    return integers(torch.mul, a, b)


@operator("Div", since=7)
def div_7(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, truncated towards zero for integers."""
    if a.dtype.is_floating_point:
        return a / b
    if a.dtype == torch.uint64:
        return _quotient(a, b)
    return integers(functools.partial(torch.div, rounding_mode="trunc"), a, b)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Divide uint64, which torch would divide as int64."""
    n, d = torch.broadcast_tensors(a.view(torch.int64), b.view(torch.int64))
    # Half of the dividend is not negative, and twice its quotient is at most one too small.
    twice = torch.div((n >> 1) & torch.iinfo(torch.int64).max, d, rounding_mode="trunc") * 2
    missing = ordered(torch.ge, (n - twice * d).view(torch.uint64), d.view(torch.uint64))
    large = ordered(torch.ge, n.view(torch.uint64), d.view(torch.uint64)).to(torch.int64)
    return torch.where(d < 0, large, twice + missing).view(torch.uint64)


@operator("Pow", since=7)
def pow_7(base: Tensor, exponent: Tensor) -> Tensor:
    """Return base ** exponent in the type of the base."""
    if not base.dtype.is_floating_point and exponent.dtype.is_floating_point:
        return torch.pow(base.to(torch.float64), exponent.to(torch.float64)).to(base.dtype)
    if exponent.dtype in STORED_ONLY:
        exponent = exponent.to(torch.int64)
    return torch.pow(base, exponent).to(base.dtype)


@operator("Mod", since=10)
def mod_10(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Return the remainder of a / b: sign of b, or sign of a when `fmod`."""
    if a.dtype == torch.uint64:
        return sub_7(a, mul_7(_quotient(a, b), b))
    return integers(torch.fmod if fmod else torch.remainder, a, b)


@operator("Sum")
def sum_1(*inputs: Tensor) -> Tensor:
    """Return the elementwise sum of all inputs."""
    return functools.reduce(add_7, inputs)


@operator("Mean")
def mean_1(*inputs: Tensor) -> Tensor:
    """Return the elementwise mean of all inputs."""
    return sum_1(*inputs) / len(inputs)


@operator("Max")
def max_1(*inputs: Tensor) -> Tensor:
    """Return the elementwise maximum of all inputs."""
    return functools.reduce(lambda a, b: ordered(torch.maximum, a, b), inputs)


@operator("Min")
def min_1(*inputs: Tensor) -> Tensor:
    """Return the elementwise minimum of all inputs."""
    return functools.reduce(lambda a, b: ordered(torch.minimum, a, b), inputs)


@operator("Clip")
def clip_1(x: Tensor, *, min: float = -3.4028234663852886e38, max: float = 3.4028234663852886e38) -> Tensor:
    """Limit x to the attributes [min, max]; the defaults are the float32 range, hence no limit."""
    return torch.clamp(x, min, max)


@operator("Clip", since=11)
def clip_11(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Limit x to the inputs [low, high], either of which may be absent; high wins where low > high."""
    y = x if low is None else ordered(torch.clamp_min, x, low.reshape(()))
    return y if high is None else ordered(torch.clamp_max, y, high.reshape(()))


@operator("Abs")
def abs_1(x: Tensor) -> Tensor:
    """Return the absolute value."""
    return x if x.dtype in STORED_ONLY else torch.abs(x)


@operator("Neg")
def neg_1(x: Tensor) -> Tensor:
    """Return -x."""
    return torch.neg(x)


@operator("Sign", since=9)
def sign_9(x: Tensor) -> Tensor:
    """Return -1, 0 or 1."""
    return (x != 0).to(x.dtype) if x.dtype in STORED_ONLY else torch.sign(x)


@operator("Floor")
def floor_1(x: Tensor) -> Tensor:
    """Round towards minus infinity."""
    return torch.floor(x)


@operator("Ceil")
def ceil_1(x: Tensor) -> Tensor:
    """Round towards infinity."""
    return torch.ceil(x)


@operator("Round", since=11)
def round_11(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even."""
    return torch.round(x)


@operator("Reciprocal")
def reciprocal_1(x: Tensor) -> Tensor:
    """Return 1 / x."""
    return torch.reciprocal(x)


@operator("Sqrt")
def sqrt_1(x: Tensor) -> Tensor:
    """Return the square root."""
    return torch.sqrt(x)


@operator("Exp")
def exp_1(x: Tensor) -> Tensor:
    """Return e ** x."""
    return torch.exp(x)


@operator("Log")
def log_1(x: Tensor) -> Tensor:
    """Return the natural logarithm."""
    return torch.log(x)


@operator("Erf", since=9)
def erf_9(x: Tensor) -> Tensor:
    """Return the error function in the type of x, which may be an integer type."""
    return torch.erf(x).to(x.dtype)


@operator("Sin", since=7)
def sin_7(x: Tensor) -> Tensor:
    """Return the sine."""
    return torch.sin(x)


@operator("Cos", since=7)
def cos_7(x: Tensor) -> Tensor:
    """Return the cosine."""
    return torch.cos(x)


@operator("Tan", since=7)
def tan_7(x: Tensor) -> Tensor:
    """Return the tangent."""
    return torch.tan(x)


@operator("Asin", since=7)
def asin_7(x: Tensor) -> Tensor:
    """Return the inverse sine."""
    return torch.asin(x)


@operator("Acos", since=7)
def acos_7(x: Tensor) -> Tensor:
    """Return the inverse cosine."""
    return torch.acos(x)


@operator("Atan", since=7)
def atan_7(x: Tensor) -> Tensor:
    """Return the inverse tangent."""
    return torch.atan(x)


@operator("Sinh", since=9)
def sinh_9(x: Tensor) -> Tensor:
    """Return the hyperbolic sine."""
    return torch.sinh(x)


@operator("Cosh", since=9)
def cosh_9(x: Tensor) -> Tensor:
    """Return the hyperbolic cosine."""
    return torch.cosh(x)


@operator("Asinh", since=9)
def asinh_9(x: Tensor) -> Tensor:
    """Return the inverse hyperbolic sine."""
    return torch.asinh(x)


@operator("Acosh", since=9)
def acosh_9(x: Tensor) -> Tensor:
    """Return the inverse hyperbolic cosine."""
    return torch.acosh(x)


@operator("Atanh", since=9)
def atanh_9(x: Tensor) -> Tensor:
    """Return the inverse hyperbolic tangent."""
    return torch.atanh(x)


@operator("Where", since=9)
def where_9(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return x where the condition holds, else y."""
    return torch.where(condition, x, y)


@operator("IsNaN", since=9)
def is_nan_9(x: Tensor) -> Tensor:
    """Return where x is NaN."""
    return torch.isnan(x)


@operator("IsInf", since=10)
def is_inf_10(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Return where x is infinite with one of the asked-for signs."""
    x = widened(x)
    return torch.isinf(x) & ((x > 0) & bool(detect_positive) | (x < 0) & bool(detect_negative))


@operator("SwiGLU", since=28)
def swiglu_28(gate: Tensor, value: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return gate * sigmoid(alpha * gate) * value."""
    return gate * torch.sigmoid(alpha * gate) * value


@operator("Gelu", since=20)
def gelu_20(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return x times the normal distribution function of x."""
    return F.gelu(x, approximate=approximate)
