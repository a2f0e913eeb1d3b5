"""The feature map against its definition, in fp64, with all gradients."""

import pytest
import torch

from graphopt.ops import hedgehog_map


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("biased", [True, False])
def test_feature_map(activation, biased):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True) if biased else None
    found = hedgehog_map(x, weight, bias, activation)
    y = torch.einsum("bhtd,hdf->bhtf", x, weight) + (bias if biased else 0)
    f = (lambda z: z.softmax(-1)) if activation == "softmax" else torch.exp
    torch.testing.assert_close(found, torch.cat([f(y), f(-y)], -1), rtol=1e-12, atol=1e-12)
    values = [x, weight] + ([bias] if biased else [])
    assert torch.autograd.gradcheck(lambda *v: hedgehog_map(v[0], v[1], v[2] if biased else None, activation), values)


def test_unknown_activation():
    with pytest.raises(ValueError, match="expected activation"):
        hedgehog_map(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), None, "relu")


def test_library_registration():
    values = [torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)]
    torch.library.opcheck(torch.ops.graphopt.hedgehog_map.default, tuple(values))
