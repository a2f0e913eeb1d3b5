"""Closed forms against torch, their derivatives against autograd, and error bounds against a finer search."""

import numpy as np
import pytest
import sympy
import torch

from graphopt.fit.activation import fit_activation, is_relu_and_even
from graphopt.fit.closed_form import (
    X,
    activation_expression,
    error_bound,
    evaluate,
    rational_expression,
    shown,
    spelled,
)
from graphopt.ops import group_rational
from graphopt.sites.mlp import _PLAIN, activation

NAMES = (*_PLAIN, "leaky_relu(0.2)", "elu(0.7)", "swish(1.3)")
# torch's softplus is a straight line from 20 on, where log(1 + e^x) - x is 2e-9.
CLOSE = 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_activations(name):
    expression, function = activation_expression(name), activation(name)
    x = torch.linspace(-30.003, 30.001, 2001, dtype=torch.float64, requires_grad=True)  # on no kink
    points = x.detach().numpy()
    np.testing.assert_allclose(evaluate(expression, points), function(x).detach().numpy(), rtol=0, atol=CLOSE)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    np.testing.assert_allclose(evaluate(sympy.diff(expression, X), points), slope.numpy(), rtol=0, atol=CLOSE)


def test_an_unknown_activation():
    with pytest.raises(KeyError):
        activation_expression("gleu")


@pytest.mark.parametrize("form", ["abs_sum", "sum_abs"])
@pytest.mark.parametrize("split", [False, True])
def test_rational_functions_and_their_derivatives(form, split):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(5), rng.standard_normal(6)
    expression = rational_expression(a, b, form, split)
    x = torch.linspace(-6.003, 6.001, 801, dtype=torch.float64, requires_grad=True)
    y = group_rational(x[:, None], torch.from_numpy(a)[None], torch.from_numpy(b)[None], form, split)[:, 0]
    points = x.detach().numpy()
    np.testing.assert_allclose(evaluate(expression, points), y.detach().numpy(), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_allclose(evaluate(sympy.diff(expression, X), points), slope.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh"])
def test_no_point_exceeds_the_bound(name):
    split = is_relu_and_even(name)
    found = fit_activation(name, 8.0, (4, 6), split=split)
    expression = rational_expression(found.numerator, found.denominator, found.form, split)
    bound = error_bound(activation_expression(name), expression, -8, 8)
    x = np.sort(np.random.default_rng(0).uniform(-8, 8, 400_000))
    seen = np.abs(evaluate(expression, x) - evaluate(activation_expression(name), x)).max()
    assert bound.largest <= seen * (1 + 1e-3) + 1e-12
    assert seen <= bound.bound
    assert bound.bound <= 1.5 * bound.largest + 1e-7  # tight enough to be worth reading


def test_an_empty_interval():
    with pytest.raises(ValueError, match="an interval of finite length"):
        error_bound(X, X, 1, 1)


@pytest.mark.parametrize("form", ["abs_sum", "sum_abs"])
@pytest.mark.parametrize("split", [False, True])
def test_what_is_spelled_is_what_is_computed(form, split):
    """Each line is read back as Python, and put together as the first two lines say."""
    a, b = [0.5, -1.0, 0.25], [0.3, -0.2, 0.1, 0.4]
    lines = spelled(a, b, form, split)
    for x in (-1.7, 0.9, 3.1):
        t = abs(x) if split else x
        at = {name: eval(lines[name], {"t": t}) for name in ("P(t)", "P'(t)")}
        if form == "abs_sum":
            inner, slope = (eval(lines[k], {"t": t}) for k in ("D(t)", "D'(t)"))
            q, slope = 1 + abs(inner), np.sign(inner) * slope
        else:
            q, slope = (eval(lines[k], {"t": abs(x)}) for k in ("Q(t)", "Q'(t)"))
            slope = slope if split else np.sign(x) * slope
        value, derivative = at["P(t)"] / q, (at["P'(t)"] * q - at["P(t)"] * slope) / q**2
        if split:
            value, derivative = max(x, 0) - value, (x > 0) - np.sign(x) * derivative
        expected = rational_expression(a, b, form, split)
        np.testing.assert_allclose(value, evaluate(expected, np.array([x]))[0], rtol=1e-5)  # six digits
        np.testing.assert_allclose(derivative, evaluate(sympy.diff(expected, X), np.array([x]))[0], rtol=1e-4)


def test_numbers_are_short():
    assert shown(sympy.pi * X) == "3.14159*x"
