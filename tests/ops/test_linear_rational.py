"""A linear layer with a rational function behind it against the two in a row."""

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops import group_rational, linear_rational
from graphopt.ops.group_rational import FORMS


def operands(dtype=torch.float64, rows=(3, 5), K=7, C=12, G=4, m=5, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((*rows, K), (C, K), (C,), (G, m + 1), (G, n))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(3, 5), (7,), (0,), (2, 1, 3), ()])
def test_values_and_gradients_are_those_of_the_two(form, split, bias, rows):
    given = [t.requires_grad_() for t in operands(rows=rows)]
    x, w, b, numerator, denominator = given
    added = b if bias else None
    used = [t for t in given if bias or t is not b]
    found = linear_rational(x, w, added, numerator, denominator, form, split)
    expected = group_rational(F.linear(x, w, added), numerator, denominator, form, split)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weight = torch.randn(found.shape, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), used),
        torch.autograd.grad((expected * weight).sum(), used),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_gradients_and_theirs(split):
    given = [t.requires_grad_() for t in operands(rows=(3,), K=2, C=4, G=2, m=2, n=2)]
    assert torch.autograd.gradcheck(lambda *t: linear_rational(*t, "abs_sum", split), given)
    assert torch.autograd.gradgradcheck(lambda *t: linear_rational(*t, "abs_sum", split), given)


def test_what_does_not_fit_is_refused():
    x, w, b, numerator, denominator = operands(C=10)
    with pytest.raises(ValueError, match="a number of channels that 4 groups divide, got 10"):
        linear_rational(x, w, b, numerator, denominator)


def test_it_traces():
    given = [t.requires_grad_() for t in operands(torch.float32)]
    torch.library.opcheck(linear_rational, (*given, "sum_abs", True))
