"""`snnk`: an MLP as random features, in closed form."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.errors import GraphOptError
from graphopt.passes.mlp.snnk import RandomFeatures
from graphopt.rewrite import parse

D, H = 6, 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def batches(count=12):
    g = torch.Generator().manual_seed(3)
    return [(2 * torch.randn(8, 5, D, generator=g),) for _ in range(count)]


def applied(options=""):
    return graphopt.load(Mlp().eval(), batches(1)[0]).apply(f"snnk{options}", calibration=batches())


def test_more_features_are_closer_and_all_beat_the_linear_part():
    errors = {m: applied(f"{{features={m},max_error=9}}").report.passes[0].sites[0].errors for m in (1, 8, 32, 60)}
    found = [e["after_fit"] for e in errors.values()]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]
    assert errors[32]["parameters_after"] == 32 * (2 * D + 1) + D * D + D


def test_the_ridge_solution_is_the_minimum():
    (x,), module = batches(1)[0], RandomFeatures(D, D, 20, True, torch.Generator().manual_seed(0))
    x = x.flatten(0, -2)
    y = Mlp()(x).detach()
    module.standardise([x])
    module.solve([(x[:17], y[:17]), (x[17:], y[17:])], 1e-3)
    with torch.no_grad():
        products = x @ module.directions + module.offsets
        design = torch.cat([torch.relu(products), x, torch.ones(len(x), 1)], 1).double()
    strength = 1e-3 * (design.T @ design).diagonal().mean()
    penalised = torch.cat([design, torch.diag(strength.sqrt() * torch.tensor([1.0] * 26 + [0.0])).double()])
    expected = torch.linalg.lstsq(penalised, torch.cat([y.double(), torch.zeros(27, D).double()])).solution
    found = torch.cat([module.coefficients, module.skip, module.constant[None]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # stored in fp32
    assert float((products.std(0) - 1).abs().max()) < 1e-4


def test_saved_and_run_elsewhere(tmp_path):
    result = applied("{features=40}")
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"]
    result.graph.save(tmp_path / "m.onnx", target="onnxruntime")
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    (x,) = batches(1)[0]
    (found,) = Session(tmp_path / "m.onnx").run({result.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(found, result.graph.execute(x)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_from_a_file(tmp_path):
    torch.onnx.export(Mlp().eval(), batches(1)[0], tmp_path / "a.onnx", verbose=False, external_data=False)
    graph = graphopt.load(tmp_path / "a.onnx")
    name = graph.inputs[0].name
    result = graph.apply("snnk{features=40}", calibration=[{name: x.numpy()} for (x,) in batches()])
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"]
    result.graph.save(tmp_path / "b.onnx")
    (x,) = batches(1)[0]
    (found,) = Session(tmp_path / "b.onnx").run({name: x.numpy()}).values()
    np.testing.assert_allclose(found, result.graph.execute(x)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_random_directions_are_not_trained():
    trained = {
        name.rpartition(".")[2] for name, _ in applied("{features=8,max_error=9}").graph.to_module().named_parameters()
    }
    assert {"coefficients", "skip", "constant"} <= trained
    assert not {"directions", "offsets"} & trained


def test_what_saves_nothing_is_refused():
    (site,) = applied("{features=64}").report.passes[0].sites
    assert site.status == "refused"
    assert "hidden width is 64" in site.reason


@pytest.mark.parametrize("options", ["features=-1", "ridge=0", "max_error=0"])
def test_wrong_options(options):
    with pytest.raises(GraphOptError):
        parse(f"snnk{{{options}}}")
