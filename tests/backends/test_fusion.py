"""Linear layers and rational functions as one node: which, the same values and gradients, the same names."""

import copy

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import graphopt
from graphopt import registry
from graphopt.backends.torch.fusion import fuse_linear_rational
from graphopt.errors import GraphOptError
from graphopt.ops import group_rational
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site

K, C = 6, 16
# One product of K terms and its bias in fp32, in another order; values are below 30.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Rational(nn.Module):
    def __init__(self, groups=2, bias=False):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.numerator = nn.Parameter(torch.randn(groups, 5, generator=g))
        self.denominator = nn.Parameter(torch.randn(groups, 6, generator=g))
        self.register_buffer("bias", torch.randn(C, generator=g) if bias else None)

    def forward(self, x):
        x = x if self.bias is None else x + self.bias
        return group_rational(x, self.numerator, self.denominator, "abs_sum", True)


class Mlp(nn.Module):
    def __init__(self, bias=True, added=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, C, bias=bias), nn.Linear(C, K)
        self.act = Rational(bias=added)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Transposed(Mlp):
    def forward(self, x):
        return self.down(self.act(x @ self.up.weight.t() + self.up.bias))


class ReadTwice(Mlp):
    def forward(self, x):
        z = self.up(x)
        return self.down(self.act(z)) + z.sum()


class Cast(Mlp):
    def forward(self, x):
        weight = self.up.weight.to(torch.float64)
        return self.down(self.act(nn.functional.linear(x.double(), weight).float()))


def names(graph):
    return [str(n.target).removesuffix(".default").rpartition(".")[2] for n in graph.nodes if n.op == "call_function"]


def inputs(*shape):
    return 2 * torch.randn(*shape, K, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("module", [Mlp(), Mlp(bias=False), Mlp(bias=False, added=True), Transposed()])
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_a_module(module, shape):
    x = inputs(*shape)
    graph = graphopt.load(module, (x,))
    fused = fuse_linear_rational(graph)
    assert names(fused).count("linear_rational") == 1
    assert "group_rational" in names(graph)
    assert "group_rational" not in names(fused)
    assert len(names(fused)) <= len(names(graph)) - 1
    torch.testing.assert_close(fused.execute(x)[0], module(x), **CLOSE)
    lowered = registry.backend("torch").lower(fused)
    assert {n for n, _ in lowered.named_parameters()} == {n for n, _ in module.named_parameters()}
    for twin in (module, lowered):
        twin.zero_grad()
        twin(x).square().sum().backward()
    theirs = dict(module.named_parameters())
    for name, parameter in lowered.named_parameters():
        assert parameter.requires_grad
        largest = float(theirs[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("module", [ReadTwice(), Cast()])
def test_what_stays(module):
    x = inputs(7)
    graph = graphopt.load(module, (x,))
    assert names(fuse_linear_rational(graph)) == names(graph)


PRODUCTS = {
    "matmul": ("z0 = MatMul(x, W) z = Add(z0, b)", (K, C), (C,)),
    "bias first": ("z0 = MatMul(x, W) z = Add(b, z0)", (K, C), (C,)),
    "no bias": ("z = MatMul(x, W)", (K, C), None),
    "gemm": ("z = Gemm(x, W, b)", (K, C), (C,)),
    "gemm transposed": ("z = Gemm <transB = 1> (x, W, b)", (C, K), (1, C)),
    "transposed": ("V = Transpose <perm = [1, 0]> (W) z0 = MatMul(x, V) z = Add(z0, b)", (C, K), (C,)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_onnx_file(tmp_path, name):
    text, weight, bias = PRODUCTS[name]
    rng = np.random.default_rng(0)
    stored = {"W": weight} | ({} if bias is None else {"b": bias})
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {key}" for key, shape in stored.items())
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[n, {K}] x) => (float[n, {C}] y) <{declared}> '
        f"{{ {text} y = Tanh(z) }}"
    )
    model.graph.ClearField("initializer")
    for key, shape in stored.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), key))
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    (tanh,) = [n for n in graph.nodes if n.op == "call_function" and n.meta["onnx"].proto.op_type == "Tanh"]
    splice(graph, Site("s", tanh, (tanh,), (tanh.args[0],)), Rational(), "graphopt.s")
    fused = fuse_linear_rational(graph)
    assert names(fused).count("linear_rational") == 1
    assert "group_rational" not in names(fused)
    x = inputs(7)
    torch.testing.assert_close(fused.execute(x)[0], graph.execute(x)[0], **CLOSE)
    before, after = (registry.backend("torch").lower(g) for g in (graph, fused))
    assert {n for n, _ in after.named_parameters()} == {n for n, _ in before.named_parameters()}
    after(x).sum().backward()
    assert all(p.grad is not None for p in after.parameters())


def test_targets_with_kernels_fuse_and_torch_does_not():
    x = inputs(700)
    graph = graphopt.load(Mlp(), (x,))
    for target, expected in (("torch", 0), ("cpu", 1)):
        module = registry.backend(target).lower(graph)
        with torch.profiler.profile() as profile:
            found = module(x)
        calls = [event.key for event in profile.key_averages() if event.key == "graphopt::linear_rational"]
        assert len(calls) == expected
        torch.testing.assert_close(found, Mlp()(x), **CLOSE)
    assert "group_rational" in names(graph)  # lowering changes a copy


def test_frozen_weights_follow_what_is_written_to_them():
    """Packed once, and again after a change; names, gradients and copies as without."""
    torch.manual_seed(0)
    module = Mlp()
    module.up, module.down = nn.Linear(K, 512), nn.Linear(512, K)
    x = torch.randn(40, K)
    lowered = registry.backend("cpu").lower(graphopt.load(module, (x,)), frozen=True)
    frozen = [part for part in lowered.modules() if type(part).__name__ == "FrozenLinearRational"]
    assert len(frozen) == 1
    assert dict(lowered.named_parameters()).keys() == dict(module.named_parameters()).keys()
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), module(x), **CLOSE)
        before = frozen[0]._packed
        torch.testing.assert_close(lowered(x), module(x), **CLOSE)
        assert frozen[0]._packed is before
        for parameters in (module, lowered):
            dict(parameters.named_parameters())["up.weight"].mul_(-2)
        torch.testing.assert_close(lowered(x), module(x), **CLOSE)
        torch.testing.assert_close(copy.deepcopy(lowered)(x), module(x), **CLOSE)
        torch.testing.assert_close(lowered.double()(x.double()), module.double()(x.double()), **CLOSE)
    found = torch.autograd.grad(lowered(x.double()).sum(), list(lowered.parameters()))
    expected = torch.autograd.grad(module(x.double()).sum(), list(module.parameters()))
    by_name = dict(zip(dict(lowered.named_parameters()), found, strict=True))
    for name, gradient in zip(dict(module.named_parameters()), expected, strict=True):
        torch.testing.assert_close(by_name[name], gradient, rtol=1e-9, atol=1e-9)


def test_compiled_or_frozen():
    with pytest.raises(GraphOptError, match="compile or frozen"):
        registry.backend("cpu").lower(graphopt.load(Mlp(), (torch.randn(3, K),)), frozen=True, compile=True)
