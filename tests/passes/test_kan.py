"""`kan`: an MLP as a spline network, and as a formula."""

import numpy as np
import onnx
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.errors import GraphOptError
from graphopt.fit.formula import Formula, formulas, variables
from graphopt.fit.splines import SplineLayer, SplineNetwork
from graphopt.fit.symbolic import LIBRARY
from graphopt.passes.mlp.kan import Distilled, Kan
from graphopt.rewrite import parse

X, Y = variables(2)


def points(count=1500, inputs=2, seed=3):
    return 2 * torch.rand(count, inputs, generator=torch.Generator().manual_seed(seed)) - 1


def truth(x):
    return torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2


def trained(function, steps):
    """An MLP 2 -> 64 -> 1 that has learned a function on [-1, 1]^2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 1))
    x = points()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, history_size=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (model(x) - function(x)).square().mean()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return model.eval()


@pytest.fixture(scope="module")
def mlp():
    return trained(truth, 300)


def batches(count=12):
    return [(part,) for part in points().split(1500 // count)]


def applied(model, options=""):
    return graphopt.load(model, batches()[0]).apply(f"kan{options}", calibration=batches())


def site_of(result):
    (site,) = result.report.passes[0].sites
    return site


def test_a_sum_of_functions_is_recovered_from_a_trained_mlp(mlp, tmp_path):
    x = points(125, seed=9)
    with torch.no_grad():
        assert float((mlp(x) - truth(x)).abs().max()) < 0.05  # the MLP is no exact one
    graph = graphopt.load(mlp, batches()[0])
    graph.save(tmp_path / "mlp.onnx")
    loaded = graphopt.load(tmp_path / "mlp.onnx")
    name = loaded.inputs[0].name
    for source, data in ((graph, batches()), (loaded, [{name: part.numpy()} for (part,) in batches()])):
        result = source.apply("kan{hidden=0,symbolic=true}", calibration=data)
        assert site_of(result).status == "rewritten"
        assert site_of(result).reason.endswith("2 of 2 edges are kept; y_0 = x_1**2 + sin(pi*x_0)")
        result.graph.save(tmp_path / "formula.onnx", target="onnxruntime")
        onnx.checker.check_model(onnx.load(tmp_path / "formula.onnx"), full_check=True)
        (found,) = Session(tmp_path / "formula.onnx").run({result.graph.inputs[0].name: x.numpy()}).values()
        np.testing.assert_allclose(found, truth(x).numpy(), rtol=0, atol=1e-5)  # fp32


@pytest.mark.parametrize("source", ["module", "onnx"])
def test_splines_are_saved_and_run_elsewhere(mlp, tmp_path, source):
    graph = graphopt.load(mlp, batches()[0])
    data = batches()
    if source == "onnx":
        graph.save(tmp_path / "mlp.onnx")
        graph = graphopt.load(tmp_path / "mlp.onnx")
        data = [{graph.inputs[0].name: part.numpy()} for (part,) in data]
    result = graph.apply("kan{hidden=2,starts=2,fit_steps=60,max_error=0.5}", calibration=data)
    site = site_of(result)
    assert site.status == "rewritten"
    assert site.errors["edges_before"] == 6
    assert site.errors["parameters_before"] == 3 * 64 + 65
    assert site.errors["parameters_after"] <= 6 * 9
    result.graph.save(tmp_path / "kan.onnx", target="onnxruntime")
    onnx.checker.check_model(onnx.load(tmp_path / "kan.onnx"), full_check=True)
    x = 1.5 * points(125, seed=5)  # some of it outside of the grids
    (found,) = Session(tmp_path / "kan.onnx").run({result.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(found, result.graph.execute(x)[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["module", "onnx"])
def test_every_function_of_the_library_has_an_onnx_form(mlp, tmp_path, source, monkeypatch):
    phi = sympy.Function("phi_0_0_0")
    u = X + 3
    parts = [p.symbol(u) for p in LIBRARY] + [phi(Y), sympy.cos(X), X**5, u ** sympy.Rational(3, 2), u**Y, 2.5**X]
    layer = SplineLayer(torch.tensor([-1.0]), torch.tensor([1.0]), 1, 4, torch.Generator().manual_seed(0))
    network = SplineNetwork([layer])
    formula = Formula([sympy.Add(*(part / (k + 2) for k, part in enumerate(parts)))], {"phi_0_0_0": layer})
    monkeypatch.setattr(Kan, "distil", lambda self, x, y, *rest: Distilled(network, formula))
    graph = graphopt.load(mlp, batches()[0])
    data = batches()
    if source == "onnx":
        graph.save(tmp_path / "mlp.onnx")
        graph = graphopt.load(tmp_path / "mlp.onnx")
        data = [{graph.inputs[0].name: part.numpy()} for (part,) in data]
    result = graph.apply("kan{max_error=1e9}", calibration=data)
    assert site_of(result).status == "rewritten"
    result.graph.save(tmp_path / "formula.onnx")
    x = points(125, seed=5)
    (found,) = Session(tmp_path / "formula.onnx").run({result.graph.inputs[0].name: x.numpy()}).values()
    wanted = formula.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)  # fp32, parts of up to 60


def test_a_composition_is_recovered():
    x = points()
    y = torch.exp(truth(x))
    fitted = Kan(hidden=1, symbolic=True).distil(x, y)
    assert formulas(fitted) == [sympy.exp(Y**2 + sympy.sin(sympy.pi * X))]
    torch.testing.assert_close(fitted(x), y, rtol=1e-5, atol=1e-5)


def test_growing_finds_that_no_hidden_node_is_needed():
    x = points(600)
    fitted = Kan(hidden=1, starts=2, fit_steps=40, grow=True).distil(x, truth(x))
    assert len(fitted.network.layers) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype).eval()
    data = [(part.to(dtype),) for (part,) in batches()]
    result = graphopt.load(model, data[0]).apply("kan{hidden=0,max_error=0.5}", calibration=data)
    assert site_of(result).status == "rewritten"
    assert result.graph.execute(*data[0])[0].dtype == dtype


def test_without_training_the_last_layer_is_solved_for():
    x = points()
    fitted = Kan(hidden=4, starts=1, prune=0).distil(x, truth(x), steps=0)
    with torch.no_grad():
        share = float((fitted(x) - truth(x)).var() / truth(x).var())
    assert 0 < share < 0.9  # random first layers, and the best that can be made of them


def test_several_tokens_and_outputs():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.gate, self.down = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2, bias=False)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 20, 3, generator=generator),) for _ in range(12)]
    result = graphopt.load(Gated().eval(), data[0]).apply(
        "kan{hidden=4,starts=2,fit_steps=80,max_error=0.9}", calibration=data
    )
    site = site_of(result)
    assert site.status == "rewritten"
    assert site.errors["after_fit"] < 0.4
    assert site.errors["parameters_before"] == 2 * 4 * 8 + 16
    assert result.graph.execute(data[0][0])[0].shape == (4, 20, 2)


def test_what_no_formula_fits_stays_splines():
    x = points(800)
    y = torch.sin(9 * x[:, :1]) * torch.exp(-2 * x[:, :1] ** 2) + x[:, 1:] * x[:, :1] ** 3
    fitted = Kan(hidden=0, grid=12, symbolic=True, max_error=1e-4).distil(x, y)
    assert "the splines stay" in fitted.reason
    assert fitted.formula is None


def test_a_site_that_misses_is_left(mlp):
    site = site_of(applied(mlp, "{hidden=0,grid=1,max_error=1e-6}"))
    assert site.status == "reverted"
    assert "above 1e-06" in site.reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("{hidden=900}", "2,700 edges of 9 coefficients are more than 20,000"),
        ("{hidden=0,grid=5000}", "2 inputs with 5,004 coefficients each are more than 4,096"),
    ],
)
def test_too_large_networks_are_refused(mlp, options, reason):
    site = site_of(applied(mlp, options))
    assert site.status == "refused"
    assert reason in site.reason


@pytest.mark.parametrize(
    "options",
    ["hidden=-1", "grid=0", "fit_steps=-1", "starts=0", "sparsity=-1", "learning_rate=0", "max_error=0", "prune=1"],
)
def test_wrong_options(options):
    with pytest.raises(GraphOptError, match="expected"):
        parse(f"kan{{{options}}}")
