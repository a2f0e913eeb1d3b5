"""From a trained spline network to formulas: functions for its edges, constants refined together, and simple ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from graphopt.fit.formula import Edge, EdgeCurve, Formula, compose, curve_name, tidy, values_of
from graphopt.fit.splines import SplineNetwork
from graphopt.fit.symbolic import FLOOR, EdgeFit, fit_edge

_NEAR = 0.1
"""How far a constant may be from the simple number it is tried as, relative to the larger of 1 and itself."""
_MOST_CONSTANTS = 40
"""In a formula that is refined and rounded."""
_MOST_EDGES = 12
"""In a network whose edges are tried with other functions than each one's best."""
_ALTERNATIVES = 4
_POINTS = 600
"""Samples that a formula is refined on."""
_PRIOR = 1e-5
"""Pull of each constant towards where it began, relative to 1: a formula may have directions that change nothing."""
_EXACT = 1e-6
"""An error that rounding a constant may always cause: what is replaced computes in fp32."""
_TINY = 1e-15


@dataclass(frozen=True)
class Found:
    """What `find_formulas` returns.

    Attributes:
        module: computes the formulas.
        edges: the functions of the kept edges as they were fitted, before the joint refinement.
        error: relative RMS error of `module` on the samples.
        splines: edges that no function of the library fits, and which stay splines.
    """

    module: Formula
    edges: dict[Edge, EdgeFit]
    error: float
    splines: int


def find_formulas(network: SplineNetwork, x: Tensor, y: Tensor, least_r2: float = 0.98, growth: float = 1.1) -> Found:
    """Replace the edges of a trained network by functions of the library, and refine all constants against y.

    Edges are tried with their second best functions too where the network is small, and the formula as a whole decides.
    A constant is replaced by an integer, a half or a multiple of pi / 2 only where the error, with the other constants
    refined again, stays below `growth` times that of the refined formula.

    Args:
        network: trained, pruned, in fp64.
        x: samples [N, I].
        y: what the formulas should give there [N, O].
        least_r2: an edge that no function explains this far stays a spline.
        growth: see above; at least 1.
    """
    chosen = torch.linspace(0, len(x) - 1, min(len(x), _POINTS)).long()
    x, y = x[chosen].double(), y[chosen].double()
    options = _edge_fits(network, x, least_r2)
    layers = network.spline_layers()
    curves: dict[str, nn.Module] = {
        curve_name(edge): EdgeCurve(layers[edge[0]], edge[1], edge[2]) for edge, fits in options.items() if not fits
    }
    picked = {edge: fits[0] for edge, fits in options.items() if fits}
    picked = _search(network, picked, options, curves, x, y)
    start = [tidy(e) for e in compose(network, {edge: fit.expression for edge, fit in picked.items()})]
    fitted = _Constants(start, curves, x, y).refined()
    expressions = _simplest(start, max(fitted.error * growth, _EXACT), curves, x, y)
    error = _Constants(expressions, curves, x, y).error
    return Found(Formula(expressions, curves), picked, error, len(curves))


def _edge_fits(network: SplineNetwork, x: Tensor, least_r2: float) -> dict[Edge, list[EdgeFit]]:
    """The functions that explain each kept edge well enough, best first."""
    found: dict[Edge, list[EdgeFit]] = {}
    for index, (layer, entering) in enumerate(zip(network.spline_layers(), network.values(x)[:-1], strict=True)):
        values = layer.edges(entering).detach().numpy()
        for o, i in (layer.mask > 0).nonzero().tolist():
            column = entering[:, i].numpy()
            fits = fit_edge(column, values[:, o, i]) if column.std() > 0 else []
            found[index, o, i] = [fit for fit in fits if fit.r2 >= least_r2]
    return found


def _search(
    network: SplineNetwork,
    picked: dict[Edge, EdgeFit],
    options: Mapping[Edge, Sequence[EdgeFit]],
    curves: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
) -> dict[Edge, EdgeFit]:
    """Change one edge's function at a time, while the formula as a whole gains by it."""
    if len(picked) > _MOST_EDGES:
        return picked

    def score(fits: Mapping[Edge, EdgeFit]) -> float:
        start = [tidy(e) for e in compose(network, {edge: fit.expression for edge, fit in fits.items()})]
        error = _Constants(start, curves, x, y).refined(30).error
        return math.log10(error**2 + FLOOR) + sum(fit.price for fit in fits.values())

    best = score(picked)
    for edge in picked:
        for fit in options[edge][1 : 1 + _ALTERNATIVES]:
            trial = {**picked, edge: fit}
            found = score(trial)
            if found < best:
                best, picked = found, trial
    return picked


def _simplest(
    start: Sequence[sympy.Expr], bound: float, curves: Mapping[str, nn.Module], x: Tensor, y: Tensor
) -> list[sympy.Expr]:
    """Of the formula as it stands and multiplied out, each with simple constants, the shorter one."""
    best: list[sympy.Expr] | None = None
    forms = [list(start), _expanded(start)]
    for form in forms:
        if len(_floats(form)) > _MOST_CONSTANTS:
            continue
        found = _Constants(form, curves, x, y).refined().rounded(bound)
        # Where a constant has become 0 or 1 the rest may fall together.
        found = _Constants([tidy(e) for e in found.expressions()], curves, x, y).refined().rounded(bound)
        shown = found.expressions()
        if len(forms) == 2:
            forms.append(_expanded(shown))
        shown = min(shown, _expanded(shown), key=_length)
        if found.error <= bound and (best is None or _length(shown) < _length(best)):
            best = shown
    return best or _Constants(start, curves, x, y).refined().expressions()


def _expanded(expressions: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    return [sympy.expand(e, power_base=False, power_exp=False, log=False) for e in expressions]


class _Constants:
    """Expressions with their floating-point constants as unknowns, against samples."""

    def __init__(
        self, expressions: Sequence[sympy.Expr], curves: Mapping[str, nn.Module], x: Tensor, y: Tensor
    ) -> None:
        floats = _floats(expressions)
        self.symbols = [sympy.Symbol(f"p_{k}", real=True) for k in range(len(floats))]
        self.forms = [e.xreplace(dict(zip(floats, self.symbols, strict=True))) for e in expressions]
        self.free: dict[sympy.Symbol, float] = {s: float(f) for s, f in zip(self.symbols, floats, strict=True)}
        self.fixed: dict[sympy.Symbol, sympy.Expr] = {}
        self.curves, self.x, self.y = curves, x, y
        self.size = float(y.square().mean().sqrt()) + _TINY

    @property
    def error(self) -> float:
        """Relative RMS error; infinite where a value is not finite."""
        with torch.no_grad():
            residual = self._residual(self._vector())
        error = float(residual.square().mean().sqrt())
        return error if math.isfinite(error) else math.inf

    def refined(self, evaluations: int = 100) -> _Constants:
        """Least squares over the free constants; stays as it is where that does not lower the error."""
        if not self.free:
            return self
        before, start = self.error, dict(self.free)
        if not math.isfinite(before):
            return self
        jacobian = torch.func.jacfwd(self._residual)
        origin = np.array(list(start.values()))
        pull = _PRIOR * self.y.numel() ** 0.5 / np.maximum(1.0, np.abs(origin))

        def residual(values: Any) -> Any:
            with torch.no_grad():
                found = self._residual(torch.from_numpy(np.array(values))).numpy()
            return np.concatenate([found, pull * (values - origin)])

        def slopes(values: Any) -> Any:
            found = np.nan_to_num(jacobian(torch.from_numpy(np.array(values))).detach().numpy())
            return np.concatenate([found, np.diag(pull)])

        try:
            result = least_squares(residual, origin, slopes, x_scale="jac", max_nfev=evaluations)
        except ValueError:  # a step left the numbers that a float can hold
            return self
        self.free = dict(zip(start, map(float, result.x), strict=True))
        if not self.error <= before:
            self.free = start
        return self

    def rounded(self, bound: float) -> _Constants:
        """Fix constants at simple numbers, closest first, while the error stays within `bound`."""
        tried: set[tuple[sympy.Symbol, sympy.Expr]] = set()
        while True:
            near = [
                (abs(value - float(simple)) / max(1.0, abs(value)), symbol.name, symbol, simple)
                for symbol, value in self.free.items()
                for simple in _simple(value)
                if (symbol, simple) not in tried
            ]
            near = [item for item in near if item[0] <= _NEAR]
            if not near:
                return self
            _, _, symbol, simple = min(near, key=lambda item: item[:2])
            tried.add((symbol, simple))
            before = dict(self.free)
            del self.free[symbol]
            self.fixed[symbol] = simple
            if self.error <= bound or self.refined(20).error <= bound:
                continue
            del self.fixed[symbol]
            self.free = before

    def expressions(self) -> list[sympy.Expr]:
        """With the constants put in."""
        values = {s: sympy.Float(v) for s, v in self.free.items()} | self.fixed
        return [e.subs(values) for e in self.forms]

    def _vector(self) -> Tensor:
        return torch.tensor(list(self.free.values()), dtype=torch.float64)

    def _residual(self, values: Tensor) -> Tensor:
        constants: dict[sympy.Expr, Tensor] = {s: values[k] for k, s in enumerate(self.free)}
        constants |= {s: torch.tensor(float(v), dtype=torch.float64) for s, v in self.fixed.items()}
        return (values_of(self.forms, self.x, self.curves, constants) - self.y).flatten() / self.size


def _simple(value: float) -> Iterator[sympy.Expr]:
    """Simple numbers near a constant: an integer, a half, a multiple of pi / 2."""
    yield sympy.Integer(round(value))
    halves = round(2 * value)
    if halves % 2:
        yield sympy.Rational(halves, 2)
    quarters = round(value / (math.pi / 2))
    if quarters:
        yield quarters * sympy.pi / 2


def _floats(expressions: Sequence[sympy.Expr]) -> list[sympy.Float]:
    found = {f for e in expressions for f in e.atoms(sympy.Float)}
    return sorted(found, key=float)


def _length(expressions: Sequence[sympy.Expr]) -> int:
    return sum(int(sympy.count_ops(e)) + len(e.atoms(sympy.Float)) for e in expressions)
