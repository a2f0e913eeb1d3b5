"""Rational functions in the place of activations, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from graphopt.fit.rational import RationalFunction, fit_rational
from graphopt.sites.mlp import activation

IDENTITY = "identity"
"""Beside the names of activations: R(x) = x, with a denominator that training can move."""

_Array = np.ndarray[Any, Any]
_FINEST = 1e-12


def exact(name: str) -> Callable[[_Array], _Array]:
    """An activation, or `IDENTITY`, of points [N] in fp64."""
    if name == IDENTITY:
        return lambda x: x
    function = activation(name)
    return lambda x: np.asarray(function(torch.from_numpy(np.asarray(x, np.float64))).numpy())


@functools.cache
def is_relu_and_even(name: str) -> bool:
    """Whether relu(x) - f(x) is the same for x and -x, and vanishes far out: then it has a form `split`."""
    x = np.linspace(0, 40, 401)
    function = exact(name)
    right, left = x - function(x), -function(-x)
    return bool(np.abs(right - left).max() < _FINEST and abs(right[-1]) < _FINEST)


@functools.cache
def fit_activation(
    name: str, reach: float, degrees: tuple[int, int], form: str = "abs_sum", *, split: bool
) -> RationalFunction:
    """The rational function that stands for an activation.

    Args:
        name: of the activation, or `IDENTITY`.
        reach: the fit is on [-reach, reach].
        degrees: of numerator and denominator.
        form: of the denominator, see `graphopt.ops.group_rational.FORMS`.
        split: the result R is of |x|, and relu(x) - R(|x|) stands for the activation; else R(x) does.
    """
    if name == IDENTITY:
        return _identity(reach, degrees, form)
    if split and name == "relu":
        return RationalFunction((0.0,) * (degrees[0] + 1), _live(reach, degrees[1]), form, 0.0, reach, 0.0)
    function = exact(name)
    if split:
        return fit_rational(lambda t: np.maximum(t, 0) - function(t), 0.0, reach, degrees, form)
    return fit_rational(function, -reach, reach, degrees, form)


def _live(reach: float, n: int, highest: int = 7) -> tuple[float, ...]:
    """Q = 1 + (x / reach)^2 + ..: with Q = 1 the signs in the gradient of Q would be 0, and it could never learn."""
    return tuple(reach**-i if i % 2 == 0 and i <= highest else 0.0 for i in range(1, n + 1))


def _identity(reach: float, degrees: tuple[int, int], form: str) -> RationalFunction:
    """R(x) = x Q(x) / Q(x)."""
    m, n = degrees
    b = _live(reach, n, highest=m - 1)
    a = [0.0, 1.0, *b, *[0.0] * m]
    return RationalFunction(tuple(a[: m + 1]), b, form, -reach, reach, 0.0)
