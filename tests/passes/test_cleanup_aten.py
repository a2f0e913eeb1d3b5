"""Graphs of ATen operators: fewer nodes, the same bits, and every parameter still trainable under its own name."""

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.api import load
from graphopt.calibration import Calibration
from graphopt.graph import Graph
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.cleanup.checking import fingerprint
from graphopt.rewrite import Context

X = torch.tensor([[-1.5, 2.0, -0.0, 3.0], [0.25, float("inf"), float("nan"), 0.0]])


class Module(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))
        self.other = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def clean(function: Any, x: torch.Tensor = X, dynamic: Any = None) -> tuple[Graph, list[str]]:
    graph = load(Module(function).eval(), (x,), dynamic_shapes=dynamic)
    rewritten, reports = Cleanup().run(graph, Context(Calibration([(x,)], "test")))
    rewritten.lint()
    with torch.no_grad():
        assert list(map(fingerprint, rewritten.execute(x))) == list(map(fingerprint, graph.execute(x)))
    assert Cleanup().run(rewritten, Context(Calibration([(x,)], "test")))[0] is rewritten
    return rewritten, [r.kind for r in reports if r.status == "rewritten"]


FITS = {
    "dropout": lambda m, x: nn.functional.dropout(x, 0.5, m.training).exp(),
    "no-reshape": lambda m, x: x.view(2, 4).exp(),
    "no-reshape expand": lambda m, x: x.expand(2, -1).exp(),
    "cast-same-type": lambda m, x: x.to(torch.float32).exp(),
    "no-transpose": lambda m, x: x.permute(0, 1).exp(),
    "transpose-transpose": lambda m, x: x.transpose(0, 1).transpose(1, 0).exp(),
    "no-slice": lambda m, x: x[:].exp(),
    "times-one": lambda m, x: (x * 1).exp(),
    "divided-by-one": lambda m, x: (x / 1.0).exp(),
    "minus-zero": lambda m, x: (x - 0.0).exp(),
    "plus-zero": lambda m, x: (x.to(torch.int32) + 0).abs(),
    "cse": lambda m, x: x.exp() + x.exp(),
    "fold": lambda m, x: x + torch.arange(4).reshape(1, 4).eq(torch.zeros(1, 4)),
}
MISSES = {
    "dropout": lambda m, x: nn.functional.dropout(x, 0.5, True).exp(),
    "no-reshape": lambda m, x: x.view(4, 2).exp(),
    "cast-same-type": lambda m, x: x.to(torch.float64).exp(),
    "no-transpose": lambda m, x: x.permute(1, 0).exp(),
    "transpose-transpose": lambda m, x: x.transpose(0, 1).exp(),
    "no-slice": lambda m, x: x[1:].exp(),
    "times-one": lambda m, x: (x * 2).exp(),
    "times-one type": lambda m, x: (x.to(torch.int32) * 1.0).exp(),
    "divided-by-one": lambda m, x: (x.to(torch.int32) / 1).exp(),
    "minus-zero": lambda m, x: (x - -0.0).exp(),
    "plus-zero": lambda m, x: (x + 0.0).exp(),
    "cse": lambda m, x: x.exp() + x.sin(),
    "cse random": lambda m, x: torch.rand_like(x) - torch.rand_like(x) + x,
    "fold": lambda m, x: x * m.weight.exp(),
}


@pytest.mark.parametrize("case", FITS)
def test_rule_fits(case: str) -> None:
    assert case.partition(" ")[0] in clean(FITS[case])[1]


@pytest.mark.parametrize("case", MISSES)
def test_rule_does_not_fit(case: str) -> None:
    graph = load(Module(MISSES[case]).eval(), (X,))
    _, reports = Cleanup().run(graph, Context(Calibration([(X,)], "test")))
    assert [r for r in reports if r.status == "rewritten" and r.kind != "dead-node"] == []


def test_parameters_are_neither_merged_nor_folded() -> None:
    rewritten, _ = clean(lambda m, x: x * m.weight.view(4) + m.other.to(torch.float32))
    assert {n.target for n in rewritten.nodes if n.op == "get_attr"} == {"weight", "other"}
    assert all(p.requires_grad for p in rewritten.module.parameters())
    x = X[:1].clone().requires_grad_()
    rewritten.execute(x)[0].sum().backward()
    assert dict(rewritten.module.named_parameters())["weight"].grad is not None


def test_dynamic_sizes_stay_dynamic() -> None:
    rewritten, kinds = clean(
        lambda m, x: x.reshape(x.shape[0], 4) * x.view(-1, 2, 2).view(-1, 4), torch.randn(3, 4), ({0: "batch"},)
    )
    assert "no-reshape" in kinds
    for size in (2, 3, 7):
        x = torch.randn(size, 4)
        assert torch.equal(rewritten.execute(x)[0], x * x)


def test_writing_in_place_forbids_everything() -> None:
    graph = load(Module(lambda m, x: x.clone().add_(1) * 1 + x * 1).eval(), (X,))
    rewritten, reports = Cleanup().run(graph, Context(Calibration([(X,)], "test")))
    if any("add_." in str(n.target) for n in graph.nodes):
        assert rewritten is graph
        (report,) = reports
        assert (report.kind, report.status) == ("mutation", "refused")
        assert "writes into its operand" in report.reason


def test_result_is_a_module_again() -> None:
    rewritten, _ = clean(lambda m, x: (x * 1) * m.weight + torch.arange(4).reshape(1, 4))
    module = rewritten.to_module()
    assert "weight" in module.state_dict()
    torch.testing.assert_close(module(X), X + torch.arange(4), rtol=0, atol=0, equal_nan=True)
