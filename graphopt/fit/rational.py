"""Rational functions with a small largest error on an interval, with a denominator that has no poles.

Linearised least squares (Sanathanan & Koerner, 1963): P - f (Q - 1) = f is linear in the coefficients, and weights of
1 / Q from the round before make its residual that of P / Q. Lawson's weights (1961) turn the least squares towards the
least maximum: points with a large error count more in the next round. What is kept is the round whose largest error,
of the function as the operator computes it, is the least.

From there differential correction (Barrodale, Powell & Roberts, 1972) goes on: linear programs whose solutions approach
the best rational function with Q >= 1 on the interval, where least squares may end with a sum in |.| that changes sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, lsq_linear

from graphopt.ops.group_rational import FORMS

_Array = np.ndarray[Any, np.dtype[np.float64]]
_POINTS = 1200
_ROUNDS = {"abs_sum": 40, "sum_abs": 12}
"""Of Lawson's weights; with bounds on the coefficients a round takes ten times as long."""
_INNER = 4
"""Least squares per round of Lawson's weights, for the weights 1 / Q to settle."""
_LEAST_WEIGHT = 1e-3
"""Of a point without error, so that it does not drop out for good."""
_CORRECTIONS = 20
_SOLVABLE = 1e-6
"""Relative error from which on linear programs, whose tolerances are 1e-7, have something to correct."""


@dataclass(frozen=True)
class RationalFunction:
    """P(x) / Q(x) on an interval.

    Attributes:
        numerator: a_0 .. a_m.
        denominator: b_1 .. b_n, as `graphopt::group_rational` takes them.
        form: which denominator, see `graphopt.ops.group_rational.FORMS`.
        low: where the interval begins.
        high: where it ends.
        error: largest error on a grid of the interval, four times as fine as that of the fit.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    form: str
    low: float
    high: float
    error: float

    def __call__(self, x: Any) -> _Array:
        """Values at `x`, in fp64."""
        return _value(np.asarray(x, np.float64), np.array(self.numerator), np.array(self.denominator), self.form)


def fit_rational(
    function: Callable[[_Array], _Array],
    low: float,
    high: float,
    degrees: tuple[int, int] = (5, 5),
    form: str = "abs_sum",
) -> RationalFunction:
    """The rational function of these degrees that is close to `function` everywhere on [low, high].

    Args:
        function: from points [N] to values [N], in fp64.
        low: where the interval begins.
        high: where it ends; above `low`.
        degrees: of numerator and denominator, 0 to 7.
        form: which denominator, see `graphopt.ops.group_rational.FORMS`.

    Raises:
        ValueError: the interval is empty or infinite, a degree is out of range, there is no such form, or the function
            is not finite on the interval.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"expected an interval of finite length, got [{low}, {high}]")
    if not all(0 <= degree <= 7 for degree in degrees):
        raise ValueError(f"expected degrees of 0 to 7, got {degrees}")
    if form not in FORMS:
        raise ValueError(f"expected form to be one of {FORMS}, got {form!r}")
    x = _grid(low, high, _POINTS)
    wanted = np.asarray(function(x), np.float64)
    if not np.isfinite(wanted).all():
        raise ValueError(f"the function is not finite on [{low}, {high}]")
    # Powers of numbers up to 1 keep the columns of the least squares apart.
    unit = float(np.abs(x).max())
    a, b = _corrected(x / unit, wanted, _search(x / unit, wanted, degrees, form), form)
    a, b = a / unit ** np.arange(len(a)), b / unit ** np.arange(1, len(b) + 1)
    fine = _grid(low, high, 4 * _POINTS)
    error = float(np.abs(_value(fine, a, b, form) - function(fine)).max())
    return RationalFunction(tuple(a.tolist()), tuple(b.tolist()), form, low, high, error)


def _grid(low: float, high: float, count: int) -> _Array:
    """Points of an interval: half of them even, half dense around 0, where activations bend, and their corners."""
    near = np.linspace(-4.0, 4.0, count // 2)
    points = np.concatenate([np.linspace(low, high, count // 2), near, [-3.0, 0.0, 3.0, 6.0]])
    return np.unique(np.clip(points, low, high))


def _search(x: _Array, wanted: _Array, degrees: tuple[int, int], form: str) -> tuple[_Array, _Array]:
    m, n = degrees
    above = np.stack([x**i for i in range(m + 1)], axis=1)
    below = _powers(x, n, form)
    weights, q = np.ones_like(x), np.ones_like(x)
    best, found = np.inf, np.zeros(m + 1 + n)
    for _ in range(_ROUNDS[form]):
        for _ in range(_INNER):
            scale = np.sqrt(weights) / q
            system = np.hstack([above, -wanted[:, None] * below]) * scale[:, None]
            coefficients = _least_squares(system, wanted * scale, m, form)
            q = np.maximum(np.abs(1 + below @ coefficients[m + 1 :]), 1e-6)
        error = np.abs(_value(x, coefficients[: m + 1], coefficients[m + 1 :], form) - wanted)
        if error.max() < best:
            best, found = error.max(), coefficients
        if error.max() == 0:
            break
        weights *= error / error.max() + _LEAST_WEIGHT
        weights /= weights.mean()
    return found[: m + 1], found[m + 1 :]


def _corrected(x: _Array, wanted: _Array, found: tuple[_Array, _Array], form: str) -> tuple[_Array, _Array]:
    """Better coefficients by differential correction, or those that were given.

    With e, P_0 and Q_0 of the round before, each round minimises the largest (|f Q - P| - e Q) / Q_0: below 0, every
    point of P / Q is closer than e. Q = q_0 + ... is at least q_0 everywhere; divided by q_0 it is 1 plus a sum >= 0.
    """
    m, n = len(found[0]) - 1, len(found[1])
    size = float(np.abs(wanted).max()) or 1.0
    x, wanted = x[::2], wanted[::2] / size
    above = np.stack([x**i for i in range(m + 1)], axis=1)
    below = np.hstack([np.ones((len(x), 1)), _powers(x, n, form)])
    best = (found[0] / size, found[1])
    error = float(np.abs(_value(x, *best, form) - wanted).max())
    q = np.ones(len(x))
    # Rows: f Q - P, P - f Q, and Q_0 in the column of what is minimised; then q_0 - Q <= 0.
    positive = np.hstack([np.zeros_like(above), -below, np.zeros((len(x), 1))])
    positive[:, m + 1] = 0
    low = 0.0 if form == "sum_abs" else -1.0
    bounds = [(None, None)] * (m + 1) + [(1e-7, 1)] + [(low, 1)] * n + [(None, None)]
    for _ in range(_CORRECTIONS):
        if n == 0 or error < _SOLVABLE:
            break
        sides = [
            np.hstack([sign * -above, (sign * wanted - error)[:, None] * below, -q[:, None]]) for sign in (1.0, -1.0)
        ]
        system = np.vstack([*sides, positive])
        solved = linprog([0.0] * (m + n + 2) + [1.0], system, np.zeros(len(system)), bounds=bounds)
        if not solved.success or solved.x[-1] > -1e-9:
            break
        a, whole = solved.x[: m + 1], solved.x[m + 1 : -1]
        q = below @ whole
        candidate = (a / whole[0], whole[1:] / whole[0])
        reached = float(np.abs(_value(x, *candidate, form) - wanted).max())
        goes_on = reached < error * (1 - 1e-4)
        if reached < error:
            best, error = candidate, reached
        if not goes_on:
            break
    return best[0] * size, best[1]


def _least_squares(system: _Array, wanted: _Array, m: int, form: str) -> _Array:
    """Coefficients; those of the denominator at least 0 where the form takes their magnitude."""
    norms = np.linalg.norm(system, axis=0)
    norms[norms == 0] = 1
    if form == "abs_sum":
        return np.asarray(np.linalg.lstsq(system / norms, wanted, rcond=None)[0] / norms)
    low = np.where(np.arange(system.shape[1]) > m, 0.0, -np.inf)
    return np.asarray(lsq_linear(system / norms, wanted, (low, np.inf), method="bvls").x / norms)


def _powers(x: _Array, n: int, form: str) -> _Array:
    """What the coefficients of the denominator are multiplied with [N, n]."""
    base = np.abs(x) if form == "sum_abs" else x
    return np.stack([base**i for i in range(1, n + 1)], axis=1) if n else np.zeros((len(x), 0))


def _value(x: _Array, a: _Array, b: _Array, form: str) -> _Array:
    """P / Q as the operator computes it."""
    flat = x.reshape(-1)
    p = np.polynomial.polynomial.polyval(flat, a)
    powers = _powers(flat, len(b), form)
    q = 1 + (powers @ np.abs(b) if form == "sum_abs" else np.abs(powers @ b))
    return np.asarray((p / q).reshape(x.shape))
