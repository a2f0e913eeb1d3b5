"""Functions of one variable by name: the best a f(b x + c) + d out of a library, for samples of a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from scipy.optimize import least_squares

_Array = np.ndarray[Any, np.dtype[np.float64]]
_STARTS = 3
"""Points of the grid from which b and c are refined."""
FLOOR = 1e-6
"""Of 1 - R^2: below it a better fit of a trained curve says nothing about the function."""
PENALTY = 0.5
"""Decades of 1 - R^2 that one unit of complexity has to win."""
_GUARD = 1e-12


@dataclass(frozen=True)
class Primitive:
    """A function of the library.

    Attributes:
        name: as shown.
        value: on arrays.
        symbol: on sympy expressions.
        complexity: what it costs against x.
        scales: which numbers inside of f change the curve beyond what a and d do: `bc`, `c` (b is 1, or -1 where f
            needs that for the sign of its argument), `b`, or none.
        domain: `real`, `positive` or `nonzero` arguments.
    """

    name: str
    value: Callable[[_Array], _Array]
    symbol: Callable[[sympy.Expr], sympy.Expr]
    complexity: float
    scales: str = ""
    domain: str = "real"


def _power(exponent: int) -> Callable[[sympy.Expr], sympy.Expr]:
    return lambda u: u**exponent


LIBRARY = (
    Primitive("x", lambda u: u, lambda u: u, 1),
    Primitive("x^2", lambda u: u**2, _power(2), 2, "c"),
    Primitive("x^3", lambda u: u**3, _power(3), 3, "c"),
    Primitive("x^4", lambda u: u**4, _power(4), 3, "c"),
    Primitive("1/x", lambda u: 1 / u, _power(-1), 2, "c", "nonzero"),
    Primitive("1/x^2", lambda u: u**-2.0, _power(-2), 2.5, "c", "nonzero"),
    Primitive("sqrt", lambda u: np.sqrt(np.maximum(u, _GUARD)), sympy.sqrt, 2, "c", "positive"),
    Primitive("log", lambda u: np.log(np.maximum(u, _GUARD)), sympy.log, 2, "c", "positive"),
    Primitive("exp", lambda u: np.exp(np.minimum(u, 80.0)), sympy.exp, 2, "b"),
    Primitive("sin", np.sin, sympy.sin, 2.5, "bc"),
    Primitive("tanh", np.tanh, sympy.tanh, 3, "bc"),
    Primitive("gaussian", lambda u: np.exp(-(u**2)), lambda u: sympy.exp(-(u**2)), 3.5, "bc"),
    Primitive("abs", np.abs, sympy.Abs, 3, "c"),
)
"""What edges are compared with, simplest first."""


@dataclass(frozen=True)
class EdgeFit:
    """A f(b x + c) + d for one curve.

    Attributes:
        primitive: f.
        a: factor.
        b: factor of the argument.
        c: shift of the argument.
        d: constant.
        r2: share of the curve's variance that it explains.
        cancels: largest magnitude of a f over the range of the curve. Many a function is a parabola, or a line, where
            it is stretched enough, and d takes away what it has too much.
    """

    primitive: Primitive
    a: float
    b: float
    c: float
    d: float
    r2: float
    cancels: float = 1.0

    @property
    def price(self) -> float:
        """What it costs, in decades of unexplained variance: its complexity, and digits that a f and d cancel."""
        return PENALTY * self.primitive.complexity + float(np.log10(max(self.cancels, 1.0)))

    @property
    def score(self) -> float:
        """Decades of unexplained variance, and the price of the function; less is better."""
        return float(np.log10(max(1 - self.r2, 0.0) + FLOOR)) + self.price

    def __call__(self, x: Any) -> _Array:
        """Values at `x`."""
        argument = self.b * np.asarray(x, np.float64) + self.c
        return np.asarray(self.a * self.primitive.value(argument) + self.d)

    def expression(self, x: sympy.Expr) -> sympy.Expr:
        """The same as a sympy expression of `x`, without the numbers 1 and 0 that change nothing."""
        argument = x if self.b == 1 else sympy.Float(self.b) * x
        argument = argument if self.c == 0 else argument + sympy.Float(self.c)
        return sympy.Float(self.a) * self.primitive.symbol(argument) + sympy.Float(self.d)


def fit_edge(x: Any, y: Any, library: Sequence[Primitive] = LIBRARY) -> list[EdgeFit]:
    """All functions of the library fitted to a curve, best first.

    For each f, (b, c) come from a grid of starts and least squares from the best of these, (a, d) from linear least
    squares. What is better is decided by `EdgeFit.score`, so that x is preferred to sin(0.001 x).

    Args:
        x: places [N].
        y: values [N].
        library: the functions.

    Raises:
        ValueError: x and y are no two finite vectors of one length, or x is constant.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"expected x and y to be finite vectors of one length, got shapes {x.shape} and {y.shape}")
    centre, deviation = float(x.mean()), float(x.std())
    if deviation == 0:
        raise ValueError(f"expected x to vary, got {x[0]} only")
    z = (x - centre) / deviation
    fits = []
    for primitive in library:
        b, c = _inner(primitive, z, y)
        # (b z + c) in x; where f only scales with its argument, b is brought to 1 or -1.
        b, c = b / deviation, c - b * centre / deviation
        if primitive.scales == "c":
            b, c = float(np.sign(b)), c / abs(b)
        elif primitive.scales == "b":
            c = 0.0
        elif not primitive.scales:
            b, c = 1.0, 0.0
        fits.append(_outer(primitive, b, c, x, y))
    return sorted(fits, key=lambda fit: fit.score)


def _inner(primitive: Primitive, z: _Array, y: _Array) -> tuple[float, float]:
    """B and c for a standardised variable."""
    starts = _starts(primitive, z)
    free = [index for index, letter in enumerate("bc") if letter in primitive.scales]
    if not free:
        return 1.0, 0.0
    explained = _explained(primitive.value(starts[:, :1] * z + starts[:, 1:]), y)
    best, found = -1.0, starts[0]
    for start in starts[np.argsort(-explained)[:_STARTS]]:
        refined = _refined(primitive, start, free, z, y)
        share = float(_explained(primitive.value(refined[0] * z + refined[1])[None], y)[0])
        if share > best and _allowed(primitive, refined[0] * z + refined[1]):
            best, found = share, refined
    return float(found[0]), float(found[1])


def _starts(primitive: Primitive, z: _Array) -> _Array:
    """Pairs (b, c) [S, 2] from which to begin."""
    low, high = float(z.min()), float(z.max())
    if primitive.domain != "real":
        # The argument is b (z - pole), and the pole stands outside of the samples.
        gaps = np.geomspace(1e-3, 20.0, 24) * (high - low)
        signs = (1.0, -1.0)
        return np.array([(s, g - (low if s > 0 else -high)) for s in signs for g in gaps])
    if primitive.scales == "c":
        return np.array([(1.0, -c) for c in np.linspace(2 * low, 2 * high, 41)])
    if primitive.scales == "b":
        return np.array([(s * b, 0.0) for s in (1.0, -1.0) for b in np.geomspace(0.05, 8.0, 24)])
    if primitive.name == "sin":
        return np.array([(b, c) for b in np.linspace(0.2, 12.0, 60) for c in np.linspace(0, np.pi, 6, endpoint=False)])
    return np.array([(b, -b * c) for b in np.geomspace(0.2, 10.0, 16) for c in np.linspace(low, high, 15)])


def _refined(primitive: Primitive, start: _Array, free: Sequence[int], z: _Array, y: _Array) -> _Array:
    wanted = (y - y.mean()) / max(float(y.std()), _GUARD)

    def residual(values: _Array) -> _Array:
        point = start.copy()
        point[free] = values
        f = primitive.value(point[0] * z + point[1])
        f = np.nan_to_num(f - f.mean(), nan=0.0, posinf=1e12, neginf=-1e12)
        size = float(f @ f)
        return np.asarray(wanted if size < _GUARD else wanted - f * (float(f @ wanted) / size))

    point = start.copy()
    point[free] = least_squares(residual, start[free], max_nfev=60).x
    return point


def _explained(values: _Array, y: _Array) -> _Array:
    """R^2 of the best a f + d for rows f [S, N]: the squared correlation."""
    f = values - values.mean(1, keepdims=True)
    wanted = y - y.mean()
    sizes = (f**2).sum(1) * (wanted @ wanted)
    with np.errstate(all="ignore"):
        share = (f @ wanted) ** 2 / sizes
    return np.asarray(np.where(np.isfinite(share) & (sizes > _GUARD**2), share, 0.0))


def _allowed(primitive: Primitive, argument: _Array) -> bool:
    if primitive.domain == "positive":
        return bool(argument.min() >= 0)
    if primitive.domain == "nonzero":
        return bool(argument.min() > 0 or argument.max() < 0)
    return True


def _outer(primitive: Primitive, b: float, c: float, x: _Array, y: _Array) -> EdgeFit:
    f = primitive.value(b * x + c)
    centred, spread = f - f.mean(), y - y.mean()
    size, variance = float(centred @ centred), float(spread @ spread)
    if not np.isfinite(f).all() or size < _GUARD**2:
        return EdgeFit(primitive, 0.0, b, c, float(y.mean()), 0.0)
    a = float(centred @ spread) / size
    d = float(y.mean() - a * f.mean())
    r2 = 1 - float(((spread - a * centred) ** 2).sum()) / variance if variance > _GUARD**2 else 0.0
    # x itself has nothing to stretch.
    cancels = float(np.abs(a * f).max() / max(float(np.ptp(y)), _GUARD)) if primitive.scales else 1.0
    return EdgeFit(primitive, a, b, c, d, r2, cancels)
