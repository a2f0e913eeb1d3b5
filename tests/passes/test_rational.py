"""`rational`: activations as rational functions, from .onnx and nn.Module, without training."""

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.errors import GraphOptError
from graphopt.fit.rational import fit_rational
from graphopt.passes.mlp.rational_activation import RationalActivation
from graphopt.rewrite import parse
from graphopt.sites.mlp import activation

D, H = 6, 16


class Mlp(nn.Module):
    """A plain or gated feed-forward layer with weights large enough to reach both tails."""

    def __init__(self, act, gated=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.gate = nn.Linear(D, H) if gated else None
        self.act = act

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
}


def batches(count=4, scale=6.0):
    g = torch.Generator().manual_seed(3)
    return [(scale * torch.randn(3, 5, D, generator=g),) for _ in range(count)]


def export(module, path):
    torch.onnx.export(
        module.eval(), batches(1)[0], path, dynamo=True, verbose=False, input_names=["x"], output_names=["y"],
        dynamic_shapes=({0: "batch", 1: "seq"},), external_data=False,
    )  # fmt: skip


def loaded(module):
    return graphopt.load(module, batches(1)[0])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_module_keeps_its_function(name, gated):
    module = Mlp(ACTIVATIONS[name], gated).eval()
    result = loaded(module).apply("rational", calibration=batches())
    after, (site,) = result.graph.to_module(), result.report.passes[0].sites
    assert site.status == "rewritten"
    assert site.errors["max_error"] <= 1e-4
    for (x,) in batches(2, scale=60.0):  # ten times what calibration saw: the tails are right all the same
        # Each of the H errors is below 1e-4, and the weights of `down` are below 1/4, times `up` where it is gated.
        reach = 1.0 if not gated else float(module.up(x).detach().abs().max())
        assert float((module(x) - after(x)).detach().abs().max()) <= 1e-4 * H / 4 * reach


@pytest.mark.parametrize("options", ["", "{groups=4}", "{form=pade,m=7,n=6,max_error=0.02}", "{denominator=sum_abs}"])
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_a_file_keeps_its_function(options, target, tmp_path):
    module = Mlp(F.gelu)
    export(module, tmp_path / "a.onnx")
    graph = graphopt.load(tmp_path / "a.onnx")
    feeds = [{"x": x.numpy()} for (x,) in batches()]
    result = graph.apply(f"rational{options}", calibration=feeds)
    (site,) = result.report.passes[0].sites
    assert site.status == "rewritten", site.reason
    result.graph.save(tmp_path / "b.onnx", target=target)
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"))
    assert not {"Gelu", "Erf"} & {n.op_type for n in onnx.load(tmp_path / "b.onnx").graph.node}
    x = 3 * torch.randn(2, 7, D)
    with torch.no_grad():
        (inside,) = result.graph.execute(x)
    (found,) = Session(tmp_path / "b.onnx").run({"x": x.numpy()}).values()
    np.testing.assert_allclose(found, inside.numpy(), rtol=1e-5, atol=1e-5)  # Horner in fp32 on both sides
    expected = module(x).detach().numpy()
    assert np.abs(found - expected).max() <= max(1e-4, site.errors["max_error"]) * H / 4


def test_a_bias_within_the_activation_is_kept(tmp_path):
    text = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (float[B, 4] x) => (float[B, 3] y) <
        float[4, 8] w1, float[8] b1, float[8, 3] w2 > {
        h = MatMul(x, w1) a = com.microsoft.BiasGelu(h, b1) y = MatMul(a, w2) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (4, 8), "b1": (8,), "w2": (8, 3)}.items():
        value = onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        slot = next((t for t in model.graph.initializer if t.name == name), None)
        slot.CopyFrom(value) if slot is not None else model.graph.initializer.append(value)
    onnx.save(model, tmp_path / "a.onnx")
    graph = graphopt.load(tmp_path / "a.onnx")
    feeds = [{"x": rng.standard_normal((5, 4)).astype(np.float32)} for _ in range(3)]
    result = graph.apply("rational", calibration=feeds)
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"]
    result.graph.save(tmp_path / "b.onnx")
    a, b = (Session(tmp_path / n).run(feeds[0])["y"] for n in ("a.onnx", "b.onnx"))
    np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_the_split_form_is_right_everywhere(name):
    """Fitted on inputs below 1: right behind them, where the remainder vanishes, and far out."""
    module = RationalActivation(name, (4, 6), 1, form="split", denominator="abs_sum")
    module.set_functions([module.fitted(-0.5, 0.5)])
    near, far = torch.linspace(-80, 80, 40_001), torch.tensor([-1e4, 1e4, -1e30, 1e30])
    for x, bounds in ((near, {"rtol": 0, "atol": 6e-5}), (far, {"rtol": 1e-6, "atol": 1e-6})):
        found = module(x[:, None])[:, 0].detach().double()
        torch.testing.assert_close(found, ACTIVATIONS[name](x.double()), **bounds)


def test_all_groups_are_continued_behind_one_interval():
    """A group whose inputs were small gets large ones later."""
    module = Mlp(torch.tanh).eval()
    module.up.weight.data[: H // 2] *= 0.01
    module.up.bias.data[: H // 2] *= 0.01
    module.up.weight.data[H // 2 :] *= 4
    result = loaded(module).apply("rational{form=pade,m=7,n=4,groups=2,max_error=0.2}", calibration=batches())
    (site,) = result.report.passes[0].sites
    assert site.status == "rewritten"
    after, x = result.graph.to_module(), 600 * batches(1)[0][0]
    with torch.no_grad():
        assert float((after(x) - module(x)).abs().max()) <= 0.2 * H / 4


def test_what_misses_is_left_and_says_why():
    module = Mlp(F.gelu).eval()
    result = loaded(module).apply("rational{form=pade,m=2,n=1}", calibration=batches())
    (site,) = result.report.passes[0].sites
    assert site.status == "reverted"
    assert "above max_error=0.0005" in site.reason


def test_what_split_cannot_express_is_refused_or_takes_pade():
    module = Mlp(torch.tanh).eval()
    result = loaded(module).apply("rational{form=split}", calibration=batches())
    assert "use form=pade" in result.report.passes[0].sites[0].reason
    (site,) = loaded(module).apply("rational", calibration=batches()).report.passes[0].sites
    assert site.status == "rewritten"
    assert site.errors["max_error"] < 5e-4


def test_what_misses_is_kept_on_request():
    result = loaded(Mlp(F.gelu).eval()).apply("rational{form=pade,m=2,n=1,preserve=false}", calibration=batches())
    (site,) = result.report.passes[0].sites
    assert site.status == "rewritten"
    assert site.errors["max_error"] > 5e-4


def test_every_activation_of_layers_in_a_row():
    """Of three layers the second belongs to two MLPs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, D)).eval()
    sites = loaded(module).apply("rational", calibration=batches()).report.passes[0].sites
    assert [site.status for site in sites] == ["rewritten"] * 2


@pytest.mark.parametrize("options", ["m=8", "n=3,m=4", "groups=0", "form=cubic", "max_error=0"])
def test_wrong_options(options):
    with pytest.raises(GraphOptError):
        parse(f"rational{{{options}}}")


@pytest.mark.parametrize("form", ["abs_sum", "sum_abs"])
@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [
        ("tanh", -5.0, 5.0, 1e-6),
        ("sigmoid", -8.0, 8.0, 1e-6),
        ("gelu", -4.0, 4.0, 5e-5),
        ("relu", 0.0, 5.0, 1e-12),
        # Least squares alone end with a denominator that changes its sign, and errors of 0.02 to 3.
        ("mish", -8.0, 8.0, 5e-4),
        ("hardswish", -8.0, 8.0, 0.06),
        ("hardsigmoid", -8.0, 8.0, 0.02),
        ("relu6", -4.0, 4.0, 0.01),
    ],
)
def test_fits(form, name, low, high, bound):
    def exact(x):
        return activation(name)(torch.from_numpy(x)).numpy()

    found = fit_rational(exact, low, high, (7, 6), form)
    x = np.linspace(low, high, 20_001)
    assert np.abs(found(x) - exact(x)).max() <= 1.05 * found.error + 1e-12  # the grid is finer here
    assert found.error <= bound
