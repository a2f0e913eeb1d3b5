"""Activations and the rational functions in their place as sympy expressions: closed form, derivative, error bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy import Abs, Max, Min, Piecewise, Rational, erf, exp, log, pi, sqrt, tanh

X = sympy.Symbol("x", real=True)
"""The argument of every expression here."""

_CELLS = 20_000
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

_PLAIN: dict[str, sympy.Expr] = {
    "relu": Max(X, 0),
    "gelu": X * (1 + erf(X / sqrt(2))) / 2,
    "gelu_tanh": X * (1 + tanh(sqrt(2 / pi) * (X + Rational(44715, 1_000_000) * X**3))) / 2,
    "silu": X / (1 + exp(-X)),
    "quick_gelu": X / (1 + exp(-sympy.Float("1.702") * X)),
    "tanh": tanh(X),
    "sigmoid": 1 / (1 + exp(-X)),
    "leaky_relu": Max(X, 0) + Min(X, 0) / 100,
    "elu": Piecewise((X, X > 0), (exp(X) - 1, True)),
    "selu": _SELU_SCALE * Piecewise((X, X > 0), (_SELU_ALPHA * (exp(X) - 1), True)),
    "hardswish": X * Min(Max(X + 3, 0), 6) / 6,
    "hardsigmoid": Min(Max(X + 3, 0), 6) / 6,
    "softplus": log(1 + exp(X)),
    "softsign": X / (1 + Abs(X)),
    "mish": X * tanh(log(1 + exp(X))),
    "relu6": Min(Max(X, 0), 6),
    "relu_squared": Max(X, 0) ** 2,
}


def activation_expression(name: str) -> sympy.Expr:
    """The closed form of an activation in `X`.

    Args:
        name: as `graphopt.sites.mlp.activation` takes it, such as `gelu` or `leaky_relu(0.2)`.

    Raises:
        KeyError: there is no activation of that name.
    """
    stem, _, rest = name.partition("(")
    if not rest:
        return _PLAIN[stem]
    p = sympy.Float(rest.rstrip(")"))
    families = {
        "leaky_relu": Max(X, 0) + p * Min(X, 0),
        "elu": Piecewise((X, X > 0), (p * (exp(X) - 1), True)),
        "swish": X / (1 + exp(-p * X)),
    }
    return families[stem]


def rational_expression(
    numerator: Sequence[float], denominator: Sequence[float], form: str = "abs_sum", split: bool = False
) -> sympy.Expr:
    """What `graphopt::group_rational` computes with one group of coefficients, in `X`.

    Args:
        numerator: a_0 .. a_m.
        denominator: b_1 .. b_n.
        form: see `graphopt.ops.group_rational.FORMS`.
        split: relu(x) - R(|x|) in place of R(x).
    """
    t = Abs(X) if split else X
    top = sum((sympy.Float(a) * t**i for i, a in enumerate(numerator)), sympy.Integer(0))
    if form == "abs_sum":
        below = Abs(sum((sympy.Float(b) * t**i for i, b in enumerate(denominator, 1)), sympy.Integer(0)))
    else:
        below = sum((Abs(sympy.Float(b)) * Abs(X) ** i for i, b in enumerate(denominator, 1)), sympy.Integer(0))
    value = top / (1 + below)
    return Max(X, 0) - value if split else value


@dataclass(frozen=True)
class ErrorBound:
    """How far two expressions are apart on an interval.

    Attributes:
        low: where the interval begins.
        high: where it ends.
        largest: largest difference on a grid.
        at: where that is.
        bound: no difference is larger, between the points either: half a cell times the slope at its ends is added to
            each cell. What is left out is of the second order in cells of 1 / 20,000 of the interval.
    """

    low: float
    high: float
    largest: float
    at: float
    bound: float


def error_bound(first: sympy.Expr, second: sympy.Expr, low: float, high: float) -> ErrorBound:
    """The largest difference of two expressions in `X`, with what their derivatives allow between grid points.

    Args:
        first: one of them.
        second: the other.
        low: where the interval begins.
        high: where it ends; above `low`.

    Raises:
        ValueError: the interval is empty or infinite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"expected an interval of finite length, got [{low}, {high}]")
    x = np.linspace(low, high, _CELLS + 1)
    difference = np.abs(evaluate(first, x) - evaluate(second, x))
    slope = np.abs(evaluate(sympy.diff(first, X), x) - evaluate(sympy.diff(second, X), x))
    cells = np.maximum(difference[1:], difference[:-1]) + np.maximum(slope[1:], slope[:-1]) * (x[1] - x[0]) / 2
    worst = int(difference.argmax())
    return ErrorBound(low, high, float(difference[worst]), float(x[worst]), float(cells.max()))


def evaluate(expression: sympy.Expr, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values of an expression in `X` at points [N], in fp64."""
    function = sympy.lambdify(X, expression, ["numpy", "scipy"])
    with np.errstate(over="ignore"):  # exp(-x) far out: the quotient is 0, as it should be
        return np.broadcast_to(np.asarray(function(np.asarray(x, np.float64)), np.float64), x.shape)


def shown(expression: sympy.Expr, digits: int = 6) -> str:
    """An expression in one line, numbers to so many digits."""
    return str(sympy.N(expression, digits))


def spelled(
    numerator: Sequence[float], denominator: Sequence[float], form: str = "abs_sum", split: bool = False
) -> dict[str, str]:
    """What `rational_expression` gives, and its derivative, in lines that can be read.

    Returns:
        Left side to right side: f and f', and the polynomials that they consist of.
    """
    t = sympy.Symbol("t")
    p = sympy.Add(*(sympy.Float(a) * t**i for i, a in enumerate(numerator)))
    inner = sympy.Add(*(sympy.Float(b) * t**i for i, b in enumerate(denominator, 1)))
    signs, lines = "", {}
    if form == "sum_abs":
        inner = sympy.Add(*(abs(sympy.Float(b)) * t**i for i, b in enumerate(denominator, 1)))
        lines = {"Q(t)": f"1 + {shown(inner)}"}
    else:
        lines = {"D(t)": shown(inner), "Q(t)": "1 + |D(t)|"}
        signs = "sign(D) "
    slope = "D'(t)" if form == "abs_sum" else "Q'(t)"
    polynomials = {"P(t)": shown(p), **lines, "P'(t)": shown(sympy.diff(p, t)), slope: shown(sympy.diff(inner, t))}
    quotient = f"(P' Q - {signs}P {slope[:2]}) / Q^2"
    if split:
        whole = {"f(x)": "max(x, 0) - P(t) / Q(t), t = |x|", "f'(x)": f"[x > 0] - sign(x) {quotient}"}
    elif form == "sum_abs":
        whole = {"f(x)": "P(x) / Q(|x|)", "f'(x)": "(P' Q - sign(x) P Q') / Q^2"}
    else:
        whole = {"f(x)": "P(x) / Q(x)", "f'(x)": quotient}
    return {**whole, **polynomials}
