"""Formulas of several variables: spline networks as sympy expressions, their constants refined, and as modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from graphopt.fit.splines import SplineLayer, SplineNetwork

Substitute = Callable[[sympy.Expr], sympy.Expr]
Edge = tuple[int, int, int]
"""Layer, output, input."""
_GUARD = 1e-12


class Formula(nn.Module):
    """Sympy expressions as a module: x [.., I] -> one column per expression [.., O].

    Roots and logarithms of numbers below 1e-12 are those of 1e-12, so that an input beyond a formula's domain gives no
    NaN; a pole stays a pole.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], curves: Mapping[str, nn.Module] | None = None) -> None:
        """Keep the expressions.

        Args:
            expressions: of the symbols x_0, x_1, ... and of undefined functions named in `curves`.
            curves: what undefined functions of one argument compute, [.., 1] -> [.., 1].
        """
        super().__init__()
        self.expressions = tuple(expressions)
        self.curves = nn.ModuleDict(curves)

    def forward(self, x: Tensor) -> Tensor:
        """Values of all expressions at x."""
        return values_of(self.expressions, x, dict(self.curves.items()))


class EdgeCurve(nn.Module):
    """One edge of a spline layer as a module [.., 1] -> [.., 1]."""

    def __init__(self, layer: SplineLayer, output: int, input: int) -> None:
        """Args: layer: holds the edge. output, input: which it is."""
        super().__init__()
        single = SplineLayer(layer.low[input : input + 1], layer.high[input : input + 1], 1, layer.grid)
        with torch.no_grad():
            single.base.copy_(layer.base[output, input])
            single.coefficients.copy_(layer.coefficients[output, input])
        self.layer = single

    def forward(self, x: Tensor) -> Tensor:
        """The edge's values."""
        y: Tensor = self.layer(x)
        return y


def variables(count: int) -> tuple[sympy.Symbol, ...]:
    """The symbols x_0, x_1, ..."""
    return tuple(sympy.Symbol(f"x_{i}", real=True) for i in range(count))


def formulas(module: nn.Module) -> list[sympy.Expr]:
    """The expressions that a fitted module computes, one per output, in the symbols x_0, x_1, ... (real).

    Args:
        module: a `Formula`; a `SplineNetwork`, whose edges appear as undefined functions `phi_l_o_i` of layer l, from
            its node i to node o of the next one; or a module that holds one of them.

    Raises:
        ValueError: there is neither in it.
    """
    for part in module.modules():
        if isinstance(part, Formula):
            return list(part.expressions)
        if isinstance(part, SplineNetwork):
            return compose(part, {})
    raise ValueError(f"expected a module with a Formula or a SplineNetwork, got {type(module).__name__}")


def compose(network: SplineNetwork, known: Mapping[Edge, Substitute]) -> list[sympy.Expr]:
    """The network as expressions, one per output.

    Args:
        network: gives the kept edges.
        known: expressions of edges; the others become undefined functions `phi_l_o_i`.
    """
    layers = network.spline_layers()
    values: list[sympy.Expr] = list(variables(layers[0].inputs))
    for index, layer in enumerate(layers):
        sums = []
        for o in range(layer.outputs):
            terms = []
            for i in (layer.mask[o] > 0).nonzero().flatten().tolist():
                function = known.get((index, o, i)) or sympy.Function(curve_name((index, o, i)))
                terms.append(function(values[i]))
            sums.append(sympy.Add(*terms))
        values = sums
    return values


def curve_name(edge: Edge) -> str:
    """How an edge without an expression is called."""
    return "phi_" + "_".join(map(str, edge))


def tidy(expression: sympy.Expr) -> sympy.Expr:
    """One way to write what has several, so that a formula has as few constants as it needs.

    exp(u + c) becomes exp(c) exp(u); a factor leaves a power, a logarithm or a magnitude; a phase is within (-pi, pi].
    """
    if expression.is_Atom:
        return expression
    expression = expression.func(*map(tidy, expression.args))
    inside = expression.base if expression.is_Pow else expression.args[0]
    name = type(expression).__name__
    if not inside.is_Add or not (expression.is_Pow or len(expression.args) == 1):
        return expression
    constant, rest = inside.as_coeff_Add()
    if name == "exp":
        return sympy.exp(constant) * sympy.exp(rest)
    if name == "sin" and constant.is_Float:
        turns = round(float(constant) / (2 * math.pi))
        return sympy.sin(sympy.Float(float(constant) - 2 * math.pi * turns) + rest) if turns else expression
    factor = sympy.Add.make_args(rest)[0].as_coeff_Mul()[0]
    if not factor.is_Float or factor == 0:
        return expression
    factor = factor if expression.is_Pow and expression.exp.is_Integer else abs(factor)
    scaled = sympy.Add(*(term / factor for term in sympy.Add.make_args(inside)))
    if expression.is_Pow:
        return factor**expression.exp * scaled**expression.exp
    if name == "log":
        return sympy.log(factor) + sympy.log(scaled)
    return factor * sympy.Abs(scaled) if name == "Abs" else expression


def values_of(
    expressions: Sequence[sympy.Expr],
    x: Tensor,
    curves: Mapping[str, Any],
    constants: Mapping[sympy.Expr, Tensor] | None = None,
) -> Tensor:
    """All expressions at x [.., I], with values for the symbols that stand for constants: [.., O]."""
    count = max([0, *(int(s.name[2:]) for e in expressions for s in e.free_symbols if s.name.startswith("x_"))]) + 1
    known: dict[sympy.Expr, Any] = dict(constants or {})
    known |= {symbol: x.narrow(-1, i, 1) for i, symbol in enumerate(variables(count))}
    values = [evaluate(e, known, curves) for e in expressions]
    # A constant has no batch of its own.
    varies = [bool(e.free_symbols & set(variables(count))) for e in expressions]
    return torch.cat(
        [v if free else x.narrow(-1, 0, 1) * 0.0 + v for v, free in zip(values, varies, strict=True)], dim=-1
    )


def evaluate(expression: sympy.Expr, known: dict[sympy.Expr, Any], curves: Mapping[str, Any]) -> Any:
    """Value of an expression on tensors.

    Args:
        expression: sums, products, powers, exp, log, sin, cos, tanh, abs, undefined functions.
        known: values by symbol; takes those of all parts, so that what occurs twice is computed once.
        curves: undefined functions by name.

    Returns:
        A tensor, or a float where nothing in it varies.

    Raises:
        ValueError: another function occurs.
    """
    if expression in known:
        return known[expression]
    if expression.is_number:
        return float(expression)
    if expression.is_Add or expression.is_Mul:
        parts = [evaluate(part, known, curves) for part in expression.args]
        value = parts[0]
        for part in parts[1:]:
            value = value + part if expression.is_Add else value * part
    elif expression.is_Pow:
        base, exponent = (evaluate(part, known, curves) for part in expression.args)
        value = _power(base, exponent)
    elif len(expression.args) == 1:
        value = _function(expression, evaluate(expression.args[0], known, curves), curves)
    else:
        raise ValueError(f"expected functions of the library, got {expression}")
    known[expression] = value
    return value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, float):
        return torch.exp(exponent * math.log(max(base, _GUARD)))
    if not isinstance(exponent, float):  # exp(u log(x)) is shown as x^u
        return torch.exp(exponent * torch.log(torch.clamp(base, min=_GUARD)))
    if exponent < 0:
        return 1.0 / _power(base, -exponent)
    if exponent == int(exponent) and exponent <= 4:
        value = base
        for _ in range(int(exponent) - 1):
            value = value * base
        return value
    if exponent == 0.5:
        return torch.sqrt(torch.clamp(base, min=_GUARD))
    return torch.pow(base if exponent == int(exponent) else torch.clamp(base, min=_GUARD), exponent)


def _function(expression: sympy.Expr, argument: Any, curves: Mapping[str, Any]) -> Any:
    name = type(expression).__name__
    if name in curves:
        return curves[name](argument)
    if name == "log":
        return torch.log(torch.clamp(argument, min=_GUARD))
    plain = {"sin": torch.sin, "cos": torch.cos, "exp": torch.exp, "tanh": torch.tanh, "Abs": torch.abs}
    if name not in plain:
        raise ValueError(f"expected functions of the library, got {name} in {expression}")
    return plain[name](argument)
