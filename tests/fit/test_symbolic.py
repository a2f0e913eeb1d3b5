"""Functions by name for curves, and formulas of several variables."""

import math

import numpy as np
import pytest
import sympy
import torch

from graphopt.fit.formula import Formula, compose, evaluate, formulas, tidy, variables
from graphopt.fit.formula_search import find_formulas
from graphopt.fit.splines import SplineLayer, SplineNetwork, bounds
from graphopt.fit.symbolic import LIBRARY, fit_edge

X, Y = variables(2)
# Of each function: a curve with numbers that no start of the search has.
CURVES = {
    "x": lambda t: 1.7 * t - 0.4,
    "x^2": lambda t: -0.8 * (t + 0.35) ** 2 + 1,
    "x^3": lambda t: 0.6 * (t - 0.2) ** 3,
    "x^4": lambda t: 2.1 * (t + 0.1) ** 4 - 3,
    "1/x": lambda t: 1.3 / (t + 1.4) + 2,
    "1/x^2": lambda t: 0.9 / (1.3 - t) ** 2,
    "sqrt": lambda t: 2 * np.sqrt(t + 1.1) - 1,
    "log": lambda t: -1.5 * np.log(1.2 - t) + 0.3,
    "exp": lambda t: 0.7 * np.exp(-1.6 * t) + 2,
    "sin": lambda t: 1.2 * np.sin(2.7 * t + 0.9) - 0.1,
    "tanh": lambda t: 3 * np.tanh(2.2 * t - 0.7),
    "gaussian": lambda t: 1.4 * np.exp(-((1.9 * t + 0.3) ** 2)) - 1,
    "abs": lambda t: 0.8 * np.abs(t - 0.15) + 0.5,
}


def points(count=400, inputs=2, seed=0):
    return 2 * torch.rand(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def spread():
    return points(300, 1)[:, 0].numpy()


def test_every_function_has_a_curve():
    assert {p.name for p in LIBRARY} == set(CURVES)


@pytest.mark.parametrize("name", CURVES)
def test_each_function_is_found_in_its_samples(name):
    x = spread()
    y = CURVES[name](x)
    best = fit_edge(x, y)[0]
    assert best.primitive.name == name
    between = np.linspace(-0.98, 0.98, 51)
    np.testing.assert_allclose(best(between), CURVES[name](between), rtol=0, atol=1e-5)
    shown = sympy.lambdify(X, best.expression(X), "numpy")(between)
    np.testing.assert_allclose(shown, best(between), rtol=1e-10, atol=1e-10)


def test_far_from_zero_and_in_other_units():
    x = 1000 + 50 * spread()
    best = fit_edge(x, 3 * np.sin(0.04 * x) + 100)[0]
    assert best.primitive.name == "sin"
    np.testing.assert_allclose(best(x), 3 * np.sin(0.04 * x) + 100, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "stretched", [lambda t: np.sin(0.001 * t), lambda t: np.exp(0.001 * t), lambda t: np.abs(t + 2)]
)
def test_a_line_is_preferred_to_what_is_one_here(stretched):
    assert fit_edge(spread(), stretched(spread()))[0].primitive.name == "x"


def test_a_parabola_is_preferred_to_a_wide_cosine():
    x = spread()
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(x))
    assert fit_edge(x, 1 - np.cos(0.3 * x) + noise * 0.05)[0].primitive.name == "x^2"


@pytest.mark.parametrize(("x", "y"), [([1.0, 1.0], [0.0, 1.0]), ([1.0, 2.0], [0.0]), ([1.0, math.nan], [0.0, 1.0])])
def test_wrong_samples(x, y):
    with pytest.raises(ValueError, match="expected"):
        fit_edge(x, y)


@pytest.mark.parametrize(
    "expression",
    [
        sympy.exp(1.5 * X - 2) + sympy.cos(Y),
        sympy.Float(2.5) ** X,
        (X + 2) ** sympy.Rational(3, 2) - 1 / (Y + 3) ** 2,
        sympy.sqrt(X**2 + Y**2) * sympy.log(X + 1.5),
        sympy.tanh(X * Y) ** 3 + sympy.Abs(Y) + sympy.pi,
        X**5 - sympy.sin(X) * sympy.sin(X),
        (X + 2) ** Y,
    ],
)
def test_a_formula_as_a_module_is_what_sympy_says(expression):
    x = points(50)
    expected = sympy.lambdify((X, Y), expression, "math")
    wanted = torch.tensor([[expected(*row), 7.0] for row in x.tolist()], dtype=torch.float64)
    found = Formula([expression, sympy.Integer(7)])(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)  # the guard of roots and logarithms is 1e-12


def test_beyond_its_domain_a_formula_is_finite():
    found = Formula([sympy.sqrt(X), sympy.log(X)])(torch.full((1, 1), -1.0))
    torch.testing.assert_close(found, torch.tensor([[1e-6, math.log(1e-12)]]))


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="besselj"):
        evaluate(sympy.besselj(0, X), {X: torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="gamma"):
        evaluate(sympy.gamma(X), {X: torch.zeros(1)}, {})


@pytest.mark.parametrize(
    "expression",
    [
        2.0 * sympy.exp(0.5 * X + 1.25),
        sympy.sqrt(2.5 * X + 3.0 * Y + 6.0),
        (-2.5 * X + 3.0) ** 2 + sympy.log(0.5 * X + 2.0),
        sympy.Abs(-2.0 * X + 0.3) / (3.0 * Y - 9.0),
        sympy.sin(2.0 * X + 9.7) - sympy.tanh(X + 0.4),
    ],
)
def test_tidying_changes_the_form_and_not_the_value(expression):
    x = points(20)
    torch.testing.assert_close(Formula([tidy(expression)])(x), Formula([expression])(x), rtol=1e-10, atol=1e-10)


def test_a_network_as_expressions():
    x = points()
    network = SplineNetwork.around(x, (2, 1), 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.spline_layers()[0].mask[1, 0] = 0
    (shown,) = formulas(torch.nn.Sequential(network))
    phi = {name: sympy.Function(f"phi_{name}") for name in ("0_0_0", "0_0_1", "0_1_1", "1_0_0", "1_0_1")}
    assert shown == phi["1_0_0"](phi["0_0_0"](X) + phi["0_0_1"](Y)) + phi["1_0_1"](phi["0_1_1"](Y))
    assert compose(network, {(1, 0, 0): sympy.exp, (1, 0, 1): sympy.sin})[0].atoms(sympy.sin, sympy.exp)
    with pytest.raises(ValueError, match="Linear"):
        formulas(torch.nn.Linear(1, 1))


def one_layer(x, y, grid=8):
    network = SplineNetwork([SplineLayer(*bounds(x), y.shape[1], grid)])
    network.spline_layers()[0].solve(x, y)
    network.prune(x, 1e-3)
    return network


def test_several_outputs_share_their_search():
    x = points()
    y = torch.stack([torch.sin(torch.pi * x[:, 0]) + x[:, 1] ** 2, 0.3 * torch.exp(2 * x[:, 1]) - 2 * x[:, 0]], 1)
    network = one_layer(x, y)
    found = find_formulas(network, x, y)
    first, second = found.module.expressions
    assert first == sympy.sin(sympy.pi * X) + Y**2
    assert (
        sympy.simplify(sympy.nsimplify(second, rational=True, tolerance=1e-6) - (3 * sympy.exp(2 * Y) / 10 - 2 * X))
        == 0
    )
    assert {edge: fit.primitive.name for edge, fit in found.edges.items()} == {
        (0, 0, 0): "sin",
        (0, 0, 1): "x^2",
        (0, 1, 0): "x",
        (0, 1, 1): "exp",
    }
    assert found.splines == 0
    assert found.error < 1e-8


def test_a_constant_is_rounded_only_where_the_data_allow_it():
    x = points()
    exact = (2.03 * x[:, :1] ** 2).double()
    (kept,) = find_formulas(one_layer(x, exact), x, exact).module.expressions
    assert [round(float(f), 6) for f in kept.atoms(sympy.Float)] == [2.03]
    noise = 0.2 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = one_layer(x, exact)
    assert find_formulas(network, x, exact + noise).module.expressions == (2 * X**2,)


def test_a_curve_that_no_function_fits_stays_a_spline():
    x = points(800)
    y = torch.sin(14 * x[:, :1]) * x[:, :1] + 2 * x[:, 1:]
    found = find_formulas(one_layer(x, y, 30), x, y)
    (expression,) = found.module.expressions
    assert found.splines == 1
    # A constant may be in the spline or beside it.
    assert (expression - 2 * Y - sympy.Function("phi_0_0_0")(X)).is_number
    torch.testing.assert_close(
        found.module(x), y, rtol=0, atol=5e-3
    )  # of the spline, with 30 intervals for 14 / pi waves
