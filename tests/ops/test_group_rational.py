"""The grouped rational function against fp64 loops, its gradients, and its gradients' gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.group_rational import FORMS, group_rational, reference

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def operands(C=12, G=4, m=5, n=4, dtype=torch.float64, shared="", seed=0, rows=(3, 5)):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(*rows, C, generator=g, dtype=torch.float64)
    a = torch.randn(1 if "a" in shared else G, m + 1, generator=g, dtype=torch.float64)
    b = torch.randn(1 if "b" in shared else G, n, generator=g, dtype=torch.float64)
    return x.to(dtype), a.to(dtype), b.to(dtype)


def loop(x, a, b, form, split=False):
    """One number at a time, with powers instead of Horner's rule."""
    if split:
        return x.clamp(min=0) - loop(x.abs(), a, b, form)
    groups = max(len(a), len(b))
    out = torch.empty_like(x)
    for index, value in enumerate(x.flatten().tolist()):
        group = (index % x.shape[-1]) // (x.shape[-1] // groups)
        top = sum(c * value**i for i, c in enumerate(a[group % len(a)].tolist()))
        terms = [(c, i) for i, c in enumerate(b[group % len(b)].tolist(), 1)]
        if form == "abs_sum":
            bottom = 1 + abs(sum(c * value**i for c, i in terms))
        else:
            bottom = 1 + sum(abs(c) * abs(value) ** i for c, i in terms)
        out.view(-1)[index] = top / bottom
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shared", ["", "a", "b", "ab"])
@pytest.mark.parametrize(("m", "n"), [(5, 4), (0, 3), (7, 7), (3, 0), (1, 1)])
def test_values(form, split, shared, m, n):
    x, a, b = operands(m=m, n=n, shared=shared)
    torch.testing.assert_close(group_rational(x, a, b, form, split), loop(x, a, b, form, split), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shared", ["", "a", "b"])
def test_gradients_and_theirs(form, split, shared):
    given = [t.requires_grad_() for t in operands(C=4, G=2, m=3, n=3, shared=shared, rows=(3,))]
    assert torch.autograd.gradcheck(lambda *t: group_rational(*t, form, split), given)
    assert torch.autograd.gradgradcheck(lambda *t: group_rational(*t, form, split), given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("m", "n"), [(5, 4), (0, 2), (4, 0)])
def test_gradients_are_those_of_the_reference(form, split, m, n):
    given = [t.requires_grad_() for t in operands(m=m, n=n)]
    weight = torch.randn(given[0].shape, dtype=torch.float64)
    used = [t for t in given if t.numel()]
    found = torch.autograd.grad((group_rational(*given, form, split) * weight).sum(), used)
    expected = torch.autograd.grad((reference(*given, form, split) * weight).sum(), used)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # sums of 45 terms of either sign


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_once(dtype, form):
    x, a, b = operands()
    x, a, b = x.to(dtype), a.float(), b.float()
    found = group_rational(x, a, b, form)
    assert found.dtype == dtype
    expected = loop(x.double(), a.double(), b.double(), form)
    # One rounding to the type, and fp32 sums of terms up to a hundred times the result.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_at_zero_the_split_form_has_the_derivative_from_the_left(form):
    """Padding is zeros: gelu'(0) is 1/2 there, and neither 0 nor 1."""
    _, a, b = operands(m=3, n=4)
    at = [torch.tensor([[value] * 4], dtype=torch.float64, requires_grad=True) for value in (0.0, -1e-9)]
    found, left = (torch.autograd.grad(group_rational(x, a, b, form, True).sum(), x)[0] for x in at)
    torch.testing.assert_close(found, left, rtol=1e-7, atol=1e-7)  # two points 1e-9 apart


def test_far_out_the_split_form_is_relu():
    _, a, b = operands(m=3, n=5, dtype=torch.float32)
    far = torch.tensor([[-1e38, 1e38, -torch.inf, torch.inf] * 3], requires_grad=True)
    y = group_rational(far, a, b, "sum_abs", True)
    torch.testing.assert_close(y, far.relu(), rtol=1e-6, atol=1e-2)  # R(4096), of degree -2
    assert torch.equal(torch.autograd.grad(y.sum(), far)[0], (far > 0).float())
    assert group_rational(torch.full((1, 12), torch.nan), a, b, "abs_sum", True).isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FORMS), st.floats(1e-3, 1e6))
def test_there_are_no_poles(seed, form, scale):
    x, a, b = operands(seed=seed, m=4, n=4)
    value = group_rational(x * scale, a, b, form)
    assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"C": 10, "G": 4}, "a number of channels that 4 groups divide, got 10"),
        ({"form": "pade"}, "expected form to be one of"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, reason):
    form = sizes.pop("form", "abs_sum")
    with pytest.raises(ValueError, match=reason):
        group_rational(*operands(**sizes), form)


def test_it_traces():
    x, a, b = operands(dtype=torch.float32)
    for split in (False, True):
        torch.library.opcheck(group_rational, (x, a.requires_grad_(), b.requires_grad_(), "sum_abs", split))
