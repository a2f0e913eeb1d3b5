"""StableMax against its definition entry by entry, at the edges, and its gradients."""

import math

import pytest
import torch

from graphopt.ops import stablemax


def naive(row):
    weights = [0.0 if x == -math.inf else x + 1 if x >= 0 else 1 / (1 - x) for x in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 4)], ids=str)
def test_against_the_definition(shape):
    x = 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dim in range(-len(shape), len(shape)):
        rows = x.movedim(dim, -1)
        expected = torch.tensor([naive(row) for row in rows.reshape(-1, rows.shape[-1]).tolist()], dtype=x.dtype)
        torch.testing.assert_close(stablemax(x, dim).movedim(dim, -1), expected.view(rows.shape), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounded_once(dtype):
    x = (30 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = stablemax(x)
    assert found.dtype == dtype
    # Half a unit in the last place of the result, and for fp32 what the sum of 1,000 terms adds.
    torch.testing.assert_close(found.double(), stablemax(x.double()), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_arg_max_is_kept():
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 500)[:, None]
    assert (stablemax(x).argmax(-1) == x.argmax(-1)).all()


def test_edges():
    inf, nan, low = math.inf, math.nan, torch.finfo(torch.float32).min
    x = torch.tensor([[-inf, 0.0, 1.0], [-inf, -inf, -inf], [nan, 1.0, 2.0], [low, -1e30, 0.0], [1.0, 0.0, -1.0]])
    found = stablemax(x)
    torch.testing.assert_close(found[0], torch.tensor([0, 1 / 3, 2 / 3]))
    assert (found[1] == 0).all()
    assert found[2].isnan().all()
    torch.testing.assert_close(found[3], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(found[4], torch.tensor([4.0, 2, 1]) / 7)
    assert stablemax(torch.empty(0, 4)).shape == (0, 4)
    assert stablemax(torch.empty(4, 0)).shape == (4, 0)


def test_gradients():
    # At 0 and at 1, where the branch that is not taken has its pole, too.
    x = torch.tensor([[1.0, 0.3, -2.0, 4.0], [1.0, -0.5, -30.0, 1e3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: stablemax(v, 1), [x])
    assert torch.autograd.gradcheck(lambda v: stablemax(v, 0), [x])
    zero = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(stablemax(zero)[0], zero)
    # s = (1, 2), s' = (1, 1): d(s_0 / 3) = (1/3 - 1/9, -1/9).
    torch.testing.assert_close(found, torch.tensor([2 / 9, -1 / 9], dtype=torch.float64))


def test_hidden_entries_have_no_gradient():
    x = torch.tensor([[-math.inf, 0.5, 1.0], [-math.inf] * 3], requires_grad=True)
    (found,) = torch.autograd.grad(stablemax(x)[:, 1].sum(), x)
    assert (found[0, 0] == 0).all()
    assert (found[0, 1:] != 0).all()
    assert (found[1] == 0).all()


def test_library_registration():
    torch.library.opcheck(torch.ops.graphopt.stablemax.default, (torch.randn(3, 4, requires_grad=True), 0))
